"""The tests check the types of functions at each call, also of files that name torch under `if TYPE_CHECKING` only."""

import sys

import jaxtyping
import pytest
import torch

from hf_transfer_ext.merging.arithmetic.changes import elect_sign, one_for_zero
from hf_transfer_ext.merging.arithmetic.noise import Noise
from hf_transfer_ext.merging.methods.linear import linear

needs_the_hook = pytest.mark.skipif(
    not any(type(finder).__module__.startswith("jaxtyping") for finder in sys.meta_path),
    reason="the tests run without --jaxtyping-packages",
)


@needs_the_hook
@pytest.mark.parametrize(
    "call",
    [
        lambda: linear.function(None, [torch.zeros(3, dtype=torch.int32)], weight=[1.0]),
        lambda: Noise().keep(0, 3, 0.5),
        lambda: elect_sign(torch.zeros(3)),
        lambda: one_for_zero([1.0]),
    ],
)
def test_types_for_type_checkers_are_checked(call):
    with pytest.raises(jaxtyping.TypeCheckError):
        call()
