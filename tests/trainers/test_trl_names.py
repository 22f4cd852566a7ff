"""Configurations of TRL in the words of ours; `tests/test_trl.py` runs the scripts."""

import logging
from dataclasses import fields

import pytest
import torch
from datasets import Dataset
from tiny import byte_tokenizer, tiny_llama
from transformers import TrainingArguments
from trl import DistillationConfig as TRLDistillationConfig
from trl import GRPOConfig, SFTConfig
from trl.experimental.gkd import GKDConfig
from trl.experimental.gold import GOLDConfig

from hf_transfer_ext import DistillationConfig, DistillationTrainer
from hf_transfer_ext.trainers.trl_names import ALL_TEXTS, ANSWERED, NOT_USED, TRL_NAMES, converted, divergence_of_beta

SETTINGS = {
    "use_cpu": True, "bf16": False, "max_steps": 1, "per_device_train_batch_size": 4, "report_to": "none",
    "gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "seed": 1,
    "learning_rate": 1e-2,
}  # fmt: skip
ROWS = {
    "prompt": ["what is gold? ", "what is paris? ", "what is tin? "],
    "completion": ["a metal", "a city", "a metal"],
}


@pytest.fixture
def models(tmp_path):
    for name, seed in (("student", 1), ("teacher", 2)):
        tiny_llama(seed).save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    return tmp_path


def loss_of(trainer):
    trainer.train()
    return trainer.state.log_history[0]["loss"]


@pytest.mark.parametrize("kind", [SFTConfig, TrainingArguments])
def test_a_plain_configuration_is_converted(models, kind):
    args = kind(str(models / "out"), **SETTINGS)
    data = Dataset.from_dict({"text": ["gold is a metal", "paris is a city"]})
    trainer = DistillationTrainer(
        model=str(models / "student"), teacher=str(models / "teacher"), args=args, train_dataset=data
    )
    assert isinstance(trainer.args, DistillationConfig) and trainer.args.learning_rate == 1e-2
    expected = DistillationConfig(str(models / "out"), **SETTINGS)
    other = DistillationTrainer(tiny_llama(1), tiny_llama(2), expected, data, processing_class=byte_tokenizer())
    assert loss_of(trainer) == pytest.approx(loss_of(other), rel=1e-6)


def test_configurations_of_trl_are_converted_or_refused(tmp_path):
    args = converted(TRLDistillationConfig(str(tmp_path), temperature=2.0, **SETTINGS), DistillationConfig)
    assert args.loss == "reverse_kl" and args.distill_temperature == 2.0  # beta is 1 by default there
    assert (args.on_policy_share, args.max_new_tokens, args.sampling_temperature) == (1.0, 512, 2.0)
    assert args.generation_options == {} and args.max_length is None and args.remove_unused_columns
    args = converted(GKDConfig(str(tmp_path), seq_kd=True, **SETTINGS), DistillationConfig)
    assert (args.loss, args.distill_temperature, args.sampling_temperature) == ("generalized_jsd", 1.0, 0.9)
    assert (args.on_policy, args.on_policy_share, args.teacher_writes) == ("gkd", 0.5, True)
    args = converted(GKDConfig(str(tmp_path), lmbda=0.0, **SETTINGS), DistillationConfig)
    assert (args.loss, args.on_policy_share, args.distill_temperature) == ("generalized_jsd", 0.0, 1.0)
    assert (args.max_length, args.truncation_mode) == (1024, "keep_end")
    args = converted(GOLDConfig(str(tmp_path), log_completions=True, **SETTINGS), DistillationConfig)
    assert (args.on_policy_share, args.max_new_tokens, args.distill_temperature) == (0.5, 128, 0.9)
    assert args.generation_options == {"top_p": 0.95} and args.log_rollouts == ALL_TEXTS
    with pytest.raises(TypeError, match="`args` has to be a DistillationConfig"):
        converted({"output_dir": "out"}, DistillationConfig)
    with pytest.raises(ValueError, match="a setting that DistillationConfig does not have"):
        converted(
            GRPOConfig(str(tmp_path), beta=0.1, **{**SETTINGS, "per_device_train_batch_size": 8}), DistillationConfig
        )


@pytest.mark.parametrize("given, expected", [
    ({"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}, {}),
    ({"top_p": 0.9, "generation_kwargs": {"top_p": 1.0}}, {}),
    ({"top_k": 5, "generation_kwargs": '{"typical_p": 0.9}'}, {"top_k": 5, "typical_p": 0.9}),
])  # fmt: skip
def test_values_of_generation_that_change_nothing_are_left_out(tmp_path, given, expected):
    """So that methods which need the probability of each drawn token accept TRL's defaults."""
    args = converted(TRLDistillationConfig(str(tmp_path), **given, **SETTINGS), DistillationConfig)
    assert args.generation_options == expected


def test_every_setting_of_trls_configurations_is_known():
    known = {field.name for field in fields(DistillationConfig)} | TRL_NAMES
    named = {field.name for kind in (TRLDistillationConfig, GKDConfig, GOLDConfig) for field in fields(kind)}
    assert not named - known
    assert not TRL_NAMES - named  # nothing stays in the table that TRL has dropped


def test_settings_without_effect_are_named_with_the_reason(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    args = TRLDistillationConfig(str(tmp_path), use_vllm=True, log_unique_prompts=True, **SETTINGS)
    converted(args, DistillationConfig)
    for name in ("use_vllm", "log_unique_prompts"):
        assert f"`{name}` is not used: {NOT_USED[name]}." in caplog.text
    caplog.clear()
    for kind in (TRLDistillationConfig, GKDConfig, GOLDConfig):
        converted(kind(str(tmp_path), **SETTINGS), DistillationConfig)
    assert "is not used" not in caplog.text


@pytest.mark.parametrize("name", ANSWERED)
def test_settings_that_would_train_something_else_are_answered(tmp_path, name):
    taken, advice = ANSWERED[name]
    other = {type(None): "x", bool: not taken, int: 2, str: "other", list: [1]}[type(taken)]
    kind = GOLDConfig if hasattr(GOLDConfig, name) or name == "callbacks" else TRLDistillationConfig
    more = {"use_uld_loss": True} if kind is GOLDConfig else {}
    args = kind(str(tmp_path), **{name: other}, **more, **SETTINGS)
    with pytest.raises(ValueError) as error:
        converted(args, DistillationConfig)
    assert f"`{name}` is {other!r}, a setting of TRL that is not taken: {advice}." == str(error.value)


@pytest.mark.parametrize("name", sorted(TRL_NAMES))
def test_a_name_of_trl_alone_is_refused_with_the_name_to_use(tmp_path, name):
    """It would bring the setting, and not the defaults of TRL that go with it."""
    with pytest.raises(ValueError, match=rf"^`{name}` is a setting of TRL.*`hf_transfer_ext\.trl`"):
        DistillationConfig(str(tmp_path), **{name: 1})


def test_the_refusal_names_the_setting_of_ours(tmp_path):
    for name, ours in (("lmbda", "on_policy_share"), ("beta", "loss"), ("top_p", "generation_options")):
        with pytest.raises(ValueError, match=f"`{ours}` here"):
            DistillationConfig(str(tmp_path), **{name: 0.5})


def test_arguments_that_cannot_be_obeyed_are_refused(models, caplog):
    def start(data=ROWS, **kwargs):
        args = DistillationConfig(str(models / "out"), **SETTINGS)
        return DistillationTrainer(
            str(models / "student"), args=args, train_dataset=Dataset.from_dict(data), **kwargs
        )  # fmt: skip

    with pytest.raises(ValueError, match="two names of one argument"):
        start(teacher=tiny_llama(2), teacher_model=tiny_llama(2))
    with pytest.raises(ValueError, match=r"prompts without completions.*`hf_transfer_ext\.trl`"):
        start({"prompt": ROWS["prompt"]}, teacher_model=tiny_llama(2))
    with pytest.raises(ValueError, match="`tools` are functions to call while a text is written"):
        start(teacher_model=tiny_llama(2), tools=[print])
    caplog.set_level(logging.WARNING)
    start(teacher_model=tiny_llama(2))
    assert "a script for TRL finds TRL's in `hf_transfer_ext.trl`" in caplog.text


@pytest.mark.parametrize("layers", [[], [0, 1], [[0]], [[0, True]], {"a": 1}])
def test_a_layer_map_that_names_no_pairs_is_refused(tmp_path, layers):
    with pytest.raises(
        ValueError, match=r"`layer_map` has to (be a name or pairs of layers|name layers by their numbers)"
    ):
        DistillationConfig(str(tmp_path), hidden_loss="hidden_mse", layer_map=layers, **SETTINGS)


@pytest.mark.parametrize("beta, expected", [(0.0, "forward_kl"), (1.0, "reverse_kl"), (0.25, "generalized_jsd")])
def test_beta_is_trls(beta, expected):
    """The loss of a row of logits equals the one that TRL computes."""
    from trl.experimental.gkd import GKDTrainer

    from hf_transfer_ext.losses.distillation import DISTILLATION_LOSSES

    torch.manual_seed(0)
    student, teacher = torch.randn(1, 3, 7), torch.randn(1, 3, 7)
    name, options = divergence_of_beta(beta)
    assert name == expected
    ours = DISTILLATION_LOSSES[name](student, teacher, **options).mean()
    theirs = GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, labels=torch.zeros(1, 3, dtype=torch.long))
    torch.testing.assert_close(ours, theirs)
