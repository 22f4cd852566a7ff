"""Texts that are written during training: by whom, after which prompts, how they are counted, and resumed runs."""

import copy
import json
import random
from string import ascii_letters

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from processes import on_two_ranks
from tiny import CHAT_TEMPLATE, byte_tokenizer, tiny_llama
from trainers.test_distillation import assert_same, config, logged, weights

from hf_transfer_ext import DistillationTrainer
from hf_transfer_ext.losses.distillation import DISTILLATION_LOSSES
from hf_transfer_ext.models.generation import continuations
from hf_transfer_ext.tensors import next_token_view
from hf_transfer_ext.trainers import rollouts
from hf_transfer_ext.trainers.rollouts import Rollout, prompt_of, rows_of, seed_of

ROWS = {
    "prompt": ["what is gold? ", "paris ", "tin: ", "name a tree "],
    "completion": ["a metal", "a city in France", "zinc", "oak"],
}
PROMPTS = {"prompt": ROWS["prompt"]}
WRITES = {"on_policy": "gkd", "on_policy_share": 1.0, "max_new_tokens": 6}


def trainer_of(folder, student=None, teacher=None, data=ROWS, **options):
    tokenizer = options.pop("tokenizer", None) or byte_tokenizer(CHAT_TEMPLATE)
    trainer = DistillationTrainer(
        student if student is not None else tiny_llama(1),
        teacher if teacher is not None or options.get("teacher_adapter") else tiny_llama(2),
        config(folder, **{**WRITES, **options}),
        Dataset.from_dict(data),
        eval_dataset=Dataset.from_dict(options.pop("eval_data", data)),
        processing_class=tokenizer,
    )
    trainer._get_train_sampler = lambda *a: torch.utils.data.SequentialSampler(trainer.train_dataset)
    return trainer


def trained(*args, **options):
    trainer = trainer_of(*args, **options)
    trainer.train()
    return trainer


def written_by(model, prompts, seed, max_new_tokens=6, temperature=1.0):
    """Sequences sampled by plain `generate`, with their labels: ids until the first end, none for the prompt."""
    texts, *_ = continuations(
        model.eval(), prompts, pad_id=257, stop_ids=[257], max_new_tokens=max_new_tokens, temperature=temperature,
        seed=seed,
    )  # fmt: skip
    return [(prompt + text, [-100] * len(prompt) + text) for prompt, text in zip(prompts, texts, strict=True)]


def step_by_hand(student, teacher, rows, loss="forward_kl", lr=0.5, **options):
    """One SGD step on the mean over all written tokens, each row alone and without padding."""
    student, total, tokens = copy.deepcopy(student).train(), 0.0, 0
    for ids, labels in rows:
        z, _, mask = next_token_view(student(torch.tensor([ids])).logits, torch.tensor([labels]))
        with torch.no_grad():
            t = teacher(torch.tensor([ids])).logits[:, :-1]
        total = total + (DISTILLATION_LOSSES[loss](z, t, **options) * mask).sum()
        tokens += int(mask.sum())
    (total / tokens).backward()
    return {n: (p - lr * p.grad).detach() for n, p in student.named_parameters()}, (total / tokens).item(), tokens


def prompt_ids():
    return [byte_tokenizer()(text)["input_ids"] for text in ROWS["prompt"]]


def prompt_batch():
    """The first prompt alone, as the collator gives it."""
    ids = torch.tensor([prompt_ids()[0]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full_like(ids, -100)}


@pytest.mark.parametrize("data", [ROWS, PROMPTS], ids=["with completions", "prompts alone"])
def test_a_step_is_the_one_by_hand(tmp_path, data):
    trainer = trained(tmp_path, data=data, loss="reverse_kl", distill_temperature=2.0, sampling_temperature=0.7)
    seed = seed_of(1, 0, 0, "student", 0)
    rows = written_by(tiny_llama(1), prompt_ids(), seed, temperature=0.7)
    expected, loss, tokens = step_by_hand(tiny_llama(1), tiny_llama(2), rows, "reverse_kl", temperature=2.0)
    assert_same(weights(trainer), expected)
    assert logged(trainer, "loss")[0] == pytest.approx(loss, rel=1e-4)
    assert logged(trainer, "rollout_tokens")[0] == pytest.approx(tokens / 4)


def test_tokens_are_counted_after_they_are_written(tmp_path):
    """Micro-batches of unequal length are one mean over all of their tokens, not over those of the data."""
    trainer = trained(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    rows = [
        written_by(tiny_llama(1), [prompt], seed_of(1, 0, i, "student", 0))[0] for i, prompt in enumerate(prompt_ids())
    ]
    expected, loss, _ = step_by_hand(tiny_llama(1), tiny_llama(2), rows)
    assert_same(weights(trainer), expected)
    assert logged(trainer, "loss")[0] == pytest.approx(loss, rel=1e-4)


def test_processes_write_texts_of_their_own_and_count_them_together(tmp_path):
    def rank(_):
        return weights(trained(tmp_path / "two", per_device_train_batch_size=2))

    rows = [
        row
        for process, part in enumerate((prompt_ids()[:2], prompt_ids()[2:]))
        for row in written_by(tiny_llama(1), part, seed_of(1, 0, 0, "student", process))
    ]
    expected, _, _ = step_by_hand(tiny_llama(1), tiny_llama(2), rows)
    for part in on_two_ranks(rank, tmp_path):
        assert_same(part, expected)


def test_a_student_equal_to_its_teacher_has_nothing_to_learn(tmp_path):
    trainer = trainer_of(tmp_path, tiny_llama(1), tiny_llama(1), loss="reverse_kl", stop_on_nan=True)
    trainer.train()
    assert logged(trainer, "kd")[0] == pytest.approx(0.0, abs=1e-6)
    assert_same(weights(trainer), dict(tiny_llama(1).named_parameters()), atol=1e-5)


def test_the_share_and_the_writers_are_those_of_the_config(tmp_path):
    def sources(**options):
        trainer = trainer_of(tmp_path, log_rollouts=9, **options)
        seen = []
        for step in range(200):
            trainer.state.global_step = step
            draw = random.Random(seed_of(1, step, 0, "source")).random()
            seen += trainer.rollout_method.sources(draw, trainer.args, 0.0)
        return seen

    mixed = sources(on_policy_share=0.25)
    assert set(mixed) == {"student", "data"} and 30 <= mixed.count("student") <= 70
    assert set(sources(on_policy_share=0.5, teacher_writes=True)) == {"student", "teacher"}
    assert set(sources(on_policy_share=0.0)) == {"data"}


def test_the_teacher_writes(tmp_path):
    trainer = trained(tmp_path, on_policy_share=0.0, teacher_writes=True, ce_weight=0.0, data=PROMPTS)
    rows = written_by(tiny_llama(2), prompt_ids(), seed_of(1, 0, 0, "teacher", 0))
    expected, _, _ = step_by_hand(tiny_llama(1), tiny_llama(2), rows)
    assert_same(weights(trainer), expected)


def test_cross_entropy_leaves_out_what_the_student_wrote(tmp_path):
    share = 0.999  # above the draw of the first step, so that the student writes its batch
    both = trained(tmp_path / "a", ce_weight=0.7, on_policy_share=share)
    without = trained(tmp_path / "b", ce_weight=0.0, on_policy_share=share)
    assert logged(both, "rollout_tokens") == logged(without, "rollout_tokens") != []
    assert_same(weights(both), weights(without))
    data = trained(tmp_path / "c", ce_weight=0.7, on_policy_share=0.0)
    plain = trained(tmp_path / "d", ce_weight=0.7, on_policy=None, on_policy_share=None, max_new_tokens=128)
    assert_same(weights(data), weights(plain))


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}], ids=["plain", "accumulated"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, options):
    student = tiny_llama(1, attention_dropout=0.2)
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2,
                "on_policy_share": 0.6, "optim": "adamw_torch", "learning_rate": 1e-2, **options}  # fmt: skip
    whole = trained(tmp_path / "a", copy.deepcopy(student), **settings)
    resumed = trainer_of(tmp_path / "b", copy.deepcopy(student), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name


@pytest.mark.parametrize("kind", ["lora", "prompt tuning", "checkpointing"])
def test_modes_and_caches_are_restored(tmp_path, kind):
    student = tiny_llama(1, attention_dropout=0.3)
    own = student.generation_config = copy.deepcopy(student.generation_config)
    student.generation_config.top_k, student.generation_config.repetition_penalty = 1, 5.0  # not obeyed
    if kind == "lora":
        student = get_peft_model(student, LoraConfig(r=2, init_lora_weights=False))
    if kind == "prompt tuning":
        student = get_peft_model(student, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    trainer = trainer_of(tmp_path, student, gradient_checkpointing=kind == "checkpointing")
    trainer.model.train()
    batch = prompt_batch()
    one, other = (trainer.rollouts_from("student", batch, 7) for _ in range(2))
    assert one == other and all(module.training for module in trainer.model.modules())
    assert trainer.model.generation_config is own and own.top_k == 1
    assert trainer.rollouts_from("student", batch, 8) != one
    trainer.train()
    assert len({len(row.written) for row in one}) == 1 and logged(trainer, "loss")[0] > 0


def test_the_models_own_defaults_of_generation_are_not_obeyed(tmp_path):
    model, changed = tiny_llama(1), tiny_llama(1)
    changed.generation_config.top_k, changed.generation_config.repetition_penalty = 1, 5.0
    one, other = (written_by(m, prompt_ids(), 3) for m in (model, changed))
    assert one == other and changed.generation_config.top_k == 1


CHATS = [
    [{"role": "user", "content": "gold?"}, {"role": "assistant", "content": "metal"},
     {"role": "user", "content": "tin?"}, {"role": "assistant", "content": "also a metal"}],
    [{"role": "user", "content": "oak?"}, {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "look", "arguments": {}}}]},
     {"role": "tool", "content": "tree"}, {"role": "assistant", "content": "a tree"}],
]  # fmt: skip


def test_earlier_turns_and_results_of_tools_stay_in_the_prompt_without_labels(tmp_path):
    tokenizer = byte_tokenizer(CHAT_TEMPLATE)
    wanted = [
        "<|user|>gold?</s><|assistant|>metal</s><|user|>tin?</s><|assistant|>",
        "<|user|>oak?</s><|assistant|></s><|tool|>tree</s><|assistant|>",
    ]
    alone = {"prompt": [chat[:-1] for chat in CHATS]}
    for data in ({"messages": CHATS}, alone, {**alone, "completion": [chat[-1:] for chat in CHATS]}):
        trainer = trainer_of(tmp_path, data=data, max_length=256, tokenizer=tokenizer)
        (batch,) = trainer.get_train_dataloader()
        prompts = [prompt_of(row) for row in rows_of(batch)]
        assert sorted(tokenizer.decode(prompt) for prompt in prompts) == sorted(wanted)
        (rolled,), count = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
        rows = rows_of(rolled)
        assert [row.labels[: len(p)] for row, p in zip(rows, prompts, strict=True)] == [
            [-100] * len(p) for p in prompts
        ]
        assert count == sum(len(row.written) for row in rows) > 0


def test_assistant_only_labels_show_the_last_turn(tmp_path):
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}A:{% generation %}{{ m['content'] }}</s>"
        "{% endgeneration %}{% else %}U:{{ m['content'] }}{% endif %}{% endfor %}"
    )
    tokenizer = byte_tokenizer(template)
    trainer = trainer_of(
        tmp_path, data={"messages": CHATS[:1]}, max_length=256, tokenizer=tokenizer, assistant_only_loss=True
    )
    (batch,) = trainer.get_train_dataloader()
    assert tokenizer.decode(prompt_of(rows_of(batch)[0])) == "U:gold?A:metal</s>U:tin?A:"


def test_a_text_that_ends_at_once_is_one_token_and_padding_is_never_learned(tmp_path):
    """A student that always ends, whose padding token is its end token: one label a row."""
    student = tiny_llama(1)
    student.lm_head.weight.data.zero_()
    student.lm_head.weight.data[257] = 1.0
    student.model.norm.weight.data.fill_(1.0)
    head = torch.nn.Linear(32, 258, bias=True)
    head.weight.data.zero_()
    head.bias.data.fill_(-50.0)
    head.bias.data[257] = 50.0
    student.lm_head = head
    trainer = trainer_of(tmp_path, student)
    (batch,) = trainer.get_train_dataloader()
    (rolled,), count = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    assert [row.written for row in rows_of(rolled)] == [[257]] * 4 and count == 4
    trainer.train()
    assert logged(trainer, "rollout_ended") == [1.0] and logged(trainer, "rollout_tokens") == [1.0]


STOPS = [{"eos_token_id": list(range(128))}, {"stop_strings": list(ascii_letters)}]


@pytest.mark.parametrize("options", STOPS, ids=["tokens", "strings"])
@pytest.mark.parametrize("method", ["gkd", "sampled_reverse_kl"])
def test_a_stop_of_the_user_is_the_last_label_and_its_padding_is_none(tmp_path, options, method):
    """Half of all tokens are stops; the padding is the student's own end token, which nobody wrote."""
    settings = {"on_policy": method, "loss": "reverse_kl", "generation_options": options, "max_new_tokens": 30}
    trainer, tokenizer = trainer_of(tmp_path, **settings), byte_tokenizer()
    letters = set(tokenizer(ascii_letters)["input_ids"])
    stops = set(range(128)) if "eos_token_id" in options else {*letters, 257}
    (batch,) = trainer.get_train_dataloader()
    (rolled,), count = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    texts = [row.written for row in rows_of(rolled)]
    assert count == sum(map(len, texts)) and len({len(text) for text in texts}) > 1
    for text in texts:
        assert text[-1] in stops and not stops & set(text[:-1])
    trainer.train()
    assert logged(trainer, "rollout_ended") == [1.0]
    assert logged(trainer, "rollout_tokens")[0] == pytest.approx(sum(map(len, texts)) / 4)


def test_tokens_that_the_student_does_not_have_are_refused(tmp_path):
    for options in ({"eos_token_id": 300}, {"bad_words_ids": [[1, 300]]}):
        with pytest.raises(ValueError, match="has token 300, but the student has 258 vocabulary entries"):
            trainer_of(tmp_path, generation_options=options)


def steps_in(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_new_run_leaves_the_texts_of_an_earlier_one_aside(tmp_path):
    settings = {"log_rollouts": 1, "max_steps": 2}
    trainer = trained(tmp_path, **settings)
    trained(tmp_path, **{**settings, "max_steps": 1})
    assert steps_in(tmp_path / "rollouts.jsonl") == [0] and steps_in(tmp_path / "rollouts.1.jsonl") == [0, 1]
    trainer.train()
    assert steps_in(tmp_path / "rollouts.jsonl") == [0, 1] and steps_in(tmp_path / "rollouts.2.jsonl") == [0]


def test_a_resumed_run_goes_on_with_its_texts(tmp_path):
    settings = {"log_rollouts": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trained(tmp_path, **settings)
    path = tmp_path / "rollouts.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-5])  # killed while it wrote
    trainer_of(tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert path.read_text() == whole and not list(tmp_path.glob("rollouts.*.jsonl"))


def test_texts_are_written_to_a_file(tmp_path):
    trained(tmp_path, log_rollouts=2, max_steps=2)
    entries = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [0, 0, 1, 1]
    ids, _ = written_by(tiny_llama(1), prompt_ids(), seed_of(1, 0, 0, "student", 0))[0]
    assert entries[0]["prompt"] + entries[0]["text"] == byte_tokenizer().decode(ids)
    assert entries[0]["source"] == "student" and entries[0]["prompt"] == ROWS["prompt"][0]


def test_the_first_texts_of_each_writer_are_announced_once(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr("hf_transfer_ext.trainers.rollouts.announce", lambda *line, show: lines.append((*line, show)))
    trained(tmp_path / "shown", disable_tqdm=False, max_steps=2)
    trained(tmp_path / "quiet", on_policy_share=0.0, teacher_writes=True)
    title = "texts of the {} in each batch, up to 6 tokens each"
    assert lines == [(title.format("student"), 4, "text", True), (title.format("teacher"), 4, "text", False)]


def test_prompts_alone_are_evaluated_on_texts_of_the_student(tmp_path):
    trainer = trainer_of(tmp_path, data=PROMPTS, per_device_eval_batch_size=4)
    found = trainer.evaluate()
    rows = written_by(tiny_llama(1), prompt_ids(), seed_of(1, "evaluation", 0, 0))
    _, loss, _ = step_by_hand(tiny_llama(1), tiny_llama(2), rows)
    assert found["eval_kd"] == pytest.approx(loss, rel=1e-4)
    assert trainer.evaluate()["eval_kd"] == found["eval_kd"]  # the same texts each time for the same student
    fixed = trainer_of(tmp_path).evaluate()
    plain = trainer_of(tmp_path, on_policy=None, on_policy_share=None, max_new_tokens=128).evaluate()
    assert fixed["eval_kd"] == plain["eval_kd"]


LOSSES = [
    {"on_policy": "gkd", "on_policy_share": 0.5, "ce_weight": 0.5},
    {"on_policy": "gkd", "on_policy_share": 0.5, "ce_weight": 0.5, "data": PROMPTS, "teacher_writes": True},
    {"on_policy": "sampled_reverse_kl"},
    {"on_policy": "distillm_2", "on_policy_options": {"beta": 0.3}, "ce_weight": 0.7},
    {"on_policy": "minillm", "ce_weight": 0.7},
]


@pytest.mark.parametrize("options", LOSSES, ids=lambda one: "-".join(map(str, list(one.values())[:2])))
def test_the_loss_of_evaluation_is_what_training_minimizes(tmp_path, options):
    """By hand: every token of the evaluated texts with the weight that the method's formula gives it."""
    settings = {"kd_weight": 0.6, "per_device_eval_batch_size": 4, **options}
    trainer, seen = trainer_of(tmp_path, **settings), []
    collated = trainer._collated
    trainer._collated = lambda rows: seen.extend(rows) or collated(rows)
    found = trainer.evaluate()
    method, ce_weight = options["on_policy"], options.get("ce_weight", 0.0)
    total, tokens = 0.0, 0
    for row in seen:
        ids, labels = torch.tensor([row.ids]), torch.tensor([row.labels])
        with torch.no_grad():
            z, targets, mask = next_token_view(tiny_llama(1)(ids).logits, labels)
            t = tiny_llama(2)(ids).logits[:, :-1]
        at = targets.clamp(min=0)[..., None]
        log_q, log_p = (x.log_softmax(-1).gather(-1, at).squeeze(-1) for x in (z, t))
        by_student = row.source in ("student", "mixture")
        ce = 0.0 if by_student else -log_q
        if method == "sampled_reverse_kl":
            kd = log_q - log_p
        elif method == "distillm_2":
            loss, factor = ("skew_reverse_kl", 0.3) if by_student else ("skew_kl", 1.7)
            kd = factor * DISTILLATION_LOSSES[loss](z, t)
        elif method == "minillm":
            share = log_q.exp() / (0.2 * log_p.exp() + 0.8 * log_q.exp())
            kd = share * DISTILLATION_LOSSES["reverse_kl"](z, t) if by_student else 0.0
        else:
            kd = DISTILLATION_LOSSES["forward_kl"](z, t)
        total += ((0.6 * kd + ce_weight * ce) * mask).sum().item()
        tokens += int(mask.sum())
    sources = {"gkd": {"data"}, "sampled_reverse_kl": {"student"}, "distillm_2": {"data", "student"},
               "minillm": {"mixture", "data"}}  # fmt: skip
    assert {row.source for row in seen} == ({"student"} if "data" in options else sources[method])
    assert found["eval_loss"] == pytest.approx(total / tokens, rel=1e-4)


@pytest.mark.parametrize("method, loss", [("gkd", "forward_kl"), ("distillm", "forward_kl"),
                                          ("sampled_reverse_kl", "reverse_kl"), ("minillm", "reverse_kl"),
                                          ("distillm_2", "skew_kl"), (None, "forward_kl")])  # fmt: skip
def test_a_loss_left_out_is_that_of_the_method(tmp_path, method, loss):
    settings = {} if method is None else {"on_policy": method, "on_policy_share": 1.0, "max_new_tokens": 6}
    assert config(tmp_path, **settings).loss == loss
    if method not in ("minillm", "distillm_2"):  # which refuse another one
        assert config(tmp_path, **settings, loss="generalized_jsd").loss == "generalized_jsd"


def test_an_adapter_teaches_and_writes(tmp_path):
    torch.manual_seed(3)
    student = get_peft_model(tiny_llama(1), LoraConfig(r=2, init_lora_weights=False))
    trainer = trained(tmp_path, student, teacher_adapter="base", on_policy_share=0.0, teacher_writes=True)
    assert logged(trainer, "kd")[0] > 0
    batch = prompt_batch()
    (row,) = trainer.rollouts_from("teacher", batch, 5)
    assert row.ids == written_by(tiny_llama(1), prompt_ids()[:1], 5)[0][0]
    assert student.active_adapters == ["default"]


def test_the_prompt_is_what_stands_before_the_last_labeled_stretch():
    assert prompt_of(Rollout([1, 2, 3, 4, 5], [-100, 2, -100, 4, 5], "data")) == [1, 2, 3]
    assert prompt_of(Rollout([1, 2], [-100, -100], "data")) == [1, 2]
    assert prompt_of(Rollout([1, 2], [1, 2], "data")) == []


SERVER = {"teacher_server": "http://localhost", "teacher_server_model": "m"}


@pytest.mark.parametrize("options, message", [
    ({"on_policy": "gdk"}, "Did you mean 'gkd'"),
    ({"on_policy_share": 1.5}, r"`on_policy_share` has to lie in \[0, 1\], got 1.5"),
    ({"sampling_temperature": 0.0}, "`sampling_temperature` > 0, got 6, 0 and 0.0"),
    ({"max_new_tokens": 0}, "`max_new_tokens` has to be >= 1"),
    ({"max_new_tokens": 64}, "leaves no room for a prompt"),
    ({"generation_options": {"temperature": 2.0}}, "set `sampling_temperature`"),
    ({"on_policy_options": {"beta": 1}}, "Unknown option of gkd 'beta'"),
    ({"packing": True}, "`packing` and `padding_free` join texts"),
    ({"kd_weight": 0.0, "ce_weight": 1.0}, "nobody teaches"),
    ({"teacher_cache": "cache"}, "writes new ones in each step"),
    ({"ce_weight": 0.5}, "`ce_weight` is 0.5, but with gkd and `on_policy_share` 1 the student writes every text"),
    ({"ce_weight": 0.5, "on_policy": "distillm"}, "with distillm and `on_policy_share` 1 the student writes every"),
    ({"ce_weight": 0.5, "on_policy": "sampled_reverse_kl"}, "with sampled_reverse_kl and `on_policy_share` 1"),
    ({"teacher_writes": True}, "`teacher_writes` is set, but with gkd and `on_policy_share` 1 the student writes"),
    ({"teacher_writes": True, "on_policy_share": 0.5, **SERVER}, "gkd lets the teacher write, which a server cannot"),
    ({"on_policy": "minillm", "loss": "reverse_kl", **SERVER}, r"a server cannot do\. .* choose gkd or sampled_rev"),
    ({"on_policy": "minillm", "teachers": [{"model": "a"}, {"model": "b"}]}, "which several teachers cannot do"),
    ({"on_policy": None, "on_policy_share": None}, "no text is written during training. Choose a method"),
])  # fmt: skip
def test_settings_that_cannot_be_obeyed_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **{**WRITES, **options})


@pytest.mark.parametrize("data, options, message", [
    ({"text": ["gold is a metal"]}, {}, "writes after the prompts of the data, but the rows have the columns text"),
    (PROMPTS, {"on_policy_share": 0.5}, r"gkd learns from completions as well \(`on_policy_share` 0.5"),
    ({"prompt": [""]}, {}, "Row 0: a prompt has no token"),
    ({"prompt": ["a" * 60]}, {}, "Row 0: a prompt has 60 tokens, which leaves no room for `max_new_tokens`"),
    ({"messages": [CHATS[0][:1]]}, {}, "Row 0 does not end with an answer of the assistant"),
])  # fmt: skip
def test_data_that_cannot_be_written_after_are_refused(tmp_path, data, options, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, data=data, **options)


def test_a_sharded_student_does_not_write(tmp_path, monkeypatch):
    monkeypatch.setattr(rollouts, "is_sharded", lambda **_: True)
    with pytest.raises(ValueError, match=r"Weights are sharded \(NO\), .* which it does for FSDP2 alone"):
        trainer_of(tmp_path)


def test_only_a_model_can_write_as_the_teacher(tmp_path):
    class Says:
        form = "dense"

        def signal(self, student, inputs, mask):
            raise AssertionError("never called")

    with pytest.raises(ValueError, match="lets the teacher write, which a Says cannot do"):
        trainer_of(tmp_path, teacher=Says(), teacher_writes=True, on_policy_share=0.0)
