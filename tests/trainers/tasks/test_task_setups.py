"""Tasks under accumulation, two processes, FSDP2, `torch_compile` and resume: the same weights, or the same bits."""

import pytest
import torch
from datasets import Dataset
from processes import on_two_ranks
from torch.distributed.tensor import DTensor
from trainers.tasks.test_seq2seq import t5
from trainers.tasks.tiny_encoders import config, tiny_bert, tokenizer_of
from trainers.tasks.tiny_vision import drawn, idefics, idefics_processor, llava, llava_processor
from trainers.test_fsdp import shard_on_cpu
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)

from hf_transfer_ext import TaskDistillationTrainer
from hf_transfer_ext.models.loading import tokenizer_in
from hf_transfer_ext.trainers.saving import save_whole
from hf_transfer_ext.trainers.tasks import TASKS

#: Of very different lengths: a mean of means would show.
TEXTS = [
    "gold is a metal", "paris", "the sea is wide and the sky is high", "iron", "tin is soft", "a city",
    "rome is old", "the river runs to the sea through many lands",
]  # fmt: skip
LABELS = ["metal", "city", "other"]
TAGS = ["O", "B-LOC", "I-LOC"]
LOOKS = [(color, shape) for color in ("red", "green", "blue", "white") for shape in ("circle", "square")]


def bert(kind, seed, names=None, reader="wordpiece"):
    return tiny_bert(kind, tokenizer_of(reader), seed, labels=names)


def of_bert(kind, names=None, readers=("wordpiece", "unigram")):
    """Student and teacher with tokenizers of their own, and the teacher's labels in another order."""
    return lambda: (
        bert(kind, 1, names, readers[0]), tokenizer_of(readers[0]),
        bert(kind, 2, names and names[::-1], readers[1]), tokenizer_of(readers[1]),
    )  # fmt: skip


def masked():
    tokenizer = tokenizer_of()
    tokenizer.mask_token = "<unused0>"
    return bert(BertForMaskedLM, 1), tokenizer, bert(BertForMaskedLM, 2), tokenizer


def tagged():
    words = [text.split() for text in TEXTS]
    labels = [[TAGS[len(word) % 3] for word in one] if place % 2 else None for place, one in enumerate(words)]
    return {"tokens": words, "labels": labels}


#: Task -> (student, its reader, teacher, the teacher's reader), rows, settings.
CASES = {
    "sequence_classification": (
        of_bert(BertForSequenceClassification, LABELS),
        lambda: {"text": TEXTS, "label": [LABELS[place % 3] if place % 3 else None for place in range(8)]}, {},
    ),
    "token_classification": (of_bert(BertForTokenClassification, TAGS), tagged, {}),
    "seq2seq": (
        lambda: (
            t5(1, initializer_factor=1.0), tokenizer_of("unigram"), t5(2, initializer_factor=1.0),
            tokenizer_of("unigram"),
        ),
        lambda: {"source": TEXTS, "target": TEXTS[::-1]}, {"learning_rate": 1e-3},
    ),
    "masked_lm": (
        masked, lambda: {"text": TEXTS},
        {"task_options": {"mask_probability": 0.5}},
    ),
    "sentence_embedding": (
        of_bert(BertModel), lambda: {"text": TEXTS, "other_text": TEXTS[::-1]},
        {"loss": "cosine_distance", "ce_weight": 0.0},
    ),
    "vision_language": (
        lambda: (idefics(1), idefics_processor(), llava(2), llava_processor()),
        lambda: {
            "image": [drawn(*look) for look in LOOKS], "prompt": TEXTS, "completion": [" ".join(o) for o in LOOKS]
        },
        {"max_length": 256},
    ),
}  # fmt: skip


def trainer_of(task, folder, **options):
    models, rows, settings = CASES[task]
    student, reader, teacher, theirs = models()
    steps = {"max_steps": 3, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "learning_rate": 0.02}
    args = config(folder, task, **{"ce_weight": 0.5, **steps, **settings, **options})
    return TaskDistillationTrainer(student, teacher, args, Dataset.from_dict(rows()), reader, theirs)


def changes(task, folder, **options):
    trainer = trainer_of(task, folder, **options)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    after = dict(trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False).named_parameters())
    logged = [line["kd"] for line in trainer.state.log_history if "kd" in line]
    return {name: after[name].detach() - before[name] for name in before} | {"kd": torch.tensor(logged) / 100}


def test_every_task_is_checked():
    assert set(CASES) == set(TASKS)


@pytest.mark.parametrize("task", CASES)
def test_the_tokenizers_are_as_before_whatever_was_cut_and_padded(tmp_path, task):
    trainer = trainer_of(task, tmp_path, **({} if task == "vision_language" else {"max_length": 8}))
    own, theirs = (tokenizer_in(one) for one in (trainer.task.tokenizer, CASES[task][0]()[1]))
    trainer.data_collator([trainer.train_dataset[place] for place in range(8)])
    assert own.backend_tokenizer.truncation is own.backend_tokenizer.padding is None
    assert own.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()


@pytest.mark.slow
@pytest.mark.parametrize("task", CASES)
def test_one_process_two_processes_and_accumulation_give_the_same_weights(tmp_path, task):
    torch.set_num_threads(1)
    one = changes(task, tmp_path / "one", per_device_train_batch_size=4)
    ranks = on_two_ranks(lambda _: changes(task, tmp_path / "two", per_device_train_batch_size=2), tmp_path)
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    others = {"rank 0": ranks[0], "rank 1": ranks[1], "accumulation": changes(task, tmp_path / "split", **split)}
    assert sum(bool(change.any()) for change in one.values()) > len(one) / 2
    for setup, other in others.items():
        distance = max(float((one[name] - other[name]).abs().max()) for name in one)
        assert distance < 1e-5, f"{setup}: {distance:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize("task", CASES)
def test_a_compiled_student_trains_as_the_plain_one(tmp_path, task):
    torch.set_num_threads(1)
    plain = changes(task, tmp_path / "plain")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = changes(task, tmp_path / "compiled", torch_compile=True, torch_compile_backend="eager")
    counted = torch._dynamo.utils.counters
    # The batches of three steps have several lengths, which gives a second, general graph. Where a vision-language
    # model puts images between tokens, transformers breaks the graph.
    if task != "vision_language":
        assert counted["stats"]["unique_graphs"] <= 2 and not counted["graph_break"]
    assert counted["stats"]["unique_graphs"] >= 1
    for name, change in plain.items():
        torch.testing.assert_close(compiled[name], change, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("task", CASES)
def test_a_resumed_run_ends_as_the_one_that_was_not_interrupted(tmp_path, task):
    torch.set_num_threads(1)
    steps = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch", "learning_rate": 1e-3}
    whole = trainer_of(task, tmp_path / "whole", **steps)
    whole.train()
    resumed = trainer_of(task, tmp_path / "resumed", **steps)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    ends = [trainer.model.state_dict() for trainer in (whole, resumed)]
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name
    parts = [[p for part in trainer.parts for p in part.parameters()] for trainer in (whole, resumed)]
    assert all(torch.equal(*pair) for pair in zip(*parts, strict=True))
    lines = [[line for line in one.state.log_history if "kd" in line][-1] for one in (whole, resumed)]
    assert lines[0]["kd"] == lines[1]["kd"]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["sequence_classification", "vision_language"])
def test_a_sharded_student_and_teacher_equal_one_process(tmp_path, task, monkeypatch):
    if task == "sequence_classification":  # Accelerate would shard BERT's embeddings twice, by themselves and inside
        monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "BertLayer")
    torch.set_num_threads(1)
    whole = trainer_of(task, tmp_path / "one", per_device_train_batch_size=4)
    whole.train()

    def rank(_):
        shard_on_cpu()
        trainer = trainer_of(task, tmp_path / "two", per_device_train_batch_size=2)
        trainer.train()
        sharded = [
            isinstance(p, DTensor) for model in (trainer.model, trainer.teacher.model) for p in model.parameters()
        ]
        save_whole(trainer, tmp_path / "saved")
        return all(sharded)

    assert on_two_ranks(rank, tmp_path) == [True, True]
    saved = type(whole.model).from_pretrained(tmp_path / "saved").state_dict()
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(saved[name], value, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
