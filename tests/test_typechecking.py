"""The tests check the types of functions at each call, also of files that name torch under `if TYPE_CHECKING` only."""

import sys

import jaxtyping
import pytest
import torch
from typechecking import checked

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


def test_equal_functions_inside_functions_share_a_check_and_others_do_not():
    def stand_in(kind):
        def read(value): ...

        read.__annotations__ = {"value": kind}
        return read

    of_int, of_text = checked(stand_in(int)), checked(stand_in(str))
    assert checked(stand_in(int)) is of_int and checked(stand_in(str)) is of_text
    of_int(1)
    of_text("one")
    for check, wrong in ((of_int, "one"), (of_text, 1)):
        with pytest.raises(jaxtyping.TypeCheckError):
            check(wrong)
