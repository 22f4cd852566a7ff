"""Distillation of masked language models: the loss by its definition, masks drawn anew and, in evaluation, fixed."""

import pytest
import torch
from datasets import Dataset
from trainers.tasks.tiny_encoders import config, tiny_bert, tokenizer_of
from trainers.tasks.token_oracle import expected_loss
from transformers import AutoModelForMaskedLM, BertForMaskedLM

from hf_transfer_ext import TaskDistillationTrainer

ROWS = {"text": ["gold is heavy", "paris is a city of france", "the rhine flows"] * 2}


@pytest.fixture
def tokenizer():
    found = tokenizer_of()
    found.mask_token = "<unused0>"
    yield found
    found.mask_token = None


def trainer_of(folder, tokenizer, teacher=None, **options):
    student = tiny_bert(BertForMaskedLM, tokenizer, 1)
    teacher = teacher or tiny_bert(BertForMaskedLM, tokenizer, 2)
    options = {"task_options": {"mask_probability": 0.5}, **options}
    args = config(folder, "masked_lm", **options)
    return TaskDistillationTrainer(student, teacher, args, Dataset.from_dict(ROWS), tokenizer, tokenizer)


@pytest.mark.parametrize("fused", [True, False])
def test_the_loss_is_its_definition_at_each_masked_token(tmp_path, tokenizer, fused):
    trainer = trainer_of(tmp_path, tokenizer, kd_weight=0.7, ce_weight=0.3, fused=fused)
    batch = trainer.data_collator(list(trainer.train_dataset))
    models = trainer.model, trainer.teacher.model
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected = expected_loss(*models, inputs, batch["labels"], kd_weight=0.7, ce_weight=0.3)
    assert trainer.compute_loss(trainer.model.eval(), batch).item() == pytest.approx(expected, rel=1e-4)
    assert trainer.task._fused is fused


def test_masks_are_as_berts_and_fixed_in_evaluation(tmp_path, tokenizer):
    trainer = trainer_of(tmp_path, tokenizer, task_options={"mask_probability": 1.0})
    text = {"text": ["gold is heavy and old " * 8] * 60}
    rows = list(trainer.task.prepared(Dataset.from_dict(text)))
    whole = torch.tensor([row["input_ids"] for row in rows])
    one, two = trainer.data_collator(rows), trainer.data_collator(rows)
    assert not torch.equal(one["input_ids"], two["input_ids"])
    chosen = one["labels"] != -100
    assert torch.equal(one["labels"][chosen], whole[chosen])
    special = torch.isin(whole, torch.tensor(tokenizer.all_special_ids))
    assert special[:, 0].all() and torch.equal(chosen, ~special)  # special tokens are never predicted
    shares = [(one["input_ids"] == tokenizer.mask_token_id)[chosen], (one["input_ids"] == whole)[chosen]]
    assert [float(share.float().mean()) for share in shares] == pytest.approx([0.8, 0.1], abs=0.03)
    found = [trainer.evaluate(trainer.train_dataset)["eval_kd"] for _ in range(2)]
    assert found[0] == found[1]
    trainer.task.evaluates = True  # a text has the same mask beside a longer one, too
    short = list(trainer.task.prepared(Dataset.from_dict({"text": ["gold is old"]})))
    alone, beside = trainer.data_collator(short), trainer.data_collator([*rows[:1], *short])
    assert torch.equal(alone["input_ids"][0], beside["input_ids"][1][: len(alone["input_ids"][0])])


def test_training_learns_the_teacher_and_saves_what_it_is(tmp_path, tokenizer):
    trainer = trainer_of(tmp_path, tokenizer, max_steps=40, optim="adamw_torch", learning_rate=0.02)
    before = {m.name: m.value for m in trainer.measure(Dataset.from_dict(ROWS))}
    trainer.train()
    after = {m.name: m.value for m in trainer.measure(Dataset.from_dict(ROWS))}
    assert after["kl_to_teacher"] < before["kl_to_teacher"] / 2
    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    assert "fill-mask" in card and isinstance(AutoModelForMaskedLM.from_pretrained(tmp_path), BertForMaskedLM)


def test_what_does_not_fit_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"`mask_probability` of masked_lm must lie in \(0, 1\]"):
        config(tmp_path, "masked_lm", task_options={"mask_probability": 0})
    with pytest.raises(ValueError, match="different vocabularies"):
        larger = tiny_bert(BertForMaskedLM, tokenizer, 2, vocab_size=len(tokenizer) + 8)
        other = tokenizer_of("unigram")
        TaskDistillationTrainer(
            tiny_bert(BertForMaskedLM, tokenizer), larger, config(tmp_path, "masked_lm"), Dataset.from_dict(ROWS),
            tokenizer, other,
        )  # fmt: skip
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match="has no mask token"):
        trainer_of(tmp_path, tokenizer)
