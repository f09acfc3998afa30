"""A server that stands in for Google's buckets: gcp-storage-emulator, and what TensorStore asks for
beside it (the generation of what is read, nothing anew where that is known).

    python tests/fake_bucket.py PORT
"""

import sys

from gcp_storage_emulator.handlers import objects

_download = objects.download


def download(request, response, storage, *args, **kwargs):
    place = request.params["bucket_name"], request.params["object_id"]
    try:
        generation = storage.get_file_obj(*place)["generation"]
    except Exception:
        generation = ""
    if generation and request.query.get("ifGenerationNotMatch") == [generation]:
        response.status = 304
        return
    if generation:
        response["x-goog-generation"] = generation
    _download(request, response, storage, *args, **kwargs)


objects.download = download  # before the server takes it

from gcp_storage_emulator.server import create_server  # noqa: E402

if __name__ == "__main__":
    server = create_server("localhost", int(sys.argv[1]), in_memory=True, default_bucket="pail")
    server.run()
