"""What recipes share: a record of the settings, models by name, and how a recipe runs as a program."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from hf_transfer_ext.files import sha256_of
from hf_transfer_ext.hub.record import RunRecord, describe_input
from hf_transfer_ext.models.loading import four_bit, load_model, load_tokenizer
from hf_transfer_ext.recipe import inherited_defaults, settings_of, use_all_cores
from hf_transfer_ext.settings import run_program
from hf_transfer_ext.teachers.demo import demo_model

#: The name of the packaged model, Gemma 3 270M.
DEMO = "demo"
#: Groups of the trainers' own settings, whose configurations do not state any.
TRAINER_GROUPS = {
    "teacher": [
        *("teacher_model_name_or_path", "teacher_revision", "teacher_dtype", "teacher_model_init_kwargs"),
        *("teacher_adapter", "teacher_cache", "teacher_cache_options", "teacher_server", "teacher_server_model"),
        *(
            "teacher_server_options",
            "teacher_tokenizer",
            "teachers",
            "teachers_by",
            "teacher_column",
            "teacher_sharpness",
        ),
    ],
    "student": ["model_init_kwargs", "disable_dropout"],
    "loss": [
        *("loss", "loss_options", "distill_temperature", "kd_weight", "ce_weight", "fused", "stop_on_nan"),
        *("hidden_loss", "hidden_options", "hidden_weight", "layer_map", "hidden_embeddings"),
        *("method", "forget_loss", "retain_loss", "gamma", "alpha", "forget_options", "retain_options"),
        *("reference_adapter", "hidden_layer", "refusal", "float32_logits", "task", "task_options"),
    ],
    "on_policy": [
        *("on_policy", "on_policy_options", "on_policy_share", "teacher_writes", "max_new_tokens"),
        *("sampling_temperature", "generation_options", "log_rollouts", "rollout_engine", "rollout_engine_options"),
    ],
    "data": ["drop_unlabelled"],
}


def model_path(name: str | Path) -> str | Path:
    """The folder of the demo's model for `demo`, and any other name as it is."""
    return demo_model() if str(name) == DEMO else name


def load_named(
    name: str | Path,
    record: RunRecord | None = None,
    role: str = "model",
    revision: str | None = None,
    dtype: str = "auto",
    device: Any = None,
    load_reader: Callable[..., Any] = load_tokenizer,
    **loading: Any,
) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder, a Hub id or `demo`; the record, if any, notes it as an input.

    Args:
        load_reader: Loads the tokenizer, or a processor in its place.
        loading: Passed to `load_model` (`attn_implementation`, `quantization_config`, ...).
    """
    path = model_path(name)
    model = load_model(path, revision=revision, dtype=dtype, **loading)
    if device is not None:
        model = model.to(device)
    if record is not None:
        record.inputs.append(describe_input(path, revision, role, model=model))
    code = {key: value for key, value in loading.items() if key == "trust_remote_code"}
    return model, load_reader(path, revision=revision, **code)


def packed(is_four_bit: bool, args: Any) -> dict[str, Any]:
    """What `load_named` is given for a model in 4 bits (`four_bit`), with the precision of `args`; else nothing."""
    return {"quantization_config": four_bit(torch.bfloat16 if args.bf16 else torch.float32)} if is_four_bit else {}


def start_record(
    job: str, script: str, argv: Sequence[str] | None, *settings: Any, seed: int | None = None
) -> RunRecord:
    """The record of a run that starts: all settings, the command line, and the digest of the recipe's file.

    Args:
        script: `__file__` of the recipe.
        argv: The recipe's arguments; those of this process if None.
        settings: The dataclasses that hold the settings.
    """
    return RunRecord(
        job,
        f"hf-transfer-ext {Path(script).stem}",
        settings_of(*settings),
        defaults=inherited_defaults(*settings),
        command=[Path(script).stem, *(sys.argv[1:] if argv is None else argv)],
        recipe_sha256=sha256_of(script),
        seed=seed,
    )


def as_words(**settings: Any) -> list[str]:
    """Settings as the arguments of a recipe: `as_words(seed=1)` is `["--seed", "1"]`."""
    return [str(word) for name, value in settings.items() for word in (f"--{name}", value)]


def run_recipe(name: str, main: Callable[..., Any]) -> NoReturn:
    """A recipe as a program: all cores, and a mistake in one line with status 2."""
    use_all_cores()
    sys.exit(run_program(name, main))
