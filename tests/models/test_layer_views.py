"""What layers compute, read without a change: against the model's own hidden states and attention."""

import pytest
import torch
from tiny import tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_transfer_ext.models.layer_views import EMBEDDINGS, FEATURES, layers_viewed

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=3, n_head=2)).eval()


@pytest.mark.parametrize("make", [lambda: tiny_llama(1, num_hidden_layers=3), gpt2], ids=["llama", "gpt2"])
def test_views_are_the_models_own_hidden_states(make):
    model = make()
    with layers_viewed(model, [EMBEDDINGS, 0, 1, FEATURES]) as found:
        output = model(IDS, output_hidden_states=True)
    torch.testing.assert_close(found[EMBEDDINGS].states, output.hidden_states[0])
    torch.testing.assert_close(found[1].states, output.hidden_states[2])
    torch.testing.assert_close(model.lm_head(found[FEATURES].states), output.logits)
    assert set(found) == {EMBEDDINGS, FEATURES, 0, 1} and found[0].query is None
    before = found[0].states
    model(IDS + 1)
    assert found[0].states is before  # nothing is read behind the block


@pytest.mark.parametrize("make", [lambda: tiny_llama(1, num_hidden_layers=3), gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_scores_give_the_models_own_attention(make, attention):
    model = make()
    model.set_attn_implementation("eager")
    attentions = model(IDS, output_attentions=True).attentions
    model.set_attn_implementation(attention)
    logits = model(IDS).logits
    with layers_viewed(model, [1], attention=[1]) as found:
        torch.testing.assert_close(model(IDS).logits, logits)
    later = torch.ones(4, 4, dtype=torch.bool).triu(1)
    own = found[1].scores().masked_fill(later, -torch.inf).softmax(-1)
    torch.testing.assert_close(own, attentions[1])
    assert "eager" not in ALL_ATTENTION_FUNCTIONS and not ALL_ATTENTION_FUNCTIONS._local_mapping


def test_the_attention_functions_are_restored_after_an_error():
    with pytest.raises(RuntimeError), layers_viewed(tiny_llama(1), [0], attention=[0]):
        raise RuntimeError
    assert not ALL_ATTENTION_FUNCTIONS._local_mapping
