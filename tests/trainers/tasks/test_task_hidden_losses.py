"""Losses between layers of encoders and encoder-decoders: a step by hand, several at once, resumed, refused."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from processes import on_two_ranks
from recipes.test_distill_task_recipe import minilm
from safetensors.torch import load_file
from sharding import shard_on_cpu
from trainers.tasks.test_seq2seq import t5
from trainers.tasks.test_vision_language import ROWS as IMAGE_ROWS
from trainers.tasks.tiny_encoders import config, tiny_bert, tokenizer_of
from trainers.tasks.tiny_vision import llava, llava_processor
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from hf_transfer_ext import TaskDistillationTrainer
from hf_transfer_ext.data.facts import fact_texts
from hf_transfer_ext.losses.hidden import HIDDEN_LOSSES
from hf_transfer_ext.losses.layer_reading import reading_of
from hf_transfer_ext.models.loading import load_model, load_tokenizer
from hf_transfer_ext.students.inits.uniform_depth import uniform_depth
from hf_transfer_ext.students.shape import StudentShape
from hf_transfer_ext.trainers.task_config import TASKS
from hf_transfer_ext.trainers.trained_along import PARTS_FILE

LABELS = ["metal", "city", "river"]
TEXTS = ["gold is heavy", "paris", "the rhine flows through old towns", "tin and zinc", "rome is old", "iron"]
PAIRS = [(0, 1), (1, 3)]  # "uniform" of 2 and 4 layers
#: Task -> class of its models, rows, settings.
TASKS_HERE = {
    "sequence_classification": (
        BertForSequenceClassification, {"text": TEXTS, "label": ["metal", "city", "river", None, "city", "metal"]}, {},
    ),
    "token_classification": (
        BertForTokenClassification,
        {"tokens": [text.split() for text in TEXTS], "labels": [["metal"] * len(text.split()) for text in TEXTS]}, {},
    ),
    "masked_lm": (BertForMaskedLM, {"text": TEXTS}, {"task_options": {"mask_probability": 0.5}}),
    "sentence_embedding": (
        BertModel, {"text": TEXTS, "other_text": [text[::-1] for text in TEXTS]}, {"loss": "squared_error"},
    ),
}  # fmt: skip
#: As TinyBERT has them.
SEVERAL = [
    {"name": "hidden_mse", "embeddings": True},
    {"name": "attention_mse", "weight": 0.2, "layer_map": "last", "options": {"relative": False}},
    {"name": "attention_relation", "weight": 0.5, "layer_map": [[-1, -1]], "options": {"heads": 2}},
]


@pytest.fixture(autouse=True)
def mask_token():
    tokenizer_of().mask_token = "<unused0>"
    yield
    tokenizer_of().mask_token = None


def pair_of(task, *, width=16, teacher_width=16):
    kind, _, _ = TASKS_HERE[task]
    named = {"labels": LABELS} if "classification" in task else {}
    student = tiny_bert(kind, tokenizer_of(), 1, hidden_size=width, **named)
    return student, tiny_bert(kind, tokenizer_of(), 2, hidden_size=teacher_width, num_hidden_layers=4, **named)


def trainer_of(folder, task="sequence_classification", models=None, **options):
    _, rows, settings = TASKS_HERE[task]
    student, teacher = models or pair_of(task)
    args = config(folder, task, **{"max_steps": 1, "max_grad_norm": 0.0, "learning_rate": 0.5, **settings, **options})
    return TaskDistillationTrainer(student, teacher, args, Dataset.from_dict(rows), tokenizer_of(), tokenizer_of())


def weights(trainer):
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(one, other, atol=1e-5):
    assert set(one) == set(other)
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=atol, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def inside(model, ids):
    """Output, then (hidden states, queries, keys, values) of each layer, by the model's own output and projections."""
    output = model(input_ids=ids, output_hidden_states=True)
    found = []
    for layer, before, after in zip(
        model.bert.encoder.layer, output.hidden_states, output.hidden_states[1:], strict=False
    ):
        own = layer.attention.self
        parts = [
            getattr(own, name)(before)[0].unflatten(-1, (2, -1)).transpose(0, 1) for name in ("query", "key", "value")
        ]
        found.append((after[0], *parts))
    return output, found


def of_states(own, other, projection):
    """`hidden_mse` of each token, by its definition."""
    student, teacher = own[0] if projection is None else own[0] @ projection.T, other[0]
    return torch.stack([((s - t) ** 2).sum() / (t**2).sum() for s, t in zip(student, teacher, strict=True)])


def of_scores(own, other, projection):
    """`attention_mse` of each token: every token looks at every other one."""
    z, t = (side[1] @ side[2].transpose(1, 2) / side[1].shape[-1] ** 0.5 for side in (own, other))
    return ((z - t) ** 2).sum((0, 2)) / (t**2).sum((0, 2))


def of_relations(own, other, projection):
    """`attention_relation` with 2 heads, which are those of the models, in nats of each token."""
    total = 0.0
    for part in (1, 2, 3):
        q, p = ((x @ x.transpose(1, 2) / x.shape[-1] ** 0.5).softmax(-1) for x in (own[part], other[part]))
        total = total + (p * (p.log() - q.log())).sum(-1).mean(0)
    return total


def of_attention(own, other, projection):
    """`minilm`, in nats of each token."""
    q, p = ((side[1] @ side[2].transpose(1, 2) / side[1].shape[-1] ** 0.5).softmax(-1) for side in (own, other))
    r, s = ((side[3] @ side[3].transpose(1, 2) / side[3].shape[-1] ** 0.5).softmax(-1) for side in (own, other))
    return ((p * (p.log() - q.log())).sum(-1) + (s * (s.log() - r.log())).sum(-1)).mean(0)


BY_HAND = [
    ("hidden_mse", {}, of_states),
    ("attention_mse", {}, of_scores),
    ("attention_relation", {"heads": 2, "relative": False}, of_relations),
    ("minilm", {"relative": False}, of_attention),
]


@pytest.mark.parametrize("name, options, formula", BY_HAND, ids=[one[0] for one in BY_HAND])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_one_step_is_the_step_of_the_formula_on_texts_without_padding(tmp_path, name, options, formula, attention):
    student, teacher = pair_of("sequence_classification", teacher_width=24 if name == "hidden_mse" else 16)
    for model in (student, teacher):
        model.set_attn_implementation(attention)
    learner = copy.deepcopy(student)
    trainer = trainer_of(
        tmp_path, models=(student, teacher), per_device_train_batch_size=6, hidden_loss=name, hidden_options=options,
        hidden_weight=0.3,
    )  # fmt: skip
    (loss,) = trainer.task.between.losses
    assert loss.pairs == PAIRS
    begun = {pair: p.detach().clone().requires_grad_() for pair, p in loss.projections.items()}
    total, hidden = 0.0, 0.0
    for text in TEXTS:
        ids = torch.tensor([tokenizer_of()(text)["input_ids"]])
        output, own = inside(learner, ids)
        with torch.no_grad():
            reference, other = inside(teacher, ids)
        values = [formula(own[i], other[j], begun.get(f"student_{i}_teacher_{j}")) for i, j in PAIRS]
        between = torch.stack(values).mean(0).mean()  # over pairs of layers, then over the tokens of the text
        p = reference.logits[0].softmax(-1)
        kl = (p * (p.log() - output.logits[0].log_softmax(-1))).sum()
        total, hidden = total + (kl + 0.3 * between) / len(TEXTS), hidden + between.item() / len(TEXTS)
    total.backward()
    trainer.train()
    expected = {n: p.detach() - 0.5 * p.grad for n, p in learner.named_parameters() if p.grad is not None}
    after = weights(trainer)
    assert_same({n: after[n] for n in expected}, expected)
    moved = {pair: p.detach() for pair, p in loss.projections.items()}
    assert_same(moved, {pair: p.detach() - 0.5 * p.grad for pair, p in begun.items()})
    assert bool(moved) is (name == "hidden_mse")
    line = trainer.state.log_history[0]
    assert line["hidden"] == pytest.approx(hidden, rel=1e-4) and line["loss"] == pytest.approx(total.item(), rel=1e-4)


def test_each_item_of_a_text_has_the_mean_over_the_tokens_of_its_text(tmp_path):
    """Masked tokens and words are items; the texts are compared in all their tokens, whatever is masked in them."""
    for task in ("masked_lm", "token_classification"):
        trainer = trainer_of(tmp_path, task, hidden_loss="hidden_mse", kd_weight=0.0, hidden_weight=2.0)
        student, teacher = trainer.model, trainer.teacher.model
        batch = trainer.data_collator(list(trainer.train_dataset))
        found = trainer.compute_loss(student, batch).item()
        total, count = 0.0, 0
        for row, read in enumerate(batch["attention_mask"].bool()):
            own, other = (inside(model, batch["input_ids"][row][read][None])[1] for model in (student, teacher))
            items = int(trainer.task.items(batch)[row].sum())
            values = [of_states(own[i], other[j], None).mean().item() for i, j in PAIRS]
            total, count = total + items * sum(values) / 2, count + items
        assert found == pytest.approx(2.0 * total / count, rel=1e-4)


def deltas(folder, **options):
    before = dict(pair_of("sequence_classification")[0].named_parameters())
    trainer = trainer_of(folder, kd_weight=0.0, **options)
    trainer.train()
    return {name: p - before[name].detach() for name, p in weights(trainer).items()}, trainer.state.log_history[0]


def test_a_list_of_losses_is_the_sum_of_the_single_ones(tmp_path):
    several, line = deltas(tmp_path / "all", hidden_loss=SEVERAL, hidden_weight=0.1, layer_map="skip")
    total, loss = {name: torch.zeros_like(change) for name, change in several.items()}, 0.0
    for entry in SEVERAL:
        settings = {
            "hidden_options": entry.get("options", {}), "layer_map": entry.get("layer_map", "skip"),
            "hidden_embeddings": entry.get("embeddings", False), "hidden_weight": 0.1 * entry.get("weight", 1.0),
        }  # fmt: skip
        change, single = deltas(tmp_path / entry["name"], hidden_loss=entry["name"], **settings)
        total = {name: total[name] + change[name] for name in total}
        loss += single["loss"]
        assert line[f"hidden_{entry['name'].removeprefix('hidden_')}"] == pytest.approx(single["hidden"], rel=1e-5)
    assert_same(several, total, atol=1e-6)
    assert line["loss"] == pytest.approx(loss, rel=1e-5) == pytest.approx(0.1 * line["hidden"], rel=1e-5)


def test_several_losses_in_a_language_model(tmp_path):
    from trainers.test_distillation import logged
    from trainers.test_distillation import trained as trained_lm
    from trainers.test_hidden_loss import deep

    entries = ["hidden_mse", {"name": "dual_head", "weight": 0.2}, {"name": "minilm", "layer_map": [[-1, -1]]}]
    together = trained_lm(tmp_path / "all", teacher=deep(), kd_weight=0.0, hidden_loss=entries)
    singles = [
        ({"hidden_loss": "hidden_mse"}, 1.0, "hidden_mse"),
        ({"hidden_loss": "dual_head"}, 0.2, "hidden_dual_head"),
        ({"hidden_loss": "minilm", "layer_map": [[-1, -1]], "hidden_weight": 1.0}, 0.1, "hidden_minilm"),
    ]
    total = 0.0
    for options, weight, name in singles:
        alone = trained_lm(tmp_path / name, teacher=deep(), kd_weight=0.0, **options)
        assert logged(together, name)[0] == pytest.approx(logged(alone, "hidden")[0], rel=1e-5)
        total += weight * logged(alone, "loss")[0]
    assert logged(together, "loss")[0] == pytest.approx(total, rel=1e-5)
    assert "hidden_mse, dual_head, minilm" in together.plan()


@pytest.mark.parametrize("task", TASKS_HERE)
def test_a_step_does_not_depend_on_how_its_batch_was_split(tmp_path, task):
    ends = []
    for size, steps in ((6, 1), (2, 3)):
        trainer = trainer_of(
            tmp_path, task, pair_of(task, teacher_width=24), per_device_train_batch_size=size, learning_rate=0.1,
            gradient_accumulation_steps=steps, hidden_loss=SEVERAL,
        )  # fmt: skip
        trainer.train()
        parts = {n: p.detach() for n, p in trainer.task.between.losses[0].projections.items()}
        assert len(parts) == 3  # the embeddings, and two pairs of layers
        ends.append((weights(trainer), parts, trainer.state.log_history[0]["hidden"]))
    assert_same(ends[0][0], ends[1][0])
    assert_same(ends[0][1], ends[1][1])
    assert ends[0][2] == pytest.approx(ends[1][2], rel=1e-5)


def test_a_resumed_run_ends_as_the_one_that_was_not_interrupted(tmp_path):
    options = {
        "hidden_loss": SEVERAL, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch",
        "learning_rate": 1e-2, "per_device_train_batch_size": 3, "max_grad_norm": 1.0,
    }  # fmt: skip
    task = "masked_lm"
    whole = trainer_of(tmp_path, task, pair_of(task, teacher_width=24), **options)
    whole.train()
    saved = load_file(tmp_path / "checkpoint-2" / PARTS_FILE)
    assert set(saved) == {f"0.projections.{name}" for name in whole.task.between.losses[0].projections}
    resumed = trainer_of(tmp_path, task, pair_of(task, teacher_width=24), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for one, other in zip(whole.parts.parameters(), resumed.parts.parameters(), strict=True):
        assert torch.equal(one, other)
    ends = weights(whole), weights(resumed)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    whole.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / PARTS_FILE).exists()


#: Those that take the longest and read what another one reads, too.
SLOW = ("hidden_cosine", "attention_mse", "minilm", "token_relationship_graph")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in HIDDEN_LOSSES]
)
def test_what_a_task_can_read_it_learns_from_and_all_else_is_refused(tmp_path, name):
    for task in (*TASKS_HERE, "seq2seq", "vision_language"):
        options = {"loss": "squared_error"} if task == "sentence_embedding" else {}
        options |= {
            "hidden_loss": name,
            "kd_weight": 0.0,
            "learning_rate": 0.002,
            "max_steps": 40 if task == "seq2seq" else 8,
            "per_device_train_batch_size": 6,
            "optim": "adamw_torch",
        }
        if reading_of(HIDDEN_LOSSES[name]) in TASKS[task].unread:
            with pytest.raises(ValueError, match=f"`hidden_loss` is {name}, but `task` is '{task}': "):
                config(tmp_path, task, **options)
            continue
        if task == "seq2seq":
            rows = {"source": TEXTS, "target": [text[::-1] for text in TEXTS]}
            tokenizer = tokenizer_of("unigram")
            args = config(tmp_path, task, **options)
            trainer = TaskDistillationTrainer(t5(1), t5(2), args, Dataset.from_dict(rows), tokenizer, tokenizer)
        elif task == "vision_language":
            args = config(tmp_path, task, **{**options, "max_length": 128})
            models = llava(1), llava(2, 48)
            readers = llava_processor(), llava_processor(48)
            trainer = TaskDistillationTrainer(*models, args, Dataset.from_dict(IMAGE_ROWS), *readers)
        else:
            trainer = trainer_of(tmp_path, task, **options, task_options=TASKS_HERE[task][2].get("task_options", {}))
        before = trainer.evaluate(trainer.train_dataset)
        trainer.train()
        after = trainer.evaluate(trainer.train_dataset)
        assert after["eval_hidden"] < before["eval_hidden"] and trainer.task.views is None
        assert after["eval_loss"] == pytest.approx(trainer.args.hidden_weight * after["eval_hidden"], rel=1e-5)


def test_adapters_learn_and_teach(tmp_path):
    def adapted():
        torch.manual_seed(0)
        student, _ = pair_of("sequence_classification")
        lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], init_lora_weights=False)
        return get_peft_model(student, lora)

    options = {"hidden_loss": SEVERAL, "learning_rate": 0.05}
    own = trainer_of(tmp_path / "a", models=(adapted(), None), teacher_adapter="base", **options)
    other = trainer_of(tmp_path / "b", models=(adapted(), pair_of("sequence_classification")[0]), **options)
    checkpointed = trainer_of(
        tmp_path / "c", models=(adapted(), None), teacher_adapter="base", gradient_checkpointing=True, **options
    )
    ends = []
    for trainer in (own, other, checkpointed):
        trainer.train()
        assert trainer.state.log_history[0]["grad_norm"] > 0 and trainer.state.log_history[0]["hidden"] > 0
        ends.append(weights(trainer))
    assert_same(ends[0], ends[1])
    assert_same(ends[0], ends[2])


def test_virtual_tokens_in_front_of_a_text_are_left_out(tmp_path):
    student, teacher = pair_of("sequence_classification")
    student = get_peft_model(student, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3))
    trainer = trainer_of(tmp_path, models=(student, teacher), hidden_loss=SEVERAL)
    batch = trainer.data_collator(list(trainer.train_dataset))
    found = []
    forward = trainer.task.between.losses[0].loss
    trainer.task.between.losses[0].loss = lambda own, *rest: (found.append(own), forward(own, *rest))[1]
    with torch.no_grad():
        trainer.compute_loss(student, batch)
        prompt = torch.cat(
            [student.get_prompt(1), student.base_model.bert.embeddings.word_embeddings(batch["input_ids"][:1])], 1
        )
        mask = torch.cat([torch.ones(1, 3), batch["attention_mask"][:1]], 1)
        whole = student.base_model.bert(inputs_embeds=prompt, attention_mask=mask, output_hidden_states=True)
    length = int(batch["attention_mask"][0].sum())
    torch.testing.assert_close(found[1][:length], whole.hidden_states[1][0, 3 : 3 + length], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    torch.set_num_threads(1)
    task, options = "masked_lm", {"hidden_loss": SEVERAL, "max_steps": 2, "learning_rate": 0.05}

    def run(folder, size):
        trainer = trainer_of(
            folder, task, pair_of(task, teacher_width=24), per_device_train_batch_size=size, **options
        )
        trainer.train()
        return weights(trainer), {n: p.detach() for n, p in trainer.task.between.losses[0].projections.items()}

    one = run(tmp_path / "one", 6)
    for found in on_two_ranks(lambda _: run(tmp_path / "two", 3), tmp_path):
        assert_same(one[0], found[0])
        assert_same(one[1], found[1])


@pytest.mark.slow
def test_a_sharded_student_and_teacher_equal_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "BertLayer")
    torch.set_num_threads(1)

    def run(folder, size):
        trainer = trainer_of(
            folder, per_device_train_batch_size=size, max_steps=2, learning_rate=0.05, hidden_loss=SEVERAL
        )
        trainer.train()
        return [trainer.state.log_history[1][name] for name in ("loss", "hidden")]

    def rank(_):
        shard_on_cpu()
        return run(tmp_path / "two", 3)

    one = run(tmp_path / "one", 6)
    for found in on_two_ranks(rank, tmp_path):
        assert found == pytest.approx(one, rel=1e-4)


@pytest.mark.slow
def test_half_of_minilm_comes_closer_to_the_whole_by_its_layers_too(tmp_path):
    """A real model and real texts, as TinyBERT learns: the vectors of held-out texts are nearer than without."""
    for package in ("countryinfo", "mendeleev"):
        pytest.importorskip(package)
    path, found = minilm(), []
    train, test = (
        Dataset.from_dict({"text": [row["text"] for row in fact_texts(split) if row["source"] != "question"]})
        for split in ("train", "test")
    )
    tokenizer = load_tokenizer(path)
    for losses in (None, [{"name": "hidden_mse", "embeddings": True}, {"name": "attention_mse", "weight": 0.1}]):
        teacher = load_model(path, auto_class="AutoModel", dtype="float32")
        args = config(
            tmp_path, "sentence_embedding", loss="cosine_distance", hidden_loss=losses, max_steps=60, max_length=32,
            learning_rate=2e-4, optim="adamw_torch", per_device_train_batch_size=16,
        )  # fmt: skip
        student = uniform_depth(teacher, StudentShape(depth=3))
        trainer = TaskDistillationTrainer(student, teacher, args, train, tokenizer, tokenizer)
        before = trainer.evaluate(trainer.task.prepared(test))
        trainer.train()
        after = trainer.evaluate(trainer.task.prepared(test))
        found.append(after["eval_kd"])
        assert after["eval_kd"] < before["eval_kd"] / 2
        assert losses is None or after["eval_hidden"] < before["eval_hidden"]
    assert found[1] < 0.99 * found[0]


def test_models_that_cannot_be_compared_are_refused(tmp_path):
    student, _ = pair_of("sequence_classification")
    other = tokenizer_of("byte_level")
    apart = tiny_bert(BertForSequenceClassification, other, 2, labels=LABELS)
    args = config(tmp_path, "sequence_classification", hidden_loss="hidden_mse")
    data = Dataset.from_dict(TASKS_HERE["sequence_classification"][1])
    with pytest.raises(
        ValueError, match="compares layers token by token, but the teacher reads a text in other tokens"
    ):
        TaskDistillationTrainer(student, apart, args, data, tokenizer_of(), other)
    torch.manual_seed(0)
    decoder = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(tokenizer_of()), hidden_size=16, intermediate_size=32, num_hidden_layers=4,
            num_attention_heads=2, pad_token_id=0, id2label=dict(enumerate(LABELS)),
            label2id={name: i for i, name in enumerate(LABELS)},
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="a token of the student looks at all tokens, and one of the teacher at only"):
        trainer_of(tmp_path, models=(student, decoder), hidden_loss="minilm").train()
    trainer_of(tmp_path, models=(student, decoder), hidden_loss="hidden_mse").train()
    trainer = trainer_of(tmp_path, models=pair_of("sequence_classification"), hidden_loss="hidden_mse")
    trainer.task.taught = lambda *args: None  # a task that runs its teacher in another way
    with pytest.raises(ValueError, match="sequence_classification does not run its teacher within `viewed`"):
        trainer.train()


def test_the_plan_tells_the_losses_and_the_memory_of_the_teacher(tmp_path):
    trainer = trainer_of(tmp_path, hidden_loss=SEVERAL)
    size = sum(p.numel() * p.element_size() for p in trainer.teacher.model.parameters())
    plan = trainer.plan()
    assert "Loss: forward_kl, hidden_mse, attention_mse, attention_relation" in plan
    assert f"Memory of the frozen teacher: teacher {size / 1e9:.3g} GB" in plan
    assert trainer.record().config["frozen_teacher_bytes"] == {"teacher": size}
