"""RobotHow programs with their graphs, from a folder in RobotHow's layout or an installed wheel.

Layout: `executable_programs/<scene>/<source>/<name>.txt` (title, description, then the script) and
`init_and_final_graphs/<scene>/<source>/<name>.json` (`init_graph`, `final_graph`). The PyPI package
`virtualhome-eval` ships 518 such programs; its files are read, its modules never imported.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from egjax.errors import EgjaxError
from egjax.sim.graph import check_graph
from egjax.sim.text import Line, parse_script

__all__ = [
    "Program",
    "each_program",
    "find_dataset",
    "load_pair",
    "load_program",
    "load_programs",
    "read_names",
]

_WHEEL = "virtualhome_eval"
_FOLDER = "dataset/programs_processed_precond_nograb_morepreconds"
_SCRIPTS, _GRAPHS = "executable_programs", "init_and_final_graphs"


@dataclass(frozen=True)
class Program:
    """A human program: what the activity is called, how a person did it, and where.

    Attributes:
        name: file name without suffix, e.g. `file710_2`; `<scene>/<source>/file710_2` where a
            folder has several of that name.
        title: the activity, e.g. "Set up table".
        description: a person's words.
        script: the steps.
        init, final: graphs before and after.
        scene: name of the household.
    """

    name: str
    title: str
    description: str
    script: tuple[Line, ...]
    init: Mapping[str, Any]
    final: Mapping[str, Any]
    scene: str


def find_dataset() -> Path | None:
    """The RobotHow folder of an installed `virtualhome-eval`, None where it is not installed."""
    spec = importlib.util.find_spec(_WHEEL)
    for root in spec.submodule_search_locations or () if spec else ():
        folder = Path(root) / _FOLDER
        if (folder / _SCRIPTS).is_dir():
            return folder
    return None


def load_program(script: Path, graphs: Path) -> Program:
    """Reads one program and its graphs.

    Raises:
        EgjaxError: a missing or malformed file, with file, line and remedy.
    """
    try:
        text = script.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise EgjaxError("cannot read the program", where=str(script), remedy=str(error)) from None
    lines = text.splitlines()
    if not lines or not lines[0].strip() or lines[0].lstrip().startswith("["):
        raise EgjaxError(
            "a program without a title", where=f"{script}:1", remedy="the activity's name"
        )
    steps = parse_script(text, where=str(script))
    if not steps:
        raise EgjaxError(
            "a program without steps", where=str(script), remedy="[VERB] <object> (id)"
        )
    init, final = load_pair(graphs)
    return Program(
        name=script.stem,
        title=lines[0].strip(),
        description=lines[1].strip() if len(lines) > 1 else "",
        script=tuple(steps),
        init=init,
        final=final,
        scene=script.parent.parent.name,
    )


def load_pair(path: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Initial and final graph of a program's graph file.

    Raises:
        EgjaxError: a missing or malformed file.
    """
    try:
        pair = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError:
        raise EgjaxError("the program has no graph file", where=str(path)) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        line = getattr(error, "lineno", 1)
        raise EgjaxError("not JSON", where=f"{path}:{line}", remedy=str(error)) from None
    if not isinstance(pair, dict) or not {"init_graph", "final_graph"} <= pair.keys():
        raise EgjaxError("expected 'init_graph' and 'final_graph'", where=str(path))
    initial, final = (
        check_graph(pair[name], where=f"{path}, {name}") for name in ("init_graph", "final_graph")
    )
    return initial, final


def load_programs(folder: str | Path, names: Sequence[str] | None = None) -> list[Program]:
    """All programs of a folder in RobotHow's layout, or those named, see `each_program`."""
    return list(each_program(folder, names))


def each_program(folder: str | Path, names: Sequence[str] | None = None) -> Iterator[Program]:
    """The programs of a folder in RobotHow's layout, sorted by scene and name, one by one.

    With its graphs a program takes some 4 MB, so 518 of them 2 GB.

    Args:
        folder: the folder that holds `executable_programs` and `init_and_final_graphs`.
        names: program names to read; all where absent.

    Raises:
        EgjaxError: not such a folder, no program in it, a name that it lacks, or a bad file.
    """
    root = Path(folder)
    files = sorted((root / _SCRIPTS).glob("*/*/*.txt"))
    if not files:
        raise EgjaxError(
            "no RobotHow programs",
            where=str(root),
            remedy=f"expected {_SCRIPTS}/<scene>/<source>/<name>.txt beside {_GRAPHS}/",
        )
    stems = Counter(path.stem for path in files)
    by_name = {
        path.stem if stems[path.stem] == 1 else _long_name(path, root): path for path in files
    }
    missing = [name for name in names or () if name not in by_name]
    if missing:
        several = [name for name in by_name if name.endswith(f"/{missing[0]}")]
        raise EgjaxError(
            f"no program {missing[0]!r}",
            where=str(root),
            remedy=f"there are {', '.join(several)}" if several else None,
        )
    for name in names if names is not None else by_name:
        path = by_name[name]
        graph = root / _GRAPHS / path.parent.parent.name / path.parent.name / f"{path.stem}.json"
        yield dataclasses.replace(load_program(path, graph), name=name)


def _long_name(path: Path, root: Path) -> str:
    """`<scene>/<source>/<name>`, of programs whose file names occur several times."""
    return str(path.relative_to(root / _SCRIPTS).with_suffix(""))


def read_names(path: str | Path) -> list[str]:
    """Program names from a text file: one or several a line, `#` starts a comment.

    Raises:
        EgjaxError: no such file, or no name in it.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise EgjaxError("cannot read the task list", where=str(path), remedy=str(error)) from None
    names = [name for line in text.splitlines() for name in line.split("#")[0].split()]
    if not names:
        raise EgjaxError("an empty task list", where=str(path), remedy="name a program a line")
    return [name.removesuffix(".txt") for name in names]
