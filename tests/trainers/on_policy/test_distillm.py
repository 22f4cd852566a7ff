"""DistiLLM: who writes at which threshold, how it rises, the buffer, and that a checkpoint holds all of it."""

import pytest
import torch
from datasets import Dataset
from tiny import byte_tokenizer, tiny_llama
from trainers.test_distillation import config, logged, weights
from trainers.test_rollouts import PROMPTS, trained, trainer_of

from hf_transfer_ext import DistillationTrainer
from hf_transfer_ext.trainers.on_policy import distillm
from hf_transfer_ext.trainers.rollout_method import Rollout

DISTILLM = {"on_policy": "distillm", "on_policy_share": 0.5, "max_new_tokens": 6, "loss": "skew_reverse_kl"}


def text(n):
    return Rollout([n, n + 1], [-100, n + 1], "student")


def chosen(draw, threshold, progress, size, capacity):
    """The cases of the published code, one after the other."""
    if draw < threshold * (1 - progress) or (draw < threshold and size < capacity):
        return "student"
    return "replay" if draw < threshold else "data"


@pytest.mark.parametrize("size", [0, 3, 4])
@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_the_source_is_that_of_the_published_code(tmp_path, size, progress):
    method, args = distillm(capacity=4), config(tmp_path, **DISTILLM)
    method.note([text(n) for n in range(size)])
    for i in range(20):
        assert method.sources(i / 20, args, progress) == (chosen(i / 20, 0.5, progress, size, 4),)


def test_the_threshold_rises_when_the_held_out_loss_does(tmp_path):
    method, args = distillm(step=0.3, tolerance=0.1), config(tmp_path, **DISTILLM)
    for loss, threshold in ((2.0, 0.5), (2.05, 0.5), (1.0, 0.5), (2.1, 0.8), (2.15, 0.8), (2.3, 1.0), (9.0, 1.0)):
        method.after_evaluation(loss)
        assert method.threshold(args) == pytest.approx(threshold)


def evaluated(folder, sets, **options):
    trainer = trainer_of(folder, **{**DISTILLM, "on_policy_options": {"step": 0.2, "tolerance": 0.1}, **options})
    trainer.eval_dataset = sets(trainer.eval_dataset)
    first = trainer.evaluate()
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(3.0)
    return trainer, first, trainer.evaluate()


def test_the_mean_of_several_evaluation_sets_raises_the_threshold(tmp_path):
    trainer, first, worse = evaluated(tmp_path, lambda own: {"a": own.select([0]), "b": own.select([1, 2])})
    values = [(found["eval_a_ce"] + found["eval_b_ce"]) / 2 for found in (first, worse)]
    assert values[1] > values[0] + 0.1 and trainer.rollout_method.reference == pytest.approx(values[1])
    assert (first["on_policy_raised"], worse["on_policy_raised"]) == (0.0, 0.2)
    assert logged(trainer, "on_policy_raised") == [0.0, 0.2]
    alone, *_ = evaluated(tmp_path / "one", lambda own: own)
    assert alone.rollout_method.raised == 0.2


def test_another_set_than_the_trainers_own_does_not_count(tmp_path):
    trainer, *_ = evaluated(tmp_path, lambda own: own)
    before = trainer.rollout_method.state()
    assert "on_policy_raised" not in trainer.evaluate(trainer.eval_dataset)
    assert trainer.rollout_method.state() == before


def test_an_evaluation_on_prompts_alone_is_refused(tmp_path):
    prompts = Dataset.from_dict(PROMPTS)
    with pytest.raises(ValueError, match="distillm reads the cross entropy of held-out completions"):
        DistillationTrainer(
            tiny_llama(1), tiny_llama(2), config(tmp_path, **DISTILLM, teacher_writes=True), prompts,
            eval_dataset={"a": prompts}, processing_class=byte_tokenizer(),
        )  # fmt: skip


def test_the_buffer_keeps_the_newest_and_gives_them_back_by_seed():
    method = distillm(capacity=2)
    method.note([text(1), text(5), text(9)])
    drawn = [row.ids[0] for seed in range(30) for row in method.replayed(2, seed)]
    assert set(drawn) == {5, 9} and method.replayed(4, 3) == method.replayed(4, 3)
    assert {row.source for row in method.replayed(4, 3)} == {"replay"}


def test_a_resumed_run_has_the_same_buffer_and_threshold(tmp_path):
    settings = {**DISTILLM, "max_steps": 6, "save_strategy": "steps", "save_steps": 3,
                "per_device_train_batch_size": 2, "eval_strategy": "steps", "eval_steps": 1, "on_policy_share": 0.6,
                "on_policy_options": {"capacity": 3, "tolerance": 0.0}}  # fmt: skip
    whole = trained(tmp_path / "a", **settings)
    assert logged(whole, "on_policy_raised")[-1] == whole.rollout_method.raised
    resumed = trainer_of(tmp_path / "b", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert resumed.rollout_method.state() == whole.rollout_method.state()
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name
    (tmp_path / "a" / "checkpoint-3" / "rollouts_0.json").unlink()
    with pytest.raises(ValueError, match=r"has no rollouts_0.json, which holds what distillm had written"):
        trainer_of(tmp_path / "c", **settings).train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))


@pytest.mark.parametrize("options, message", [
    ({"on_policy_share": None}, "distillm lets the student write once the held-out loss rises: it would never do"),
    ({"on_policy_options": {"capacity": 0}}, "`capacity` has to be >= 1"),
    ({"on_policy_options": {"step": 0}}, r"`step` in \(0, 1\]"),
])  # fmt: skip
def test_settings_without_effect_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **{**DISTILLM, **options})
