"""What is done to a loaded model from outside leaves no trace."""

import copy
import types

import pytest
import torch
from models.test_heads import Odd, families
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny import tiny_llama

from hf_transfer_ext.models.plumbing import (
    active_adapter,
    evaluation_mode,
    head_is_understood,
    hidden_states,
    is_sharded,
    output_head,
    pad_token_id,
    probing,
)

IDS = torch.tensor([[5, 7, 9, 11]])


def two_adapters():
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, init_lora_weights=False), adapter_name="one")
    model.add_adapter("two", LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "lm_head"]))
    return model


def state(model):
    return list(model.active_adapters), model.active_adapter, [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("adapter", ["one", "two", "base", None])
@pytest.mark.parametrize("active", [["one"], ["two"], ["one", "two"]])
def test_switching_an_adapter_leaves_no_trace_even_after_an_error(adapter, active):
    model = two_adapters()
    model.base_model.set_adapter(active)
    next(model.parameters()).requires_grad_(True)  # a choice of the user that PEFT knows nothing of
    before, logits = state(model), model(IDS).logits
    with pytest.raises(RuntimeError, match="inside"), active_adapter(model, adapter):
        inside = model(IDS).logits
        raise RuntimeError("inside")
    assert state(model) == before and torch.equal(model(IDS).logits, logits)
    assert torch.equal(inside, logits) == (adapter is None or [adapter] == active)
    if adapter == "base":
        torch.testing.assert_close(inside, tiny_llama()(IDS).logits)


def test_prompt_learning_adapters_are_switched_off_as_well():
    model = get_peft_model(tiny_llama(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).eval()
    with active_adapter(model, "base"):
        assert model(input_ids=IDS).logits.shape[1] == 4
    assert model(input_ids=IDS).logits.shape[1] == 7


def test_an_adapter_that_is_not_there():
    with pytest.raises(ValueError, match=r"Unknown adapter 'thre'.* Available: base, one, two"):
        active_adapter(two_adapters(), "thre").__enter__()
    with pytest.raises(ValueError, match="LlamaForCausalLM is not a PeftModel"):
        active_adapter(tiny_llama(), "base").__enter__()


def test_evaluation_mode_gives_every_module_its_own_flag_back():
    model, other = tiny_llama().train(), tiny_llama()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError), evaluation_mode(model, None, other):
        assert not any(module.training for module in model.modules())
        raise RuntimeError
    assert [module.training for module in model.modules()] == before and not other.training


@pytest.mark.parametrize("plain", [True, False])
def test_the_try_of_a_head_leaves_no_trace(plain):
    model = tiny_llama(attention_dropout=0.5).train()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    assert head_is_understood(model, plain=plain)
    assert torch.equal(torch.rand(4), expected) and model.training and model.model.layers[0].training


def test_probing_restores_the_random_state():
    model = tiny_llama()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with probing(model):
        assert not torch.is_grad_enabled()
        torch.rand(5)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("model", families(), ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_and_head_are_the_models_logits_in_every_dtype(model, dtype):
    model = copy.deepcopy(model).to(dtype).eval()
    hidden, output = hidden_states(model, input_ids=IDS)
    assert output.logits.shape[-1] == 1
    expected = model(IDS).logits.float()
    torch.testing.assert_close(
        output_head(model)(hidden[0]), expected[0], atol=1e-2 * expected.abs().max().item(), rtol=0
    )
    assert head_is_understood(model) and head_is_understood(model, plain=False)


def test_an_adapted_head_is_understood_but_not_plain():
    model = two_adapters()
    model.set_adapter("two")
    assert head_is_understood(model, plain=False) and not head_is_understood(model)


def test_a_family_with_its_own_way_is_not_understood():
    model = Odd(tiny_llama().config)
    assert not head_is_understood(model, plain=False) and not head_is_understood(model)


def test_logits_cut_to_fewer_entries_are_not_understood():
    class Cut(type(tiny_llama())):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.logits = outputs.logits[..., :100]
            return outputs

    assert not head_is_understood(Cut(tiny_llama().config))


@pytest.mark.parametrize("pad, eos, expected", [(7, 5, 7), (0, 5, 0), (None, 5, 5), (None, 0, 0), (None, None, 0)])
def test_the_padding_token_is_its_own_or_the_end_of_sequence(pad, eos, expected):
    assert pad_token_id(types.SimpleNamespace(pad_token_id=pad, eos_token_id=eos)) == expected


def test_sharding_is_told_by_parameters_or_by_what_will_shard_them():
    model = tiny_llama()
    assert not is_sharded(model) and not is_sharded()
    model.lm_head.weight.ds_id = 1  # any of them: some may be whole for now
    assert is_sharded(model)
