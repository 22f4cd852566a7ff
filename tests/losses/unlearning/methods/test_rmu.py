import pytest
from losses.unlearning.methods.objective import objective

from hf_transfer_ext.losses.needs import needs_of
from hf_transfer_ext.losses.unlearning import RETAIN_LOSSES, UNLEARNING_LOSSES
from hf_transfer_ext.losses.unlearning.methods import METHODS


def test_by_hand():
    # Twice the direction is (1.2, 1.6): the squares .04 and .16, by two; on the retain set 1 and 0, by two.
    forget = {"hidden": [[1.0, 2.0]], "control": [0.6, 0.8]}
    retain = {"hidden": [[1.0, 1.0]], "reference_hidden": [[0.0, 1.0]]}
    assert objective("rmu", forget, retain) == pytest.approx(0.1 + 0.5)


def test_it_reads_hidden_states_on_both_sets():
    method = METHODS["rmu"]
    for loss in (UNLEARNING_LOSSES[method.forget], RETAIN_LOSSES[method.retain]):
        assert "hidden" in {need.name for need in needs_of(loss)}
