import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama
from torch import nn
from transformers import (  # fmt: skip
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
)

from hf_transfer_ext.models.heads import (
    LMHead,
    LogitFinish,
    causal_lm_of,
    head_module,
    head_of,
    head_replaced,
)
from hf_transfer_ext.models.plumbing import head_is_understood

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
IDS = torch.tensor([[5, 7, 9, 11]])


def families():
    torch.manual_seed(0)
    yield tiny_llama()
    yield GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2))
    yield Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=2.0))
    yield CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.3))
    yield GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0))


@pytest.mark.parametrize("model", families(), ids=lambda m: type(m).__name__)
def test_the_described_head_gives_the_models_logits(model):
    model.eval()
    assert head_is_understood(model)
    hidden = model.base_model(IDS).last_hidden_state
    torch.testing.assert_close(head_of(model).logits(hidden), model(IDS).logits)


def test_a_family_that_treats_its_logits_in_its_own_way_is_noticed():
    class Odd(type(tiny_llama())):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.logits = outputs.logits.sin()
            return outputs

    assert not head_is_understood(Odd(tiny_llama().config))


def test_the_model_inside_wrappers():
    model = tiny_llama()
    adapted = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["lm_head"]))
    assert causal_lm_of(model) is model
    assert causal_lm_of(torch.nn.DataParallel(adapted)) is adapted.get_base_model()
    assert not head_is_understood(adapted)
    with pytest.raises(ValueError, match="A plain linear head is needed"):
        head_of(adapted)
    with pytest.raises(ValueError, match="a causal language model is needed"):
        head_module(nn.Linear(2, 2))


def test_a_replaced_head_is_put_back_even_after_an_error():
    head = nn.Linear(3, 5)
    x = torch.ones(1, 3)
    with pytest.raises(RuntimeError), head_replaced(head, lambda hidden: hidden * 2):
        assert torch.equal(head(x), 2 * x)
        raise RuntimeError
    assert head(x).shape == (1, 5) and "forward" not in vars(head)


def test_scale_comes_before_the_cap():
    head = LMHead(torch.eye(2), torch.tensor([1.0, 0.0]), LogitFinish(scale=3.0, softcap=2.0))
    expected = 2.0 * torch.tanh(torch.tensor([[3.0 * 1.5, 3.0 * 0.25]]) / 2.0)
    torch.testing.assert_close(head.logits(torch.tensor([[0.5, 0.25]])), expected)
    assert head.vocab_size == 2
