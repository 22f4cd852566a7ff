"""Student and teacher under DeepSpeed's ZeRO, on two CPU ranks.

Accelerate starts DeepSpeed beside an accelerator alone, so its state is told to use gloo.
"""

import os

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from processes import on_two_ranks
from tiny import byte_tokenizer, tiny_llama
from transformers import AutoModelForCausalLM

from hf_transfer_ext import DistillationConfig, DistillationTrainer, UnlearningConfig, UnlearningTrainer
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


def unlearned(folder, batch_size, method, *, lora=False, **options):
    """A forget loss alone, with a retain loss, and with a reference model, which ZeRO-3 partitions, too."""
    rows = [{"question": f"What is {text[:4]}?", "answer": text} for text in TEXTS * 2]
    args = UnlearningConfig(
        str(folder), bf16=False, report_to="none", optim="sgd", learning_rate=0.1, lr_scheduler_type="constant",
        max_steps=2, per_device_train_batch_size=batch_size, max_grad_norm=0.0, save_strategy="no", disable_tqdm=True,
        method=method, alpha=2.0, allow_overlap=True, logging_steps=1, **options,
    )  # fmt: skip
    torch.manual_seed(3)  # of the adapter's random half
    trainer = UnlearningTrainer(
        tiny_llama(1), args, forget_dataset=rows[:4], retain_dataset=rows[4:], processing_class=byte_tokenizer(),
        reference_model=tiny_llama(3) if method == "npo" and not lora else None,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if lora else None,
    )  # fmt: skip
    trainer.train()
    return trainer


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("method", ["grad_diff", "npo"])
@pytest.mark.parametrize("stage", [2, 3])
def test_unlearning_on_two_ranks_under_zero_equals_one_process(tmp_path, stage, method, accumulation):
    whole = unlearned(tmp_path / "one", 4, method, use_cpu=True)
    assert not torch.equal(whole.model.lm_head.weight, tiny_llama(1).lm_head.weight)

    def rank(_):
        trainer = unlearned(
            tmp_path / "two", 2 // accumulation, method, gradient_accumulation_steps=accumulation,
            deepspeed=zero_on_cpu(stage),
        )  # fmt: skip
        save_whole(trainer, tmp_path / "saved")
        models = [trainer.model, *([trainer.reference_model] if method == "npo" else [])]
        return [trainer.accelerator.num_processes, *map(in_parts, models), parts_logged(trainer)]

    found = on_two_ranks(rank, tmp_path)
    for processes, *partitioned, logged in found:
        assert processes == 2 and set(partitioned) == {stage == 3}
        assert logged == pytest.approx(parts_logged(whole), rel=1e-4)
    assert_saved_whole(tmp_path / "saved", whole.model.state_dict())


def parts_logged(trainer):
    names = ("forget_loss", "retain_loss", "forget_nll")
    return [line[name] for line in trainer.state.log_history if "loss" in line for name in names]


@pytest.mark.parametrize("stage", [2, 3])
def test_an_adapter_that_unlearns_under_zero_has_its_base_as_the_reference(tmp_path, stage):
    whole = unlearned(tmp_path / "one", 4, "npo", lora=True, use_cpu=True)

    def rank(_):
        trainer = unlearned(tmp_path / "two", 2, "npo", lora=True, deepspeed=zero_on_cpu(stage))
        save_whole(trainer, tmp_path / "saved")
        return parts_logged(trainer)

    for logged in on_two_ranks(rank, tmp_path):
        assert logged == pytest.approx(parts_logged(whole), rel=1e-4)
    tiny_llama(1).save_pretrained(tmp_path / "base")
    own = {name: value for name, value in whole.model.state_dict().items() if "lora_" in name}
    assert max(value.abs().max() for name, value in own.items() if "lora_B" in name) > 1e-5  # it has learned
    saved = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "saved")
    found = saved.state_dict()
    for name, value in own.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
