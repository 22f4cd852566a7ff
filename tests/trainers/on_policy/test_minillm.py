"""MiniLLM: the mixture that is drawn from, importance weights, returns, and its step by hand."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama
from trainers.test_distillation import assert_same, config, weights
from trainers.test_rollouts import PROMPTS, trained, trainer_of
from transformers import LogitsProcessorList

from hf_transfer_ext.trainers.on_policy.minillm import importance, mean_returns

MINILLM = {"on_policy": "minillm", "loss": "reverse_kl", "on_policy_share": None, "max_new_tokens": 6}


def log_probs(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)


def first_texts(trainer, seed=5):
    (batch,) = trainer.get_train_dataloader()
    return trainer.rollouts_from("mixture", batch, seed)


def returns_by_loops(rewards, discount):
    found = []
    for t in range(len(rewards)):
        later = [(discount ** (k - t - 1), rewards[k]) for k in range(t + 1, len(rewards))]
        weight = sum(w for w, _ in later)
        found.append(sum(w * r for w, r in later) / weight if weight else 0.0)
    return found


@pytest.mark.parametrize("discount", [0.0, 0.9, 1.0])
def test_returns_are_their_definition_and_stay_within_a_text(discount):
    texts = [[0.5, -1.0, 2.0, 0.25], [3.0], [-2.0, 1.5]]
    rewards = torch.tensor([r for text in texts for r in text], dtype=torch.float64)
    row = torch.tensor([i for i, text in enumerate(texts) for _ in text])
    expected = [r for text in texts for r in returns_by_loops(text, discount)]
    torch.testing.assert_close(mean_returns(rewards, row, discount), torch.tensor(expected, dtype=torch.float64))


def test_importance_undoes_the_mixture():
    """The mean over the mixture of w * f is the mean of f over the student, exactly."""
    torch.manual_seed(0)
    log_q, log_p = torch.randn(2, 8, dtype=torch.float64).log_softmax(-1)
    mixture = 0.3 * log_p.exp() + 0.7 * log_q.exp()
    f = torch.randn(8, dtype=torch.float64)
    torch.testing.assert_close((mixture * importance(log_q, log_p, 0.3) * f).sum(), (log_q.exp() * f).sum())


@pytest.mark.parametrize("adapter", [False, True])
def test_tokens_are_drawn_from_the_mixture_with_both_probabilities_noted(tmp_path, adapter, monkeypatch):
    """The scores that tokens are drawn from, at each step and with prompts of unequal length."""
    seen = []
    own = LogitsProcessorList.__call__

    def spy(self, input_ids, scores, **kwargs):
        result = own(self, input_ids, scores, **kwargs)
        seen.append((input_ids.clone(), result.clone()))
        return result

    monkeypatch.setattr(LogitsProcessorList, "__call__", spy)
    student, teacher, options = tiny_llama(1), tiny_llama(2), {}
    if adapter:
        torch.manual_seed(0)
        student = get_peft_model(tiny_llama(1), LoraConfig(r=2, init_lora_weights=False))
        teacher, options = None, {"teacher_adapter": "base"}
    trainer = trainer_of(tmp_path, student, teacher, **MINILLM, **options)
    rows = first_texts(trainer)
    q_model, p_model = (copy.deepcopy(student).eval(), tiny_llama(1) if adapter else tiny_llama(2))
    for i, row in enumerate(rows):
        log_q, log_p = log_probs(q_model, row.ids), log_probs(p_model, row.ids)
        start = len(row.ids) - len(row.written)
        for step in range(len(row.written)):
            at = start + step - 1
            mixture = (0.2 * log_p[at].exp() + 0.8 * log_q[at].exp()).log()
            torch.testing.assert_close(seen[step][1][i], mixture, atol=1e-4, rtol=1e-4)
            token = row.ids[at + 1]
            assert row.log_probs[step] == pytest.approx(log_q[at, token].item(), abs=1e-4)
            assert row.teacher_log_probs[step] == pytest.approx(log_p[at, token].item(), abs=1e-4)


@pytest.mark.parametrize("ce_weight", [0.0, 0.4])
def test_a_step_is_the_one_by_hand(tmp_path, ce_weight):
    trainer = trainer_of(tmp_path, **MINILLM, ce_weight=ce_weight, on_policy_options={"discount": 0.9})
    batches = []
    collated = trainer._collated
    trainer._collated = lambda rows: batches.append(rows) or collated(rows)
    trainer.train()
    student, teacher = tiny_llama(1).train(), tiny_llama(2)
    total, tokens = 0.0, 0
    for row in batches[0]:
        ids = torch.tensor([row.ids])
        log_q = student(ids).logits[0, :-1].log_softmax(-1)
        log_p = log_probs(teacher, row.ids)
        start = len(row.ids) - len(row.written)
        rewards = [(log_p - log_q)[t - 1, row.ids[t]].item() for t in range(start, len(row.ids))]
        returns = returns_by_loops(rewards, 0.9)
        for step, t in enumerate(range(start, len(row.ids))):
            q, p, token = log_q[t - 1], log_p[t - 1], row.ids[t]
            if row.source == "data":
                total = total - ce_weight * q[token]
            else:
                w = (q[token].exp() / (0.2 * p[token].exp() + 0.8 * q[token].exp())).item()
                total = total + w * ((q.exp() * (q - p)).sum() - returns[step] * q[token])
            tokens += 1
    (total / tokens).backward()
    assert {row.source for row in batches[0]} == ({"mixture", "data"} if ce_weight else {"mixture"})
    expected = {n: (p - 0.5 * p.grad).detach() for n, p in student.named_parameters()}
    assert_same(weights(trainer), expected, atol=1e-5)


def test_prompts_alone_are_enough_and_evaluated(tmp_path):
    trainer = trained(tmp_path, data=PROMPTS, **MINILLM)
    assert trainer.evaluate()["eval_kd"] > 0
    with pytest.raises(ValueError, match="minillm learns from completions as well"):
        trainer_of(tmp_path, data=PROMPTS, **MINILLM, ce_weight=0.5)


@pytest.mark.parametrize("options, message", [
    ({"loss": "forward_kl"}, "`loss` is 'forward_kl', but minillm needs 'reverse_kl'"),
    ({"sampling_temperature": 0.5}, "`sampling_temperature` is 0.5, but minillm needs 1.0"),
    ({"generation_options": {"top_k": 5}}, "needs the probability with which each token was drawn"),
    ({"on_policy_options": {"teacher_mix": 1.0}}, r"`teacher_mix` has to lie in \(0, 1\)"),
])  # fmt: skip
def test_settings_that_cannot_be_followed_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **{**MINILLM, **options})


def test_a_server_cannot_write(tmp_path):
    class Says:
        form = "dense"

        def signal(self, student, inputs, mask):
            raise AssertionError("never called")

    with pytest.raises(ValueError, match=r"with the student, which a Says cannot do\. .* choose gkd or sampled"):
        trainer_of(tmp_path, teacher=Says(), **MINILLM)
