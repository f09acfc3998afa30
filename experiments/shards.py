"""Work in shards: a killed run goes on with those that are missing, hosts share them out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from egjax.errors import EgjaxError
from egjax.files import make_folder
from experiments.common import Stage

__all__ = ["Shards", "parse_part"]


def parse_part(text: str) -> tuple[int, int]:
    """Which part of the shards is this process's: index and number of parts.

    Args:
        text: `i/n`, i from 0; empty for all of them. (Processes that `EGJAX_MULTI_HOST` connects
            divide them by themselves.)

    Raises:
        EgjaxError: not of that form, or i is not below n.
    """
    if not text:
        return 0, 1
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise EgjaxError(f"not a part of the shards: {text!r}", remedy="e.g. 0/4, 1/4, 2/4, 3/4")
    return int(index), int(count)


class Shards:
    """Numbered stages of a run, kept in `NAME_shards/`.

    Args:
        run_dir: an opened run directory.
        name: of the stage that they make up.
        inputs: of that stage; a shard is done again when they change.
        count: number of shards.
    """

    def __init__(self, run_dir: Path, name: str, inputs: Mapping[str, Any], count: int):
        self.folder = run_dir / f"{name}_shards"
        self.stages = [
            Stage(
                run_dir, f"{name}_shards/{k:05d}", {**inputs, "shard": k, "shards": count}, "self"
            )
            for k in range(count)
        ]

    def run(self, work: Callable[[int, Path], object], part: tuple[int, int] = (0, 1)) -> None:
        """Does the shards k with k mod n = i of part (i, n) that are not finished.

        Args:
            work: writes shard k into the directory it is given.
            part: index and number of parts.
        """
        index, count = part
        make_folder(self.folder)
        for k, stage in enumerate(self.stages):
            if k % count == index:
                stage.run(lambda out, k=k: work(k, out))

    def missing(self) -> list[int]:
        """Shards that are not finished."""
        return [k for k, stage in enumerate(self.stages) if not stage.is_finished()]

    def paths(self) -> list[Path]:
        """Directories of all shards, in order."""
        return [stage.path for stage in self.stages]
