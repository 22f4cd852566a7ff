"""Promises of the layout, kept by listing files: no exclude lists, so a new method cannot slip by."""

import ast
import subprocess
import sys
from collections.abc import Callable
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import hf_transfer_ext
from hf_transfer_ext.adapters.transfer.methods import TRANSFER_METHODS
from hf_transfer_ext.data.selection import SELECTIONS
from hf_transfer_ext.edits.methods import EDITS
from hf_transfer_ext.evals.audit.attack import ACCESS
from hf_transfer_ext.evals.audit.attacks import ATTACKS
from hf_transfer_ext.evals.audit.membership import MEMBERSHIP_ATTACKS
from hf_transfer_ext.evals.baselines import BASELINES
from hf_transfer_ext.evals.metric import Metric
from hf_transfer_ext.evals.metrics import COMPARISONS, METRICS
from hf_transfer_ext.evals.suites import SUITES
from hf_transfer_ext.losses.distillation import DISTILLATION_LOSSES
from hf_transfer_ext.losses.hidden import HIDDEN_LOSSES
from hf_transfer_ext.losses.needs import UNITS, unit_of
from hf_transfer_ext.losses.spans import SPAN_LOSSES
from hf_transfer_ext.losses.unlearning import RETAIN_LOSSES, UNLEARNING_LOSSES
from hf_transfer_ext.losses.unlearning.methods import METHODS as UNLEARNING_METHODS
from hf_transfer_ext.losses.vectors import VECTOR_LOSSES
from hf_transfer_ext.merging.methods import MERGE_METHODS
from hf_transfer_ext.recipes import RECIPES
from hf_transfer_ext.registry import Registry
from hf_transfer_ext.students import STUDENT_INITS
from hf_transfer_ext.trainers.on_policy import ON_POLICY_METHODS
from hf_transfer_ext.trainers.tasks import TASKS

ROOT = Path(hf_transfer_ext.__file__).parent
TESTS = Path(__file__).parent
#: Folders in which every file is one method: folder -> (its registries, whether a function states its unit).
METHOD_FOLDERS: dict[str, tuple[list[Registry], Callable[[Any], bool]]] = {
    "losses/distillation": ([DISTILLATION_LOSSES], lambda f: "Returns:" in f.__doc__),
    "losses/hidden": ([HIDDEN_LOSSES], lambda f: "Returns:" in f.__doc__),
    "losses/spans": ([SPAN_LOSSES], lambda f: "Returns:" in f.__doc__),
    "losses/vectors": ([VECTOR_LOSSES], lambda f: "Returns:" in f.__doc__),
    "losses/unlearning": ([UNLEARNING_LOSSES, RETAIN_LOSSES], lambda f: unit_of(f) in UNITS),
    "losses/unlearning/methods": ([UNLEARNING_METHODS], lambda f: f.forget in UNLEARNING_LOSSES),
    "merging/methods": ([MERGE_METHODS], lambda f: f.unit in ("element", "row", "matrix")),
    "adapters/transfer/methods": ([TRANSFER_METHODS], lambda f: "Returns:" in f.__doc__),
    "data/selection": ([SELECTIONS], lambda f: "Returns:" in f.__doc__),
    "edits/methods": ([EDITS], lambda f: "Returns:" in f.__doc__ or "Yields:" in f.__doc__),
    "evals/metrics": ([METRICS, COMPARISONS], lambda f: bool(f.unit) if isinstance(f, Metric) else True),
    "evals/audit/attacks": ([ATTACKS], lambda f: f.access in ACCESS),
    "evals/audit/membership": ([MEMBERSHIP_ATTACKS], lambda f: "higher" in f.__doc__ or "score" in f.__doc__.lower()),
    "evals/suites": ([SUITES], lambda f: True),
    "evals/baselines": ([BASELINES], lambda f: "Returns:" in f.__doc__),
    "students/inits": ([STUDENT_INITS], lambda f: True),
    "trainers/tasks": ([TASKS], lambda f: f.kind().pipeline_tag),
    "trainers/on_policy": ([ON_POLICY_METHODS], lambda f: 0 <= f.default_share <= 1),
}
METHODS = [
    (folder, name, function)
    for folder, (registries, _) in METHOD_FOLDERS.items()
    for registry in registries
    for name, function in registry.items()
]
METHOD_FILES = [
    (folder, path)
    for folder in METHOD_FOLDERS
    for path in sorted((ROOT / folder).glob("*.py"))
    if path.name != "__init__.py"
]


def problems_of(path: Path, registries: list[Registry], has_unit: Callable[[Any], bool], tests: Path) -> list[str]:
    """What keeps a file of a method folder from being a method that can be found, trusted and tested."""
    found = [registry[path.stem] for registry in registries if path.stem in registry]
    if len(found) != 1:
        return [f"{path.stem} is in {len(found)} registries"]
    function, problems = found[0], []
    defined = {
        node.name for node in ast.parse(path.read_text()).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }
    if path.stem not in defined:
        problems.append(f"{path.name} does not define {path.stem}")
    source = (function.__doc__ or "").partition("Source: ")[2]
    if "https://" not in source and "this package's own" not in source:
        problems.append(f"{path.stem} gives no source")
    if not has_unit(function):
        problems.append(f"{path.stem} gives no unit")
    test = tests / f"test_{path.name}"
    if not test.is_file() or "def test_" not in test.read_text():
        problems.append(f"{path.stem} has no tests in {test.name}")
    return problems


#: Rooms from the ground up: each may import from those before it, and from none behind it.
FLOORS = [
    "registry", "tensors", "files", "reading", "measurement", "launch", "progress", "settings", "recipe",
    "weights", "data", "hub", "models", "losses", "teachers", "students", "trainers", "trl",
    "evals", "adapters", "merging", "edits", "testing", "recipes", "export", "reproduce",
    "catalogue", "doctor", "cli", "__main__", "moved",
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


@pytest.mark.parametrize("folder, path", METHOD_FILES, ids=[f"{f}/{p.stem}" for f, p in METHOD_FILES])
def test_every_file_of_a_method_folder_is_a_method(folder, path):
    assert problems_of(path, *METHOD_FOLDERS[folder], TESTS / folder) == []


@pytest.mark.parametrize("folder, name, function", METHODS, ids=[f"{f}/{n}" for f, n, _ in METHODS])
def test_every_registered_method_is_in_the_file_of_its_name(folder, name, function):
    module = import_module(f"hf_transfer_ext.{folder.replace('/', '.')}.{name}")
    assert getattr(module, name) is function


def test_the_check_of_files_finds_each_fault(tmp_path):
    """A file without a registry entry, a source, a unit or a test fails; so does one that defines something else."""

    def mine(x):
        """Doubles x. Source: this package's own."""

    path, test = tmp_path / "mine.py", tmp_path / "test_mine.py"
    path.write_text("def mine(x): ...")
    test.write_text("def test_it(): ...")
    registry = Registry("method", [mine])
    assert problems_of(path, [registry], lambda f: True, tmp_path) == []
    assert problems_of(path, [Registry("method")], lambda f: True, tmp_path) == ["mine is in 0 registries"]
    assert problems_of(path, [registry], lambda f: False, tmp_path) == ["mine gives no unit"]
    test.write_text("")
    assert problems_of(path, [registry], lambda f: True, tmp_path) == ["mine has no tests in test_mine.py"]
    test.unlink()
    assert problems_of(path, [registry], lambda f: True, tmp_path) == ["mine has no tests in test_mine.py"]
    test.write_text("def test_it(): ...")
    mine.__doc__ = "Doubles x."
    path.write_text("def other(x): ...")
    found = problems_of(path, [registry], lambda f: True, tmp_path)
    assert found == ["mine.py does not define mine", "mine gives no source"]


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
