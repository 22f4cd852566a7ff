"""Scripts for TRL's trainers run with their imports changed."""

import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import byte_tokenizer, tiny_llama
from transformers import TrainingArguments
from trl import DistillationConfig as TRLDistillationConfig
from trl import SFTConfig
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


def test_a_script_for_the_distillation_trainer_of_trl(models, caplog):
    # from trl import DistillationConfig, DistillationTrainer
    args = DistillationConfig(
        output_dir=str(models / "out"), teacher_model_revision=None, teacher_model_init_kwargs={"dtype": "float32"},
        model_init_kwargs={"attn_implementation": "eager"}, temperature=2.0, beta=0.5, max_completion_length=64,
        disable_dropout=True, **SETTINGS,
    )  # fmt: skip
    assert (args.on_policy, args.on_policy_share, args.max_new_tokens) == ("gkd", 1.0, 64)  # the student writes all
    caplog.set_level(logging.WARNING)
    trainer = DistillationTrainer(
        model=str(models / "student"), teacher_model=str(models / "teacher"), args=args,
        train_dataset=Dataset.from_dict(ROWS), eval_dataset=Dataset.from_dict(ROWS),
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
    )  # fmt: skip
    assert trainer.model.config._attn_implementation == "eager" and hasattr(trainer.model, "peft_config")
    assert (trainer.args.loss, trainer.args.loss_options) == ("generalized_jsd", {"beta": 0.5})
    assert trainer.args.distill_temperature == trainer.args.sampling_temperature == 2.0
    assert trainer.args.max_length == 512 and "the models take 512 tokens" in caplog.text  # TRL's default is 1024
    assert loss_of(trainer) > 0 and trainer.evaluate()["eval_loss"] > 0
    assert trainer.state.log_history[0]["rollout_tokens"] <= 64
    prompts = DistillationTrainer(
        model=str(models / "student"), teacher_model=str(models / "teacher"),
        args=DistillationConfig(str(models / "out"), max_completion_length=8, temperature=1.0, beta=1.0, **SETTINGS),
        train_dataset=Dataset.from_dict({"prompt": ROWS["prompt"]}),
    )  # fmt: skip
    assert loss_of(prompts) > 0 and prompts.state.log_history[0]["rollout_tokens"] <= 8


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_a_script_for_the_gkd_trainer_of_trl(models, lmbda, caplog):
    # from trl.experimental.gkd import GKDConfig, GKDTrainer
    caplog.set_level(logging.WARNING)
    args = DistillationConfig(
        str(models / "out"), lmbda=lmbda, beta=0.0, temperature=0.9, max_new_tokens=16, **SETTINGS
    )
    # its temperature is that of sampling alone
    assert (args.distill_temperature, args.sampling_temperature) == (1.0, 0.9 if lmbda else 1.0)
    assert ("`lmbda` is 0 and no text is written: max_new_tokens, sampling_temp" in caplog.text) == (lmbda == 0)
    messages = [[{"role": "user", "content": "gold?"}, {"role": "assistant", "content": "a metal"}]] * 4
    chat = byte_tokenizer("{% for m in messages %}{{ m['content'] }}</s>{% endfor %}")
    trainer = DistillationTrainer(
        model=tiny_llama(1), teacher_model=tiny_llama(2), args=args, processing_class=chat,
        train_dataset=Dataset.from_dict({"messages": messages}),
    )  # fmt: skip
    assert trainer.args.loss == "forward_kl"
    assert loss_of(trainer) > 0


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
    assert args.generation_options == {"repetition_penalty": 1.0, "top_k": 0, "top_p": 1.0}
    args = converted(GKDConfig(str(tmp_path), seq_kd=True, **SETTINGS), DistillationConfig)
    assert (args.loss, args.distill_temperature, args.sampling_temperature) == ("generalized_jsd", 1.0, 0.9)
    assert (args.on_policy, args.on_policy_share, args.teacher_writes) == ("gkd", 0.5, True)
    args = converted(GKDConfig(str(tmp_path), lmbda=0.0, **SETTINGS), DistillationConfig)
    assert (args.loss, args.on_policy, args.distill_temperature) == ("generalized_jsd", None, 1.0)
    args = converted(GOLDConfig(str(tmp_path), lmbda=0.3, log_completions=True, **SETTINGS), DistillationConfig)
    assert (args.on_policy_share, args.max_new_tokens, args.distill_temperature) == (0.3, 128, 0.9)
    assert args.generation_options == {"top_p": 0.95, "top_k": 0} and args.log_rollouts == ALL_TEXTS
    with pytest.raises(TypeError, match="`args` has to be a DistillationConfig"):
        converted({"output_dir": "out"}, DistillationConfig)


def test_every_setting_of_trls_configurations_is_known():
    from dataclasses import fields

    known = {field.name for field in fields(DistillationConfig)} | TRL_NAMES
    named = {field.name for kind in (TRLDistillationConfig, GKDConfig, GOLDConfig) for field in fields(kind)}
    assert not named - known
    assert not TRL_NAMES - named  # nothing stays in the table that TRL has dropped


def test_settings_without_effect_are_named_with_the_reason(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    DistillationConfig(str(tmp_path), max_completion_length=64, use_vllm=True, generation_batch_size=4, **SETTINGS)
    for name in ("use_vllm", "generation_batch_size"):
        assert f"`{name}` is not used: {NOT_USED[name]}." in caplog.text


@pytest.mark.parametrize("name", ANSWERED)
def test_settings_that_would_train_something_else_are_answered(tmp_path, name):
    taken, advice = ANSWERED[name]
    other = {type(None): "x", bool: not taken, int: 2, float: 0.5, str: "other", list: [1]}[type(taken)]
    with pytest.raises(ValueError) as error:
        DistillationConfig(str(tmp_path), **{name: other}, **SETTINGS)
    assert f"`{name}` is {other!r}, a setting of TRL that is not taken: {advice}." == str(error.value)


@pytest.mark.parametrize("options, message", [
    ({"lmbda": 0.5, "on_policy_share": 0.5}, "`on_policy_share` is set twice: by itself, and as `lmbda`"),
    ({"lmbda": 1.5}, r"`on_policy_share` has to lie in \[0, 1\], got 1.5"),
    ({"beta": 1.5}, "`beta` has to lie between 0 and 1, got 1.5"),
    ({"beta": 0.5, "loss": "forward_kl"}, "`loss` is set twice: by itself, and as `beta`"),
    ({"temperature": 2.0, "distill_temperature": 1.0}, "`distill_temperature` is set twice"),
])  # fmt: skip
def test_what_cannot_be_done_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        DistillationConfig(str(tmp_path), **SETTINGS, **options)


def test_arguments_that_cannot_be_obeyed_are_refused(models):
    def start(data=ROWS, **kwargs):
        args = DistillationConfig(str(models / "out"), **SETTINGS)
        return DistillationTrainer(
            str(models / "student"), args=args, train_dataset=Dataset.from_dict(data), **kwargs
        )  # fmt: skip

    with pytest.raises(ValueError, match="two names of one argument"):
        start(teacher=tiny_llama(2), teacher_model=tiny_llama(2))
    with pytest.raises(ValueError, match="prompts without completions"):
        start({"prompt": ROWS["prompt"]}, teacher_model=tiny_llama(2))
    with pytest.raises(ValueError, match="`tools` are functions to call while a text is written"):
        start(teacher_model=tiny_llama(2), tools=[print])


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
