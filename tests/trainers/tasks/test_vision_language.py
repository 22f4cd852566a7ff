"""Distillation of vision-language models: both see the images, and answers alone are learned."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trainers.tasks.tiny_encoders import config
from trainers.tasks.tiny_vision import (
    CHAT_TEMPLATE,
    IMAGE,
    drawn,
    idefics,
    idefics_processor,
    llava,
    llava_processor,
    vision_tokenizer,
)
from trainers.tasks.token_oracle import log_softmax
from transformers import AutoModelForImageTextToText, AutoProcessor

from hf_transfer_ext import TaskDistillationTrainer
from hf_transfer_ext.losses.distillation import DISTILLATION_LOSSES
from hf_transfer_ext.models.loading import load_processor

LOOKS = [("red", "circle"), ("blue", "square"), ("white", "square"), ("green", "circle")]
ROWS = {
    "image": [drawn(*look) for look in LOOKS],
    "prompt": ["What is it?", "What?", "Say what it is.", "What is it?"],
    "completion": [f"a {color} {shape}" for color, shape in LOOKS],
}
CHAT = [
    {"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "a dot"}]},
    {"role": "user", "content": [{"type": "text", "text": "sure?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
]
PAIRS = {
    "one processor": lambda: (llava(1), llava_processor(), llava(2, layers=3), llava_processor()),
    "larger images": lambda: (llava(1), llava_processor(), llava(2, 48), llava_processor(48)),
    "another family": lambda: (idefics(1), idefics_processor(), llava(2), llava_processor()),
}


def trainer_of(folder, models, rows=ROWS, **options):
    peft, data = options.pop("peft_config", None), Dataset.from_dict(rows) if isinstance(rows, dict) else rows
    student, reader, teacher, theirs = models
    args = config(folder, "vision_language", **{"max_length": 128, **options})
    return TaskDistillationTrainer(student, teacher, args, data, reader, theirs, peft_config=peft)


def seen(model, processor, row):
    """Float64 logits of one row at the tokens of its answer, without any of our code: text first, then its tokens."""
    text = f"<s>user:{IMAGE}{row['prompt']}</s><s>assistant:"
    read = processor(text=[text], images=[[row["image"]]], return_tensors="pt", add_special_tokens=False)
    answer = vision_tokenizer()(f"{row['completion']}</s>", return_tensors="pt", add_special_tokens=False)["input_ids"]
    start = read["input_ids"].shape[1]
    read["input_ids"] = torch.cat([read["input_ids"], answer], 1)
    read["attention_mask"] = torch.ones_like(read["input_ids"])
    with torch.no_grad():
        return model(**read).logits[0, start - 1 : -1].double().tolist(), answer[0].tolist()


@pytest.mark.parametrize("pair, fused", [*((pair, True) for pair in PAIRS), ("larger images", False)])
def test_the_loss_is_its_definition_at_each_token_of_the_answers(tmp_path, pair, fused):
    models = PAIRS[pair]()
    trainer = trainer_of(tmp_path, models, kd_weight=0.7, ce_weight=0.3, fused=fused)
    total, count = 0.0, 0
    for row in Dataset.from_dict(ROWS):
        (own, answer), (other, _) = seen(*models[:2], row), seen(*models[2:], row)
        for one, two, token in zip(own, other, answer, strict=True):
            log_q, log_p = log_softmax(one), log_softmax(two)
            total += 0.7 * sum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True)) - 0.3 * log_q[token]
            count += 1
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert trainer.compute_loss(models[0], batch).item() == pytest.approx(total / count, rel=1e-4)
    assert trainer.task._fused is fused
    assert trainer.task.reads_apart is (pair != "one processor")


@pytest.mark.parametrize("loss", DISTILLATION_LOSSES)
def test_every_divergence_of_a_model_from_its_copy_is_zero(tmp_path, loss):
    trainer = trainer_of(tmp_path, (llava(1), llava_processor(), llava(1), llava_processor()), loss=loss)
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert abs(trainer.compute_loss(trainer.model.eval(), batch).item()) < 1e-5


def test_another_image_changes_what_the_teacher_says_of_this_row_alone(tmp_path):
    trainer = trainer_of(tmp_path, PAIRS["another family"]())
    rows, signals = list(trainer.train_dataset), []
    for image in (drawn("red", "circle"), drawn("blue", "square")):
        batch = trainer.data_collator([{**rows[0], "image": image}, *rows[1:]])
        read = trainer.task.inputs(trainer.teacher.network, batch, of_teacher=True)
        signals.append(trainer.teacher.signal(trainer.model, read, trainer.task.teacher_mask(batch)).rows.hidden)
    changed = (signals[0] - signals[1]).abs().amax(1) > 1e-6
    first = int(trainer.task.items(batch)[0].sum())
    assert changed[:first].all() and not changed[first:].any()


def test_a_teacher_without_the_images_is_refused(tmp_path):
    trainer = trainer_of(tmp_path, PAIRS["larger images"]())
    batch = trainer.data_collator(list(trainer.train_dataset))
    with pytest.raises(ValueError, match="is given no pixels, so it would not see all of the image"):
        trainer.compute_loss(trainer.model, {k: v for k, v in batch.items() if k != "teacher_pixel_values"})
    idefics_inputs = trainer_of(tmp_path, PAIRS["another family"]()).data_collator
    rows = list(trainer_of(tmp_path, PAIRS["another family"]()).train_dataset)
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration does not take pixel_attention_mask"):
        trainer.task.inputs(llava(1), idefics_inputs(rows))
    with pytest.raises(ValueError, match="has no tokenizer beside it"):
        trainer_of(tmp_path, (llava(1), llava_processor(), llava(2), None))
    with pytest.raises(ValueError, match="The student of the task vision_language: A processor of texts and images"):
        trainer_of(tmp_path, (llava(1), vision_tokenizer(), llava(2), llava_processor()))


def test_all_answers_of_a_conversation_are_learned_and_nothing_else(tmp_path):
    rows = {"messages": [CHAT, CHAT[:2]], "images": [[drawn("red", "circle")]] * 2}
    trainer = trainer_of(tmp_path, PAIRS["larger images"](), Dataset.from_list([
        {name: column[i] for name, column in rows.items()} for i in range(2)
    ]))  # fmt: skip
    batch = trainer.data_collator(list(trainer.train_dataset))
    for side in ("", "teacher_"):
        labels = batch[f"{side}labels"]
        learned = [vision_tokenizer().decode(row[row >= 0]) for row in labels]
        assert learned == ["a dot</s>yes</s>", "a dot</s>"]
        at = labels >= 0
        assert torch.equal(batch[f"{side}input_ids"][at], labels[at])
    images = vision_tokenizer().convert_tokens_to_ids(IMAGE)
    assert [int((batch[name] == images).sum()) for name in ("input_ids", "teacher_input_ids")] == [2 * 16, 2 * 36]
    held = copy.deepcopy(CHAT)
    held[0]["content"][1]["image"] = drawn("red", "circle")
    for inside in (
        Dataset.from_list([{"messages": held}]),
        Dataset.from_list([{"messages": held}]).to_iterable_dataset(),
    ):
        trainer = trainer_of(tmp_path, PAIRS["larger images"](), inside, max_steps=1, per_device_train_batch_size=1)
        found = next(iter(trainer.get_train_dataloader()))
        assert torch.allclose(found["pixel_values"], batch["pixel_values"][:1])
        assert torch.equal(found["teacher_labels"], batch["teacher_labels"][:1])


@pytest.mark.parametrize("change, message", [
    ({"image": [None] * 4}, "Row 0: it has no image"),
    ({"completion": ["a dot", "a <image>", "a", "b"]}, "Row 1: tokens of images stand in or behind its first answer"),
    ({"prompt": ["a", "b", "c", "x" * 200]}, r"Row 3: up to its first answer .* 2\d\d for the student, 2"),
    ({"completion": None}, "needs a column `images`"),
    ({"image": None}, "needs a column `images`"),
    ({"image": ["https://a.b/c.png"] * 4}, "Row 0: The image 'https://a.b/c.png' is an address"),
    ({"image": ["c.png"] * 4}, "Row 0: The image 'c.png' is a path"),
])  # fmt: skip
def test_a_row_that_cannot_be_learned_is_refused_by_its_number(tmp_path, change, message):
    rows = {name: value for name, value in {**ROWS, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, PAIRS["larger images"](), rows)


def test_places_and_templates_that_do_not_fit_are_refused(tmp_path):
    two = [{"messages": CHAT, "images": [drawn("red", "circle")] * 2}]
    with pytest.raises(ValueError, match="Row 0: its messages have places for 1 images, but it has 2"):
        trainer_of(tmp_path, PAIRS["one processor"](), Dataset.from_list(two))
    late = [{"messages": [*CHAT[:2], CHAT[0], CHAT[3]], "images": [drawn("red", "circle")] * 2}]
    with pytest.raises(ValueError, match="Row 0: tokens of images stand in or behind its first answer"):
        trainer_of(tmp_path, PAIRS["one processor"](), Dataset.from_list(late))
    other = llava_processor()
    other.chat_template = CHAT_TEMPLATE.replace("</s>{% endfor %}", "!</s>{% endfor %}")
    models = (llava(1), llava_processor(), llava(2), other)
    with pytest.raises(
        ValueError, match="answers are 13 tokens for the student and 14 different ones for the teacher"
    ):
        trainer_of(tmp_path, models)
    blind = llava_processor()
    blind.chat_template = CHAT_TEMPLATE.replace("<image>", "[picture]")
    with pytest.raises(ValueError, match=r"puts no token of an image|number of <image> tokens"):
        trainer_of(tmp_path, (llava(1), blind, llava(2), blind))
    ends = llava_processor()
    ends.chat_template = "{{ messages | length }}" + CHAT_TEMPLATE
    with pytest.raises(ValueError, match="writes the start of a conversation in another way"):
        trainer_of(tmp_path, (llava(1), ends, llava(2), ends))


def test_a_prompt_of_another_template_is_fine_and_long_answers_are_cut_alike(tmp_path):
    other = llava_processor(48)
    other.chat_template = "Look. " + CHAT_TEMPLATE
    rows = {**ROWS, "completion": ["x" * 200, "y" * 8, "z", "b"]}
    trainer = trainer_of(tmp_path, (llava(1), llava_processor(), llava(2, 48), other), rows, max_length=80)
    batch = trainer.data_collator(list(trainer.train_dataset))
    counts = [(batch[f"{side}labels"] >= 0).sum(1).tolist() for side in ("", "teacher_")]
    assert counts[0] == counts[1] and counts[0][1:] == [9, 2, 2] and 5 < counts[0][0] < 40
    assert max(batch[f"{side}input_ids"].shape[1] for side in ("", "teacher_")) <= 80
    assert trainer.compute_loss(trainer.model, batch).item() > 0


def test_a_processor_without_a_template_reads_placeholders_in_front_of_texts(tmp_path):
    plain = llava_processor()
    plain.chat_template = None
    plain.tokenizer = copy.deepcopy(plain.tokenizer)
    trainer = trainer_of(tmp_path, (llava(1), plain, llava(2), plain))
    batch = trainer.data_collator(list(trainer.train_dataset))
    text = vision_tokenizer().decode(batch["input_ids"][0])
    assert text.replace("<pad>", "") == IMAGE * 16 + "What is it?a red circle</s>"


def test_paths_stay_in_the_folder_of_the_data(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("data/one.png", "secret.png"):
        drawn("red", "circle").save(tmp_path / name)
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "secret.png")
    options = {"task_options": {"image_folder": str(tmp_path / "data")}}
    one = {name: column[:1] for name, column in ROWS.items()}
    trainer = trainer_of(tmp_path, PAIRS["one processor"](), {**one, "image": ["one.png"]}, **options)
    direct = trainer_of(tmp_path, PAIRS["one processor"](), one)
    pixels = [each.data_collator(list(each.train_dataset))["pixel_values"] for each in (trainer, direct)]
    assert torch.equal(*pixels)
    for path in ("../secret.png", str(tmp_path / "secret.png"), "link.png"):
        with pytest.raises(ValueError, match="leads out of its folder"):
            trainer_of(tmp_path, PAIRS["one processor"](), {**one, "image": [path]}, **options)
    (tmp_path / "data" / "no.png").write_text("no image")
    with pytest.raises(ValueError, match=r"Row 0: The image .*no.png' cannot be read"):
        trainer_of(tmp_path, PAIRS["one processor"](), {**one, "image": ["no.png"]}, **options)


@pytest.mark.parametrize(
    "setup", ["lora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("all weights", "frozen"))]
)
def test_one_step_does_not_depend_on_how_the_batch_was_split(tmp_path, setup):
    ends = []
    for size, steps in ((4, 1), (1, 4)):
        torch.manual_seed(0)
        lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        trainer = trainer_of(
            tmp_path, PAIRS["another family"](), per_device_train_batch_size=size, gradient_accumulation_steps=steps,
            max_steps=1, ce_weight=1.0, gradient_checkpointing=setup == "lora", max_grad_norm=0.0,
            peft_config=lora if setup == "lora" else None, task_options={"freeze_vision": setup == "frozen"},
        )  # fmt: skip
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
        assert moved and any("vision" in name for name in moved) is (setup == "all weights")
        assert setup != "lora" or all("text_model" in name and "lora" in name for name in moved)
        ends.append(torch.cat([p.flatten() for p in trainer.model.parameters() if p.requires_grad]))
    assert (ends[0] - ends[1]).abs().max() < 1e-5


def test_frozen_vision_and_adapters_on_it_exclude_each_other(tmp_path, caplog):
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="`freeze_vision` is on, but the adapter has 256 weights in the vision tower"):
        trainer_of(tmp_path, PAIRS["one processor"](), peft_config=lora, task_options={"freeze_vision": True})
    with caplog.at_level("INFO"):
        trainer = trainer_of(tmp_path, PAIRS["one processor"](), task_options={"freeze_vision": True})
    assert "parameters of the vision tower 'model.vision_tower', 0 are trained" in caplog.text
    assert trainer.record().config["frozen"] == "model.vision_tower"
    with pytest.raises(ValueError, match="`freeze_vision` of vision_language has to be true or false"):
        config(tmp_path, "vision_language", task_options={"freeze_vision": "yes"})


@pytest.mark.slow
def test_it_is_measured_and_saved_as_what_it_is(tmp_path):
    trainer = trainer_of(tmp_path, PAIRS["larger images"]())
    trainer.train()
    found = {m.name: m for m in trainer.measure(Dataset.from_dict(ROWS))}
    assert set(found) == {"nats_per_token", "accuracy", "exact_match", "kl_to_teacher", "teacher_agreement"}
    assert trainer.evaluate(trainer.train_dataset)["eval_kd"] == pytest.approx(found["kl_to_teacher"].value, rel=1e-4)
    teacher = trainer.measure(Dataset.from_dict(ROWS), model=trainer.teacher.network)
    assert {m.name for m in teacher} == {"nats_per_token", "accuracy", "exact_match"}
    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    assert "image-text-to-text" in card and "AutoModelForImageTextToText, AutoProcessor" in card
    model, processor = AutoModelForImageTextToText.from_pretrained(tmp_path), load_processor(tmp_path)
    assert isinstance(processor, type(AutoProcessor.from_pretrained(tmp_path)))
    own, theirs = (seen(one, reader, Dataset.from_dict(ROWS)[0])[0] for one, reader in (
        (model, processor), (trainer.model.eval(), trainer.processing_class)))  # fmt: skip
    assert own == theirs


def test_a_processor_that_needs_more_says_so(tmp_path):
    vision_tokenizer().save_pretrained(tmp_path)
    kind = {"processor_class": "Qwen2VLProcessor", "image_processor_type": "Qwen2VLImageProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(kind))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    try:
        import torchvision  # noqa: F401
    except ImportError:
        with pytest.raises(FileNotFoundError, match="pip install torchvision"):
            load_processor(tmp_path)
    with pytest.raises(FileNotFoundError, match="processor_config"):
        load_processor(Path(tmp_path / "nowhere"))
