"""Do programs without graphs run? Their objects placed in scenes, and tried in the simulator.

    python -m experiments.place --programs TAR_OR_FOLDER --scenes FOLDER --resources FOLDER

Binds each program to its scene, makes and places what the scene lacks, and mends the layout where
a step is refused, over several seeds. Writes `placed.jsonl` with `scenes/` (tasks for every other
script: `--robothow FOLDER`) and `failed.jsonl` (each program that does not run, with the step and
the reason). Row `programs_executed`: programs of which every step is accepted.
Hardware: two CPU cores, 2,685 programs in three minutes. Expected: 2,610 of them, 97 %.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from egjax.evals.intervals import Figure
from egjax.evals.manifest import write_atomic
from egjax.files import here
from egjax.sim.placing import Resources, load_homes, placed_row, read_sources, write_placed
from egjax.sim.repair import Failed, Placed, place
from egjax.train.progress import progress
from experiments.common import emit, note, run_main

_SHOWN = 8
_OBJECT = re.compile(r"<\S+> \(\d+\)")


@dataclass(frozen=True)
class Config:
    """What to place, and how hard to try."""

    programs: Path
    """Tar file or folder with `<scene>/<source>/<name>.txt`."""
    scenes: Path
    """Folder with `<scene>.json`."""
    resources: Path
    """Folder with VirtualHome's class_name_equivalence, object_script_placing, object_states and
    properties_data."""
    out: Path = Path("runs/placed")
    """Where tasks and reasons go."""
    limit: int = 0
    """Programs to place, the first by name; 0 for all."""
    seed: int = 0
    """The first seed of the layouts."""
    seeds: int = 3
    """Layouts drawn for a program at most."""
    repairs: int = 40
    """Changes to a layout at most."""
    json: Annotated[bool, tyro.conf.arg(help="print figures as JSON lines")] = False


def main(config: Config) -> None:
    here(config.out, "--out")
    sources, unread = read_sources(config.programs)
    sources = sources[: config.limit or None]
    homes = load_homes(config.scenes, {s.scene for s in sources}, Resources.load(config.resources))
    started = time.perf_counter()
    with progress("programs", len(sources)) as update:
        found = place(
            sources,
            homes,
            seed=config.seed,
            seeds=config.seeds,
            repairs=config.repairs,
            progress=lambda done, placed: update(done, f"{placed} run"),
        )
    seconds = time.perf_counter() - started
    placed = [f for f in found if isinstance(f, Placed)]
    failed = [f for f in found if isinstance(f, Failed)]
    rows = [placed_row(p.source, p.layout, p.seed, p.final) for p in placed]
    write_placed(config.out, rows, config.scenes)
    reasons = [
        {"name": f.source.name, "step": f.step, "line": f.line, "reason": f.reason} for f in failed
    ]
    reasons += [{"name": name, "step": None, "reason": why} for name, why in unread.items()]
    write_atomic(config.out / "failed.jsonl", "".join(json.dumps(r) + "\n" for r in reasons))
    _tell(failed, config.out)
    n = len(found) + (0 if config.limit else len(unread))
    emit(
        Figure("programs_executed", len(placed), "programs", n=n, seed=config.seed),
        Figure("programs_executed_share", len(placed) / n, "fraction", n=n, seed=config.seed),
        Figure("programs_executed_at_once", sum(p.tries == 1 for p in placed), "programs", n=n),
        Figure("layouts_tried", sum(f.tries for f in found), "layouts", n=n),
        Figure("place_time", seconds, "s", n=n),
        json=config.json,
    )


def _tell(failed: Sequence[Failed], out: Path) -> None:
    """The commonest reasons, for the terminal."""
    counts = Counter(_OBJECT.sub("X", f.reason) for f in failed)
    for reason, count in counts.most_common(_SHOWN):
        note(f"{count:5d} do not run: {reason}")
    note(f"tasks and reasons are in {out}")


if __name__ == "__main__":
    run_main(main, Config)
