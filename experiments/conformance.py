"""Do we do what VirtualHome v1.0.0 does? Recorded transitions of the reference against our world.

    python -m experiments.conformance --golden FILE... [--graphs FOLDER...] [--rules eai]

Episodes run freely from their graph, without resets. A step agrees if verdict, message (when
refused), new states, added and removed edges all do. Exit code 1 where any step disagrees. With
--rules eai the recordings are to be those of the Embodied Agent Interface's executor.
Hardware: two busy CPU cores, three and a half minutes for 65,000 steps. Expected: 1 and 1.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from egjax.errors import EgjaxError
from egjax.evals.intervals import Figure
from egjax.sim.graph import encode, load_graph, sizes_of
from egjax.sim.replay import compare_episode, read_episodes
from egjax.sim.robothow import find_dataset, load_pair
from egjax.sim.rules import RULES
from egjax.train.progress import progress
from experiments.common import emit, note, run_main

_SHOWN = 5  # disagreements printed


@dataclass(frozen=True)
class Config:
    """What to compare."""

    golden: tuple[Path, ...]
    """Files of recorded episodes, .jsonl or .jsonl.gz."""
    graphs: tuple[Path, ...] = ()
    """Folders with the graphs that episodes name; RobotHow's initial graphs are found anyway."""
    robothow: Path | None = None
    """Folder in RobotHow's layout; the installed data where absent."""
    rules: Literal["reference", "repaired", "eai"] = "reference"
    """Rule set of the world."""
    added: int = 256
    """Edges that a state can add."""
    json: Annotated[bool, tyro.conf.arg(help="print figures as JSON lines")] = False


class Graphs:
    """Finds graphs by file name and encodes each once."""

    def __init__(self, folders: tuple[Path, ...], robothow: Path | None):
        root = robothow or find_dataset()
        places = [path for folder in folders for path in folder.rglob("*.json")]
        if root is not None:
            places += (root / "init_and_final_graphs").rglob("*.json")
        self.paths = {path.name: path for path in reversed(places)}

    def load(self, name: str) -> dict[str, Any]:
        """The graph of that file name; of a pair of graphs the initial one."""
        if name not in self.paths:
            raise EgjaxError(f"no graph {name}", remedy="name its folder with --graphs")
        path = self.paths[name]
        graph = load_pair(path)[0] if "init_and_final_graphs" in path.parts else load_graph(path)
        return dict(graph)


def main(config: Config) -> int:
    graphs = Graphs(config.graphs, config.robothow)
    episodes = [(path, e) for path in config.golden for e in read_episodes(path)]
    if not episodes:
        raise EgjaxError("no episodes", where=", ".join(map(str, config.golden)))
    loaded = {name: graphs.load(name) for name in {str(e["graph"]) for _, e in episodes}}
    sizes = sizes_of(loaded.values(), added=config.added)
    agreed: Counter[tuple[str, bool]] = Counter()
    tried: Counter[tuple[str, bool]] = Counter()
    shown = 0
    with progress("episodes", len(episodes)) as advance:
        for done, (path, episode) in enumerate(episodes, start=1):
            world = encode(loaded[episode["graph"]], sizes, where=episode["graph"])
            for verb, accepted, differs in compare_episode(episode, *world, RULES[config.rules]):
                tried[verb, accepted] += 1
                agreed[verb, accepted] += differs is None
                if differs is not None and shown < _SHOWN:
                    note(f"{path.name} {episode['graph']} {differs}")
                    shown += 1
            advance(done, "")
    emit(*_figures(agreed, tried), json=config.json)
    return 0 if agreed == tried else 1


def _figures(agreed: Counter[tuple[str, bool]], tried: Counter[tuple[str, bool]]) -> list[Figure]:
    figures = []
    for accepted, name in ((True, "agreement_accepted"), (False, "agreement_refused")):
        kinds = [(verb, n) for (verb, kind), n in tried.items() if kind == accepted]
        rows = {verb: (agreed[verb, accepted], n) for verb, n in kinds}
        total = sum(n for _, n in rows.values())
        if total:
            good = sum(k for k, _ in rows.values())
            figures.append(Figure(name, good / total, "fraction", n=total))
        for verb in sorted(rows):
            k, n = rows[verb]
            figures.append(Figure(f"{name}_{verb.lower()}", k / n, "fraction", n=n))
    return figures


if __name__ == "__main__":
    run_main(main, Config)
