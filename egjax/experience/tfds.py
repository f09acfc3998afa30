"""Trajectories and preference pairs as TensorFlow Datasets, in array_record files.

TensorFlow itself is never imported: the builders write array_record and the records come back
through `as_data_source`, which gives random access and is what Grain reads.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from egjax.errors import EgjaxError, require
from egjax.experience.records import PreferencePair, Trajectory, from_flat, to_flat
from egjax.files import as_path, local_copy, written_here

tfds = require("tensorflow_datasets", "data")
require("array_record", "data")

__all__ = ["PreferencePairs", "RecordSource", "Trajectories", "read", "splits", "write"]

Record = TypeVar("Record", Trajectory, PreferencePair)


_TYPES = {"rewards": np.float64, "values": np.float64, "visits": np.int64}  # of each step


class Trajectories(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of `Trajectory` records; splits are those the records name."""

    VERSION = tfds.core.Version("1.1.0")
    record = Trajectory
    pending: Sequence[Any] = ()

    def _info(self):
        text = tfds.features.Text

        def array(shape: tuple[int | None, ...], dtype: type) -> Any:
            # As bytes, because plain numbers are stored in 32 bits.
            return tfds.features.Tensor(shape=shape, dtype=dtype, encoding="bytes")

        return tfds.core.DatasetInfo(
            builder=self,
            description="Plans that search found in the household, with their verdicts.",
            features=tfds.features.FeaturesDict(
                {
                    "task": text(),
                    "title": text(),
                    "split": text(),
                    "script": text(),
                    "text": text(),
                    "label": text(),
                    "solved": tfds.features.Tensor(shape=(), dtype=np.bool_),
                    "total_return": array((), np.float64),
                    "goals": text(),
                    "seed": tfds.features.Tensor(shape=(), dtype=np.int64),
                    "kind": text(),
                    "wanted": text(),
                    **{name: array((None,), dtype) for name, dtype in _TYPES.items()},
                    "refusals": text(),
                }
            ),
            # The order of the records is part of what is stored.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        names = dict.fromkeys(record.split for record in self.pending)
        return {
            name: self._generate_examples([r for r in self.pending if r.split == name])
            for name in names
        }

    def _generate_examples(self, records):
        for index, record in enumerate(records):
            flat = to_flat(record)
            # An empty list has no type of its own.
            numbers = {k: np.asarray(v, _TYPES[k]) for k, v in flat.items() if k in _TYPES}
            yield index, {**flat, **numbers}


class PreferencePairs(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of `PreferencePair` records; all of them in the split `train`."""

    VERSION = tfds.core.Version("1.0.0")
    record = PreferencePair
    pending: Sequence[Any] = ()

    def _info(self):
        names = ("task", "prompt", "chosen", "rejected", "kind")
        return tfds.core.DatasetInfo(
            builder=self,
            description="Plans preferred to failed and to redundant plans for the same prompt.",
            features=tfds.features.FeaturesDict({name: tfds.features.Text() for name in names}),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {"train": self._generate_examples(self.pending)}

    def _generate_examples(self, records):
        for index, record in enumerate(records):
            yield index, to_flat(record)


Builder = type[Trajectories] | type[PreferencePairs]


def _folder(builder: Builder, data_dir: str | Path) -> Path:
    return as_path(data_dir) / builder.name / str(builder.VERSION)


def _builder_of(record_type: type) -> Builder:
    builders: dict[type, Builder] = {b.record: b for b in (Trajectories, PreferencePairs)}
    return builders[record_type]


def write(records: Sequence[Trajectory] | Sequence[PreferencePair], data_dir: str | Path) -> Path:
    """Writes records of one type, in their order; replaces what was there before.

    The new files are complete before the old ones go, so a failure loses nothing.

    Args:
        records: all `Trajectory` or all `PreferencePair`.
        data_dir: folder of TFDS datasets, made if it is missing.

    Returns:
        The folder of the dataset.

    Raises:
        EgjaxError: there are no records, they are of several types, or a split has a name
            that TFDS cannot store.
    """
    if not records:
        raise EgjaxError("there are no records to write", where=str(data_dir))
    kind = type(records[0])
    if any(type(record) is not kind for record in records):
        raise EgjaxError("records of several types in one dataset", where=str(data_dir))
    bad = [r for r in records if isinstance(r, Trajectory) and not r.split.isidentifier()]
    if bad:
        raise EgjaxError(
            f"split name {bad[0].split!r} of task {bad[0].task}", remedy="letters, digits and _"
        )
    with written_here(as_path(data_dir)) as folder:
        _write(_builder_of(kind), records, folder)
    return _folder(_builder_of(kind), data_dir)


def _write(builder: Builder, records: Sequence[Any], data_dir: Path) -> None:
    final = _folder(builder, data_dir)
    final.parent.mkdir(parents=True, exist_ok=True)
    # TFDS keeps an existing dataset instead of writing anew, hence a fresh folder and a swap.
    work = Path(tempfile.mkdtemp(prefix=".writing-", dir=data_dir))
    try:
        made = builder(data_dir=str(work), file_format="array_record")
        made.pending = records
        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()):  # it announces a download; there is none
            made.download_and_prepare()
        if final.exists():
            final.rename(work / "old")
        _folder(builder, work).rename(final)
    finally:
        shutil.rmtree(work, ignore_errors=True)


class RecordSource(Generic[Record]):
    """Random access to stored records as dataclasses: `len(source)`, `source[i]`.

    Grain takes it as it is: `grain.MapDataset.source(source)`.
    """

    def __init__(self, source, kind: type[Record]):
        self._source, self._kind = source, kind

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return from_flat(self._kind, self._source[index])


def _open(kind: type, data_dir: str | Path):
    folder = _folder(_builder_of(kind), data_dir)
    if not (folder / "dataset_info.json").exists():
        raise EgjaxError(
            f"no stored {kind.__name__} records", where=str(folder), remedy="collect them first"
        )
    return tfds.builder_from_directory(str(local_copy(folder)))


def splits(kind: type[Record], data_dir: str | Path) -> dict[str, int]:
    """Names of the stored splits and how many records each has.

    Raises:
        EgjaxError: nothing of that type is stored there.
    """
    return {name: split.num_examples for name, split in _open(kind, data_dir).info.splits.items()}


def read(kind: type[Record], data_dir: str | Path, split: str = "train") -> RecordSource[Record]:
    """Opens a split of stored records for random access, in the order they were written.

    Args:
        kind: `Trajectory` or `PreferencePair`.
        data_dir: the folder that `write` was given.
        split: a split's name; TFDS slices such as `train[:10]` work too.

    Raises:
        EgjaxError: nothing of that type, or no such split, is stored there.
    """
    builder = _open(kind, data_dir)
    if split.split("[")[0] not in builder.info.splits:
        raise EgjaxError(
            f"no split {split!r}",
            where=str(_folder(_builder_of(kind), data_dir)),
            remedy=f"there are {', '.join(builder.info.splits)}",
        )
    return RecordSource(builder.as_data_source(split=split), kind)
