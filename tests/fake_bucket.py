"""A server that stands in for Google's buckets: gcp-storage-emulator, and what TensorStore asks for
beside it (the generation of what is read, nothing anew where that is known).

    python tests/fake_bucket.py PORT [FOLDER [silent|gone NAME]]

Objects are in memory, or in a folder, where the next server finds them. The first upload of an
object whose name contains NAME is the end of it: the server stands still (`silent`: nothing is
answered any more) or dies (`gone`: connections are refused).
"""

import os
import sys
import threading
from http import HTTPStatus

from gcp_storage_emulator.handlers import objects

_download, _insert = objects.download, objects.insert
port, folder, ends, name = [*sys.argv[1:], "", "", ""][:4]


def download(request, response, storage, *args, **kwargs):
    place = request.params["bucket_name"], request.params["object_id"]
    try:
        generation = storage.get_file_obj(*place)["generation"]
    except Exception:
        generation = ""
    if generation and request.query.get("ifGenerationNotMatch") == [generation]:
        response.status = HTTPStatus.NOT_MODIFIED
        return
    if generation:
        response["x-goog-generation"] = generation
    _download(request, response, storage, *args, **kwargs)


def insert(request, *args, **kwargs):
    if ends and name in request.query.get("name", [""])[0]:
        os._exit(1) if ends == "gone" else threading.Event().wait()  # it has this thread only
    _insert(request, *args, **kwargs)


objects.download, objects.insert = download, insert  # before the server takes them

from gcp_storage_emulator.server import create_server  # noqa: E402

if __name__ == "__main__":
    server = create_server(
        "localhost", int(port), in_memory=not folder, default_bucket="pail", data_dir=folder or None
    )
    server.run()
