"""Student and teacher sharded by FSDP2, on two CPU ranks."""

import pytest
import torch
from datasets import Dataset
from processes import on_two_ranks
from sharding import shard_on_cpu
from tiny import byte_tokenizer, tiny_llama
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from hf_transfer_ext import DistillationConfig, DistillationTrainer, UnlearningConfig, UnlearningTrainer
from hf_transfer_ext.trainers.rollouts import WRITTEN
from hf_transfer_ext.trainers.saving import save_whole

pytestmark = pytest.mark.slow

TEXTS = ["gold is a metal", "paris", "the sea is wide and the sky is high", "iron"]


def trained(folder, batch_size, teacher=..., data=None, **options):
    args = DistillationConfig(
        str(folder), use_cpu=True, bf16=False, report_to="none", max_length=64, optim="sgd", learning_rate=0.5,
        lr_scheduler_type="constant", max_steps=2, per_device_train_batch_size=batch_size, max_grad_norm=0.0,
        gradient_checkpointing=False, save_strategy="no", disable_tqdm=True, ce_weight=0.5, **options,
    )  # fmt: skip
    trainer = DistillationTrainer(
        tiny_llama(1),
        tiny_llama(2, num_hidden_layers=3) if teacher is ... else teacher,
        args,
        Dataset.from_dict(data or {"text": TEXTS}),
        processing_class=byte_tokenizer(),
    )
    trainer._get_train_sampler = lambda *a: torch.utils.data.SequentialSampler(trainer.train_dataset)
    trainer.train()
    return trainer


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("offload", [False, True], ids=["on the device", "offloaded"])
def test_sharded_training_with_a_sharded_teacher_equals_one_process(tmp_path, fused, offload):
    whole = trained(tmp_path / "one", 4, fused=fused).model.state_dict()

    def rank(_):
        shard_on_cpu(offload)
        trainer = trained(tmp_path / "two", 2, fused=fused)
        assert isinstance(trainer.accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy) is offload
        sharded = [isinstance(p, DTensor) for p in trainer.model.parameters()]
        teacher = [isinstance(p, DTensor) for p in trainer.teacher.model.parameters()]
        save_whole(trainer, tmp_path / "saved")
        return all(sharded) and all(teacher)

    assert on_two_ranks(rank, tmp_path) == [True, True]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    assert saved.keys() == whole.keys()
    for name in whole:
        torch.testing.assert_close(saved[name], whole[name], atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "options, offload",
    [({"on_policy": "gkd"}, False), ({"on_policy": "minillm", "loss": "reverse_kl"}, False),
     ({"on_policy": "gkd"}, True)],
    ids=["gkd", "minillm", "gkd, offloaded"],
)  # fmt: skip
def test_a_sharded_student_and_teacher_write_what_whole_ones_write(tmp_path, options, offload):
    """Processes end their texts after different numbers of tokens: none may wait for another in between."""
    data = {"prompt": [f"{text} and" for text in TEXTS], "completion": [" so on", "", " blue", " is heavy"]}
    settings = {"data": data, "max_new_tokens": 12, "sampling_temperature": 1.0, "log_rollouts": 4, **options}

    def rank(name):
        if name == "sharded":
            shard_on_cpu(offload)
        trainer = trained(tmp_path / name, 2, **settings)
        sharded = [isinstance(p, DTensor) for p in trainer.model.parameters()]
        save_whole(trainer, tmp_path / f"{name}-saved")
        return all(sharded)

    assert on_two_ranks(lambda _: rank("whole"), tmp_path) == [False, False]
    assert on_two_ranks(lambda _: rank("sharded"), tmp_path) == [True, True]
    assert (tmp_path / "whole" / WRITTEN).read_text() == (tmp_path / "sharded" / WRITTEN).read_text() != ""
    whole, saved = (
        AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-saved").state_dict() for name in ("whole", "sharded")
    )
    for name in whole:
        torch.testing.assert_close(saved[name], whole[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_sharded_training_from_a_cache_equals_one_process(tmp_path):
    """The rows are stored before; the sharded run holds no teacher."""
    cache = {"teacher_cache": str(tmp_path / "cache")}
    trained(tmp_path / "fill", 4, **cache, teacher_cache_options={"kind": "top", "top": 8})
    whole = trained(tmp_path / "one", 4, teacher=None, **cache).model.state_dict()

    def rank(_):
        shard_on_cpu()
        trainer = trained(tmp_path / "two", 2, teacher=None, **cache)
        save_whole(trainer, tmp_path / "saved")
        return all(isinstance(p, DTensor) for p in trainer.model.parameters())

    assert on_two_ranks(rank, tmp_path) == [True, True]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    for name in whole:
        torch.testing.assert_close(saved[name], whole[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def unlearned(folder, batch_size, method):
    rows = [{"question": f"What is {text[:4]}?", "answer": text} for text in TEXTS * 2]
    args = UnlearningConfig(
        str(folder), use_cpu=True, report_to="none", optim="sgd", learning_rate=0.1, lr_scheduler_type="constant",
        max_steps=2, per_device_train_batch_size=batch_size, max_grad_norm=0.0, save_strategy="no", disable_tqdm=True,
        method=method, alpha=2.0, allow_overlap=True,
    )  # fmt: skip
    sets = {"forget_dataset": rows[:4], "retain_dataset": rows[4:]}
    reference = tiny_llama(3) if method == "npo" else None
    trainer = UnlearningTrainer(
        tiny_llama(1), args, **sets, processing_class=byte_tokenizer(), reference_model=reference
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("method, offload", [("grad_diff", False), ("npo", False), ("grad_diff", True), ("npo", True)])
def test_sharded_unlearning_equals_one_process(tmp_path, method, offload):
    whole = unlearned(tmp_path / "one", 4, method).model.state_dict()

    def rank(_):
        shard_on_cpu(offload)
        trainer = unlearned(tmp_path / "two", 2, method)
        assert isinstance(trainer.accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy) is offload
        sharded = all(isinstance(p, DTensor) for p in trainer.model.parameters())
        save_whole(trainer, tmp_path / "saved")
        return sharded

    assert on_two_ranks(rank, tmp_path) == [True, True]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    for name in whole:
        torch.testing.assert_close(saved[name], whole[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
