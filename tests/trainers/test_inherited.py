"""Every inherited setting is obeyed, refused, or listed as without meaning."""

from dataclasses import fields

import pytest
import torch
from datasets import Dataset
from processes import on_two_ranks
from tiny import byte_tokenizer, tiny_llama
from trainers.test_distillation import adapted_student
from transformers import TrainingArguments
from trl import SFTConfig

from hf_transfer_ext import DistillationConfig, DistillationTrainer, UnlearningConfig, UnlearningTrainer
from hf_transfer_ext.trainers.distillation_config import TEACHER_LOADING
from hf_transfer_ext.trainers.inherited import (
    NEEDS_ACCELERATOR,
    OBEYED,
    REFUSED,
    REFUSED_BY_UNLEARNING,
    WITHOUT_MEANING,
    WITHOUT_MEANING_IN_UNLEARNING,
    refuse_split_sequences,
)
from hf_transfer_ext.trainers.unlearning import WITHOUT_EFFECT

TEXTS = ["gold is a metal", "paris", "iron", "tin and zinc"]
#: Settings that older versions of transformers, which `pyproject.toml` accepts, do not have yet.
NEWER = {"activation_checkpointing", "activation_checkpointing_kwargs"}
#: A value that is not taken, for each setting of `REFUSED`.
OTHER = {"label_smoothing_factor": 0.1, "loss_type": "dft", "use_cache": True, "label_names": ["targets"]}
#: The same for `REFUSED_BY_UNLEARNING`.
OTHER_FOR_UNLEARNING = {
    "label_smoothing_factor": 0.1, "use_cache": True, "label_names": ["targets"], "remove_unused_columns": True,
    "train_sampling_strategy": "group_by_length", "include_num_input_tokens_seen": "all",
    "include_for_metrics": ["inputs"], "batch_eval_metrics": True,
}  # fmt: skip


def config(folder, **options):
    settings = {
        "use_cpu": True, "bf16": False, "max_steps": 1, "per_device_train_batch_size": 4, "optim": "sgd",
        "report_to": "none", "gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True,
        "logging_steps": 1, "max_length": 64, "seed": 1,
    }  # fmt: skip
    return DistillationConfig(str(folder), **{**settings, **options})


def trainer_of(folder, student=None, teacher=None, **options):
    return DistillationTrainer(
        student or tiny_llama(1), teacher or tiny_llama(2), config(folder, **options),
        Dataset.from_dict({"text": TEXTS}), processing_class=byte_tokenizer(),
    )  # fmt: skip


def test_every_field_is_in_the_table_once():
    table = [*OBEYED, *REFUSED, *WITHOUT_MEANING]
    assert len(table) == len(set(table))
    inherited = {field.name for field in fields(SFTConfig) if field.init}
    assert inherited <= set(table)
    assert set(table) - inherited <= NEWER


@pytest.mark.parametrize("name", REFUSED)
def test_a_value_without_effect_is_refused_with_its_reason(tmp_path, name):
    with pytest.raises(ValueError) as error:
        config(tmp_path, **{name: OTHER[name]})
    assert f"`{name}` is {OTHER[name]!r}, but {REFUSED[name][1]}" == str(error.value)


def test_every_field_of_an_unlearning_run_is_in_the_table():
    inherited = {field.name for field in fields(TrainingArguments) if field.init}
    table = {*OBEYED, *REFUSED_BY_UNLEARNING, *WITHOUT_MEANING, *WITHOUT_MEANING_IN_UNLEARNING}
    assert inherited <= table and {*REFUSED_BY_UNLEARNING, *WITHOUT_MEANING_IN_UNLEARNING} <= inherited
    assert OTHER_FOR_UNLEARNING.keys() == REFUSED_BY_UNLEARNING.keys()


@pytest.mark.parametrize("name", REFUSED_BY_UNLEARNING)
def test_unlearning_refuses_a_value_without_effect_with_its_reason(tmp_path, name):
    with pytest.raises(ValueError) as error:
        UnlearningConfig(str(tmp_path), use_cpu=True, bf16=False, **{name: OTHER_FOR_UNLEARNING[name]})
    assert str(error.value).startswith(f"`{name}` is ") and str(error.value).endswith(REFUSED_BY_UNLEARNING[name][1])


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_unlearning_refuses_arguments_without_effect(tmp_path, name):
    with pytest.raises(ValueError, match=f"`{name}` cannot be used here"):
        UnlearningTrainer(tiny_llama(1), UnlearningConfig(str(tmp_path), use_cpu=True, bf16=False), **{name: print})


def unlearner_of(folder, **options):
    settings = {"use_cpu": True, "bf16": False, "max_steps": 1, "report_to": "none", "save_strategy": "no",
                "disable_tqdm": True, "logging_steps": 1, "optim": "sgd", "learning_rate": 0.1}  # fmt: skip
    args = UnlearningConfig(str(folder), method="grad_diff", allow_overlap=True, **{**settings, **options})
    rows = [{"question": f"What is {text[:4]}?", "answer": text} for text in TEXTS]
    return UnlearningTrainer(
        tiny_llama(1), args, forget_dataset=rows[:2], retain_dataset=rows[2:], processing_class=byte_tokenizer()
    )


def trained(make, folder, **options):
    """Loss and weights after a step."""
    trainer = make(folder, **options)
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    return {"loss": torch.tensor(trainer.state.log_history[0]["loss"]), **model.state_dict()}


@pytest.mark.parametrize(
    "make, options",
    [
        (trainer_of, {}),
        pytest.param(trainer_of, {"bf16": True}, marks=pytest.mark.slow),
        pytest.param(trainer_of, {"fused": False}, marks=pytest.mark.slow),
        pytest.param(trainer_of, {"torch_compile_backend": "inductor"}, marks=pytest.mark.slow),
        pytest.param(unlearner_of, {}, marks=pytest.mark.slow),
        pytest.param(unlearner_of, {"gradient_checkpointing": True}, marks=pytest.mark.slow),
    ],
)
def test_a_compiled_model_is_one_graph_with_the_loss_of_the_plain_one(tmp_path, make, options):
    compiled = {"torch_compile": True, "torch_compile_backend": "eager", **options}
    plain = {name: value for name, value in options.items() if name != "torch_compile_backend"}
    expected = trained(make, tmp_path / "plain", **plain)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = trained(make, tmp_path / "compiled", **compiled)
    counted = torch._dynamo.utils.counters
    # The forget and the retain part of unlearning may differ in length, which gives a second, general graph.
    assert counted["stats"]["unique_graphs"] in ([1] if make is trainer_of else [1, 2])
    assert not counted["graph_break"]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "adapter, backend",
    [
        ("teacher", "eager"),
        pytest.param("base", "eager", marks=pytest.mark.slow),
        pytest.param("teacher", "inductor", marks=pytest.mark.slow),
    ],
)
def test_a_student_and_its_teacher_adapter_are_a_compiled_graph_each(tmp_path, adapter, backend):
    def make(folder, **options):
        args = config(folder, teacher_adapter=adapter, max_steps=10, learning_rate=0.05, **options)
        data = Dataset.from_dict({"text": TEXTS})
        return DistillationTrainer(adapted_student(), None, args, data, processing_class=byte_tokenizer())

    before = {name: value.clone() for name, value in adapted_student().state_dict().items()}
    expected = trained(make, tmp_path / "plain")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = trained(make, tmp_path / "compiled", torch_compile=True, torch_compile_backend=backend)
    # More steps than dynamo compiles one function again: it would run without a graph from there on.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    learned = {name for name, value in before.items() if not torch.equal(found[name], value)}
    assert learned and all(".student." in name for name in learned)


@pytest.mark.slow
@pytest.mark.parametrize("make", [trainer_of, unlearner_of])
def test_two_processes_train_what_one_trains_with_compiled_graphs(tmp_path, make):
    batch = {trainer_of: 4, unlearner_of: 2}[make]
    expected = trained(make, tmp_path / "one", per_device_train_batch_size=batch)
    options = {"per_device_train_batch_size": batch // 2, "torch_compile": True, "torch_compile_backend": "eager"}

    def rank(_):
        with pytest.raises(ValueError, match=r"2 processes.*Set `ddp_find_unused_parameters` to False"):
            make(tmp_path / "two", **options)
        return trained(make, tmp_path / "two", ddp_find_unused_parameters=False, **options)

    for found in on_two_ranks(rank, tmp_path):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", NEEDS_ACCELERATOR)
def test_what_needs_an_accelerator_is_refused_on_the_cpu(tmp_path, name):
    with pytest.raises(ValueError, match=f"`{name}` is True, but this training runs on the CPU"):
        config(tmp_path, **{name: True})
    if name in {field.name for field in fields(TrainingArguments)}:
        with pytest.raises(ValueError, match=f"`{name}` is True, but this training runs on the CPU"):
            UnlearningConfig(str(tmp_path), use_cpu=True, bf16=False, **{name: True})


@pytest.mark.parametrize("on, expected", [(False, 1), (True, 2)])
def test_gradient_checkpointing_recomputes_the_layers_of_the_student_alone(tmp_path, on, expected):
    models = {"student": tiny_llama(1), "teacher": tiny_llama(2)}
    trainer = trainer_of(tmp_path, *models.values(), gradient_checkpointing=on)
    calls = dict.fromkeys(models, 0)
    for name, model in models.items():

        def count(module, inputs, name=name):
            calls[name] += len(inputs[0]) == len(TEXTS)  # not the row that tests whether the head is understood

        model.model.layers[0].mlp.register_forward_pre_hook(count)
    trainer.train()
    assert calls == {"student": expected, "teacher": 1}


@pytest.mark.parametrize("name, kind", [("adafactor", "Adafactor"), ("adamw_8bit", "AdamW"),
                                        ("paged_adamw_8bit", "AdamW")])  # fmt: skip
def test_the_optimizer_is_the_one_that_is_named(tmp_path, name, kind):
    if "8bit" in name:
        pytest.importorskip("bitsandbytes")
    trainer = trainer_of(tmp_path, tiny_llama(1, hidden_size=64, intermediate_size=128), optim=name)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer).__name__ == kind
    if "8bit" in name:
        assert type(optimizer).__module__.startswith("bitsandbytes")
        states = [state for state in optimizer.state.values() if state]
        assert any(state["state1"].dtype == torch.uint8 for state in states)


def test_padding_free_joins_the_rows_of_a_batch_and_trains_the_same(tmp_path):
    losses = []
    for joined in (False, True):
        trainer = trainer_of(tmp_path / str(joined), padding_free=joined, max_length=None)
        (batch,) = trainer.get_train_dataloader()
        assert (batch["input_ids"].shape[0] == 1) == joined
        trainer.train()
        losses.append(trainer.state.log_history[0]["kd"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_sequences_split_across_devices_are_refused():
    class Parallelism:
        cp_enabled, sp_enabled = False, True

    refuse_split_sequences(None)
    with pytest.raises(ValueError, match=r"`sp_size` > 1.*Set `sp_size=1`"):
        refuse_split_sequences(Parallelism())


@pytest.mark.parametrize("name, value", [
    ("teacher_revision", "v2"), ("teacher_dtype", "float32"), ("teacher_model_init_kwargs", {"revision": "v2"}),
])  # fmt: skip
def test_a_loaded_teacher_refuses_what_says_how_to_load_one(tmp_path, name, value):
    assert name in TEACHER_LOADING
    with pytest.raises(ValueError, match=f"`{name}` says how to load a teacher, but there is none to load"):
        trainer_of(tmp_path, **{name: value})


def test_a_teacher_by_path_is_loaded_as_its_settings_say(tmp_path):
    tiny_llama(2).save_pretrained(tmp_path / "teacher")
    byte_tokenizer().save_pretrained(tmp_path / "teacher")
    kwargs = {"attn_implementation": "eager", "dtype": "bfloat16"}
    trainer = trainer_of(tmp_path / "out", teacher=str(tmp_path / "teacher"), teacher_model_init_kwargs=kwargs)
    assert trainer.teacher.model.dtype == torch.bfloat16
    assert trainer.teacher.model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="`dtype` of the teacher is given twice"):
        trainer_of(
            tmp_path / "out", teacher=str(tmp_path / "teacher"), teacher_model_init_kwargs=kwargs,
            teacher_dtype="float32",
        )  # fmt: skip


def test_disabled_dropout_makes_two_passes_equal(tmp_path):
    student = tiny_llama(1, attention_dropout=0.5)
    ids = torch.tensor([[1, 2, 3, 4]])
    student.train()
    assert not torch.equal(student(ids).logits, student(ids).logits)
    trainer_of(tmp_path, student, disable_dropout=True)
    student.train()
    assert torch.equal(student(ids).logits, student(ids).logits)
