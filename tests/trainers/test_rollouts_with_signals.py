"""Texts that are written during training, with every kind of teacher: other tokenizers, layers, several, servers."""

import copy

import pytest
import torch
from datasets import Dataset
from teachers.test_server import server, teacher  # noqa: F401
from tiny import byte_tokenizer, tiny_llama
from tiny_tokenizers import byte_fallback, byte_level
from trainers.test_distillation import assert_same, config, logged, weights
from trainers.test_rollouts import ROWS, WRITES, prompt_ids, step_by_hand, trainer_of, written_by
from trainers.test_span_distillation import student as byte_level_student
from trainers.test_span_distillation import teacher as byte_fallback_teacher

from hf_transfer_ext import DistillationTrainer
from hf_transfer_ext.trainers.rollouts import seed_of


@pytest.mark.parametrize("loss", ["uld", "gold", "alm"])
def test_a_teacher_with_another_tokenizer_reads_what_the_student_wrote(tmp_path, loss):
    """The step on the student's own texts is that of a run on the same texts as data."""
    trainer = DistillationTrainer(
        byte_level_student(), byte_fallback_teacher(), config(tmp_path / "a", **WRITES, loss=loss, max_length=128),
        Dataset.from_dict(ROWS), processing_class=byte_level(), teacher_processing_class=byte_fallback(),
    )  # fmt: skip
    trainer._get_train_sampler = lambda *a: torch.utils.data.SequentialSampler(trainer.train_dataset)
    seen = []
    collated = trainer._collated
    trainer._collated = lambda rows: seen.extend(rows) or collated(rows)
    trainer.train()
    data = Dataset.from_list([{"input_ids": row.ids, "labels": row.labels} for row in seen])
    plain = DistillationTrainer(
        byte_level_student(), byte_fallback_teacher(), config(tmp_path / "b", loss=loss, max_length=128), data,
        processing_class=byte_level(), teacher_processing_class=byte_fallback(),
    )  # fmt: skip
    plain._get_train_sampler = lambda *a: torch.utils.data.SequentialSampler(plain.train_dataset)
    plain.train()
    assert len(seen) == 4 and {row.source for row in seen} == {"student"}
    assert_same(weights(trainer), weights(plain))
    assert logged(trainer, "kd")[0] == pytest.approx(logged(plain, "kd")[0], rel=1e-5)


def test_layers_are_compared_at_the_written_tokens(tmp_path):
    trainer = trainer_of(tmp_path, hidden_loss="hidden_mse", hidden_weight=0.5)
    trainer.train()
    plain = trainer_of(tmp_path / "b")
    plain.train()
    assert logged(trainer, "hidden")[0] > 0 and logged(trainer, "kd")[0] == pytest.approx(logged(plain, "kd")[0])
    assert not torch.equal(*(next(iter(weights(one).values())) for one in (trainer, plain)))


def test_several_teachers_judge_the_same_texts(tmp_path):
    for seed in (2, 3):
        tiny_llama(seed).save_pretrained(tmp_path / str(seed))
        byte_tokenizer().save_pretrained(tmp_path / str(seed))
    teachers = [{"model": str(tmp_path / "2"), "weight": 1.0}, {"model": str(tmp_path / "3"), "weight": 3.0}]
    args = config(tmp_path / "out", **WRITES, teachers=teachers)
    trainer = DistillationTrainer(
        tiny_llama(1), None, args, Dataset.from_dict(ROWS), processing_class=byte_tokenizer()
    )
    trainer._get_train_sampler = lambda *a: torch.utils.data.SequentialSampler(trainer.train_dataset)
    trainer.train()

    def mixture(ids):
        parts = [share * tiny_llama(seed)(ids).logits.softmax(-1) for share, seed in ((0.25, 2), (0.75, 3))]
        return type("Output", (), {"logits": sum(parts).log()})()

    rows = written_by(tiny_llama(1), prompt_ids(), seed_of(1, 0, 0, "student", 0))
    expected, _, _ = step_by_hand(tiny_llama(1), mixture, rows)
    assert_same(weights(trainer), expected, atol=1e-5)


def test_a_teacher_on_a_server_by_its_config(tmp_path, server):  # noqa: F811
    """gkd takes the likeliest tokens that the server lists, sampled_reverse_kl the drawn ones."""
    found = []
    for method, top in (("gkd", 6), ("sampled_reverse_kl", 1)):
        settings = {**WRITES, "on_policy": method, "loss": "reverse_kl", "teacher_server": server.url,
                    "teacher_server_model": "big", "teacher_server_options": {"top": top}}  # fmt: skip
        trainer = DistillationTrainer(
            tiny_llama(1), None, config(tmp_path / method, **settings), Dataset.from_dict(ROWS),
            processing_class=byte_tokenizer(),
        )  # fmt: skip
        trainer.train()
        found.append(logged(trainer, "kd")[0])
        assert not torch.equal(*(next(iter(copy.deepcopy(one).values())) for one in (
            weights(trainer), dict(tiny_llama(1).named_parameters()))))  # fmt: skip
    assert found[0] > 0


@pytest.mark.parametrize("options, message", [
    ({"on_policy": "sampled_reverse_kl", "loss": "uld"}, "compares spans of text, but sampled_reverse_kl compares"),
    ({"on_policy": "minillm", "loss": "gold"}, "compares spans of text, but minillm compares"),
    ({"teachers": [{"model": "a", "name": "a"}, {"model": "b", "name": "b"}], "teachers_by": "column",
      "on_policy": "sampled_reverse_kl"},
     "`teachers_by` is column, but sampled_reverse_kl asks one teacher for the probability of each written token"),
])  # fmt: skip
def test_pairs_that_do_not_go_together_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **{**WRITES, **options})
