"""Promises of the layout, kept by listing files: no exclude lists, so a new method cannot slip by."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import hf_transfer_ext
from hf_transfer_ext.evals.audit.attacks import ATTACKS
from hf_transfer_ext.evals.audit.membership import MEMBERSHIP_ATTACKS
from hf_transfer_ext.evals.metrics import COMPARISONS, METRICS
from hf_transfer_ext.evals.suites import SUITES
from hf_transfer_ext.losses.distillation import DISTILLATION_LOSSES
from hf_transfer_ext.losses.hidden import HIDDEN_LOSSES
from hf_transfer_ext.losses.spans import SPAN_LOSSES
from hf_transfer_ext.losses.unlearning import RETAIN_LOSSES, UNLEARNING_LOSSES
from hf_transfer_ext.losses.unlearning.methods import METHODS as UNLEARNING_METHODS
from hf_transfer_ext.merging.methods import MERGE_METHODS
from hf_transfer_ext.recipes import RECIPES
from hf_transfer_ext.students import STUDENT_INITS

ROOT = Path(hf_transfer_ext.__file__).parent
REGISTRIES = {
    "losses/distillation": [DISTILLATION_LOSSES],
    "losses/hidden": [HIDDEN_LOSSES],
    "losses/spans": [SPAN_LOSSES],
    "losses/unlearning": [UNLEARNING_LOSSES, RETAIN_LOSSES],
    "losses/unlearning/methods": [UNLEARNING_METHODS],
    "merging/methods": [MERGE_METHODS],
    "evals/metrics": [METRICS, COMPARISONS],
    "evals/audit/attacks": [ATTACKS],
    "evals/audit/membership": [MEMBERSHIP_ATTACKS],
    "evals/suites": [SUITES],
    "students": [STUDENT_INITS],
}
METHODS = [
    (folder, name, function)
    for folder, registries in REGISTRIES.items()
    for registry in registries
    for name, function in registry.items()
]


#: Rooms from the ground up: each may import from those before it, and from none behind it.
FLOORS = [
    "registry", "tensors", "files", "reading", "measurement", "settings", "recipe",
    "weights", "data", "models", "losses", "teachers", "students", "trainers",
    "evals", "hub", "adapters", "merging", "testing", "recipes",
    "catalogue", "doctor", "cli", "__main__",
]  # fmt: skip


def imports_of(path: Path) -> set[str]:
    """Modules of this package that a file imports, wherever in the file, as dotted paths below the package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:  # relative: resolved from the file's own folder
                above = path.relative_to(ROOT.parent).parent.parts
                module = ".".join([*above[: len(above) - node.level + 1], *filter(None, [node.module])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node.value.startswith("hf_transfer_ext.")
        ):
            if all(part.isidentifier() for part in node.value.split(".")):
                found.add(node.value)  # given to import_module
    return {name.removeprefix("hf_transfer_ext.") for name in found if name.startswith("hf_transfer_ext.")}


def room_imports(top: Path) -> dict[str, dict[str, str]]:
    """room -> (room that it imports -> the file that does), over the folders and files right under `top`."""
    prefix = ".".join(top.relative_to(ROOT).parts)
    rooms: dict[str, dict[str, str]] = {}
    for path in sorted(top.rglob("*.py")):
        room = path.relative_to(top).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for name in imports_of(path):
            if prefix and not name.startswith(f"{prefix}."):
                continue
            other = name.removeprefix(f"{prefix}." if prefix else "").split(".")[0]
            if other != room and ((top / other).is_dir() or (top / f"{other}.py").is_file()):
                rooms.setdefault(room, {})[other] = str(path.relative_to(ROOT))
    return rooms


def test_every_room_has_its_floor():
    rooms = {p.name.removesuffix(".py") for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert rooms - {"__init__"} == set(FLOORS)


def test_no_import_runs_upwards():
    upwards = [
        f"{file} imports {other}, which stands above {room}"
        for room, imports in room_imports(ROOT).items()
        for other, file in imports.items()
        if FLOORS.index(other) > FLOORS.index(room)
    ]
    assert not upwards, "\n".join(upwards)


@pytest.mark.parametrize(
    "folder", sorted({p.parent.parent for p in ROOT.rglob("__init__.py")} - {ROOT.parent}), ids=lambda p: p.name
)
def test_folders_beside_each_other_have_an_order(folder):
    """Inside a room, too: no circle among its folders."""
    graph = {room: set(others) for room, others in room_imports(folder).items() if (folder / room).is_dir()}
    graph = {room: {other for other in others if (folder / other).is_dir()} for room, others in graph.items()}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"{folder.name}: {' -> '.join(error.args[1])} is a circle of imports")


@pytest.mark.parametrize("folder, name, function", METHODS, ids=[f"{f}/{n}" for f, n, _ in METHODS])
def test_a_method_lies_in_the_file_of_its_name_and_gives_its_source(folder, name, function):
    assert (ROOT / folder / f"{name}.py").is_file()
    module = import_module(f"hf_transfer_ext.{folder.replace('/', '.')}.{name}")
    assert getattr(module, name) is function
    source = function.__doc__.partition("Source: ")[2]
    assert "https://" in source or "this package's own" in source


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_says_what_it_is_for(path):
    text = path.read_text(encoding="utf-8")
    is_method = path.stem in {name for _, name, _ in METHODS}
    assert text == "" or is_method or text.lstrip("r").startswith('"""'), f"{path.name} has no docstring"


def test_recipes_are_short():
    recipes = sorted((ROOT / "recipes").glob("*.py"))
    texts = {path.name: path.read_text(encoding="utf-8") for path in recipes}
    lengths = {name: len(text.splitlines()) for name, text in texts.items()}
    assert len(lengths) >= 6 and all(length <= 120 for length in lengths.values()), lengths
    assert not [name for name, text in texts.items() if "fmt: " in text]


def test_every_recipe_has_its_script_in_the_clone():
    scripts = {path.name for path in (ROOT.parent / "recipes").glob("*.py")}
    assert scripts == {f"{name}.py" for name in RECIPES}
    for name in RECIPES:
        assert (ROOT / "recipes" / f"{name}.py").is_file()


def test_ruff_and_mypy_have_nothing_to_say():
    for command in (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]):
        run = subprocess.run([sys.executable, "-m", *command], cwd=ROOT.parent, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("code", ["import hf_transfer_ext", "import hf_transfer_ext.cli as c; c.main(['--help'])"])
def test_imports_stay_light(code):
    check = "; assert not {'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules), 'heavy import'"
    run = subprocess.run([sys.executable, "-c", f"import sys; {code}{check}"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_every_exported_name_is_there():
    for name in hf_transfer_ext.__all__:
        assert getattr(hf_transfer_ext, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hf_transfer_ext.nothing
