"""The sampled-token estimator: its step by hand, its mean over all tokens, trust regions, a teacher on a server."""

import copy
import shutil

import pytest
import torch
from datasets import Dataset
from teachers.test_server import server, teacher  # noqa: F401
from tiny import byte_tokenizer, tiny_llama
from trainers.test_distillation import assert_same, config, logged, weights
from trainers.test_rollouts import ROWS, prompt_ids, trained, trainer_of, written_by

from hf_transfer_ext import DistillationTrainer
from hf_transfer_ext.losses.distillation import DISTILLATION_LOSSES
from hf_transfer_ext.losses.fused import divergence_of_logits
from hf_transfer_ext.teachers.sampled import drawn_rows
from hf_transfer_ext.tensors import next_token_view
from hf_transfer_ext.trainers.rollouts import seed_of

SAMPLED = {"on_policy": "sampled_reverse_kl", "loss": "reverse_kl", "max_new_tokens": 6}


def policy_gradient(student, teacher_model, rows, lr=0.5, trust=None, outliers="clip"):
    """One SGD step on -A log q of each written token, A = log p - log q held fixed."""
    student, total, advantages, tokens = copy.deepcopy(student).train(), 0.0, [], 0
    for ids, labels in rows:
        z, targets, mask = next_token_view(student(torch.tensor([ids])).logits, torch.tensor([labels]))
        with torch.no_grad():
            t = teacher_model(torch.tensor([ids])).logits[:, :-1]
        at = targets.clamp(min=0)[..., None]
        log_q, log_p = (x.log_softmax(-1).gather(-1, at).squeeze(-1)[mask] for x in (z, t))
        advantage = (log_p - log_q).detach()
        advantages += advantage.tolist()
        if trust is not None:
            kept = advantage.abs() <= trust
            advantage = advantage.clamp(-trust, trust) if outliers == "clip" else torch.where(kept, advantage, 0.0)
        total = total - (advantage * log_q).sum()
        tokens += int(mask.sum())
    (total / tokens).backward()
    return {n: (p - lr * p.grad).detach() for n, p in student.named_parameters()}, advantages


def rows_of_first_step():
    return written_by(tiny_llama(1), prompt_ids(), seed_of(1, 0, 0, "student", 0))


@pytest.mark.parametrize("trust, outliers", [(None, "clip"), (0.5, "clip"), (0.5, "mask")])
def test_a_step_is_the_policy_gradient_by_hand(tmp_path, trust, outliers):
    options = {"trust_region": trust, "outliers": outliers}
    trainer = trained(tmp_path, **SAMPLED, on_policy_options=options, on_policy_share=None)
    expected, advantages = policy_gradient(tiny_llama(1), tiny_llama(2), rows_of_first_step(), 0.5, trust, outliers)
    assert_same(weights(trainer), expected)
    if trust is None:
        mean = -sum(advantages) / len(advantages)
        assert logged(trainer, "kd")[0] == pytest.approx(mean, rel=1e-4)
    else:
        assert max(map(abs, advantages)) > trust  # else the test would say nothing


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "generalized_jsd"])
def test_the_mean_over_all_tokens_is_the_exact_divergence(name):
    """Each token once, weighted by the probability that it is drawn: value and gradient of the whole sum."""
    torch.manual_seed(0)
    vocab, divergence = 7, DISTILLATION_LOSSES[name]
    z, t, old = torch.randn(3, vocab)
    log_mu = old.log_softmax(-1)  # another policy than the student's own: the weights are those of importance
    leaf = z[None].expand(vocab, vocab).clone().requires_grad_()
    rows = drawn_rows(torch.arange(vocab), log_mu, t.log_softmax(-1))
    estimate = divergence_of_logits(leaf, rows, divergence, weights=log_mu.exp())
    estimate.loss.backward()
    exact = z.double().requires_grad_()
    value = divergence(exact[None, None], t.double()[None, None]).sum()
    value.backward()
    torch.testing.assert_close(leaf.grad.sum(0), exact.grad.float(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(estimate.loss.detach(), value.detach().float(), atol=1e-5, rtol=1e-5)


def test_a_student_equal_to_its_teacher_does_not_move(tmp_path):
    trainer = trainer_of(tmp_path, tiny_llama(1), tiny_llama(1), **SAMPLED)
    trainer.train()
    assert logged(trainer, "kd")[0] == pytest.approx(0.0, abs=1e-5)
    assert_same(weights(trainer), dict(tiny_llama(1).named_parameters()), atol=1e-4)


def test_log_probs_are_those_of_the_distribution_that_was_drawn_from(tmp_path):
    trainer = trainer_of(tmp_path, **SAMPLED, sampling_temperature=0.7)
    (batch,) = trainer.get_train_dataloader()
    for row in trainer.rollouts_from("student", batch, 5):
        with torch.no_grad():
            z = tiny_llama(1)(torch.tensor([row.ids])).logits[0, :-1] / 0.7
        expected = z.log_softmax(-1).gather(1, torch.tensor(row.ids[1:])[:, None])[-len(row.written) :, 0]
        torch.testing.assert_close(torch.tensor(row.log_probs), expected, atol=1e-4, rtol=1e-4)


def on_server(folder, server, **options):  # noqa: F811
    return DistillationTrainer(
        tiny_llama(1), teacher(server, top=1), config(folder, **{**SAMPLED, **options}), Dataset.from_dict(ROWS),
        processing_class=byte_tokenizer(),
    )  # fmt: skip


@pytest.mark.parametrize("style", ["prompt_logprobs", "echo"])
def test_a_teacher_on_a_server_teaches_as_the_model_itself_does(tmp_path, server, style):  # noqa: F811
    server.style = style
    trainer = on_server(tmp_path / "a", server)
    trainer._get_train_sampler = lambda *a: torch.utils.data.SequentialSampler(trainer.train_dataset)
    trainer.train()
    expected, _ = policy_gradient(tiny_llama(1), tiny_llama(2), rows_of_first_step())
    assert_same(weights(trainer), expected, atol=1e-4)
    asked = [body for path, body, _ in server.requests if path == "/v1/completions"]
    assert {body.get("prompt_logprobs", body.get("logprobs")) for body in asked} == {1}


def test_a_server_that_dies_stops_a_run_that_goes_on_when_it_is_back(tmp_path, server):  # noqa: F811
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2}
    whole = on_server(tmp_path / "a", server, **settings)
    whole.train()
    server.faults = []
    dying = on_server(tmp_path / "b", server, **settings)
    steps = dying.training_step

    def dies(*args, **kwargs):
        if dying.state.global_step == 2:
            server.faults = [(503, b"", {})] * 9
        return steps(*args, **kwargs)

    dying.training_step = dies
    with pytest.raises(OSError, match=r"answered 503\. No answer after 3 attempts"):
        dying.train()
    assert sorted(path.name for path in (tmp_path / "b").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    server.faults = [(503, b"", {})]  # one more hiccup: tried again
    resumed = on_server(tmp_path / "b", server, **settings)
    resumed.train(resume_from_checkpoint=True)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name
    shutil.rmtree(tmp_path / "b")


def test_evaluation_is_on_texts_of_the_student(tmp_path):
    trainer = trainer_of(tmp_path, **SAMPLED)
    found = trainer.evaluate()
    rows = written_by(tiny_llama(1), prompt_ids(), seed_of(1, "evaluation", 0, 0))
    _, advantages = policy_gradient(tiny_llama(1), tiny_llama(2), rows)
    assert found["eval_kd"] == pytest.approx(-sum(advantages) / len(advantages), rel=1e-4)


@pytest.mark.parametrize("options, message", [
    ({"on_policy_share": 0.5}, "learns from tokens that the student drew. Set 1 and False"),
    ({"teacher_writes": True}, "learns from tokens that the student drew"),
    ({"loss": "adaptive_kl"}, "adaptive_kl needs dense teacher rows"),
    ({"generation_options": {"top_p": 0.9}}, "needs the probability with which each token was drawn"),
    ({"on_policy_options": {"trust_region": 0.0}}, "`trust_region` has to be > 0, or None, got 0"),
    ({"on_policy_options": {"outliers": "drop"}}, "`outliers` has to be clip or mask, got 'drop'"),
])  # fmt: skip
def test_settings_that_would_bias_it_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **{**SAMPLED, **options})


def test_a_server_cannot_change_its_temperature(tmp_path, server):  # noqa: F811
    trainer = on_server(tmp_path, server, distill_temperature=2.0)
    with pytest.raises(ValueError, match="`distill_temperature` is 2, but a ServerTeacher gives the probability of"):
        trainer.train()
