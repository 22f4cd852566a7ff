import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama

from hf_transfer_ext.models.views import decoder_layers, hidden_states_changed, rounded, rounded_weights

IDS = torch.arange(1, 9)[None]


def test_by_hand():
    # Three bits: levels -3..3 in steps of a third of the largest weight.
    weight = torch.tensor([[0.9, -0.9, 0.31, 0.44, 0.46]])
    assert rounded(weight, 3, block=8).tolist()[0] == pytest.approx([0.9, -0.9, 0.3, 0.3, 0.6])


def test_each_block_has_its_own_scale_and_the_shape_stays():
    weight = torch.tensor([[8.0, 0.1, 0.02, 0.011, 0.02]])
    # In the second block one step is .02 / 7, and .011 is nearest to four of them.
    expected = [8.0, 0.0, 0.02, 4 * 0.02 / 7, 0.02]
    assert rounded(weight, 4, block=2).tolist()[0] == pytest.approx(expected, abs=1e-6)
    weight = torch.randn(6, 100)
    assert rounded(weight, 8).shape == (6, 100)
    assert (rounded(weight, 8) - weight).abs().max() < (rounded(weight, 4) - weight).abs().max() < 0.6


def by_hand_rounded(model, bits=4):
    """A copy in which every linear layer but the head is rounded."""
    copied = copy.deepcopy(model)
    for name, module in copied.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.data = rounded(module.weight.data, bits)
    return copied


def test_a_view_computes_as_a_rounded_copy_and_its_gradients_go_straight_through():
    model = tiny_llama()
    copied = by_hand_rounded(model)
    with rounded_weights(model, 4):
        logits = model(IDS).logits
        logits.square().mean().backward()
    torch.testing.assert_close(logits, copied(IDS).logits, atol=1e-4, rtol=1e-4)
    copied(IDS).logits.square().mean().backward()
    for (name, own), (_, other) in zip(model.named_parameters(), copied.named_parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, atol=1e-5, rtol=1e-3, msg=name)
    assert torch.equal(model(IDS).logits, tiny_llama()(IDS).logits)  # nothing stays


def adapted(**options):
    torch.manual_seed(1)
    settings = {"r": 4, "target_modules": ["q_proj", "down_proj", "lm_head"], "init_lora_weights": False, **options}
    return get_peft_model(tiny_llama(), LoraConfig(**settings))


def test_an_adapter_counts_as_merged_before_the_rounding():
    model = adapted(target_modules=["q_proj", "down_proj"])
    expected = by_hand_rounded(copy.deepcopy(model).merge_and_unload())(IDS).logits
    with rounded_weights(model, 4):
        torch.testing.assert_close(model(IDS).logits, expected, atol=1e-4, rtol=1e-4)
        with model.disable_adapter():  # then it is the base that is rounded
            plain = model(IDS).logits
    torch.testing.assert_close(plain, by_hand_rounded(tiny_llama())(IDS).logits, atol=1e-4, rtol=1e-4)


def test_the_head_stays_as_it_is_and_so_does_a_model_while_the_view_is_off():
    model = adapted(target_modules=["lm_head"])
    seen = []
    handle = model.base_model.model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with rounded_weights(model, 2):
        hidden = torch.randn(1, 3, 32)
        inside = model.base_model.model.lm_head(hidden)
    torch.testing.assert_close(inside, model.base_model.model.lm_head(hidden))
    handle.remove()
    with rounded_weights(model, 2, active=lambda: False):
        off = model(IDS).logits
    assert torch.equal(off, model(IDS).logits)


def test_an_adapter_that_is_not_added_to_the_weight_is_refused():
    from peft import IA3Config

    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), config)
    with pytest.raises(ValueError, match="is not a LoRA, so its weight cannot be rounded"):
        with rounded_weights(model, 4):
            pass


def test_the_output_of_a_layer_is_changed_within_the_block_only():
    model, seen = tiny_llama(), []
    model.model.layers[1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    before = model(IDS).logits
    with hidden_states_changed(model, 1, lambda hidden: hidden + 1.0):
        changed = model(IDS).logits
    torch.testing.assert_close(seen[1], seen[0] + 1.0)
    assert not torch.allclose(changed, before)
    assert torch.equal(model(IDS).logits, before)


def test_the_layers_are_found_through_an_adapter_and_a_model_without_them_is_refused():
    model = adapted()
    assert decoder_layers(model) is model.base_model.model.model.layers
    plain = tiny_llama()
    plain.config.num_hidden_layers = 3
    with pytest.raises(ValueError, match="has 0 lists of 3 modules in its decoder"):
        decoder_layers(plain)
