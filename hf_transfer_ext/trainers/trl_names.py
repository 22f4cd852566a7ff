"""The names that scripts for TRL's distillation trainers use, so that such a script runs with its import changed.

TRL's `DistillationTrainer` and `GKDTrainer` let the student write (part of) its training texts. Here the texts are
fixed: the data need completions, and settings of generation are reported and not used.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from transformers import TrainingArguments

logger = logging.getLogger(__name__)
Config = TypeVar("Config", bound=type)

#: TRL's settings of generation during training.
GENERATION = frozenset(
    "max_new_tokens max_completion_length ds3_gather_for_generation top_p top_k min_p generation_kwargs "
    "chat_template_kwargs repetition_penalty cache_implementation use_vllm vllm_mode vllm_model_impl "
    "vllm_enable_sleep_mode vllm_structured_outputs_regex vllm_server_base_url vllm_server_host vllm_server_port "
    "vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size "
    "max_tool_calling_iterations log_completions num_completions_to_print log_unique_prompts".split()
)
#: TRL's name -> ours, where the value stays.
RENAMED = {"temperature": "distill_temperature", "teacher_model_revision": "teacher_revision"}
#: TRL's settings that change what is trained, beside those of `RENAMED`.
_OTHERS = ("beta", "lmbda", "seq_kd")


def takes_trl_names(config: Config) -> Config:
    """Decorate a configuration so that it takes TRL's names of settings as keywords, too."""
    own: Callable[..., None] = config.__init__  # type: ignore[misc]

    @functools.wraps(own)
    def __init__(self: Any, *args: Any, **settings: Any) -> None:
        own(self, *args, **translated(settings))

    config.__init__ = __init__  # type: ignore[misc]
    return config


def translated(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with TRL's names replaced by ours.

    Raises:
        ValueError: A setting is given under both names, or asks for texts that the student writes.
    """
    found = {k: v for k, v in settings.items() if k not in {*RENAMED, *_OTHERS, *GENERATION}}

    def put(theirs: str, ours: str, value: Any) -> None:
        if ours in settings:
            raise ValueError(f"`{ours}` is set twice: by itself, and as `{theirs}`, TRL's name. Leave one out.")
        found[ours] = value

    for theirs, ours in RENAMED.items():
        if settings.get(theirs) is not None:
            put(theirs, ours, settings[theirs])
    if settings.get("beta") is not None:
        loss, options = divergence_of_beta(settings["beta"])
        put("beta", "loss", loss)
        if options:
            put("beta", "loss_options", options)
    if settings.get("lmbda") or settings.get("seq_kd"):
        name = "lmbda" if settings.get("lmbda") else "seq_kd"
        raise ValueError(
            f"`{name}` is {settings[name]!r}, but no text is generated during training here: the data are fixed. "
            f"Set `{name}={0.0 if name == 'lmbda' else False}`, and let the teacher or the student write completions "
            "beforehand if you want theirs."
        )
    unused = sorted(name for name in GENERATION if settings.get(name))
    if unused:
        logger.warning("Not used, because no text is generated during training here: %s.", ", ".join(unused))
    return found


def divergence_of_beta(beta: float) -> tuple[str, dict[str, Any]]:
    """The divergence that TRL's `beta` chooses, with its options: 0 is forward KL, 1 reverse KL, between them JSD.

    Raises:
        ValueError: `beta` is not between 0 and 1.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"`beta` has to lie between 0 and 1, got {beta}.")
    ends = {0: "forward_kl", 1: "reverse_kl"}
    return (ends[int(beta)], {}) if beta in ends else ("generalized_jsd", {"beta": float(beta)})


def converted(args: Any, kind: type) -> Any:
    """`args` as a configuration of the class `kind`: itself, or made from a `TrainingArguments` of another class.

    Settings that `kind` has, and TRL's names, are taken; others have to be at their default.

    Raises:
        TypeError: `args` is not a `TrainingArguments`.
        ValueError: A setting of the other class is not known here and is not at its default.
    """
    if isinstance(args, kind):
        return args
    if not isinstance(args, TrainingArguments):
        raise TypeError(
            f"`args` has to be a {kind.__name__} or another `TrainingArguments`, got {type(args).__name__}."
        )
    known = {field.name for field in fields(kind) if field.init}
    given = {}
    for field in (one for one in fields(args) if one.init):
        value = getattr(args, field.name)
        made = field.default_factory
        default = made() if made is not MISSING else field.default
        if field.name in known or field.name in RENAMED or field.name in _OTHERS:
            given[field.name] = value
        elif value != default and field.name in GENERATION:
            given[field.name] = value
        elif value != default:
            raise ValueError(
                f"`{field.name}` of {type(args).__name__} is {value!r}, a setting that {kind.__name__} does not have. "
                "Leave it at its default."
            )
    return kind(**given)


def refuse_prompts_alone(dataset: Any) -> None:
    """Refuse data of prompts without completions, from which TRL's on-policy trainers generate.

    Raises:
        ValueError: There are prompts and nothing to learn from.
    """
    columns = set(getattr(dataset, "column_names", None) or ())
    if "prompt" in columns and not columns & {"completion", "text", "messages", "conversations", "input_ids"}:
        raise ValueError(
            "The data hold prompts without completions. TRL's DistillationTrainer lets the student write them; here "
            "the data are fixed. Add a column `completion`, written by people or by the teacher."
        )
