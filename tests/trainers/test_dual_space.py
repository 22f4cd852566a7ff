"""`loss: dskd` through the trainer: one step by hand, projections, evaluation, rollouts, what is refused."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from processes import on_two_ranks
from safetensors.torch import load_file
from tiny_tokenizers import byte_fallback, byte_level
from trainers.test_distillation import assert_same, config, logged, weights
from trainers.test_span_distillation import TEXTS, groups_of, start, student, teacher, trained

from hf_transfer_ext.losses.spans import dskd
from hf_transfer_ext.losses.spans.dskd import SpaceSide
from hf_transfer_ext.models.heads import LMHead
from hf_transfer_ext.teachers.alignment import TokenBytes, align_vocabularies
from hf_transfer_ext.trainers.saving import save_whole
from hf_transfer_ext.trainers.trained_along import PARTS_FILE


def space_of(trainer):
    return trainer.span_losses.dual_spaces["teacher"]


EXACT = {"loss": "dskd", "loss_options": {"alignment": "exact"}}


def side(model, ids, groups):
    """What the head reads, without any capture, at the positions that predict the tokens of the groups."""
    rows = torch.tensor([row for first, end in groups for row in range(first - 1, end - 1)])
    states, embedding = model.model(input_ids=ids).last_hidden_state[0], model.model.embed_tokens.weight.detach()
    sizes = torch.tensor([end - first for first, end in groups])
    read, written = ids[0, rows], ids[0, rows + 1]
    return SpaceSide(states[rows], LMHead(model.lm_head.weight), embedding[read], embedding[written], written, sizes)


def manual_step(projections, alignment, lr=0.5, kd_weight=0.7, ce_weight=0.3, temperature=2.0):
    """One SGD step, text by text: no trainer, no padding, no hooks."""
    own, other = byte_level(), byte_fallback()
    known, found = [TokenBytes(one) for one in (own, other)], align_vocabularies(own, other)
    learner, master = copy.deepcopy(student()).train(), teacher()
    total, kd, tokens = 0.0, 0.0, 0
    for text in TEXTS:
        ids, others = ([*t(text)["input_ids"], t.eos_token_id] for t in (own, other))
        sides = list(zip(*groups_of(ids, others, *known), strict=True))
        one = side(learner, torch.tensor([ids]), sides[0])
        with torch.no_grad():
            two = side(master, torch.tensor([others]), sides[1])
        texts = torch.zeros(len(sides[0]), dtype=torch.long)
        matched = found.student_ids, found.teacher_ids
        here = dskd(one, two, texts, *matched, projections, temperature=temperature, alignment=alignment)
        z = learner(input_ids=torch.tensor([ids])).logits[0, :-1]
        ce = torch.nn.functional.cross_entropy(z, torch.tensor(ids[1:]), reduction="sum")
        total, kd = total + kd_weight * here.loss + ce_weight * ce, kd + here.loss.item()
        tokens += len(ids) - 1
    (total / tokens).backward()
    with torch.no_grad():
        for p in (*learner.parameters(), *projections.values()):
            p -= lr * p.grad
    return {n: p.detach() for n, p in learner.named_parameters()}, kd / tokens, (total / tokens).item()


@pytest.mark.parametrize("alignment", ["attention", "exact"])
def test_one_step_is_the_step_of_the_formula(tmp_path, alignment):
    options = {
        "loss": "dskd", "loss_options": {"alignment": alignment}, "kd_weight": 0.7, "ce_weight": 0.3,
        "distill_temperature": 2.0, "max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 0.5,
    }  # fmt: skip
    trainer = start(tmp_path, **options)
    begun = {name: p.detach().clone().requires_grad_() for name, p in space_of(trainer).projections.items()}
    assert set(begun) == {"to_student", "to_teacher", *(["query"] if alignment == "attention" else [])}
    trainer.train()
    expected, kd, loss = manual_step(begun, alignment)
    assert_same(weights(trainer), expected, atol=2e-5)
    found = {name: p.detach() for name, p in space_of(trainer).projections.items()}
    assert_same(found, {name: p.detach() for name, p in begun.items()}, atol=2e-5)
    assert logged(trainer, "kd")[0] == pytest.approx(kd, rel=1e-3)
    assert logged(trainer, "loss")[0] == pytest.approx(loss, rel=1e-3)
    metrics = trainer.evaluate(Dataset.from_dict({"text": TEXTS}))
    assert metrics["eval_kd"] < kd


def test_packing_and_micro_batches_change_nothing(tmp_path):
    options = {"loss": "dskd", "shuffle_dataset": False, "max_grad_norm": 0.0}
    one = trained(tmp_path / "a", **options)
    packed = trained(tmp_path / "b", packing=True, max_length=256, **options)
    split = trained(tmp_path / "c", per_device_train_batch_size=1, gradient_accumulation_steps=4, **options)
    for other in (packed, split):
        assert_same(weights(one), weights(other), atol=1e-5)


def test_projections_are_saved_beside_checkpoints_and_resumed(tmp_path):
    options = {
        "loss": "dskd", "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch",
        "learning_rate": 1e-2,
    }  # fmt: skip
    whole = trained(tmp_path / "whole", **options)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert set(load_file(checkpoint / PARTS_FILE)) == {
        f"0.projections.{name}" for name in ("query", "to_student", "to_teacher")
    }
    resumed = start(tmp_path / "whole", **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same(weights(resumed), weights(whole), atol=0.0)
    projections = space_of(whole).projections
    assert all(torch.equal(p, projections[name]) for name, p in space_of(resumed).projections.items())
    assert not (save_whole(whole, tmp_path / "final") / PARTS_FILE).exists()
    other = start(tmp_path / "other", **{**options, **EXACT})
    with pytest.raises(ValueError, match="the checkpoint was written with other settings"):
        other.train(resume_from_checkpoint=str(checkpoint))


def test_many_steps_bring_the_student_to_the_teacher(tmp_path):
    settings = {"max_steps": 30, "optim": "adamw_torch", "learning_rate": 1e-2}
    trainer = trained(tmp_path, **EXACT, **settings)
    assert logged(trainer, "kd")[-1] < 0.5 * logged(trainer, "kd")[0]


def test_the_teachers_own_tokens_serve_what_the_student_writes(tmp_path):
    data = Dataset.from_dict({"prompt": ["The capital", "naïve", "a b", "日本"]})
    trainer = trained(
        tmp_path, data=data, **EXACT, on_policy="gkd", on_policy_share=1.0, max_new_tokens=6, max_steps=2,
        learning_rate=0.01,
    )  # fmt: skip
    assert len(logged(trainer, "kd")) == 2 and all(value > 0 for value in logged(trainer, "kd"))
    with pytest.raises(ValueError, match="the teacher would learn to repeat the student"):
        config(tmp_path, loss="dskd", on_policy="gkd", on_policy_share=1.0)


def test_an_adapter_learns_and_what_cannot_be_is_refused(tmp_path):
    own = get_peft_model(student(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    trainer = trained(tmp_path / "a", own=own, loss="dskd", gradient_checkpointing=True)
    assert logged(trainer, "grad_norm")[0] > 0
    head = get_peft_model(student(), LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="dskd applies the student's head to projected states"):
        start(tmp_path / "b", own=head, loss="dskd")
    with pytest.raises(ValueError, match="`fused` is False, but dskd compares hidden states"):
        config(tmp_path, loss="dskd", fused=False)
    with pytest.raises(ValueError, match="Unknown distillation loss 'forward_lk'"):
        config(tmp_path, loss="dskd", loss_options={"divergence": "forward_lk"})


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    options = {"loss": "dskd", "max_steps": 2, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
    one = trained(tmp_path / "one", **options)

    def rank(_):
        trainer = trained(tmp_path / "two", per_device_train_batch_size=2, **options)
        return weights(trainer), {n: p.detach() for n, p in space_of(trainer).projections.items()}

    for found, projections in on_two_ranks(rank, tmp_path):
        assert_same(weights(one), found, atol=1e-5)
        assert_same({n: p.detach() for n, p in space_of(one).projections.items()}, projections, atol=1e-5)
