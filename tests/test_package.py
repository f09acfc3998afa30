"""The package as users get it: its wheel, its extras, and what each import brings with it."""

import ast
import importlib.util
import json
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Libraries of the extras; the base (jax, flax, optax, numpy and what they need) is always there.
OPTIONAL = {
    "mctx": "search",
    "transformers": "lm",
    "tokenizers": "lm",
    "safetensors": "lm",
    "tensorflow_datasets": "data",
    "array_record": "data",
    "grain": "data",
    "rouge_score": "eval",
    "matplotlib": "eval",
    "jinja2": "eval",
    "tyro": "cli",
}
EXTRAS_OF = {
    "egjax": set(),
    "egjax.errors": set(),
    "egjax.types": set(),
    "egjax.mesh": set(),
    "egjax.hosts": set(),
    "egjax.losses": set(),
    "egjax.sim": set(),
    "egjax.search": {"search"},
    "egjax.lm": {"lm"},
    "egjax.experience": {"data"},
    "egjax.train": {"train", "data"},
    "egjax.evals": {"eval"},
}


def run_python(code: str, *flags: str, path: str | None = None) -> subprocess.CompletedProcess:
    """Runs code in a fresh interpreter with nothing but the installed libraries and `path`."""
    start = f"import sys; sys.path.insert(0, {path!r})\n" if path else ""
    return subprocess.run(
        [sys.executable, *flags, "-c", start + code], capture_output=True, text=True, timeout=120
    )


# A finder that knows none of the given top-level modules, as where their extra is not installed.
BLOCK = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Absent())
"""


@pytest.mark.parametrize("module", EXTRAS_OF)
def test_import_brings_no_library_of_another_part(module):
    if importlib.util.find_spec(module) is None:
        pytest.fail(f"{module} does not exist")
    absent = {name for name, extra in OPTIONAL.items() if extra not in EXTRAS_OF[module]}
    code = BLOCK.format(absent=absent) + (
        f"import {module}, json\n"
        "print(json.dumps(sorted({n.split('.')[0] for n in sys.modules})))"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert not loaded & {"tensorflow", "torch", "keras"}
    if module == "egjax.losses":
        assert not loaded & {"flax", "optax", "orbax", "chex"}


def test_losses_work_with_jax_alone():
    absent = {"flax", "optax", "orbax", "chex", *OPTIONAL}
    code = BLOCK.format(absent=absent) + "import egjax.losses\nprint(len(egjax.losses.__all__))"
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


def required_extras() -> list[tuple[str, str, str]]:
    """Every `require("library", "extra")` in the package: (file, library, extra)."""
    found = []
    for path in sorted((ROOT / "egjax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require":
                values = [a.value for a in node.args if isinstance(a, ast.Constant)]
                if len(values) == 2:
                    found.append((path.name, *map(str, values)))
    return found


@pytest.mark.parametrize(("file", "library", "extra"), required_extras())
def test_a_missing_library_is_told_with_its_extra(file, library, extra):
    lines = PROJECT["optional-dependencies"][extra]
    listed = {canonicalize_name(Requirement(line).name) for line in lines}
    root = library.split(".")[0]
    names = metadata.packages_distributions().get(root, [root])
    assert listed & set(map(canonicalize_name, names)), (
        f"{file} says {extra}, which does not list {root}"
    )


def test_the_message_of_a_missing_library():
    code = (
        BLOCK.format(absent={"mctx"}) + "import egjax.errors\negjax.errors.require('mctx','search')"
    )
    done = run_python(code)
    assert done.returncode != 0
    assert "pip install 'egjax[search]'" in done.stderr.splitlines()[-1]


def test_extras_are_those_promised_and_all_holds_every_one():
    extras = PROJECT["optional-dependencies"]
    assert {"search", "lm", "data", "train", "eval", "tpu", "cuda", "test", "all"} <= set(extras)
    (everything,) = map(Requirement, extras["all"])
    assert everything.name == "egjax"
    # W&B and Google's clients are large, and for services that one asks for.
    assert everything.extras == set(extras) - {"all", "test", "tpu", "cuda", "wandb", "gcs"}


def test_every_python_gets_one_pair():
    base = [Requirement(line) for line in PROJECT["dependencies"]]
    for version in ("3.11", "3.12"):
        names = [
            r.name
            for r in base
            if r.marker is None or r.marker.evaluate({"python_version": version})
        ]
        assert sorted(names) == ["flax", "jax", "numpy", "optax"]
    for extra in ("tpu", "cuda"):  # the same bounds as the base, or pip could move jax
        bounds = {str(r.marker): r.specifier for r in base if r.name == "jax"}
        lines = map(Requirement, PROJECT["optional-dependencies"][extra])
        assert {str(r.marker): r.specifier for r in lines} == bounds


def test_nothing_pulls_tensorflow_torch_or_cuda():
    """Walks what the installed packages declare, from `egjax[all,test]` on."""
    todo, seen = [("egjax", "all"), ("egjax", "test")], set()
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, lines):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                todo += [(requirement.name.lower(), e) for e in {"", *requirement.extras}]
    names = {name for name, _ in seen}
    assert {"jax", "mctx", "tensorflow-datasets"} <= names
    unwanted = {"torch", "tensorflow", "tf-nightly", "keras", "libtpu"}
    assert not names & unwanted
    assert not [name for name in names if name.startswith(("nvidia-", "jax-cuda"))]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (file,) = out.glob("egjax-*.whl")
    return file


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
    assert {name.split("/")[0] for name in names} == {"egjax", info}
    assert {"egjax/py.typed", f"{info}/licenses/LICENSE"} <= set(names)
    assert not [name for name in names if "test" in name.lower() or "__pycache__" in name]
    source = (path for path in (ROOT / "egjax").rglob("*") if "__pycache__" not in path.parts)
    assert {str(p.relative_to(ROOT)) for p in source if p.is_file()} == {
        name for name in names if name.startswith("egjax/")
    }
    assert wheel.stat().st_size < 2_000_000


def test_wheel_says_what_the_project_says(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (n for n in archive.namelist() if n.endswith("METADATA"))
    text = archive.read(name).decode()
    import egjax

    assert f"\nVersion: {egjax.__version__}\n" in text
    assert "\nLicense-Expression: Apache-2.0\n" in text
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {egjax.__version__}\n" in citation
    assert f"{egjax.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_wheel_is_imported_from_where_it_is_unpacked(wheel, tmp_path):
    """Every module is loaded from the wheel alone: no file is missing that only a checkout has."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    files = sorted((tmp_path / "egjax").rglob("*.py"))
    modules = [".".join(f.relative_to(tmp_path).with_suffix("").parts) for f in files]
    code = (
        "import importlib, egjax\n"
        f"for name in {[m.removesuffix('.__init__') for m in modules]!r}:\n"
        "    importlib.import_module(name)\n"
        "print(egjax.__file__)\n"
    )
    done = run_python(code, "-P", path=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "egjax" / "__init__.py")
