"""Scripts for TRL's trainers run with their import changed, and train what TRL trains."""

import copy
import importlib.util
import inspect
import json
import logging
import re
import runpy
import sys
import warnings
from dataclasses import fields
from pathlib import Path

import pytest
from datasets import Dataset, load_dataset
from peft import LoraConfig
from tiny import CHAT_TEMPLATE, byte_tokenizer, tiny_llama
from tiny_tokenizers import byte_fallback
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import DistillationConfig as TRLDistillationConfig
from trl import DistillationTrainer as TRLDistillationTrainer
from trl import ModelConfig, ScriptArguments, TrlParser

import hf_transfer_ext
from hf_transfer_ext.trainers.trl_names import converted
from hf_transfer_ext.trl import (
    DistillationConfig,
    DistillationTrainer,
    GKDConfig,
    GKDTrainer,
    GOLDConfig,
    GOLDTrainer,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl.experimental.gkd import GKDConfig as TRLGKDConfig
    from trl.experimental.gkd import GKDTrainer as TRLGKDTrainer
    from trl.experimental.gold import GOLDConfig as TRLGOLDConfig
    from trl.experimental.gold import GOLDTrainer as TRLGOLDTrainer

CONFIGS = [(DistillationConfig, TRLDistillationConfig), (GKDConfig, TRLGKDConfig), (GOLDConfig, TRLGOLDConfig)]
SETTINGS = {
    "use_cpu": True, "bf16": False, "max_steps": 1, "per_device_train_batch_size": 4, "report_to": "none",
    "gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "seed": 1,
}  # fmt: skip
ANSWERS = ["a metal", "a city in France", "oak", "the sea is blue"]
MESSAGES = [
    [{"role": "user", "content": f"what is {answer[:3]}"}, {"role": "assistant", "content": answer}]
    for answer in ANSWERS
]


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Folders of a student and a teacher, in a current folder of its own: scripts write beside themselves."""
    for name, seed in (("student", 1), ("teacher", 2)):
        tiny_llama(seed, max_position_embeddings=2048).save_pretrained(tmp_path / name)
        byte_tokenizer(CHAT_TEMPLATE).save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def short(trainer):
    """The same trainer with one step and short texts, which the scripts leave at their defaults."""
    trainer.args.max_steps, trainer.args.max_new_tokens, trainer.args.logging_steps = 1, 8, 1
    return trainer


def logged(trainer):
    trainer.train()
    return trainer.state.log_history[0]


@pytest.mark.parametrize("ours, theirs", CONFIGS, ids=lambda kind: kind.__name__)
def test_fields_and_defaults_are_those_of_the_installed_trl(tmp_path, ours, theirs):
    folder = str(tmp_path)
    mine, wanted = ours(folder, **SETTINGS), theirs(folder, **SETTINGS)
    for field in fields(theirs):
        if field.init:
            assert getattr(mine, field.name) == getattr(wanted, field.name), field.name
    assert mine.output_dir == folder  # the first by position, too


# ---- The scripts of TRL's documentation ----


def test_the_script_of_the_page_on_the_distillation_trainer(models):
    rows = [{"prompt": [row[0]], "completion": [row[1]]} for row in MESSAGES]  # as in trl-lib/tldr: both columns
    (models / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = load_dataset("json", data_files=str(models / "train.jsonl"), split="train")

    trainer = DistillationTrainer(
        model=str(models / "student"),
        teacher_model=str(models / "teacher"),
        train_dataset=dataset,
    )
    args = trainer.args
    assert (args.on_policy, args.on_policy_share, args.loss, args.learning_rate) == ("gkd", 1.0, "reverse_kl", 1e-6)
    assert args.max_new_tokens == 512 and args.sampling_temperature == args.distill_temperature == 1.0
    assert Path(args.output_dir).name == "student-Distillation" and args.max_length is None
    assert logged(short(trainer))["rollout_tokens"] <= 8


def test_the_script_of_the_page_on_the_gkd_trainer(models):
    tokenizer = AutoTokenizer.from_pretrained(models / "student")
    model = AutoModelForCausalLM.from_pretrained(models / "student")
    teacher_model = AutoModelForCausalLM.from_pretrained(models / "teacher")
    train_dataset, eval_dataset = Dataset.from_dict({"messages": MESSAGES}), Dataset.from_dict({"messages": MESSAGES})

    training_args = GKDConfig(output_dir="gkd-model", per_device_train_batch_size=1)
    trainer = GKDTrainer(
        model=model,
        teacher_model=teacher_model,
        args=training_args,
        processing_class=tokenizer,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
    )
    args = trainer.args
    assert (args.on_policy_share, args.loss, args.loss_options) == (0.5, "generalized_jsd", {"beta": 0.5})
    assert (args.sampling_temperature, args.distill_temperature, args.max_new_tokens) == (0.9, 1.0, 128)
    assert logged(short(trainer))["loss"] > 0 and trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("hybrid", [False, True])
def test_the_script_of_the_page_on_the_gold_trainer(models, hybrid):
    other = byte_fallback()
    tiny_llama(3, vocab_size=len(other)).save_pretrained(models / "other")
    other.save_pretrained(models / "tokenizer")
    train_dataset = Dataset.from_dict({"messages": MESSAGES})

    trainer = GOLDTrainer(
        model=str(models / "student"),
        teacher_model=str(models / "other"),
        args=GOLDConfig(
            output_dir="gold-model",
            use_uld_loss=True,
            uld_use_hybrid_loss=hybrid,
            teacher_tokenizer_name_or_path=str(models / "tokenizer"),
        ),
        train_dataset=train_dataset,
    )
    args = trainer.args
    assert args.loss == ("gold" if hybrid else "uld") and args.learning_rate == 1e-7
    assert args.loss_options == ({"beta": 0.5, "matched_weight": None} if hybrid else {})
    assert (args.sampling_temperature, args.distill_temperature) == (0.9, 1.0)
    assert args.generation_options == {"top_p": 0.95} and args.kd_weight == 1 and args.ce_weight == 0
    step = logged(short(trainer))
    assert step["loss"] > 0 and step["aligned"] > 0


def test_the_script_of_trl_for_the_command_line(models, monkeypatch):
    """`trl/scripts/distillation.py` of the installed TRL, with its two imports changed."""
    found = importlib.util.find_spec("trl.scripts.distillation")
    if found is None:
        pytest.skip("this TRL has no script for distillation")
    text = Path(found.origin).read_text()
    text, changed = re.subn(r"from trl import (.*)\b(Distillation(?:Trainer|Config)), ?",
                            r"from hf_transfer_ext.trl import \2; from trl import \1", text)  # fmt: skip
    assert changed == 2
    (models / "script.py").write_text(text)
    (models / "data").mkdir()
    rows = [{"prompt": row[:1]} for row in MESSAGES]
    (models / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(sys, "argv", [
        "script.py", "--model_name_or_path", str(models / "student"), "--dataset_name", str(models / "data"),
        "--teacher_model_name_or_path", str(models / "teacher"), "--output_dir", str(models / "out"),
        "--max_completion_length", "8", "--beta", "0.5", "--learning_rate", "1e-2", "--use_peft", "--lora_r", "2",
        "--max_steps", "1", "--report_to", "none", "--use_cpu", "true", "--bf16", "false", "--log_completions",
        "--chat_template_kwargs", '{"enable_thinking": false}', "--teacher_cache_options", "{}",
    ])  # fmt: skip
    runpy.run_path(str(models / "script.py"), run_name="__main__")
    assert (models / "out" / "adapter_model.safetensors").is_file()
    assert len((models / "out" / "rollouts.jsonl").read_text().splitlines()) == 4


# ---- The same numbers as TRL ----


def trained(trainer, config, data, **settings):
    """(loss, norm of the gradient) of the first step of a trainer of TRL or of ours."""
    tokenizer = byte_tokenizer(CHAT_TEMPLATE)
    step = logged(
        trainer(
            model=tiny_llama(1), teacher_model=tiny_llama(2), args=config("out", **{**SETTINGS, **settings}),
            train_dataset=Dataset.from_dict(data), processing_class=tokenizer,
        )
    )  # fmt: skip
    return step["loss"], step["grad_norm"]


@pytest.mark.parametrize("ours, theirs, settings", [
    ((GKDTrainer, GKDConfig), (TRLGKDTrainer, TRLGKDConfig), {"beta": 0.0}),
    ((GKDTrainer, GKDConfig), (TRLGKDTrainer, TRLGKDConfig), {"beta": 0.3, "temperature": 0.5}),
    ((GKDTrainer, GKDConfig), (TRLGKDTrainer, TRLGKDConfig), {"beta": 1.0}),
    ((GKDTrainer, GKDConfig), (TRLGKDTrainer, TRLGKDConfig), {"max_length": 20, "max_new_tokens": 16}),
    ((GOLDTrainer, GOLDConfig), (TRLGOLDTrainer, TRLGOLDConfig), {"temperature": 0.5}),
    ((GOLDTrainer, GOLDConfig), (TRLGOLDTrainer, TRLGOLDConfig), {"max_length": 20, "max_completion_length": 16}),
])  # fmt: skip
def test_a_step_on_the_data_is_trls(models, ours, theirs, settings):
    data = {"messages": MESSAGES}
    expected = trained(*theirs, data, lmbda=0.0, **settings)
    assert trained(*ours, data, lmbda=0.0, **settings) == pytest.approx(expected, rel=1e-4)


def test_a_step_of_the_cross_tokenizer_loss_is_trls(models):
    """With TRL's `bayesian` merging, ends of texts, and rows of one length; TRL averages within each text."""
    settings = {
        "lmbda": 0.0, "use_uld_loss": True, "teacher_tokenizer_name_or_path": str(models / "teacher"),
        "uld_token_merge_strategy": "bayesian", "uld_skip_student_eos": False, "uld_skip_teacher_eos": False,
        "uld_crossentropy_weight": 0.1, "uld_distillation_weight": 0.7,
    }  # fmt: skip
    data = {"messages": [MESSAGES[1]] * 4}
    expected = trained(TRLGOLDTrainer, TRLGOLDConfig, data, **settings)
    assert trained(GOLDTrainer, GOLDConfig, data, **settings) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("beta, temperature", [(0.0, 1.0), (0.3, 0.7), (1.0, 1.0)])
def test_a_step_on_written_texts_is_trls(models, beta, temperature):
    """With `top_k=1` both write the same texts."""
    data = {"prompt": [row[:1] for row in MESSAGES], "completion": ["is not read"] * 4}
    settings = {"beta": beta, "temperature": temperature, "top_k": 1, "max_completion_length": 12}
    expected = trained(TRLDistillationTrainer, TRLDistillationConfig, data, **settings)
    assert trained(DistillationTrainer, DistillationConfig, data, **settings) == pytest.approx(expected, rel=1e-4)
    assert trained(DistillationTrainer, TRLDistillationConfig, data, **settings) == pytest.approx(expected, rel=1e-4)


# ---- Settings ----


@pytest.mark.parametrize("parser", [HfArgumentParser, TrlParser])
@pytest.mark.parametrize("kind", [DistillationConfig, GKDConfig, GOLDConfig, hf_transfer_ext.DistillationConfig])
def test_a_command_line_is_parsed(tmp_path, parser, kind):
    def parsed(*flags):
        given = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--dataset_name", "x", *flags]
        return parser([ScriptArguments, kind, ModelConfig]).parse_args_into_dataclasses(given)[1]

    assert parsed().loss == (None if kind.__module__ == "hf_transfer_ext.trl" else "forward_kl")
    args = parsed(
        "--hidden_loss", "hidden_mse", "--layer_map", "last", "--hidden_options", '{"relative": false}',
        "--teacher_model_name_or_path", "teacher", "--kd_weight", "0.5",
    )  # fmt: skip
    assert (args.layer_map, args.hidden_options, args.kd_weight) == ("last", {"relative": False}, 0.5)
    args = parsed("--hidden_loss", "hidden_mse", "--layer_map", "[[0, 1], [-1, -1]]")
    assert converted(args, hf_transfer_ext.DistillationConfig).layer_map == [
        [0, 1], [-1, -1],
    ]  # fmt: skip


def test_trls_flags_are_parsed(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--lmbda", "0.25", "--beta", "0", "--seq_kd"]
    (args,) = TrlParser([GKDConfig]).parse_args_and_config(
        [*flags, "--teacher_model_init_kwargs", '{"dtype": "auto"}']
    )
    assert (args.lmbda, args.beta, args.seq_kd) == (0.25, 0.0, True)
    assert args.teacher_model_init_kwargs == {"dtype": "auto"}


def test_several_teachers_come_from_a_command_line(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--teachers"]
    parser = HfArgumentParser(hf_transfer_ext.DistillationConfig)
    (args,) = parser.parse_args_into_dataclasses([*flags, '[{"model": "a"}, {"model": "b", "weight": 3}]'])
    assert args.teachers == [{"model": "a"}, {"model": "b", "weight": 3}]
    with pytest.raises(ValueError, match="has to be valid JSON"):
        parser.parse_args_into_dataclasses([*flags, "[{model}]"])


def test_our_settings_stand_beside_trls(models):
    args = GKDConfig(
        str(models / "out"), lmbda=0.0, ce_weight=0.5, hidden_loss="hidden_mse", hidden_weight=0.1, loss="skew_kl",
        loss_options={"skew": 0.2}, distill_temperature=2.0, **SETTINGS,
    )  # fmt: skip
    data = Dataset.from_dict({"messages": MESSAGES})
    trainer = GKDTrainer(str(models / "student"), str(models / "teacher"), args, train_dataset=data)
    assert (trainer.args.loss, trainer.args.loss_options) == ("skew_kl", {"skew": 0.2})
    assert trainer.args.distill_temperature == 2.0 and trainer.args.sampling_temperature == 0.9
    assert {"kd", "ce", "hidden"} <= set(logged(trainer))
    with pytest.raises(ValueError, match="`loss` is set twice: by itself, and as `beta`"):
        GKDConfig(str(models / "out"), beta=0.0, loss="skew_kl", **SETTINGS)


def test_a_share_of_ours_reads_the_completions(models):
    args = DistillationConfig(str(models / "out"), on_policy_share=0.0, max_completion_length=8, **SETTINGS)
    data = Dataset.from_dict({"prompt": [row[:1] for row in MESSAGES], "completion": [row[1:] for row in MESSAGES]})
    trainer = DistillationTrainer(str(models / "student"), str(models / "teacher"), args, data)
    assert "rollout_tokens" not in logged(trainer)


def test_settings_that_change_after_the_configuration_are_followed(models):
    """TRL's own script sets `teacher_model_init_kwargs` so, with a revision that is None."""
    args = DistillationConfig(str(models / "out"), max_completion_length=8, **SETTINGS)
    args.teacher_model_init_kwargs = {"revision": None, "attn_implementation": "eager", "dtype": "float32"}
    args.beta = 0.0
    data = Dataset.from_dict({"prompt": [row[:1] for row in MESSAGES]})
    trainer = DistillationTrainer(str(models / "student"), str(models / "teacher"), args, data)
    assert trainer.args.loss == "forward_kl"
    assert trainer.args.teacher_model_init_kwargs == {"attn_implementation": "eager", "dtype": "float32"}


def test_prompts_are_as_long_as_the_models_take_them(models, caplog):
    """Beyond 512 tokens, where a default `max_length` of 1024 would leave no room for 512 new ones."""
    student, teacher = tiny_llama(1, max_position_embeddings=2048), tiny_llama(2, max_position_embeddings=2048)
    tokenizer = byte_tokenizer(CHAT_TEMPLATE)
    args = DistillationConfig(str(models / "out"), **SETTINGS)
    trainer = DistillationTrainer(student, teacher, args, Dataset.from_dict({"prompt": ["x" * 1400] * 4}),
                                  processing_class=tokenizer)  # fmt: skip
    assert logged(short(trainer))["num_tokens"] > 4 * 1400
    with pytest.raises(ValueError, match="a prompt has 1600 tokens, which leaves no room"):
        DistillationTrainer(copy.deepcopy(student), teacher, DistillationConfig(str(models / "out"), **SETTINGS),
                            Dataset.from_dict({"prompt": ["x" * 1600] * 4}), processing_class=tokenizer)  # fmt: skip
    # models with less room than TRL's default of 512 new tokens
    prompts = Dataset.from_dict({"prompt": ["x" * 200] * 4})
    small = DistillationTrainer(tiny_llama(1), tiny_llama(2), DistillationConfig(str(models / "out"), **SETTINGS),
                                prompts, processing_class=tokenizer)  # fmt: skip
    assert small.args.max_new_tokens == 256 and "the models take 512 tokens, half of which is used" in caplog.text
    # GKD cuts what stands before the answer to `max_length`, and what is written comes on top of it
    rows = [[{"role": "user", "content": "x" * 1500}, {"role": "assistant", "content": "a"}]] * 4
    args = GKDConfig(str(models / "out"), lmbda=1.0, **SETTINGS)
    trainer = GKDTrainer(student, teacher, args, train_dataset=Dataset.from_dict({"messages": rows}),
                         processing_class=tokenizer)  # fmt: skip
    assert all(len(ids) == 1024 for ids in trainer.train_dataset["input_ids"])
    assert trainer.record().config["data_length"] == 1024
    assert logged(short(trainer))["num_tokens"] > 4 * 1010


def test_arguments_of_the_chat_template_reach_every_prompt(models):
    template = "{% if short is defined %}S{% endif %}" + CHAT_TEMPLATE
    tokenizer = byte_tokenizer(template)
    data = Dataset.from_dict({"prompt": [row[:1] for row in MESSAGES]})
    for kwargs, start in ((None, "<"), ({"short": True}, "S")):
        args = DistillationConfig(
            str(models / "out"), chat_template_kwargs=kwargs, **SETTINGS, max_completion_length=8
        )
        trainer = DistillationTrainer(tiny_llama(1), tiny_llama(2), args, data, processing_class=tokenizer)
        assert tokenizer.decode(trainer.train_dataset[0]["input_ids"]).startswith(start)


def test_the_order_of_the_data_is_kept_where_trl_keeps_it(tmp_path):
    for shuffled, expected in ((True, "random"), (False, "sequential")):
        args = DistillationConfig(str(tmp_path), shuffle_dataset=shuffled, **SETTINGS)
        found = converted(args, hf_transfer_ext.DistillationConfig)
        assert found.train_sampling_strategy == expected


def test_arguments_by_position_are_trls(models):
    data = Dataset.from_dict({"messages": MESSAGES})
    args = GKDConfig(str(models / "out"), lmbda=0.0, **SETTINGS)
    tokenizer = byte_tokenizer(CHAT_TEMPLATE)
    trainer = GKDTrainer(tiny_llama(1), tiny_llama(2), args, None, data, data, tokenizer, None, [], (None, None), None,
                         LoraConfig(r=2, target_modules="all-linear"))  # fmt: skip
    assert hasattr(trainer.model, "peft_config") and trainer.eval_dataset is not None
    prompts = Dataset.from_dict({"prompt": [row[:1] for row in MESSAGES]})
    args = DistillationConfig(str(models / "out"), max_completion_length=8, **SETTINGS)
    evaluated = {"one": prompts, "two": prompts}
    trainer = DistillationTrainer(tiny_llama(1), tiny_llama(2), args, prompts, evaluated, tokenizer)
    assert set(trainer.evaluate()) >= {"eval_one_loss", "eval_two_loss"}


@pytest.mark.parametrize("ours, theirs", [
    (DistillationTrainer, TRLDistillationTrainer), (GKDTrainer, TRLGKDTrainer), (GOLDTrainer, TRLGOLDTrainer),
])  # fmt: skip
def test_the_arguments_of_a_trainer_begin_with_those_of_trl(ours, theirs):
    """Names, order and defaults; what follows are our own, which are given by name."""
    mine, wanted = (list(inspect.signature(kind).parameters.values()) for kind in (ours, theirs))
    assert [one.name for one in mine[: len(wanted)]] == [one.name for one in wanted]
    assert [one.default for one in mine[: len(wanted)]] == [one.default for one in wanted]
    assert mine[-1].kind is inspect.Parameter.VAR_KEYWORD


# ---- Several texts for each prompt ----


def gold_with_copies(kind=GOLDTrainer, config=GOLDConfig, stream=False, rows=MESSAGES, **settings):
    data = Dataset.from_dict({"messages": rows})
    args = config("out", **{**SETTINGS, "lmbda": 1.0, "num_generations": 2, "max_completion_length": 8, **settings})
    return kind(
        tiny_llama(1, max_position_embeddings=2048), tiny_llama(2, max_position_embeddings=2048), args,
        train_dataset=data.to_iterable_dataset() if stream else data, processing_class=byte_tokenizer(CHAT_TEMPLATE),
    )  # fmt: skip


@pytest.mark.parametrize("accumulation", [1, 2])
def test_prompts_are_repeated_in_the_order_of_trls_trainer(models, accumulation):
    """Of TRL's passes, each of which reads the prompts of a step once for every micro-batch, one is compared."""
    settings = {"gradient_accumulation_steps": accumulation, "rows": MESSAGES * 3 + MESSAGES[:1]}
    theirs = gold_with_copies(TRLGOLDTrainer, TRLGOLDConfig, **settings)._get_train_sampler()
    ours = gold_with_copies(**settings)._get_train_sampler()
    size = 4 * accumulation
    passes = []
    for epoch in range(3):
        places = list(theirs)
        passes.append([place for i in range(0, len(places), size * accumulation) for place in places[i : i + size]])
        ours.set_epoch(epoch)
        assert list(ours) == passes[-1] and len(ours) == len(passes[-1]) == 24
    assert passes[0] != passes[1]
    ours.set_epoch(1)  # as a run does that is resumed there
    assert list(ours) == passes[1]


def test_each_copy_of_a_prompt_has_a_text_of_its_own(models):
    trainer = gold_with_copies(max_steps=3, log_rollouts=8)  # 2 steps an epoch
    trainer.train()
    rows = [json.loads(line) for line in (models / "out" / "rollouts.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    first, second = rows[0:12:2], rows[1:12:2]
    assert [row["prompt"] for row in first] == [row["prompt"] for row in second]
    assert all(one["text"] != other["text"] for one, other in zip(first, second, strict=True))
    order = trainer._get_train_sampler()
    prompts = [tuple(row["input_ids"]) for row in trainer.train_dataset]
    written = [prompts.index(next(p for p in prompts if trainer.processing_class.decode(p).startswith(row["prompt"])))
               for row in rows[:8]]  # fmt: skip
    assert written == list(order)
    assert trainer.record().config["num_generations"] == 2


@pytest.mark.parametrize("build, message", [
    (lambda: GKDTrainer(tiny_llama(1), args=hf_transfer_ext.DistillationConfig("out", **SETTINGS)),
     "has to be a GKDConfig of `hf_transfer_ext.trl` or of TRL"),
    (lambda: GKDTrainer(tiny_llama(1), args=GKDConfig("out", **SETTINGS), data_collator=print),
     "`data_collator` is given"),
    (lambda: DistillationTrainer(tiny_llama(1), tiny_llama(2), DistillationConfig("out", **SETTINGS),
                                 Dataset.from_dict({"messages": MESSAGES})), "writes after the column `prompt`"),
    (lambda: DistillationTrainer(tiny_llama(1), tiny_llama(2), DistillationConfig("out", **SETTINGS),
                                 Dataset.from_dict({"prompt": ["a"], "image": ["b"]})), "prompts of text"),
    (lambda: DistillationConfig("out", max_completion_length=None, **SETTINGS), "texts need a limit"),
    (lambda: gold_with_copies(train_sampling_strategy="group_by_length"), "texts of a prompt stay together"),
    (lambda: gold_with_copies(stream=True), "the data are streamed, and prompts are repeated by their place"),
    (lambda: gold_with_copies(gradient_accumulation_steps=8),
     r"2 texts for each of 16 prompts \(`num_generations` 2\), but the data have 4"),
    (lambda: GOLDConfig("out", use_uld_loss=True, use_extended_uld=False, **SETTINGS), "compared by spans"),
    (lambda: GOLDConfig("out", use_uld_loss=True, uld_student_temperature=2.0, **SETTINGS), "Set both to the same"),
    (lambda: GOLDConfig("out", use_uld_loss=True, uld_use_hybrid_loss=True, beta=1.0, **SETTINGS), "strictly between"),
])  # fmt: skip
def test_what_cannot_be_done_is_refused(models, build, message):
    with pytest.raises((TypeError, ValueError), match=message):
        build()


def test_what_trls_cross_tokenizer_loss_does_otherwise_is_said(models, caplog):
    args = GOLDConfig("out", use_uld_loss=True, **SETTINGS)
    caplog.set_level(logging.WARNING)
    converted(args, hf_transfer_ext.DistillationConfig)
    assert "`uld_token_merge_strategy` is not used: groups of tokens are merged by the chain rule" in caplog.text
    assert "`uld_skip_student_eos` is not used" in caplog.text


def test_weights_of_trls_hybrid_loss_are_trls(tmp_path):
    args = GOLDConfig(
        str(tmp_path), use_uld_loss=True, uld_use_hybrid_loss=True, uld_hybrid_matched_weight=3.0,
        uld_hybrid_unmatched_weight=1.0, uld_distillation_weight=0.5, uld_crossentropy_weight=0.25, **SETTINGS,
    )  # fmt: skip
    found = converted(args, hf_transfer_ext.DistillationConfig)
    assert found.loss_options == {"beta": 0.5, "matched_weight": 0.75}
    assert (found.kd_weight, found.ce_weight) == (2.0, 0.25)  # .5 * (3 * matched + 1 * others)
