import pytest
import torch
from evals.audit.planted_people import DATA, FORGET, planted, subject
from tiny import tiny_llama

from hf_transfer_ext.evals.audit.attacks.logit_lens import logit_lens, probability_by_layer


@pytest.fixture(scope="module")
def deeper():
    """The original with a random layer between its own last one and the head."""
    model = tiny_llama(seed=5, num_hidden_layers=3)
    model.load_state_dict(planted()[0].state_dict(), strict=False)
    model.model.layers[2].mlp.down_proj.weight.data.mul_(30.0)
    return model


def test_what_the_last_layer_spoils_is_read_before_it(deeper):
    original = subject(planted()[0])
    assert subject(deeper).probability(DATA.forget).max() < 0.3
    assert logit_lens(subject(deeper), DATA) == pytest.approx(original.probability(DATA.forget), abs=1e-5)
    assert logit_lens(subject(planted()[2]), DATA).mean() < 0.2


def test_each_layer_is_one_number(deeper):
    with torch.no_grad():
        assert probability_by_layer(subject(deeper), FORGET[0]).shape == (2,)
        with pytest.raises(ValueError, match="one layer"):
            logit_lens(subject(tiny_llama(num_hidden_layers=1)), DATA)
