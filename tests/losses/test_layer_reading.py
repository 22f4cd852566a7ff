"""A loss inside the network states what it reads; one that does not is refused at registration."""

import pytest

from hf_transfer_ext.losses.hidden import HIDDEN_LOSSES
from hf_transfer_ext.losses.layer_reading import default_weight, hidden_options, reading_of, reads


def test_each_loss_states_what_it_reads_and_its_options():
    assert reading_of(HIDDEN_LOSSES["hidden_mse"]) == "states"
    assert hidden_options(HIDDEN_LOSSES["attention_relation"]) == ["heads", "relative"]  # causal follows from models
    assert all(reading_of(loss) for _, loss in HIDDEN_LOSSES.items())
    small = {name for name, loss in HIDDEN_LOSSES.items() if default_weight(loss) != 1}
    assert small == {"minilm", "attention_relation"} and default_weight(HIDDEN_LOSSES["minilm"]) == 0.1


def test_a_loss_that_states_nothing_or_something_unknown_is_refused():
    def mine(student, teacher, mask):
        """Source: none."""

    with pytest.raises(ValueError, match="'mine' does not state what it reads of a layer"):
        HIDDEN_LOSSES.register(mine)
    with pytest.raises(ValueError, match=r"Unknown reading of a layer 'state'\. Did you mean 'states'"):
        reads("state")
