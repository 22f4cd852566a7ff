import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama
from torch import nn
from transformers import (  # fmt: skip
    AutoModelForCausalLM,
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
    logit_finish,
    own_forward,
    run_to_head,
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


class Odd(type(tiny_llama())):
    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits.sin()
        return outputs


def test_a_family_that_treats_its_logits_in_its_own_way_is_noticed():
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


def test_what_stood_in_the_instance_is_put_back():
    head = nn.Linear(3, 5)
    own = lambda hidden: type(head).forward(head, hidden) + 1  # noqa: E731
    head.forward = own
    x = torch.ones(1, 3)
    expected = head(x)
    with head_replaced(head, lambda hidden: own_forward(head)(hidden) * 2):
        torch.testing.assert_close(head(x), 2 * expected)
        assert own_forward(head) is own
    assert head.forward is own and own_forward(head) is head


def offloaded(folder):
    """A model whose head accelerate brings from the disk for each forward."""
    tiny_llama(2).save_pretrained(folder / "model")
    return AutoModelForCausalLM.from_pretrained(
        folder / "model", device_map={"model": "cpu", "lm_head": "disk"}, offload_folder=str(folder / "offload")
    )


def test_a_head_on_the_disk_is_entered_through_its_hook(tmp_path):
    model, plain = offloaded(tmp_path), tiny_llama(2)
    assert model.lm_head.weight.is_meta
    before = model(IDS).logits
    seen = []

    def read(hidden):
        seen.append((head_of(model).logits(hidden), own_forward(head_module(model))(hidden)))

    run_to_head(model, read, input_ids=IDS)
    for logits in seen[0]:
        torch.testing.assert_close(logits, plain(IDS).logits)
    assert torch.equal(model(IDS).logits, before) and model.lm_head.weight.is_meta
    assert head_is_understood(model) and head_is_understood(model, plain=False)


def test_hooks_on_a_head_run_and_one_that_changes_its_output_is_noticed():
    model, calls = tiny_llama(), []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: calls.append(1))
    assert head_is_understood(model) and calls
    handle.remove()
    model.lm_head.register_forward_hook(lambda module, args, output: output * 0.5)
    assert not head_is_understood(model) and not head_is_understood(model, plain=False)


def test_run_to_head_builds_no_logits_and_lets_a_stand_in_through():
    model = tiny_llama()
    output = run_to_head(model, lambda hidden: None, input_ids=IDS)
    assert output.logits.shape == (1, 4, 1)
    output = run_to_head(model, lambda hidden: hidden[..., :2] * 0, input_ids=IDS)
    assert output.logits.shape == (1, 4, 2) and "forward" not in vars(model.lm_head)


class Config:
    def __init__(self, model_type="llama", **fields):
        self.model_type = model_type
        vars(self).update(fields)


class Model:
    def __init__(self, config):
        self.config = config


@pytest.mark.parametrize(
    "config, scale, softcap",
    [
        (Config(), 1.0, None),
        (Config(final_logit_softcapping=30.0), 1.0, 30.0),
        (Config(output_logit_soft_cap=20.0), 1.0, 20.0),  # xLSTM
        (Config(logits_soft_cap=10.0), 1.0, 10.0),  # RecurrentGemma
        (Config(output_multiplier=0.25, final_logit_softcapping=30.0), 0.25, 30.0),
        (Config(lm_head_multiplier=0.5), 0.5, None),
        (Config("granite", logits_scaling=4.0), 0.25, None),
        (Config("hyperclovax", logits_scaling=4.0), 4.0, None),
        (Config("minicpm3", logits_scaling=4.0), 1.0, None),
    ],
)
def test_every_scale_and_soft_cap_field_is_known(config, scale, softcap):
    assert logit_finish(Model(config)) == LogitFinish(scale, softcap)
