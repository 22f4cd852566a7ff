import subprocess
import sys
from importlib import import_module

import pytest

import hf_transfer_ext
from hf_transfer_ext.moved import MOVED, MovedModules


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_gives_the_module_that_took_its_place(old):
    name = f"hf_transfer_ext.{old}"
    sys.modules.pop(name, None)
    with pytest.warns(DeprecationWarning, match=rf"{name} is now hf_transfer_ext\.{MOVED[old]}"):
        found = import_module(name)
    assert found is import_module(f"hf_transfer_ext.{MOVED[old]}")


def test_names_are_imported_from_it_in_every_form():
    code = """
from hf_transfer_ext.heads import LMHead
from hf_transfer_ext.merging import stream
import hf_transfer_ext.checkpoints as checkpoints
from hf_transfer_ext.evals.engine import evaluate
import hf_transfer_ext.models.heads as heads
assert LMHead is heads.LMHead and heads.__name__ == "hf_transfer_ext.models.heads"
assert stream.__name__.endswith("streaming.stream") and checkpoints.write_checkpoint and callable(evaluate)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_it_is_installed_once_and_other_names_stay_unknown():
    from hf_transfer_ext.moved import install

    install()
    assert sum(isinstance(finder, MovedModules) for finder in sys.meta_path) == 1
    with pytest.raises(ModuleNotFoundError):
        import_module("hf_transfer_ext.nothing")
    assert hf_transfer_ext.__version__
