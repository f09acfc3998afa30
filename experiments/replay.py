"""Do the human programs end where the reference says? RobotHow's programs replayed.

    python -m experiments.replay [--robothow FOLDER] [--rules reference|repaired|eai]

Runs each program from its initial graph and compares every node state and edge with the stored
final graph. Exit code 1 where one differs. Hardware: two busy CPU cores, two minutes for 518.
Expected with the reference's rules: 518 of 518 executed, 518 of 518 exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from egjax.evals.intervals import Figure
from egjax.sim.graph import encode, sizes_of
from egjax.sim.replay import final_graph, same_graph
from egjax.sim.rules import RULES
from egjax.train.progress import progress
from experiments.common import emit, note, run_main
from experiments.data import programs

_SHOWN = 5


@dataclass(frozen=True)
class Config:
    """What to replay."""

    robothow: Path | None = None
    """Folder in RobotHow's layout; the installed data where absent."""
    rules: Literal["reference", "repaired", "eai"] = "reference"
    """Rule set of the world; the stored final graphs are the reference's."""
    json: Annotated[bool, tyro.conf.arg(help="print figures as JSON lines")] = False


def main(config: Config) -> int:
    source = programs(config.robothow)
    sizes = sizes_of(program.init for program in source)
    executed = exact = shown = 0
    with progress("programs", len(source)) as advance:
        for done, program in enumerate(source, start=1):
            scene, state, names = encode(program.init, sizes, where=program.name)
            graph, refused = final_graph(
                scene, state, names, program.script, rules=RULES[config.rules], where=program.name
            )
            executed += refused is None
            same = refused is None and same_graph(graph, program.final)
            exact += same
            if not same and shown < _SHOWN:
                at = "" if refused is None else f", step {refused}: {program.script[refused]}"
                note(f"{program.name} differs{at}")
                shown += 1
            advance(done, "")
    n = len(source)
    emit(
        Figure("programs_executed", executed, "programs", n=n),
        Figure("programs_exact", exact, "programs", n=n),
        json=config.json,
    )
    return 0 if exact == n else 1


if __name__ == "__main__":
    run_main(main, Config)
