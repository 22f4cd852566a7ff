"""Distillation of sentence embedders: vectors by their definition, pairs, a projection that is trained along."""

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from trainers.tasks.tiny_encoders import config, tiny_bert, tokenizer_of
from transformers import BertForMaskedLM, BertModel

from hf_transfer_ext import TaskDistillationTrainer
from hf_transfer_ext.losses.ranking import translation_ranking
from hf_transfer_ext.losses.vectors import VECTOR_LOSSES
from hf_transfer_ext.trainers.trained_along import PARTS_FILE

TASK = "sentence_embedding"
TEXTS = ["gold is heavy", "paris is a city of france", "the rhine flows", "tin"]
PAIRS = {"text": TEXTS, "other_text": ["heavy gold", "a city", "a river", "metal"], "score": [0.9, 0.5, None, 0.1]}


def models(width=16, teacher_width=16):
    own, other = tokenizer_of(), tokenizer_of("byte_level")
    student = tiny_bert(BertModel, own, 1, hidden_size=width)
    return student, tiny_bert(BertModel, other, 2, hidden_size=teacher_width), own, other


def trainer_of(folder, rows=PAIRS, parts=None, **options):
    student, teacher, own, other = parts or models()
    options = {"loss": "squared_error", **options}
    return TaskDistillationTrainer(
        student, teacher, config(folder, TASK, **options), Dataset.from_dict(rows), own, other
    )


def vector(model, tokenizer, text, pooling="mean"):
    with torch.no_grad():
        found = model(**tokenizer(text, return_tensors="pt"))
    return found.last_hidden_state[0].double().mean(0) if pooling == "mean" else found.last_hidden_state[0, 0].double()


@pytest.mark.parametrize("loss", VECTOR_LOSSES)
def test_the_loss_is_its_definition_on_vectors_of_single_texts_padding_left_out(tmp_path, loss):
    parts = models(8, 12)
    trainer = trainer_of(tmp_path, PAIRS, parts, loss=loss, kd_weight=0.7, ce_weight=0.3)
    student, teacher, own, other = parts
    columns = PAIRS["text"], PAIRS["other_text"]
    ours, theirs = (
        torch.stack([torch.stack([vector(model, tokenizer, text) for text in texts]) for texts in columns])
        for model, tokenizer in ((student, own), (teacher, other))
    )
    assert bool(len(trainer.task.along)) is (loss != "similarity_mse")
    projection = trainer.task.along["projection"].detach() if len(trainer.task.along) else None
    expected = 0.7 * VECTOR_LOSSES[loss](ours, theirs, projection) + 0.3 * translation_ranking(ours[0], ours[1])
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert trainer.compute_loss(student, batch).item() == pytest.approx(expected.mean().item(), rel=1e-4)


def test_single_texts_and_the_first_token(tmp_path):
    parts = models()
    pooling = {"pooling": "cls", "teacher_pooling": "mean"}
    trainer = trainer_of(tmp_path, {"text": TEXTS}, parts, task_options=pooling)
    student, teacher, own, other = parts
    expected = sum(
        (vector(student, own, text, "cls") - vector(teacher, other, text)).square().sum().item() for text in TEXTS
    )
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert trainer.compute_loss(student, batch).item() == pytest.approx(expected / 4, rel=1e-5)
    trainer.save_model()
    assert "last_hidden_state[:, 0]" in (tmp_path / "README.md").read_text()


def test_a_projection_is_trained_along_kept_in_checkpoints_and_left_out_of_the_result(tmp_path):
    options = {
        "save_strategy": "steps",
        "save_steps": 4,
        "max_steps": 8,
        "optim": "adamw_torch",
        "learning_rate": 0.01,
    }
    trainer = trainer_of(tmp_path, parts=models(8, 12), loss="lealla", ce_weight=1.0, **options)
    before = trainer.task.along["projection"].detach().clone()
    trainer.train()
    log = trainer.state.log_history
    assert log[7]["kd"] < log[0]["kd"] and log[0]["ce"] > 0
    assert not torch.equal(before, trainer.task.along["projection"])
    assert load_file(tmp_path / "checkpoint-4" / PARTS_FILE)["0.projection"].shape == (12, 8)
    again = trainer_of(tmp_path, parts=models(8, 12), loss="lealla", ce_weight=1.0, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    torch.testing.assert_close(again.task.along["projection"], trainer.task.along["projection"])
    trainer.save_model(str(tmp_path / "whole"))
    assert not (tmp_path / "whole" / PARTS_FILE).exists()
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "sentence-similarity" in card and "AutoModel.from_pretrained" in card and "mask.sum(1)" in card


def test_it_is_measured_by_scores_retrieval_and_likeness(tmp_path):
    parts = models()
    trainer = trainer_of(tmp_path, parts=parts)
    found = {m.name: m.value for m in trainer.measure(Dataset.from_dict(PAIRS))}
    assert set(found) == {"spearman", "retrieval_accuracy", "similarity_to_teacher", "cosine_to_teacher"}
    student, _, own, _ = parts
    same = TaskDistillationTrainer(
        student, tiny_bert(BertModel, own, 1), config(tmp_path, TASK, loss="cosine_distance"),
        Dataset.from_dict(PAIRS), own, own,
    )  # fmt: skip
    alike = {m.name: m.value for m in same.measure(Dataset.from_dict({"text": TEXTS}))}
    assert alike == pytest.approx({"similarity_to_teacher": 1.0, "cosine_to_teacher": 1.0})


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Unknown loss of the task sentence_embedding 'forward_kl'"):
        config(tmp_path, TASK)
    with pytest.raises(ValueError, match="Did you mean 'mean'"):
        config(tmp_path, TASK, loss="lealla", task_options={"pooling": "meen"})
    with pytest.raises(ValueError, match="`margin` is about the ranking"):
        config(tmp_path, TASK, loss="lealla", task_options={"margin": 0.1})
    with pytest.raises(ValueError, match="no probabilities to soften"):
        config(tmp_path, TASK, loss="lealla", distill_temperature=2.0)
    with pytest.raises(ValueError, match="no column 'other_text'"):
        trainer_of(tmp_path, {"text": TEXTS}, ce_weight=1.0)
    _, teacher, own, other = models()
    with pytest.raises(ValueError, match="a BertForMaskedLM was given"):
        trainer_of(tmp_path, parts=(tiny_bert(BertForMaskedLM, own), teacher, own, other))
