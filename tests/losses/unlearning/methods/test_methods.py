"""What every published method keeps; a new file in `methods/` joins by itself."""

import ast
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest
import torch

from hf_transfer_ext.losses.unlearning import RETAIN_LOSSES, UNLEARNING_LOSSES, methods
from hf_transfer_ext.losses.unlearning.methods import METHODS
from hf_transfer_ext.losses.unlearning_method import Method, Progress, method_from_options, norm
from hf_transfer_ext.registry import Registry

FILES = sorted(Path(methods.__file__).parent.glob("[!_]*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_method_lies_in_the_file_of_its_name(path):
    method = METHODS[path.stem]
    assert getattr(import_module(f"{methods.__name__}.{path.stem}"), path.stem) is method
    classes = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
    assert [name for name in classes if not name.startswith("_")] == [path.stem]


def test_every_method_has_a_file():
    assert set(METHODS) == {path.stem for path in FILES}


@pytest.mark.parametrize("name", METHODS)
def test_its_text_says_what_it_is_when_to_use_it_and_where_it_comes_from(name):
    doc = METHODS[name].__doc__
    assert ".. math::" in doc and "When to use it:" in doc
    assert "https://" in doc.partition("Source: ")[2]


@pytest.mark.parametrize("name", METHODS)
def test_it_uses_registered_losses_and_weights_that_do_something(name):
    method = METHODS[name]
    assert method.forget in UNLEARNING_LOSSES and (method.retain is None or method.retain in RETAIN_LOSSES)
    made = method()
    gamma, alpha = made.weights(method.gamma, method.alpha, Progress(0.0, 0.0), made.start())
    assert gamma > 0 and alpha >= 0
    assert set(made.learn(made.start(), {"forget": 1.0, "retain": 1.0}, Progress(1.0, 9.0))) == set(made.start())


class LikeNpo(Method):
    """A method of somebody else's."""

    forget = "npo"


def test_outside_code_registers_its_own():
    registry = Registry("unlearning method", check=METHODS._check)
    assert registry.register(LikeNpo) is LikeNpo is registry["LikeNpo"]
    assert LikeNpo().start() == {} and not LikeNpo.has_own_step()


class Unknown(Method):
    forget = "npoo"


class UnknownRetain(Method):
    forget = "npo"
    retain = "retain_nl"


class Nothing(Method):
    retain = "retain_nll"


class BadOptions(Method):
    forget = "npo"
    forget_options = {"beta": 0.0}  # noqa: RUF012


class Elsewhere(Method):
    forget = "dpo"
    alternatives = "made up"


@dataclass(frozen=True)
class WithoutDefault(Method):
    forget = "npo"
    rho: float


class NotADataclass(Method):
    forget = "npo"
    rho: float = 1.0


@pytest.mark.parametrize(
    "method, message",
    [
        (Unknown, "'Unknown': Unknown unlearning loss 'npoo'. Did you mean 'npo'"),
        (UnknownRetain, "Unknown retain loss 'retain_nl'. Did you mean 'retain_nll'"),
        (Nothing, "has to name its forget loss"),
        (BadOptions, "`beta` must be > 0"),
        (Elsewhere, "Unknown source of alternatives 'made up'"),
        (WithoutDefault, "needs a default"),
        (NotADataclass, "Mark the unlearning method"),
        (len, "has to be a subclass of `Method`"),
    ],
)
def test_the_registry_refuses_what_the_trainer_could_not_use(method, message):
    with pytest.raises(ValueError, match=message):
        METHODS.register(method)
    assert method.__name__ not in METHODS


def test_options_are_the_fields_of_the_class():
    assert method_from_options(METHODS["npo_sam"], {"rho": 0.5}).rho == 0.5
    with pytest.raises(ValueError, match=r"Unknown option of npo 'rho'\..* \(it has none\)"):
        method_from_options(METHODS["npo"], {"rho": 0.5})


def test_the_norm_is_that_of_all_tensors_together():
    assert norm([torch.tensor([[3.0]]), torch.tensor([0.0, 4.0])]).item() == pytest.approx(5.0)
