"""DistiLLM-2: its loss as float64 loops, and its step over both answers to each prompt."""

import math

import pytest
import torch
from tiny import byte_tokenizer, tiny_llama
from trainers.test_distillation import assert_same, config, logged, weights
from trainers.test_rollouts import PROMPTS, ROWS, prompt_ids, trained, trainer_of, written_by

from hf_transfer_ext.losses.fused import divergence_of_logits, fused_divergence
from hf_transfer_ext.losses.rows import LogitRows
from hf_transfer_ext.models.heads import LMHead
from hf_transfer_ext.trainers.on_policy.distillm_2 import contrastive
from hf_transfer_ext.trainers.rollouts import seed_of

DISTILLM_2 = {"on_policy": "distillm_2", "loss": "skew_kl", "on_policy_share": None, "max_new_tokens": 6}


def oracle(z, t, by_student, skew):
    """SRKL(p, q) = KL(q || (1-a) p + a q) of the student's tokens, SKL(p, q) = KL(p || a p + (1-a) q) of others."""
    q, p = ([math.exp(v) for v in (row.double() - row.double().logsumexp(0)).tolist()] for row in (z, t))
    if by_student:
        return sum(b * math.log(b / ((1 - skew) * a + skew * b)) for a, b in zip(p, q, strict=True))
    return sum(a * math.log(a / (skew * a + (1 - skew) * b)) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("skew", [0.1, 0.3])
def test_the_loss_is_its_definition_whatever_the_chunks(skew):
    torch.manual_seed(0)
    z, t, by_student = torch.randn(6, 9), torch.randn(6, 9), torch.tensor([True, False, True, True, False, False])
    expected = torch.tensor([oracle(a, b, bool(c), skew) for a, b, c in zip(z, t, by_student, strict=True)])
    plain = contrastive(z[None], t[None], by_student=by_student, skew=skew)[0]
    torch.testing.assert_close(plain, expected, atol=1e-5, rtol=1e-5)
    leaf = z.clone().requires_grad_()
    contrastive(leaf[None], t[None], by_student=by_student, skew=skew).sum().backward()
    for chunk in (1, 4, 100):
        hidden = z.clone().requires_grad_()
        found = fused_divergence(
            hidden, LMHead(torch.eye(9), None), LogitRows(t), contrastive, weights=torch.ones(6), skew=skew,
            by_student=by_student, chunk_tokens=chunk,
        )  # fmt: skip
        found.loss.backward()
        torch.testing.assert_close(found.divergence, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(hidden.grad, leaf.grad, atol=1e-5, rtol=1e-5)
    same = divergence_of_logits(t, t, contrastive, weights=torch.ones(6), by_student=by_student)
    assert same.loss.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("teacher_writes", [False, True])
def test_a_step_is_the_one_by_hand(tmp_path, teacher_writes):
    data = PROMPTS if teacher_writes else ROWS
    trainer = trained(
        tmp_path, data=data, **DISTILLM_2, teacher_writes=teacher_writes, on_policy_options={"beta": 0.5}
    )
    student, teacher, tokenizer = tiny_llama(1).train(), tiny_llama(2), byte_tokenizer()
    if teacher_writes:
        first = written_by(tiny_llama(2), prompt_ids(), seed_of(1, 0, 0, "teacher", 0))
    else:
        first = []
        for prompt, text in zip(ROWS["prompt"], ROWS["completion"], strict=True):
            ids, start = tokenizer(prompt + text)["input_ids"] + [257], len(tokenizer(prompt)["input_ids"])
            first.append((ids, [-100] * start + ids[start:]))
    second = written_by(tiny_llama(1), prompt_ids(), seed_of(1, 0, 0, "student", 0))
    total, tokens = 0.0, 0
    for rows, by_student, factor in ((first, False, 1.5), (second, True, 0.5)):
        for ids, labels in rows:
            ids = torch.tensor([ids])
            mask = torch.tensor([labels])[:, 1:] != -100
            with torch.no_grad():
                t = teacher(ids).logits[:, :-1]
            total = total + factor * (contrastive(student(ids).logits[:, :-1], t, by_student=by_student) * mask).sum()
            tokens += int(mask.sum())
    (total / tokens).backward()
    assert_same(weights(trainer), {n: (p - 0.5 * p.grad).detach() for n, p in student.named_parameters()})
    assert logged(trainer, "loss")[0] == pytest.approx((total / tokens).item(), rel=1e-4)


@pytest.mark.parametrize("options, message", [
    ({"loss": "reverse_kl"}, "takes skew_kl on the teacher's answers"),
    ({"on_policy_share": 0.5}, "needs both answers to each prompt"),
    ({"on_policy_options": {"beta": 3}}, r"`beta` has to lie in \[0, 2\], got 3"),
])  # fmt: skip
def test_settings_that_cannot_be_followed_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **{**DISTILLM_2, **options})


def test_it_needs_an_answer_of_the_teacher(tmp_path):
    with pytest.raises(ValueError, match="distillm_2 learns from completions as well"):
        trainer_of(tmp_path, data=PROMPTS, **DISTILLM_2)
