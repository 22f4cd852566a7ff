"""Distillation of text classifiers: the loss by its definition, labels by name, other tokenizers, several labels."""

import math

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from peft import LoraConfig
from trainers.tasks.tiny_encoders import config, tiny_bert, tokenizer_of
from transformers import BertForSequenceClassification, BertForTokenClassification

from hf_transfer_ext import DistillationConfig, DistillationTrainer, TaskDistillationTrainer

TASK = "sequence_classification"
LABELS = ["metal", "city", "river"]
ROWS = {
    "text": ["gold is heavy", "paris", "the rhine flows", "tin and zinc", "rome is old", "iron"],
    "label": ["metal", "city", "river", "metal", "city", None],
}


def models(labels=LABELS, teacher_labels=None, **more):
    """Student, teacher, and the tokenizers of both, which differ."""
    own, other = tokenizer_of(), tokenizer_of("byte_level")
    student = tiny_bert(BertForSequenceClassification, own, 1, labels=labels, **more)
    teacher = tiny_bert(BertForSequenceClassification, other, 2, labels=teacher_labels or labels, **more)
    return student, teacher, own, other


def trainer_of(folder, rows=ROWS, parts=None, **options):
    student, teacher, own, other = parts or models()
    peft = options.pop("peft_config", None)
    return TaskDistillationTrainer(
        student, teacher, config(folder, TASK, **options), Dataset.from_dict(rows), own, other, peft_config=peft
    )


def logits_of(model, tokenizer, text):
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).logits[0].double().tolist()


def log_softmax(values):
    total = math.log(sum(math.exp(v) for v in values))
    return [v - total for v in values]


def batch_of(trainer):
    return trainer.data_collator(list(trainer.train_dataset))


def test_the_loss_is_its_definition_with_labels_by_name_and_another_tokenizer(tmp_path):
    shuffled = ["river", "metal", "city"]
    parts = models(teacher_labels=shuffled)
    trainer = trainer_of(tmp_path, parts=parts, kd_weight=0.7, ce_weight=0.3, distill_temperature=2.0)
    assert "teacher_input_ids" in trainer.train_dataset.column_names
    student, teacher, own, other = parts
    expected = 0.0
    for text, label in zip(ROWS["text"], ROWS["label"], strict=True):
        z = logits_of(student, own, text)
        theirs = logits_of(teacher, other, text)
        t = [theirs[shuffled.index(name)] for name in LABELS]
        log_p, log_q = log_softmax([v / 2 for v in t]), log_softmax([v / 2 for v in z])
        expected += 0.7 * sum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True))
        if label is not None:
            expected -= 0.3 * log_softmax(z)[LABELS.index(label)]
    loss = trainer.compute_loss(student.eval(), batch_of(trainer))
    assert loss.item() == pytest.approx(expected / 6, rel=1e-5)


def test_several_labels_are_a_yes_or_no_each(tmp_path):
    rows = {"text": ["gold", "the seine in paris"], "label": [["metal"], ["city", "river"]]}
    parts = models(problem_type="multi_label_classification")
    trainer = trainer_of(tmp_path, rows, parts, ce_weight=1.0)
    student, teacher, own, other = parts
    expected = 0.0
    for text, labels in zip(rows["text"], rows["label"], strict=True):
        for place, name in enumerate(LABELS):
            q = 1 / (1 + math.exp(-logits_of(student, own, text)[place]))
            p = 1 / (1 + math.exp(-logits_of(teacher, other, text)[place]))
            expected += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
            expected -= math.log(q if name in labels else 1 - q)
    assert trainer.compute_loss(student, batch_of(trainer)).item() == pytest.approx(expected / 6, rel=1e-4)
    names = {m.name for m in trainer.measure(Dataset.from_dict(rows))}
    assert names == {"exact_match", "macro_f1", "teacher_agreement"}


def test_an_empty_list_among_names_is_a_text_without_labels(tmp_path):
    parts = models(problem_type="multi_label_classification")
    rows = {"text": ["gold", "paris"], "label": [["metal", "city"], []]}
    assert batch_of(trainer_of(tmp_path, rows, parts, ce_weight=1.0))["labels"].tolist() == [[1, 1, 0], [0, 0, 0]]
    numbers = {"text": ["gold", "paris"], "label": [[1, 1, 0], []]}
    with pytest.raises(ValueError, match=r"Row 1: Column 'label' has to hold names of labels, or 0 and 1 .* got \[\]"):
        trainer_of(tmp_path, numbers, parts, ce_weight=1.0)


def test_a_regression_is_compared_by_squares(tmp_path):
    rows = {"text": ["gold", "paris", "tin"], "label": [1.0, None, -2.0]}
    parts = models(labels=["score"])
    with pytest.raises(ValueError, match="loss: squared_error"):
        trainer_of(tmp_path, rows, parts)
    trainer = trainer_of(tmp_path, rows, parts, loss="squared_error", ce_weight=0.5)
    student, teacher, own, other = parts
    expected = 0.0
    for text, label in zip(rows["text"], rows["label"], strict=True):
        z, t = logits_of(student, own, text)[0], logits_of(teacher, other, text)[0]
        expected += (z - t) ** 2 + (0.5 * (z - label) ** 2 if label is not None else 0.0)
    assert trainer.compute_loss(student, batch_of(trainer)).item() == pytest.approx(expected / 3, rel=1e-5)
    assert {m.name: m.examples for m in trainer.measure(Dataset.from_dict(rows))}["spearman"] == 2


def test_training_by_squares_of_class_logits_learns_the_teacher(tmp_path):
    trainer = trainer_of(tmp_path, loss="squared_error", ce_weight=0.1, max_steps=30, learning_rate=0.05)
    trainer.train()
    kd = [line["kd"] for line in trainer.state.log_history if "kd" in line]
    assert kd[-1] < kd[0] / 2 and "accuracy" in trainer.state.log_history[0]


@pytest.mark.parametrize("adapter", [False, True])
def test_one_step_does_not_depend_on_how_the_batch_was_split(tmp_path, adapter):
    ends = []
    for size, steps in ((6, 1), (2, 3)):
        peft = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], init_lora_weights=False)
        torch.manual_seed(0)
        trainer = trainer_of(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=1, ce_weight=1.0,
            gradient_checkpointing=adapter, peft_config=peft if adapter else None,
        )  # fmt: skip
        trainer.train()
        ends.append(torch.cat([p.flatten() for p in trainer.model.parameters() if p.requires_grad]))
    assert (ends[0] - ends[1]).abs().max() < 1e-6


def test_what_is_saved_is_a_classifier_with_its_card(tmp_path):
    trainer = trainer_of(tmp_path / "out", eval_steps=1)
    trainer.train()
    found = trainer.evaluate(trainer.train_dataset)
    assert found["eval_loss"] == pytest.approx(found["eval_kd"]) and 0 <= found["eval_agrees"] <= 1
    trainer.save_model()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert 'AutoModelForSequenceClassification.from_pretrained("' in card and "AutoModelForCausalLM" not in card
    assert BertForSequenceClassification.from_pretrained(tmp_path / "out").config.id2label[2] == "river"
    names = {m.name: m.value for m in trainer.measure(Dataset.from_dict(ROWS))}
    assert set(names) == {"accuracy", "macro_f1", "teacher_agreement", "kl_to_teacher"}


def test_names_of_the_data_set_meet_those_of_the_model(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["river", "city", "metal"])})
    data = Dataset.from_dict({"text": ["gold", "rhine"], "label": [2, 0]}, features=features)
    student, teacher, own, other = models()
    trainer = TaskDistillationTrainer(student, teacher, config(tmp_path, TASK), data, own, other)
    assert trainer.train_dataset["labels"] == [0, 2]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"task": "sequence_clasification"}, "Did you mean 'sequence_classification'"),
        ({"loss": "gold"}, "Unknown loss of the task sequence_classification 'gold'"),
        ({"packing": True}, "`packing` is True, but it is about the next tokens"),
        ({"on_policy": "gkd"}, "`on_policy` is 'gkd', but `task` is"),
        ({"teacher_cache": "cache"}, "it stores distributions of next tokens"),
        ({"hidden_loss": "dual_head"}, "it reads a head over a vocabulary"),
        ({"task_options": {"margin": 1}}, "Unknown option of the task"),
        ({"loss_options": {"beta": 0.3}}, "Unknown option of forward_kl"),
        ({"task": "causal_lm", "task_options": {"margin": 1}}, "the task causal_lm has none"),
    ],
)
def test_settings_without_effect_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        DistillationConfig(str(tmp_path), use_cpu=True, **{"task": TASK, **options})


def test_models_and_rows_that_do_not_fit_are_refused(tmp_path):
    student, teacher, own, other = models()
    with pytest.raises(ValueError, match="the same labels by name"):
        trainer_of(tmp_path, parts=models(teacher_labels=["metal", "city", "sea"]))
    with pytest.raises(ValueError, match="Did you mean 'metal'"):
        trainer_of(tmp_path, {"text": ["gold"], "label": ["metall"]})
    with pytest.raises(ValueError, match="needs a column 'text'"):
        trainer_of(tmp_path, {"body": ["gold"]})
    with pytest.raises(ValueError, match="ids from 0 to 2, got 3"):
        trainer_of(tmp_path, {"text": ["gold"], "label": [3]})
    with pytest.raises(ValueError, match="a BertForTokenClassification was given"):
        trainer_of(tmp_path, parts=(tiny_bert(BertForTokenClassification, own), teacher, own, other))
    with pytest.raises(ValueError, match="TaskDistillationTrainer trains"):
        DistillationTrainer(student, teacher, config(tmp_path, TASK), Dataset.from_dict(ROWS))
    with pytest.raises(ValueError, match="which DistillationTrainer trains"):
        TaskDistillationTrainer(student, teacher, config(tmp_path, "causal_lm"), Dataset.from_dict(ROWS))
