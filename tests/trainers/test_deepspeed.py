"""Student and teacher under DeepSpeed's ZeRO, on two CPU ranks.

Accelerate starts DeepSpeed beside an accelerator alone, so its state is told to use gloo.
"""

import os

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig
from processes import on_two_ranks
from tiny import byte_tokenizer, tiny_llama
from transformers import AutoModelForCausalLM

from hf_transfer_ext import DistillationConfig, DistillationTrainer
from hf_transfer_ext.trainers.saving import save_whole

pytestmark = pytest.mark.slow
TEXTS = ["gold is a metal", "paris", "the sea is wide and the sky is high", "iron"]


@pytest.fixture(autouse=True)
def deepspeed():
    return pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")


def zero_on_cpu(stage):
    """Let Accelerate take its DeepSpeed branch on gloo ranks; a configuration that partitions even tiny weights."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    os.environ.pop("ACCELERATE_USE_CPU")
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_CPU)
    batch = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
    return {
        **dict.fromkeys(batch, "auto"),
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }


def trained(folder, batch_size, *, student=None, teacher=None, peft_config=None, **options):
    args = DistillationConfig(
        str(folder), bf16=False, report_to="none", max_length=64, optim="sgd", learning_rate=0.5,
        lr_scheduler_type="constant", max_steps=2, per_device_train_batch_size=batch_size, max_grad_norm=0.0,
        gradient_checkpointing=False, save_strategy="no", disable_tqdm=True, ce_weight=0.5, **options,
    )  # fmt: skip
    trainer = DistillationTrainer(
        student or tiny_llama(1), teacher or tiny_llama(2, num_hidden_layers=3), args,
        Dataset.from_dict({"text": TEXTS}), processing_class=byte_tokenizer(), peft_config=peft_config,
    )  # fmt: skip
    trainer._get_train_sampler = lambda *a: torch.utils.data.SequentialSampler(trainer.train_dataset)
    trainer.train()
    return trainer


def in_parts(model):
    """Whether each rank holds a part of every parameter, and none of them whole."""
    return all(p.numel() == 0 and p.ds_tensor.numel() < p.ds_numel for p in model.parameters())


def assert_saved_whole(folder, expected, loader=AutoModelForCausalLM):
    saved = loader.from_pretrained(folder).state_dict()
    assert saved.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(saved[name], value, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_under_zero_equal_one_process(tmp_path, stage, fused):
    whole = trained(tmp_path / "one", 4, fused=fused, use_cpu=True)
    assert not torch.equal(whole.model.lm_head.weight, tiny_llama(1).lm_head.weight)

    def rank(_):
        trainer = trained(tmp_path / "two", 2, fused=fused, deepspeed=zero_on_cpu(stage))
        save_whole(trainer, tmp_path / "saved")
        return [trainer.accelerator.num_processes, in_parts(trainer.model), in_parts(trainer.teacher.model)]

    partitioned = stage == 3
    assert on_two_ranks(rank, tmp_path) == [[2, partitioned, partitioned]] * 2
    assert_saved_whole(tmp_path / "saved", whole.model.state_dict())


def test_accumulated_micro_batches_under_zero_3_equal_one_batch(tmp_path):
    whole = trained(tmp_path / "one", 4, use_cpu=True)

    def rank(_):
        trainer = trained(tmp_path / "two", 1, gradient_accumulation_steps=2, deepspeed=zero_on_cpu(3))
        save_whole(trainer, tmp_path / "saved")

    on_two_ranks(rank, tmp_path)
    assert_saved_whole(tmp_path / "saved", whole.model.state_dict())


def test_models_given_by_path_are_partitioned_as_they_load(tmp_path):
    paths = {"student": str(tmp_path / "student"), "teacher": str(tmp_path / "teacher")}
    for name, model in (("student", tiny_llama(1)), ("teacher", tiny_llama(2, num_hidden_layers=3))):
        model.save_pretrained(paths[name])
        byte_tokenizer().save_pretrained(paths[name])
    whole = trained(tmp_path / "one", 4, use_cpu=True, **paths)

    def rank(_):
        trainer = trained(tmp_path / "two", 2, deepspeed=zero_on_cpu(3), **paths)
        save_whole(trainer, tmp_path / "saved")
        return [in_parts(trainer.model), in_parts(trainer.teacher.model)]

    assert on_two_ranks(rank, tmp_path) == [[True, True]] * 2
    assert_saved_whole(tmp_path / "saved", whole.model.state_dict())


def test_an_adapter_trained_under_zero_3_is_saved_whole(tmp_path):
    tiny_llama(1).save_pretrained(tmp_path / "base")
    whole = trained(tmp_path / "one", 4, use_cpu=True, **lora_on(tmp_path / "base")).model.state_dict()

    def rank(_):
        trainer = trained(tmp_path / "two", 2, deepspeed=zero_on_cpu(3), **lora_on(tmp_path / "base"))
        save_whole(trainer, tmp_path / "saved")

    on_two_ranks(rank, tmp_path)
    assert max(value.abs().max() for name, value in whole.items() if "lora_B" in name) > 1e-3  # it has learnt
    assert_saved_whole(tmp_path / "saved", whole, AutoPeftModelForCausalLM)


def lora_on(base):
    torch.manual_seed(3)  # of the adapter's random half
    return {
        "student": AutoModelForCausalLM.from_pretrained(base),
        "peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    }
