"""What frozen models say about a table of tokens, computed once and kept on disk.

Reference log-probabilities, top-k teachers with their tail, hidden states: arrays with one row for
each row of the table. A folder holds one `.npy` file an array and a JSON note with the fingerprint
of what they were made from; reading checks it and maps the files instead of loading them. Nothing
is pickled or executed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from egjax import hosts
from egjax.errors import EgjaxError
from egjax.files import absolute, local_copy, written_here
from egjax.train.checkpoint import writing
from egjax.train.data import in_order, num_rows

__all__ = ["Fingerprint", "cached", "compute", "fingerprint", "load", "save"]

_NOTE = "stored.json"


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What stored arrays were made from; a short text each, e.g. a hash.

    Attributes:
        model: of the parameters (of all models, for a composed teacher), see `fingerprint`.
        tokenizer: `Tokenizer.fingerprint`.
        data: of the table of tokens, see `fingerprint`.
        settings: what else decides: quantity, k, temperature, exponent, clipping, ...
    """

    model: str
    tokenizer: str
    data: str
    settings: str = ""


def fingerprint(tree: Any) -> str:
    """SHA-256 (hex) of a pytree of arrays: names, shapes, types and contents.

    Parameters on several devices are gathered one at a time.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.ascontiguousarray(jax.device_get(leaf))
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def compute(
    fn: Callable[[Any, Any], Mapping[str, Any]],
    params: Any,
    table: Any,
    batch_size: int,
    sharding: NamedSharding | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Applies a jitted function to a table, batch by batch in order.

    Args:
        fn: (params, batch) -> arrays [B, ...] by name.
        params: of the frozen model or models.
        table: pytree of numpy arrays with one leading axis of rows.
        batch_size: B; the last batch is filled up, and cut again.
        sharding: of a batch, where `params` lie on a mesh, which may span processes: all of them
            call it.

    Yields:
        Arrays of the rows of each batch.
    """

    def on_mesh(params: Any, batch: Any) -> Mapping[str, Any]:
        assert sharding is not None
        with jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh):
            return fn(params, jax.lax.with_sharding_constraint(batch, sharding))

    everywhere = sharding and NamedSharding(sharding.mesh, PartitionSpec())
    run = jax.jit(fn) if sharding is None else jax.jit(on_mesh, out_shardings=everywhere)
    left = num_rows(table)
    for batch in in_order(table, batch_size):
        arrays = run(params, batch)
        yield {name: np.asarray(array)[:left] for name, array in arrays.items()}
        left -= batch_size


def save(
    path: str | Path,
    batches: Iterable[Mapping[str, Any]],
    rows: int,
    made_from: Fingerprint,
) -> None:
    """Writes arrays into a folder, which appears only when it is complete.

    Args:
        path: the folder; an older one there is replaced, once the new one is written.
        batches: arrays [b, ...] by name, in order, with `rows` rows in all, e.g. `compute`; one
            batch is in memory at a time.
        rows: of the table.
        made_from: written beside them.

    Raises:
        EgjaxError: the disk is full, or the rows are fewer or more.
    """
    path = Path(path).absolute()
    new, old = path.with_name(f"{path.name}.new"), path.with_name(f"{path.name}.old")
    try:
        with writing(path):
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
            dtypes = _write(new, batches, rows, path)
            note = {"made_from": dataclasses.asdict(made_from), "dtypes": dtypes, "rows": rows}
            (new / _NOTE).write_text(json.dumps(note, indent=1) + "\n")
            shutil.rmtree(old, ignore_errors=True)
            if path.exists():
                path.rename(old)
            new.rename(path)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write(
    folder: Path, batches: Iterable[Mapping[str, Any]], rows: int, where: Path
) -> dict[str, str]:
    """Fills one file an array; the types of the arrays by name."""
    files: dict[str, np.ndarray] = {}
    dtypes: dict[str, str] = {}
    done = 0
    for batch in batches:
        arrays = {name: np.asarray(array) for name, array in batch.items()}
        if not files:
            for name, array in arrays.items():
                dtypes[name] = array.dtype.name
                files[name] = np.lib.format.open_memmap(
                    folder / f"{name}.npy", "w+", _plain(array).dtype, (rows, *array.shape[1:])
                )
        count = num_rows(arrays)
        if done + count <= rows:
            for name, array in arrays.items():
                files[name][done : done + count] = _plain(array)
        done += count
    if done != rows:
        raise EgjaxError(f"{done} rows were computed for a table of {rows}", where=str(where))
    for file in files.values():
        file.flush()  # type: ignore[attr-defined]
    return dtypes


def _plain(array: np.ndarray) -> np.ndarray:
    """bfloat16, which `.npy` does not know, as its bits."""
    return array.view(np.uint16) if array.dtype == jnp.bfloat16 else array


def load(path: str | Path, made_from: Fingerprint) -> dict[str, np.ndarray]:
    """Maps the arrays of a folder into memory, if they were made from the same things.

    Args:
        path: the folder.
        made_from: what the caller has at hand.

    Returns:
        Arrays [rows, ...] by name, read-only; to be batched like (and together with) the table.

    Raises:
        EgjaxError: nothing there, a damaged file, or another model, tokenizer, table or setting.
    """
    path = Path(path).absolute()
    note = _note(path)
    for name, mine in dataclasses.asdict(made_from).items():
        theirs = note["made_from"].get(name)
        if mine != theirs:
            raise EgjaxError(
                f"stored for another {name} ({str(theirs)[:12]}, not {mine[:12]})",
                where=str(path),
                remedy="delete the folder or name another one, and compute it again",
            )
    try:
        return {
            name: _map(path, name, dtype, note["rows"]) for name, dtype in note["dtypes"].items()
        }
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(path, error) from error


def _note(path: Path) -> dict[str, Any]:
    if not (path / _NOTE).is_file():
        raise EgjaxError("nothing is stored there", where=str(path))
    try:
        note = json.loads((path / _NOTE).read_text())
        if not {"made_from", "dtypes", "rows"} <= note.keys():
            raise ValueError("fields are missing in its note")
    except (OSError, ValueError, AttributeError) as error:
        raise _damaged(path, error) from error
    return note


def _map(path: Path, name: str, dtype: str, rows: int) -> np.ndarray:
    array = np.load(path / f"{name}.npy", mmap_mode="r", allow_pickle=False)
    if array.shape[0] != rows:
        raise ValueError(f"{name} has {array.shape[0]} rows of {rows}")
    return array.view(jnp.bfloat16) if dtype == "bfloat16" else array


def _damaged(path: Path, error: Exception) -> EgjaxError:
    return EgjaxError(
        f"what is stored cannot be read: {error}",
        where=str(path),
        remedy="delete the folder and compute it again",
    )


def cached(
    path: str | Path,
    batches: Callable[[], Iterable[Mapping[str, Any]]],
    rows: int,
    made_from: Fingerprint,
) -> dict[str, np.ndarray]:
    """`load`, after a `save` if the folder is not there. Of several processes all call it, and the
    first one writes.

    Args:
        path: the folder, which may be in a bucket.
        batches: gives what `save` takes; called only if it is needed.
        rows, made_from: see `save`.

    Raises:
        EgjaxError: as both. A folder made from other things is an error, not overwritten.
    """
    path = absolute(path)
    if hosts.agree(f"looking for {path}", str(path.exists())) == str(False):
        with written_here(path) if hosts.index() == 0 else contextlib.nullcontext() as folder:
            if folder is not None:
                save(folder, batches(), rows, made_from)
            else:
                for _ in batches():  # its devices take part in every batch
                    pass
        hosts.barrier(f"what is stored in {path}")
    return load(local_copy(path), made_from)
