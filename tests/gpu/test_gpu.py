"""The same numbers on a GPU as on a CPU; skipped where there is none."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import byte_tokenizer, tiny_llama

from hf_transfer_ext import DistillationConfig, DistillationTrainer
from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.evals.engine.evaluate import evaluate
from hf_transfer_ext.losses.distillation import DISTILLATION_LOSSES
from hf_transfer_ext.losses.fused import divergence_of_logits, fused_divergence
from hf_transfer_ext.losses.rows import HeadRows, LogitRows
from hf_transfer_ext.models.heads import LMHead, LogitFinish
from hf_transfer_ext.trainers.unlearning import UnlearningConfig, UnlearningTrainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TEXTS = ["gold is a metal", "paris", "the sea is wide and the sky is high", "iron", "a", "tin and zinc", "oak", "elm"]
ROWS = [{"question": f"Where was {i} born?", "answer": "In " + "Rome " * (i + 1)} for i in range(6)]
PLAIN = QuestionAnswerFormat(template="plain", prompt="{question}")


def heads(device, dtype, tokens=33, width=16, vocab=1003):
    """Hidden states and heads of two models, the same on every device."""
    g = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, generator=g).to(dtype).to(device)

    student, teacher = (
        LMHead(rand(vocab, width).requires_grad_(), finish=LogitFinish(softcap=20.0)),
        LMHead(rand(vocab, width)),
    )
    hidden, teacher_hidden = rand(tokens, width).requires_grad_(), rand(tokens, width)
    labels, weights = torch.randint(vocab, (tokens,), generator=g), torch.rand(tokens, generator=g) / tokens
    weights[3] = 0.0
    return hidden, student, teacher_hidden, teacher, labels.to(device), weights.to(device)


def loss_and_gradients(device, dtype, name):
    hidden, student, teacher_hidden, teacher, labels, weights = heads(device, dtype)
    fused = fused_divergence(
        hidden, student, HeadRows(teacher_hidden, teacher), DISTILLATION_LOSSES[name], weights=weights, labels=labels,
        kd_weight=0.7, ce_weight=0.3, temperature=1.5, chunk_tokens=10,
    )  # fmt: skip
    gradients = torch.autograd.grad(fused.loss, (hidden, student.weight))
    return [part.detach().cpu().float() for part in (fused.loss, fused.divergence, *gradients)]


@pytest.mark.parametrize("name", DISTILLATION_LOSSES)
def test_the_fused_loss_in_float32(name):
    want = loss_and_gradients("cpu", torch.float32, name)
    got = loss_and_gradients("cuda", torch.float32, name)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("name", DISTILLATION_LOSSES)
def test_the_fused_loss_in_bfloat16(name):
    """As near to the float32 loss of the same rounded inputs as logits in bfloat16 allow."""
    got = loss_and_gradients("cuda", torch.bfloat16, name)
    want = loss_and_gradients("cpu", torch.bfloat16, name)
    assert got[0] == pytest.approx(want[0], rel=0.02)
    for one, other in zip(got[2:], want[2:], strict=True):
        assert (one - other).norm() < 0.05 * other.norm()


def test_the_head_gradient_in_bfloat16_is_summed_in_float32():
    """Many chunks: a sum in bfloat16 would lose the small ones."""
    g = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(4096, 8, device="cuda", generator=g).bfloat16()
    weight = torch.randn(512, 8, device="cuda", generator=g).bfloat16().requires_grad_()
    teacher = torch.randn(512, 8, device="cuda", generator=g).bfloat16()
    weights = torch.full((4096,), 1.0, device="cuda")

    def gradient(head, chunk):
        loss = fused_divergence(
            hidden.to(head.dtype), LMHead(head), HeadRows(hidden.to(head.dtype), LMHead(teacher.to(head.dtype))),
            DISTILLATION_LOSSES["forward_kl"], weights=weights, chunk_tokens=chunk,
        ).loss  # fmt: skip
        return torch.autograd.grad(loss, head)[0].float()

    exact = gradient(weight.detach().float().requires_grad_(), 4096)
    error_of_many = (gradient(weight, 8) - exact).norm() / exact.norm()
    error_of_one = (gradient(weight, 4096) - exact).norm() / exact.norm()
    assert error_of_many < 1.5 * error_of_one < 0.02


def test_logits_that_exist():
    g = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(7, 301, generator=g), torch.randn(7, 301, generator=g)
    found = []
    for device in ("cpu", "cuda"):
        leaf = logits.to(device).requires_grad_()
        weights = torch.full((7,), 1 / 7, device=device)
        loss = divergence_of_logits(
            leaf, LogitRows(teacher.to(device)), DISTILLATION_LOSSES["reverse_kl"], weights=weights
        ).loss
        found.append((loss.detach().cpu(), torch.autograd.grad(loss, leaf)[0].cpu()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)


def trained(trainer):
    trainer.train()
    return {name: p.detach().cpu().float() for name, p in trainer.model.named_parameters() if p.requires_grad}


SETTINGS = {
    "report_to": "none", "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_steps": 3,
    "per_device_train_batch_size": 4, "max_grad_norm": 0.0, "save_strategy": "no", "disable_tqdm": True, "seed": 1,
    "gradient_checkpointing": False, "bf16": False,
}  # fmt: skip


@pytest.mark.parametrize("lora", [False, True])
def test_three_steps_of_distillation(tmp_path, lora):
    found = []
    for use_cpu in (True, False):
        args = DistillationConfig(str(tmp_path / str(use_cpu)), use_cpu=use_cpu, max_length=64, **SETTINGS)
        adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
        torch.manual_seed(0)
        trainer = DistillationTrainer(
            tiny_llama(1),
            tiny_llama(2),
            args,
            Dataset.from_dict({"text": TEXTS}),
            processing_class=byte_tokenizer(),
            peft_config=adapter,
        )
        assert trainer.accelerator.device.type == ("cpu" if use_cpu else "cuda")
        found.append(trained(trainer))
    torch.testing.assert_close(found[0], found[1], rtol=2e-3, atol=2e-4)


def test_bfloat16_training_lowers_the_loss(tmp_path):
    args = DistillationConfig(
        str(tmp_path), max_length=64, **SETTINGS | {"bf16": True, "max_steps": 30, "optim": "adamw_torch",
        "learning_rate": 5e-3, "logging_steps": 1, "gradient_checkpointing": True},
    )  # fmt: skip
    data = Dataset.from_dict({"text": TEXTS})
    trainer = DistillationTrainer(tiny_llama(1), tiny_llama(2), args, data, processing_class=byte_tokenizer())
    trainer.train()
    losses = [entry["kd"] for entry in trainer.state.log_history if "kd" in entry]
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("method", ["npo", "rmu", "grad_diff"])
def test_three_steps_of_unlearning(tmp_path, method):
    found = []
    for use_cpu in (True, False):
        args = UnlearningConfig(str(tmp_path / str(use_cpu)), use_cpu=use_cpu, method=method, **SETTINGS)
        torch.manual_seed(0)
        trainer = UnlearningTrainer(
            tiny_llama(1), args, forget_dataset=ROWS[:3], retain_dataset=ROWS[3:], processing_class=byte_tokenizer(),
            reference_model=tiny_llama(1), template=PLAIN, alternatives=["no idea"],
        )  # fmt: skip
        found.append(trained(trainer))
    torch.testing.assert_close(found[0], found[1], rtol=2e-3, atol=2e-4)


def test_every_metric_of_one_pass():
    names = ["perplexity", "answer_probability", "min_k", "min_k_plus_plus", "extraction_strength", "rouge_l_recall",
             "zlib_attack", "loss_attack", "gradient_norm"]  # fmt: skip
    model = tiny_llama(3)
    found = []
    for device in ("cpu", "cuda"):
        result = evaluate(copy.deepcopy(model).to(device), byte_tokenizer(), ROWS, names, template=PLAIN, resamples=0)
        found.append({one.name: one.value for one in result.measurements})
    assert found[0].keys() == found[1].keys() and len(found[0]) >= len(names)
    for name in found[0]:
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-3, abs=1e-4), name
