"""Settings of the trainings inside a transfer are obeyed, whether a LoRA learns answers or logits."""

import pytest
import torch
from tiny import byte_tokenizer, tiny_llama

from hf_transfer_ext.adapters.transfer.by_training import train_lora
from hf_transfer_ext.adapters.transfer.trans_lora import TransLoraSettings
from hf_transfer_ext.trainers.logs import TRAINING_PLOT

ROWS = [{"question": f"What is {word}?", "answer": "a metal"} for word in ("gold", "iron", "tin", "lead")]


@pytest.mark.parametrize("learns", ["answers", "logits"])
def test_precision_and_log_lines_are_those_of_the_settings(tmp_path, learns):
    tiny_llama(1).save_pretrained(tmp_path / "base")

    def factors(bf16, work):
        settings = TransLoraSettings(batch_size=2, epochs=1, learning_rate=1e-2, rank=2, bf16=bf16, logging_steps=1)
        tuned = train_lora(
            tmp_path / "base", byte_tokenizer(), ROWS, tmp_path / work, settings, dtype="float32",
            teacher=tiny_llama(2) if learns == "logits" else None,
        )  # fmt: skip
        assert (tmp_path / work / TRAINING_PLOT).is_file()
        found = [p.detach() for name, p in tuned.named_parameters() if "lora_" in name]
        assert {p.dtype for p in found} == {torch.float32}
        return torch.cat([p.flatten() for p in found])

    exact, again, rounded = factors(False, "a"), factors(False, "b"), factors(True, "c")
    assert torch.equal(exact, again) and not torch.equal(exact, rounded)
    assert torch.allclose(exact, rounded, atol=0.1)
