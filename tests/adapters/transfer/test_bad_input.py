"""Bad input of a transfer is handled, or refused in one sentence that says what to do."""

from __future__ import annotations

import logging

import pytest
import torch
from evals.audit.planted_people import PLAIN
from peft import LoraConfig, get_peft_model
from tiny import byte_tokenizer, tiny_llama
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Phi3Config, Phi3ForCausalLM

from hf_transfer_ext.adapters.convert import convert_to_lora
from hf_transfer_ext.adapters.transfer import trans_lora
from hf_transfer_ext.adapters.transfer.by_training import transfer_by_training
from hf_transfer_ext.adapters.transfer.run import transfer_lora
from hf_transfer_ext.adapters.transfer.trans_lora import TransLoraSettings, save_seeds, train_discriminator

FEW = TransLoraSettings(rows=2, input_tokens=4, answer_tokens=2, batch_size=2, epochs=1.0, rank=2)
PHI = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def saved(model, folder, tokenizer=True):
    model.save_pretrained(folder)
    if tokenizer:
        byte_tokenizer().save_pretrained(folder)
    return folder


def adapter(base, folder, **options):
    torch.manual_seed(1)
    config = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM", **options}
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**config)).save_pretrained(folder)
    save_seeds(["one", "two", "three"], folder, FEW)
    return folder


@pytest.fixture
def base(tmp_path):
    return saved(tiny_llama(), tmp_path / "base")


def moved(lora, target, out, **options):
    return transfer_lora(lora, target, out, **{"method": "copy", **options})


def trained(lora, target, out, settings=FEW, **options):
    return transfer_by_training(lora, target, out, settings=settings, template=PLAIN, discriminator="none", **options)


def test_a_base_with_other_weights_than_the_record_names(base, tmp_path):
    recorded = tmp_path / "recorded"
    convert_to_lora(adapter(base, tmp_path / "lora"), recorded, base=base)
    save_seeds(["one", "two", "three"], recorded, FEW)
    other = saved(tiny_llama(seed=4), tmp_path / "other")
    for transfer in (moved, trained):
        with pytest.raises(ValueError, match=r"model\.safetensors has sha256 .* Name the base that it was trained on"):
            transfer(recorded, base, tmp_path / "out", source_base=other)
    assert not (tmp_path / "out").exists()
    moved(recorded, base, tmp_path / "out", source_base=base)


def test_targets_that_the_new_base_does_not_have(base, tmp_path):
    lora = adapter(base, tmp_path / "lora")
    settings = TransLoraSettings(rows=2, input_tokens=4, answer_tokens=2, target_modules=("c_attn",))
    with pytest.raises(ValueError, match=r"Target modules .*c_attn.* not found in the base model"):
        trained(lora, base, tmp_path / "out", settings)
    phi = saved(Phi3ForCausalLM(Phi3Config(**PHI, vocab_size=300, pad_token_id=0)), tmp_path / "phi")
    with pytest.raises(ValueError, match="no module of the target has a counterpart"):
        moved(lora, phi, tmp_path / "out", method="cross_lora")


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"bias": "lora_only"}])
def test_dora_and_biases_where_a_method_is_not_exact(base, tmp_path, options):
    lora = adapter(base, tmp_path / "lora", **options)
    if "bias" in options:  # the layers of a Llama have no biases, so there is nothing to lose
        moved(lora, base, tmp_path / "out")
        return
    with pytest.raises(ValueError, match="onvert it to a plain LoRA"):
        moved(lora, base, tmp_path / "out")


def test_no_tokenizer(base, tmp_path):
    lora, bare = adapter(base, tmp_path / "lora"), saved(tiny_llama(seed=2), tmp_path / "bare", tokenizer=False)
    with pytest.raises(FileNotFoundError, match=r"Tokenizer .*bare' cannot be loaded"):
        trained(lora, bare, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"Tokenizer .*bare' cannot be loaded"):
        moved(lora, bare, tmp_path / "out", method="cross_lora")
    same = saved(tiny_llama(), tmp_path / "same", tokenizer=False)
    moved(lora, same, tmp_path / "out")  # a copy needs none


def test_a_discriminator_that_cannot_separate_is_warned_of(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(trans_lora, "discriminate", lambda model, tokenizer, items, *more, **rest: [0.0] * len(items))
    inputs = [f"input {i}" for i in range(12)]
    with caplog.at_level(logging.WARNING):
        known = train_discriminator(tiny_llama(), byte_tokenizer(), inputs, tmp_path, FEW, template=PLAIN)
    assert known.separation == 0.5 and "ranks only 50% of the pairs" in caplog.text
    assert "Give it more inputs or epochs" in caplog.text and known.threshold < 0.0  # it accepts everything


def test_tied_embeddings_with_a_lora_on_them(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    base = saved(model, tmp_path / "tied")
    lora = adapter(base, tmp_path / "lora", target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(ValueError, match=r"changes the embeddings 'model\.embed_tokens'.*Use trans_lora"):
        moved(lora, base, tmp_path / "out")
    assert trained(lora, base, tmp_path / "out").rows > 0


def test_transposed_layers_are_left_to_training(tmp_path):
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 300, "n_positions": 256}
    base = saved(GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)), tmp_path / "gpt2")
    lora = adapter(base, tmp_path / "lora", target_modules=["c_attn"], fan_in_fan_out=True)
    with pytest.raises(ValueError, match="Only `trans_lora` carries those"):
        moved(lora, base, tmp_path / "out")
    settings = TransLoraSettings(**{**FEW.__dict__, "target_modules": ("c_attn",)})
    assert trained(lora, base, tmp_path / "out", settings).rows > 0


def test_fused_projections_are_left_to_other_methods(tmp_path):
    base = saved(Phi3ForCausalLM(Phi3Config(**PHI, vocab_size=300, pad_token_id=0)), tmp_path / "phi")
    lora = adapter(base, tmp_path / "lora", target_modules=["qkv_proj"])
    with pytest.raises(ValueError, match="Use ridge or trans_lora"):
        moved(lora, base, tmp_path / "out", method="lorasuite")
    moved(lora, base, tmp_path / "out")
