"""A run in a bucket, `--run gs://…`, finds what one on disk finds. Needs gcsfs and
gcp-storage-emulator, which stands in for Google's."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from processes import LOOK, ROOT, codes, free_port, launch

from egjax import files

sys.path.insert(0, str(ROOT / "tests" / "experiments"))
from test_hosts import close, weights
from test_processes import COMMAND, agree

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("gcsfs", "gcp_storage_emulator"))),
        reason="pip install egjax[gcs] gcp-storage-emulator",
    ),
]


@contextlib.contextmanager
def serving(port: int, *arguments: object):
    """The server of `fake_bucket.py`, for this process and those it starts."""
    address = f"http://localhost:{port}"
    settings = {
        "STORAGE_EMULATOR_HOST": address,  # gcsfs
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "FSSPEC_GCS_TOKEN": "anon",
        "FSSPEC_GS_TOKEN": "anon",
        "NO_GCE_CHECK": "true",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks over gRPC, which it has not
        "EPATH_USE_TF": "false",
    }
    command = [sys.executable, ROOT / "tests" / "fake_bucket.py", str(port), *map(str, arguments)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with pytest.MonkeyPatch.context() as patch, subprocess.Popen(command, **quiet) as server:
        for name, value in settings.items():
            patch.setenv(name, value)
        for _ in range(round(60 / LOOK)):
            try:
                urllib.request.urlopen(f"{address}/storage/v1/b").close()
                break
            except OSError:
                time.sleep(LOOK)
        try:
            yield
        finally:
            server.kill()


@pytest.fixture(scope="module")
def bucket():
    """`gs://pail`."""
    with serving(free_port()):
        yield files.as_path("gs://pail")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The weights that one process finds on disk, undisturbed."""
    run = tmp_path_factory.mktemp("bucket") / "alone"
    command = ["tests/job_toy.py", "--run", str(run)]
    assert codes(launch(command, 1, logs=run.with_suffix(".logs")), 300) == [0]
    return weights(run)


def said(logs: Path) -> str:
    return "".join(p.read_text() for p in sorted(logs.glob("*.err")))[-4000:]


def test_two_processes_stop_and_one_goes_on(bucket, alone, tmp_path):
    run, logs = bucket / "toy", tmp_path / "logs"
    command = ["tests/job_toy.py", "--run", str(run)]
    processes = launch([*command, "--pause", "0.2"], 2, logs=logs)
    for _ in range(round(300 / LOOK)):
        if "checkpoints/10/state/_METADATA" in files.sizes(run / "toy.unfinished"):
            break
        time.sleep(LOOK)
    processes[0].send_signal(signal.SIGTERM)
    assert codes(processes, 120) == [143, 143], said(logs)
    assert codes(launch(command, 1, logs=logs), 300) == [0], said(logs)
    close(files.local_copy(run), alone)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("ends", ["silent", "gone"])
def test_a_storage_that_vanishes_in_a_save_ends_the_job_which_goes_on_once_it_is_back(
    alone, tmp_path, ends, count
):
    port, run, logs = free_port(), files.as_path("gs://pail/toy"), tmp_path / "logs"
    command, last = ["tests/job_toy.py", "--run", str(run)], run / "toy.unfinished/checkpoints/15"
    with serving(port, tmp_path / "pail", ends, "checkpoints/20/state"):
        processes = launch(
            [*command, "--pause", "0.2"], count, logs=logs, EGJAX_BUCKET_SILENCE="30"
        )
        left = codes(processes, 300)
    assert set(left) == {2}, said(logs)
    for log in logs.glob("*.err"):
        told = [line for line in log.read_text().splitlines() if "error: " in line]
        # Before it gloo may have told of the other process, which waits for the bucket.
        assert "gs://pail/toy: the bucket has not answered for 30 s" in told[-1], told
        assert "same command goes on" in told[-1]
    with serving(port, tmp_path / "pail"):
        assert "commit_success.txt" in files.sizes(last)
        resumed = launch(command, count, logs=tmp_path / "again")
        assert codes(resumed, 300) == [0] * count, said(tmp_path / "again")
        close(files.local_copy(run), alone)


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """The pipeline's run on disk, by one process."""
    run = tmp_path_factory.mktemp("disk") / "run"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, *COMMAND, run], cwd=ROOT, env=environment)
    assert done.returncode == 0
    return run


@pytest.mark.parametrize("count", [1, 2])
def test_the_pipeline_in_a_bucket_finds_what_it_finds_on_disk(bucket, on_disk, tmp_path, count):
    run = bucket / f"run{count}"
    ended = codes(launch([*COMMAND, str(run)], count, logs=tmp_path / "logs"), 1800)
    assert ended == [0] * count, said(tmp_path / "logs")
    agree(on_disk, files.local_copy(run))
    again = launch([*COMMAND, str(run)], count, logs=tmp_path / "again")
    assert codes(again, 600) == [0] * count
    assert "starts" not in said(tmp_path / "again")  # everything is kept
