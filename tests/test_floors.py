"""The house: imports go down only, optional libraries stay in their rooms, functions stay small."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINES = 100  # longest function

# What each part of the package may import of the others.
BASE = {"types", "mesh", "hosts", "losses", "errors", "files"}
MAY_IMPORT = {
    "errors": set(),
    "losses": set(),
    "types": {"errors"},
    "mesh": {"errors"},
    "hosts": {"errors"},
    "files": {"errors"},
    "sim": BASE,
    "lm": BASE,
    "search": BASE | {"sim"},
    "experience": BASE | {"sim", "lm"},
    "train": BASE | {"sim", "lm", "search", "experience"},
    "capacity": BASE | {"lm", "train"},
    "evals": BASE | {"sim", "lm", "search", "experience"},
}
MCTX = "egjax/search/mcts.py"


def modules() -> list[Path]:
    return sorted((ROOT / "egjax").rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def part_of(path: Path) -> str:
    return path.relative_to(ROOT / "egjax").parts[0].removesuffix(".py")


def imports(source: str, package: tuple[str, ...]) -> Iterator[str]:
    """Full dotted names that a module imports, anywhere in it, `require("x", …)` included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*above, *([node.module] if node.module else [])))
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if called in ("require", "import_module"):
                yield str(node.args[0].value)


def imports_of(path: Path) -> list[str]:
    return list(imports(path.read_text(), path.relative_to(ROOT).parent.parts))


def parts_imported(path: Path) -> set[str]:
    names = (name.split(".") for name in imports_of(path))
    found = {name[1] for name in names if name[0] == "egjax" and len(name) > 1}
    return {part for part in found if not part.startswith("__")}


def test_imports_are_found_in_every_form():
    source = (
        "import egjax.sim.world\nfrom egjax import lm as m\nfrom .. import search\n"
        "from ..train.loop import fit\nfrom . import near\n"
        "def f():\n    from egjax.evals import text\n    require('mctx', 'search')\n"
    )
    assert set(imports(source, ("egjax", "sim"))) == {
        "egjax.sim.world",
        "egjax.lm",
        "egjax.search",
        "egjax.train.loop.fit",
        "egjax.sim.near",
        "egjax.evals.text",
        "mctx",
    }


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_go_down(path):
    part = part_of(path)
    if part == "__init__":
        assert not parts_imported(path)
        return
    above = parts_imported(path) - MAY_IMPORT[part] - {part}
    assert not above, f"{name_of(path)} imports {sorted(above)}"
    roots = {name.split(".")[0] for name in imports_of(path)}
    assert not roots & {"experiments", "tests", "virtualhome_eval"}


@pytest.mark.parametrize("path", sorted((ROOT / "egjax" / "losses").rglob("*.py")), ids=name_of)
def test_losses_need_jax_alone(path):
    standard = {"__future__", "collections", "dataclasses", "functools", "math", "typing"}
    roots = {name.split(".")[0] for name in imports_of(path)}
    others = {name for name in imports_of(path) if name.split(".")[:2] == ["egjax", "losses"]}
    assert roots - standard - {"jax"} <= ({"egjax"} if others else set())


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_mctx_has_one_door(path):
    if name_of(path) != MCTX:
        assert "mctx" not in {name.split(".")[0] for name in imports_of(path)}


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_functions_are_small(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        assert lines <= LINES, f"{name_of(path)}:{node.lineno} {node.name} has {lines} lines"


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_everything_public_says_what_it_is(path):
    tree = ast.parse(path.read_text())
    docstring = ast.get_docstring(tree) or ""
    assert len(docstring.strip(". ")) > 10, f"{name_of(path)} does not say what it is"
    described = {}  # by name: of an overloaded function one definition says it
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            described[node.name] = described.get(node.name) or ast.get_docstring(node)
    missing = [name for name, docstring in described.items() if not docstring]
    assert not missing, f"{name_of(path)}: no docstring: {missing}"


def test_every_part_has_its_floor():
    parts = {part_of(path) for path in modules()} - {"__init__"}
    assert parts <= set(MAY_IMPORT), f"new parts without a floor: {parts - set(MAY_IMPORT)}"
