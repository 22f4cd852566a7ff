"""`docs/setups.md` claims nothing that no test shows."""

import ast
import re
from pathlib import Path

import pytest

from hf_transfer_ext.recipe import CONFIGS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "setups.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE)))
STATES = ("CI", "slow", "not run on a GPU yet", "not supported")


def marked_slow(path, name):
    """Whether a test, or its whole file, is marked slow."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    whole = any(isinstance(node, ast.Assign) and "mark.slow" in ast.unparse(node) and "pytestmark" in ast.unparse(node)
                for node in tree.body)  # fmt: skip
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name]
    marks = [ast.unparse(mark) for function in functions for mark in function.decorator_list]
    return whole or "pytest.mark.slow" in marks


@pytest.mark.parametrize("file, name", NAMED)
def test_every_named_test_is_there(file, name):
    path = ROOT / file
    assert path.is_file(), file
    functions = {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
    assert name in functions if name else any(one.startswith("test_") for one in functions)


def tables():
    """(set-up, job, cell) of the tables whose first column is the set-up."""
    found, header = [], []
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if cells and cells[0] == "set-up":
            header = cells
        elif not cells:
            header = []
        elif header and not set(line) <= set("|-"):
            found += [(cells[0], job, cell) for job, cell in zip(header[1:], cells[1:], strict=True)]
    return found


def test_every_cell_has_a_state_and_a_claim_has_its_test():
    cells = tables()
    assert len(cells) > 40
    for setup, job, cell in cells:
        parts = cell.split("; slow: ")
        assert cell.startswith(STATES), f"{setup}, {job}: {cell!r}"
        if cell.startswith("not supported"):
            assert cell.startswith("not supported: "), f"{setup}, {job}: no reason"
        for number, part in enumerate(parts):
            state = "slow" if number else part.split(":")[0].split(";")[0]
            tests = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", part)
            if state in ("CI", "slow"):
                assert tests, f"{setup}, {job}: {state} names no test"
                for file, name in tests:
                    assert not name or marked_slow(ROOT / file, name) == (state == "slow"), f"{setup}, {job}: {name}"


def test_every_configuration_has_a_row_for_every_job():
    configurations = {path.stem for path in (CONFIGS / "accelerate").glob("*.yaml")}
    jobs = {job for _, job, _ in tables()}
    assert {"distill", "unlearn", "evaluate", "audit", "merge", "transfer", "cache-teacher"} <= jobs
    for job in jobs:
        named = {name for setup, other, _ in tables() if other == job for name in re.findall(r"`(\w+)`", setup)}
        assert named == configurations, f"{job}: {named ^ configurations}"
