"""Distillation of word labels: the loss by its definition across tokenizers, entities, prototypes across languages."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from trainers.tasks.tiny_encoders import config, tiny_bert, tokenizer_of
from transformers import BertForTokenClassification

from hf_transfer_ext import TaskDistillationTrainer
from hf_transfer_ext.measurement.bootstrap import interval_of
from hf_transfer_ext.trainers.trained_along import PARTS_FILE

TASK = "token_classification"
LABELS = ["O", "B-LOC", "I-LOC"]
ROWS = {
    "tokens": [["gold", "from", "rome"], ["new", "york"], ["the", "old", "rhine", "flows"]],
    "labels": [["O", "O", "B-LOC"], ["B-LOC", "I-LOC"], None],
}
SHUFFLED = ["I-LOC", "O", "B-LOC"]


def parts():
    own, other = tokenizer_of(), tokenizer_of("unigram")
    return (
        tiny_bert(BertForTokenClassification, own, 1, labels=LABELS),
        tiny_bert(BertForTokenClassification, other, 2, labels=SHUFFLED), own, other,
    )  # fmt: skip


def trainer_of(folder, rows=ROWS, models=None, **options):
    student, teacher, own, other = models or parts()
    data = Dataset.from_dict(rows)
    return TaskDistillationTrainer(student, teacher, config(folder, TASK, **options), data, own, other)


def word_logits(model, tokenizer, words):
    encoded = tokenizer(words, is_split_into_words=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**encoded).logits[0].double().tolist()
    ids = encoded.word_ids()
    return [logits[ids.index(place)] for place in range(len(words))]


def log_softmax(values):
    total = math.log(sum(math.exp(v) for v in values))
    return [v - total for v in values]


def test_streamed_rows_are_the_same_batches(tmp_path):
    """Inputs of the teacher, and the places of words, are not columns that the student itself takes."""
    batches = []
    for data in (Dataset.from_dict(ROWS), Dataset.from_dict(ROWS).to_iterable_dataset()):
        student, teacher, own, other = parts()
        args = config(tmp_path, TASK, max_steps=1)
        trainer = TaskDistillationTrainer(student, teacher, args, data, own, other)
        trainer._get_train_sampler = lambda *_, trainer=trainer: torch.utils.data.SequentialSampler(
            trainer.train_dataset
        )
        batches.append(next(iter(trainer.get_train_dataloader())))
    assert batches[0].keys() == batches[1].keys() and "teacher_input_ids" in batches[0]
    for name, values in batches[0].items():
        assert torch.equal(values, batches[1][name]), name


def test_the_loss_is_its_definition_at_the_first_token_of_each_word(tmp_path):
    models = parts()
    trainer = trainer_of(tmp_path, models=models, kd_weight=0.7, ce_weight=0.3)
    student, teacher, own, other = models
    expected = 0.0
    for words, labels in zip(ROWS["tokens"], ROWS["labels"], strict=True):
        sides = zip(word_logits(student, own, words), word_logits(teacher, other, words), strict=True)
        for place, (z, theirs) in enumerate(sides):
            t = [theirs[SHUFFLED.index(name)] for name in LABELS]
            log_p, log_q = log_softmax(t), log_softmax(z)
            expected += 0.7 * sum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True))
            if labels is not None:
                expected -= 0.3 * log_q[LABELS.index(labels[place])]
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert trainer._get_num_items_in_batch([batch], torch.device("cpu")).item() == 9
    assert trainer.compute_loss(student, batch).item() == pytest.approx(expected / 9, rel=1e-5)


def test_words_that_are_cut_off_in_one_model_do_not_count(tmp_path):
    trainer = trainer_of(tmp_path, max_length=4)
    counts = [len(labels) for labels in trainer.train_dataset["labels"]]
    assert counts[0] < 3 and all(len(ids) <= 4 for ids in trainer.train_dataset["teacher_input_ids"])


def test_measurements_are_of_words_and_of_entities(tmp_path):
    trainer = trainer_of(tmp_path)
    found = {m.name: m for m in trainer.measure(Dataset.from_dict(ROWS))}
    assert set(found) == {"accuracy", "macro_f1", "entity_f1", "teacher_agreement", "kl_to_teacher"}
    assert found["accuracy"].examples == 5 and found["teacher_agreement"].examples == 9
    rows = list(trainer.train_dataset)
    of_rows = [{m.name: m for m in trainer.task.measure(trainer.model, [row], trainer.teacher)} for row in rows]
    agreement = [(of["teacher_agreement"].value, of["teacher_agreement"].examples) for of in of_rows]
    shares, words = np.array(agreement).T
    expected = interval_of(lambda hits, count: hits.sum() / count.sum(), [[shares * words, words]])
    assert found["teacher_agreement"].interval == pytest.approx(expected)
    assert all(m.interval[0] <= m.value <= m.interval[1] for m in found.values())
    teacher = {m.name: m.value for m in trainer.measure(Dataset.from_dict(ROWS), model=trainer._taught_by)}
    assert set(teacher) == {"accuracy", "macro_f1", "entity_f1"}


def test_prototypes_learn_from_unlabelled_words_and_are_kept_in_checkpoints(tmp_path):
    options = {"self_training_weight": 1.0, "alignment_weight": 0.5, "ramp": 0.0}
    trainer = trainer_of(
        tmp_path, task_options=options, ce_weight=1.0, max_steps=2, save_strategy="steps", save_steps=1
    )
    trainer.train()
    log = trainer.state.log_history
    assert log[1]["self_training"] > 0 and log[1]["alignment"] > 0
    saved = load_file(tmp_path / "checkpoint-1" / PARTS_FILE)
    assert saved["0.centers"].shape == (3, 16) and saved["1.seen"].any()
    again = trainer_of(tmp_path, task_options=options, ce_weight=1.0, max_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for own, other in zip(again.parts.state_dict().values(), trainer.parts.state_dict().values(), strict=True):
        torch.testing.assert_close(own, other)
    trainer.save_model(str(tmp_path / "whole"))
    assert not (tmp_path / "whole" / PARTS_FILE).exists()
    assert "token-classification" in (tmp_path / "whole" / "README.md").read_text()


def test_the_teacher_is_fine_tuned_with_the_alignment_alone(tmp_path):
    student, _, own, _ = parts()
    options = {"task_options": {"alignment_weight": 1.0}, "kd_weight": 0.0, "ce_weight": 1.0, "max_steps": 3}
    trainer = TaskDistillationTrainer(student, None, config(tmp_path, TASK, **options), Dataset.from_dict(ROWS), own)
    trainer.train()
    assert trainer.state.log_history[2]["alignment"] > 0 and "kd" not in trainer.state.log_history[0]


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`ramp` is about prototypes"):
        config(tmp_path, TASK, task_options={"ramp": 0.5})
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        config(tmp_path, TASK, task_options={"ramp": 2, "alignment_weight": 1.0})
    with pytest.raises(ValueError, match="2 words and 1 labels"):
        trainer_of(tmp_path, {"tokens": [["new", "york"]], "labels": [["O"]]})
    with pytest.raises(ValueError, match="Did you mean 'B-LOC'"):
        trainer_of(tmp_path, {"tokens": [["york"]], "labels": [["B-LOK"]]})
