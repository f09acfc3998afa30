"""Files here and in a bucket alike: `gs://bucket/folder` beside local paths.

A place in a bucket is a path of etils' `epath`, which reads, writes and lists like pathlib's; what
it lacks (whole folders, libraries that need a file on disk) is here, over fsspec. A bucket has no
folders, no locks, no renaming and no appending: an object is there as a whole or not at all.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from egjax.errors import EgjaxError

__all__ = [
    "absolute",
    "append",
    "as_path",
    "check_reach",
    "delete",
    "from_bucket",
    "here",
    "is_remote",
    "local_copy",
    "make_folder",
    "move",
    "sizes",
    "written_here",
]

_STALLED = 60.0  # seconds without a byte after which a request is made anew; TensorStore's, too
_REMOTE = re.compile(r"gs:/{1,2}(?=[^/])")  # pathlib takes one of the two away
_OTHER = re.compile(r"(?!gs:)[a-z][a-z0-9+]+:/")  # s3://, hdfs://, file:///


def is_remote(place: str | os.PathLike[str]) -> bool:
    """Whether it is in a bucket."""
    return _REMOTE.match(os.fspath(place)) is not None


def as_path(place: str | os.PathLike[str]) -> Path:
    """A path to work with: pathlib's, of a place in a bucket epath's.

    Raises:
        EgjaxError: a library for buckets is not installed, or it is in another kind of storage.
    """
    text = os.fspath(place)
    if _OTHER.match(text):
        raise EgjaxError(
            "only gs:// is known beside folders", where=text, remedy="mount it, and name the folder"
        )
    if not is_remote(text):
        return Path(text)
    return cast(Path, _libraries()[0].Path(_REMOTE.sub("gs://", text)))


@functools.cache
def _libraries() -> tuple[Any, Any]:
    try:
        import fsspec.config
        from etils import epath

        fsspec.get_filesystem_class("gs")
    except ImportError as error:
        raise EgjaxError(
            f"gs:// is out of reach: {error}",
            remedy="pip install 'egjax[gcs]', or mount the bucket with Cloud Storage FUSE",
        ) from None
    for name in ("gs", "gcs"):  # other processes write there, too
        fsspec.config.conf.setdefault(name, {})["use_listings_cache"] = False
    _limit_silence(fsspec.config.conf)
    return epath, fsspec


def _limit_silence(conf: dict[str, Any]) -> None:
    """Has gcsfs try a request again that no byte comes of, as TensorStore does by itself.

    It would wait for five minutes, and then give up.
    """
    with contextlib.suppress(ImportError):  # comes with gcsfs
        aiohttp = importlib.import_module("aiohttp")
        wait = aiohttp.ClientTimeout(total=300.0, sock_connect=30.0, sock_read=_STALLED)
        for name in ("gs", "gcs"):
            conf[name].setdefault("requests_timeout", wait)
    # It prints the trace of each request that failed, beside raising it.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


def from_bucket(error: BaseException) -> bool:
    """Whether an error comes of a bucket's client, which has classes of its own for most."""
    clients = ("aiohttp", "fsspec", "gcsfs", "google", "requests")
    return type(error).__module__.partition(".")[0] in clients


def _system(place: Path) -> tuple[Any, str]:
    """The file system that holds a place in a bucket, and the place's name there."""
    return _libraries()[1].core.url_to_fs(os.fspath(place))


def absolute(place: str | os.PathLike[str]) -> Path:
    """The same place, whatever the working directory."""
    path = as_path(place)
    return path if is_remote(path) else path.absolute()


def here(place: str | os.PathLike[str], what: str) -> Path:
    """A place that has to be on this machine.

    Args:
        place: the path.
        what: the option, for the error.

    Raises:
        EgjaxError: it is in a bucket, or in another kind of storage.
    """
    if is_remote(place):
        raise EgjaxError(
            "has to be a local path",
            where=f"{what} {_REMOTE.sub('gs://', os.fspath(place))}",
            remedy="copy it with gcloud storage cp, or mount the bucket",
        )
    return as_path(place)


def check_reach(place: Path) -> None:
    """Asks a bucket whether it answers; local places are not looked at.

    Raises:
        EgjaxError: it does not: no such bucket, no rights, no network.
    """
    if not is_remote(place):
        return
    try:
        place.exists()
    except Exception as error:  # its client and its credentials raise all sorts
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EgjaxError(
            f"cannot be reached: {line}",
            where=str(place),
            remedy="gcloud auth application-default login; does the bucket exist?",
        ) from error


def make_folder(place: Path) -> None:
    """Makes a folder and those above it; a bucket has none."""
    if not is_remote(place):
        place.mkdir(parents=True, exist_ok=True)


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file below a folder, by its name from there; empty where there is none."""
    if not is_remote(folder):
        files = (p for p in sorted(folder.rglob("*")) if p.is_file())
        return {str(p.relative_to(folder)): p.stat().st_size for p in files}
    system, root = _system(folder)
    root = root.rstrip("/") + "/"
    found = system.find(root, detail=True)
    return {
        name.removeprefix(root): int(info["size"])
        for name, info in sorted(found.items())
        if name.startswith(root) and not name.endswith("/") and info["type"] == "file"
    }


def delete(place: Path) -> None:
    """Deletes a file or a folder with all in it, if it is there; of a link the link only."""
    if is_remote(place):
        system, name = _system(place)
        if system.exists(name):
            system.rm(name, recursive=True)
    elif place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


def move(source: Path, target: Path, *, last: str) -> None:
    """Moves a folder to where nothing is.

    In a bucket file by file: `last` is copied when all others are, and the source goes after that.
    """
    if not is_remote(source):
        os.replace(source, target)
        return
    system, begin = _system(source)
    end = _system(target)[1]
    for name in sorted(sizes(source), key=lambda name: (name == last, name)):
        system.cp_file(f"{begin}/{name}", f"{end}/{name}")
    delete(source)


def append(file: Path, text: str) -> None:
    """Adds to a text file; in a bucket it is written anew, so it should be short."""
    if is_remote(file):
        file.write_text((file.read_text() if file.exists() else "") + text)
    else:
        with file.open("a") as stream:
            stream.write(text)


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="egjax-")  # goes with the process


def local_copy(folder: Path) -> Path:
    """A folder for libraries that read files on disk only: itself, or a copy until the end."""
    if not is_remote(folder):
        return folder
    copy = Path(tempfile.mkdtemp(dir=_scratch().name)) / folder.name
    system, root = _system(folder)
    for name in sizes(folder):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        system.get_file(f"{root}/{name}", str(copy / name))
    return copy


@contextmanager
def written_here(folder: Path) -> Iterator[Path]:
    """A folder to write for libraries that write files on disk only: itself, or one whose files
    are added to it at the end, unless its block fails."""
    if not is_remote(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="egjax-") as scratch:
        yield Path(scratch)
        system, root = _system(folder)
        for name in sizes(Path(scratch)):
            system.put_file(str(Path(scratch) / name), f"{root}/{name}")
