"""The names that scripts for TRL's distillation trainers use, so that such a script runs with its import changed.

`docs/coming-from.md` lists what becomes of each setting.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from transformers import TrainingArguments

logger = logging.getLogger(__name__)
Config = TypeVar("Config", bound=type)

#: TRL's name -> ours, where the value stays.
RENAMED = {
    "teacher_model_revision": "teacher_revision",
    "lmbda": "on_policy_share",
    "seq_kd": "teacher_writes",
    "max_completion_length": "max_new_tokens",
}
#: TRL's settings that become options of generation, `generation_options`, under the same name.
GENERATION = frozenset(("top_p", "top_k", "min_p", "repetition_penalty", "cache_implementation"))
#: TRL's settings that become several of ours, or another value.
TRANSLATED = frozenset(("temperature", "beta", "generation_kwargs", "log_completions", "num_completions_to_print"))
#: TRL's settings that change nothing here: setting -> why.
NOT_USED = {
    **{
        name: "transformers writes the texts, from the same distribution; set `rollout_engine: vllm` for vLLM"
        for name in (
            "use_vllm", "vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode", "vllm_server_base_url",
            "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port",
            "vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size", "vllm_sync_frequency",
        )
    },
    "ds3_gather_for_generation": "students that ZeRO-3 shards do not write texts",
    "generation_batch_size": "each micro-batch is written as one batch",
    "log_unique_prompts": "`rollouts.jsonl` holds the texts of each step",
    "wandb_log_unique_prompts": "`rollouts.jsonl` holds the texts of each step",
    "log_completions_steps": "`rollouts.jsonl` holds the texts of each step",
}  # fmt: skip
_CROSS_TOKENIZER = "choose a loss across tokenizers with `loss` (uld, gold, alm, dskd) and its `loss_options`"
#: TRL's settings that would train something else if they were left out: setting -> (value that is taken, what to do).
ANSWERED: dict[str, tuple[Any, str]] = {
    "vllm_structured_outputs_regex": (None, "texts are not held to a pattern here; leave it out"),
    "max_tool_calling_iterations": (None, "no tool is called while a text is written; leave it out"),
    "chat_template_kwargs": (None, "give them for each row, in a column `chat_template_kwargs`"),
    "num_generations": (1, "repeat the prompts in the data instead"),
    "callbacks": ([], "pass them to the trainer"),
    "teacher_tokenizer_name_or_path": (None, "pass the tokenizer itself, `teacher_processing_class`"),
    "use_uld_loss": (False, _CROSS_TOKENIZER),
    "uld_use_hybrid_loss": (False, _CROSS_TOKENIZER),
    "use_extended_uld": (True, _CROSS_TOKENIZER),
    "uld_token_merge_strategy": ("observed", _CROSS_TOKENIZER),
    "uld_hybrid_matched_weight": (None, _CROSS_TOKENIZER),
    "uld_hybrid_unmatched_weight": (None, _CROSS_TOKENIZER),
    "uld_crossentropy_weight": (0.0, "set `ce_weight`"),
    "uld_distillation_weight": (1.0, "set `kd_weight`"),
    "uld_student_temperature": (1.0, "set `distill_temperature`"),
    "uld_teacher_temperature": (1.0, "set `distill_temperature`"),
    "uld_skip_student_eos": (True, _CROSS_TOKENIZER),
    "uld_skip_teacher_eos": (True, _CROSS_TOKENIZER),
}
#: Every setting of TRL's configurations that is not one of ours by name.
TRL_NAMES = frozenset((*RENAMED, *GENERATION, *TRANSLATED, *NOT_USED, *ANSWERED))
#: `log_rollouts` where TRL would print all texts of a step.
ALL_TEXTS = 1_000_000


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

    `max_completion_length` without `lmbda` is a setting of TRL's DistillationTrainer, whose student writes all texts.

    Raises:
        ValueError: A setting is given under both names, or cannot be followed.
    """
    found = {name: value for name, value in settings.items() if name not in TRL_NAMES}

    def put(theirs: str, ours: str, value: Any) -> None:
        if ours in settings:
            raise ValueError(f"`{ours}` is set twice: by itself, and as `{theirs}`, TRL's name. Leave one out.")
        found[ours] = value

    for name, (taken, advice) in ANSWERED.items():
        if name in settings and settings[name] != taken and settings[name] is not None:
            raise ValueError(f"`{name}` is {settings[name]!r}, a setting of TRL that is not taken: {advice}.")
    unused = [name for name in NOT_USED if settings.get(name) and not _is_a_default(name, settings[name])]
    for name in unused:
        logger.warning("`%s` is not used: %s.", name, NOT_USED[name])
    for theirs, ours in RENAMED.items():
        if settings.get(theirs) is not None:
            put(theirs, ours, settings[theirs])
    if settings.get("beta") is not None:
        loss, options = divergence_of_beta(settings["beta"])
        put("beta", "loss", loss)
        if options:
            put("beta", "loss_options", options)
    if "max_completion_length" in settings and not {"lmbda", "on_policy", "on_policy_share"} & set(settings):
        found["on_policy"], found["on_policy_share"] = "gkd", 1.0
    of_gkd = {"lmbda", "seq_kd", "max_new_tokens"} & set(settings) and "max_completion_length" not in settings
    if settings.get("temperature") is not None:  # GKD samples with it; the others divide logits by it in the loss, too
        for ours in ("sampling_temperature", *(() if of_gkd else ("distill_temperature",))):
            put("temperature", ours, settings["temperature"])
    options = {name: settings[name] for name in sorted(GENERATION) if settings.get(name) is not None}
    given = settings.get("generation_kwargs")
    options |= json.loads(given) if isinstance(given, str) else (given or {})
    if options:
        put("generation_kwargs" if given else next(iter(options)), "generation_options", options)
    if settings.get("log_completions"):
        put("log_completions", "log_rollouts", settings.get("num_completions_to_print") or ALL_TEXTS)
    return found if _writes(found) or not TRL_NAMES & set(settings) else _without_generation(found, settings)


def _is_a_default(name: str, value: Any) -> bool:
    """Whether the value is what a configuration of TRL holds where nobody has set it."""
    return name.startswith("vllm_") or (name, value) in (
        ("ds3_gather_for_generation", True),
        ("log_completions_steps", 100),
        ("wandb_log_unique_prompts", True),
    )


def _writes(settings: Mapping[str, Any]) -> bool:
    return bool(settings.get("on_policy") or settings.get("on_policy_share") or settings.get("teacher_writes"))


def _without_generation(found: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a script that generates nothing (`lmbda=0`), without those of generation; says so."""
    ours = ("max_new_tokens", "sampling_temperature", "generation_options", "log_rollouts")
    stated = [name for name in ours if name in found]
    if stated and "lmbda" in settings:
        logger.warning("Not used, because `lmbda` is 0 and no text is written: %s.", ", ".join(stated))
        return {name: value for name, value in found.items() if name not in ours}
    if "temperature" in settings:  # alone, it is that of the loss
        found.pop("sampling_temperature")
        found.setdefault("distill_temperature", settings["temperature"])
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
        if field.name in known or field.name in TRL_NAMES:
            given[field.name] = value
        elif value != default:
            raise ValueError(
                f"`{field.name}` of {type(args).__name__} is {value!r}, a setting that {kind.__name__} does not have. "
                "Leave it at its default."
            )
    return kind(**given)
