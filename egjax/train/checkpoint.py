"""Parameters on disk: Orbax arrays and a JSON note. Nothing is pickled or executed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from egjax import hosts
from egjax.errors import EgjaxError, require
from egjax.files import absolute, from_bucket, is_remote

__all__ = ["load_params", "read_metadata", "save_params"]

_ARRAYS, _NOTE = "params", "metadata"


def _checkpointer() -> tuple[Any, Any]:
    ocp = require("orbax.checkpoint", "train")
    handler = ocp.CompositeCheckpointHandler(
        **{_ARRAYS: ocp.StandardCheckpointHandler(), _NOTE: ocp.JsonCheckpointHandler()}
    )
    return ocp, ocp.Checkpointer(handler)


def save_params(path: str | Path, params: Any, metadata: dict[str, Any]) -> None:
    """Writes parameters and metadata into a folder, which appears only when it is complete.

    Args:
        path: the folder; an older checkpoint there is replaced, once the new one is written.
        params: pytree (nested dicts) of arrays.
        metadata: what JSON can hold, e.g. the model's config and a tokenizer's hash.

    Raises:
        EgjaxError: the disk is full or the place cannot be written; what was there stays.
    """
    ocp, checkpointer = _checkpointer()
    path = absolute(path)
    if is_remote(path):  # nothing can be renamed there; Orbax marks what is whole
        with writing(path), checkpointer:
            _save(ocp, checkpointer, path, params, metadata)
        hosts.barrier(f"the model in {path}")
        return
    new, old = path.with_name(f"{path.name}.new"), path.with_name(f"{path.name}.old")
    with writing(path), checkpointer:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _save(ocp, checkpointer, new, params, metadata)
        except BaseException:
            for rest in path.parent.glob(f"{new.name}*"):
                shutil.rmtree(rest, ignore_errors=True)
            raise
        # `force` on the folder itself would delete the old checkpoint before the new one exists.
        if hosts.index() == 0:
            shutil.rmtree(old, ignore_errors=True)
            if path.exists():
                path.rename(old)
            new.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        hosts.barrier(f"the model in {path}")


def _save(ocp: Any, checkpointer: Any, path: Path, params: Any, metadata: dict[str, Any]) -> None:
    parts = {_ARRAYS: ocp.args.StandardSave(params), _NOTE: ocp.args.JsonSave(metadata)}
    checkpointer.save(path, ocp.args.Composite(**parts), force=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the file system (OSError), the array storage (ValueError) or a bucket's client
    refuses into a line.

    Raises:
        EgjaxError: naming the folder and the cause.
    """
    try:
        yield
    except Exception as error:
        if not (isinstance(error, OSError | ValueError) or from_bucket(error)):
            raise
        text = str(error)
        full = os.strerror(errno.ENOSPC)
        mend = "free some space or choose another folder"
        if is_remote(path):
            mend = "once the bucket takes it the same command goes on"
        raise EgjaxError(
            f"cannot write: {full if full in text else _first_line(error)}",
            where=str(path),
            remedy=f"{mend}; what was saved before is kept",
        ) from error


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Reads the JSON note of a checkpoint alone.

    Raises:
        EgjaxError: no checkpoint there, or not a readable one.
    """
    path = absolute(path)
    if not path.is_dir():
        raise EgjaxError("there is no checkpoint", where=str(path))
    try:
        return json.loads((path / _NOTE / _NOTE).read_text())
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error


def load_params(path: str | Path, like: Any = None) -> tuple[Any, dict[str, Any]]:
    """Reads parameters and metadata that `save_params` wrote.

    Args:
        path: the folder.
        like: pytree of arrays or `jax.ShapeDtypeStruct` (with shardings, to place the arrays on a
            mesh); structure and shapes must match. None takes what is there, on one device.

    Returns:
        The parameters and the metadata.

    Raises:
        EgjaxError: no checkpoint there, an unreadable one, or one of another model.
    """
    metadata = read_metadata(path)
    path = absolute(path)
    ocp, checkpointer = _checkpointer()
    try:
        with checkpointer:
            if like is None:
                like = jax.tree.map(
                    lambda m: jax.ShapeDtypeStruct(
                        m.shape,
                        m.dtype,
                        sharding=jax.sharding.SingleDeviceSharding(jax.local_devices()[0]),
                    ),
                    dict(checkpointer.metadata(path).item_metadata[_ARRAYS].tree),
                )
            restored = checkpointer.restore(
                path, ocp.args.Composite(**{_ARRAYS: ocp.args.StandardRestore(like)})
            )
    except Exception as error:  # Orbax and its storage raise all sorts for a damaged folder
        raise unreadable(path, error) from error
    params = restored[_ARRAYS]
    check_shapes(params, like, path)
    return params, metadata


def check_shapes(params: Any, like: Any, path: Path) -> None:
    """Raises EgjaxError unless all arrays of `params` have the shapes of `like`."""
    for (name, got), (_, want) in zip(
        jax.tree_util.tree_leaves_with_path(params),
        jax.tree_util.tree_leaves_with_path(like),
        strict=True,
    ):
        if np.shape(got) != np.shape(want):
            raise EgjaxError(
                f"{jax.tree_util.keystr(name)} has shape {np.shape(got)}, not {np.shape(want)}",
                where=str(path),
                remedy="the checkpoint is of another model",
            )


def unreadable(
    path: Path, error: Exception, mend: str = "delete it and run that stage again"
) -> EgjaxError:
    """What to tell of a checkpoint that cannot be read: the first line of the cause."""
    return EgjaxError(
        f"the checkpoint cannot be read: {_first_line(error)}",
        where=str(path),
        remedy=f"if the bucket answers, {mend}" if is_remote(path) else mend,
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
