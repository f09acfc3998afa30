"""What all tests share: the CPU, a cache of compiled programs, real data where it is to be had."""

import gc
import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from processes import cpus

ROOT = Path(__file__).resolve().parents[1]

# Before JAX is imported. Programs compiled by one test process serve the others and the next run.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"egjax-tests-{os.getuid()}")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
# Compilation is most of the tests' time, and a third of it is LLVM's optimising of programs that
# then run for milliseconds. XLA's own passes stay; `XLA_FLAGS= make test` has LLVM's, too.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Drops a file's compiled programs: hundreds of files' worth in one process end in a crash of
    XLA (each keeps memory maps, of which a process may have 65,530)."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture
def on_devices(request):
    """Runs a script in a process of its own with so many CPU devices; what it printed."""

    def run(script: str, count: int, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments],
            cwd=request.path.parent,
            capture_output=True,
            text=True,
            env={
                **os.environ,
                **cpus(count),
                "PYTHONPATH": str(ROOT),
            },
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    return run


@pytest.fixture
def bucket(monkeypatch):
    """A folder in a bucket that stands in for Google's: objects in memory, and as little beside
    them as there (no folders, no renaming, no appending)."""
    import fsspec
    from etils.epath import backend
    from fsspec.implementations.memory import MemoryFileSystem

    from egjax import files

    class Bucket(MemoryFileSystem):
        protocol = ("gs", "gcs")
        store, pseudo_dirs = {}, [""]
        cachable = False

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(str(path).removeprefix("gs://").removeprefix("gcs://"))

        def _open(self, path, mode="rb", **options):
            assert "a" not in mode, "objects are not appended to"
            return super()._open(path, mode, **options)

        def mkdir(self, path, create_parents=True, **options):
            pass

        def makedirs(self, path, exist_ok=False):
            pass

        def mv(self, path1, path2, **options):
            raise AssertionError("nothing can be renamed")

        rename = move = mv

    for name in ("gs", "gcs"):
        fsspec.register_implementation(name, Bucket, clobber=True)
    backend.fsspec_backend._get_filesystem.cache_clear()
    files._libraries.cache_clear()
    monkeypatch.setenv("EPATH_USE_TF", "false")
    yield files.as_path("gs://pail/folder")
    for name in ("gs", "gcs"):
        importlib.import_module("fsspec.registry")._registry.pop(name, None)
    backend.fsspec_backend._get_filesystem.cache_clear()
    files._libraries.cache_clear()


@pytest.fixture(scope="session")
def robothow_dir() -> Path:
    """The folder of the virtualhome-eval wheel, found without importing it."""
    spec = importlib.util.find_spec("virtualhome_eval")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the RobotHow data is not installed")
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The reference data beside the checkout, or where EGJAX_SHARED says."""
    path = Path(os.environ.get("EGJAX_SHARED") or ROOT.parent / "shared" / "data")
    if not path.is_dir():
        pytest.skip("the reference data is not beside the checkout; EGJAX_SHARED names its place")
    return path
