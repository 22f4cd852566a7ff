"""One process with a batch of 4, two processes with 2 each, and 4 micro-batches of 1 end in the same weights."""

import tempfile
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from processes import on_two_ranks
from tiny import byte_tokenizer, tiny_llama

from hf_transfer_ext import DistillationConfig, DistillationTrainer, UnlearningConfig, UnlearningTrainer
from hf_transfer_ext.adapters.extract import extract_lora
from hf_transfer_ext.adapters.transfer.by_training import train_lora
from hf_transfer_ext.adapters.transfer.trans_lora import TransLoraSettings
from hf_transfer_ext.models.loading import load_model
from hf_transfer_ext.trainers.taught import lora_on

#: Rows of very different lengths: a mean of means would show.
TEXTS = [
    "gold is a metal", "paris", "the sea is wide and the sky is high", "iron", "tin is soft", "a", "rome is a city",
    "the river runs to the sea through many lands", "oslo", "lead", "copper is red", "a town by the lake",
]  # fmt: skip
ROWS = [{"question": f"What is {text[:4]}?", "answer": text} for text in TEXTS]
STEPS = {"max_steps": 3, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "weight_decay": 0.0, "seed": 0}
QUIET = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


#: What is logged beside the losses.
NOT_LOSSES = ("epoch", "step", "learning_rate", "grad_norm", "num_tokens", "tokens_per_second", "mean_token_accuracy")


def changes(trainer):
    """What training adds to each weight, and each part of the loss that it logged."""
    before = weights(trainer.model)
    trainer.train()
    after = weights(trainer.accelerator.unwrap_model(trainer.model))
    logged = [line for line in trainer.state.log_history if "loss" in line]
    assert logged and all(line["tokens_per_second"] > 0 for line in logged)
    parts = {name for line in logged for name in line if name not in NOT_LOSSES}
    assert len(parts) > 2
    return {
        **{name: after[name] - before[name] for name in before},
        **{f"logged {name}": torch.tensor([line[name] for line in logged]) / 100 for name in parts},
    }


def distilled(folder, batch, accumulation, **options):
    args = DistillationConfig(
        str(folder / "out"), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, bf16=False,
        optim="sgd", learning_rate=0.5, max_length=64, ce_weight=0.5, gradient_checkpointing=False,
        **{**STEPS, **QUIET, **options},
    )  # fmt: skip
    data, teacher = Dataset.from_dict({"text": TEXTS}), tiny_llama(2, num_hidden_layers=3)
    trainer = DistillationTrainer(tiny_llama(1), teacher, args, data, processing_class=byte_tokenizer())
    return changes(trainer)


def from_a_cache(folder, batch, accumulation):
    """The rows of the teacher are stored in the first epoch, by whichever process meets them, and read in the next."""
    cache = Path(tempfile.mkdtemp(dir=folder)) if not torch.distributed.is_initialized() else folder / "shared"
    options = {"kind": "top", "top": 8}
    return distilled(folder, batch, accumulation, max_steps=5, teacher_cache=str(cache), teacher_cache_options=options)


def unlearned(folder, batch, accumulation, method="npo", **options):
    args = UnlearningConfig(
        str(folder / "out"), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, optim="sgd",
        learning_rate=0.05, method=method, alpha=2.0, ddp_find_unused_parameters=False,
        **{**STEPS, **QUIET, **options},
    )  # fmt: skip
    torch.manual_seed(0)
    model = lora_on(tiny_llama(1), 4)
    sets = {"forget_dataset": ROWS[:8], "retain_dataset": ROWS[8:]}
    trainer = UnlearningTrainer(model, args, **sets, processing_class=byte_tokenizer())
    return changes(trainer)


def refreshed(folder, batch, accumulation, teacher=False):
    """A transferred adapter is trained on the new base: on answers, or on the logits of the source."""
    work = Path(tempfile.mkdtemp(dir=folder))
    # Adam turns the rounding of a gradient that is almost zero into a share of the learning rate.
    settings = TransLoraSettings(batch_size=batch, epochs=1, learning_rate=1e-3 if teacher else 1e-2, seed=0)
    tuned = train_lora(
        folder / "base", byte_tokenizer(), ROWS, work, settings, start=folder / "adapter", dtype="float32",
        teacher=tiny_llama(5) if teacher else None,
    )  # fmt: skip
    before = PeftModel.from_pretrained(load_model(folder / "base"), folder / "adapter", is_trainable=True)
    after, start = weights(tuned), weights(before)
    return {name: after[name] - start[name] for name in start}


def refreshed_on_logits(folder, batch, accumulation):
    return refreshed(folder, batch, accumulation, teacher=True)


def distilled_unfused(folder, batch, accumulation):
    return distilled(folder, batch, accumulation, fused=False, loss="generalized_jsd")


def unlearned_grad_diff(folder, batch, accumulation):
    return unlearned(folder, batch, accumulation, method="grad_diff")


JOBS = [
    distilled,
    from_a_cache,
    unlearned,
    refreshed,
    *(
        pytest.param(job, marks=pytest.mark.slow)
        for job in (distilled_unfused, unlearned_grad_diff, refreshed_on_logits)
    ),
]


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.__name__)
def test_one_process_two_processes_and_accumulation_give_the_same_weights(tmp_path, job, monkeypatch):
    monkeypatch.setattr("hf_transfer_ext.trainers.distillation_config.cpu_computes_in_bf16", lambda: False)
    torch.set_num_threads(1)
    for seed, name in ((1, "base"), (2, "tuned")):
        tiny_llama(seed).save_pretrained(tmp_path / name)
    extract_lora(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=2)
    one = job(tmp_path, 4, 1)
    assert all(bool(change.any()) for change in one.values())
    others = {
        f"rank {rank}": found for rank, found in enumerate(on_two_ranks(lambda _: job(tmp_path, 2, 1), tmp_path))
    }
    if not job.__name__.startswith("refreshed"):
        others["accumulation"] = job(tmp_path, 1, 4)
    for setup, other in others.items():
        assert one.keys() == other.keys()
        distance = max(float((one[name] - other[name]).abs().max()) for name in one)
        assert distance < 1e-5, f"{setup}: {distance:.1e}"
