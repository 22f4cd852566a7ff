"""What holds for every transfer method: between a base and itself, transfer is the identity."""

import pytest
import torch
from adapters.transfer.pairs import SIZES, dense, twin

from hf_transfer_ext.adapters.transfer.method import transfer_method
from hf_transfer_ext.adapters.transfer.methods import TRANSFER_METHODS

#: Options under which a method promises the identity exactly, beside its defaults.
EXACT = {"ridge": {"regularization": 1e-9}}


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("name", TRANSFER_METHODS)
def test_between_a_base_and_itself_the_change_stays(name, kind):
    pair, expected = twin(kind)
    carried = TRANSFER_METHODS[name](pair, **EXACT.get(name, {}))
    torch.testing.assert_close(dense(carried), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", TRANSFER_METHODS)
def test_the_rank_stays_small_and_the_inputs_are_untouched(name):
    pair, _ = twin("q_proj")
    before = pair.source.clone(), pair.target.clone(), pair.change.left.clone(), pair.change.right.clone()
    carried = TRANSFER_METHODS[name](pair)
    assert carried.left.shape[1] == carried.right.shape[0] <= 2 * pair.change.left.shape[1]
    after = pair.source, pair.target, pair.change.left, pair.change.right
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("name", TRANSFER_METHODS)
def test_the_docstring_gives_formula_and_source(name):
    doc = TRANSFER_METHODS[name].__doc__
    assert ".. math::" in doc and "Returns:" in doc and "https://" in doc.partition("Source: ")[2]


def test_a_plain_function_is_refused_at_the_door():
    def mine(layer):
        return layer.change

    with pytest.raises(ValueError, match="Declare what it needs"):
        TRANSFER_METHODS.register(mine)
    with pytest.raises(ValueError, match="need of a transfer method 'activation'"):
        transfer_method(needs=("activation",))(mine)
    assert "mine" not in TRANSFER_METHODS
