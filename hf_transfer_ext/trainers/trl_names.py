"""The settings of TRL's distillation trainers in the words of `DistillationConfig`.

`hf_transfer_ext.trl` has the configurations and trainers for scripts; `docs/coming-from.md` lists what becomes of each
setting.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar

from transformers import TrainingArguments

logger = logging.getLogger(__name__)
Config = TypeVar("Config", bound=type)

#: Configurations of TRL whose settings are translated.
STABLE, GKD, GOLD = "DistillationConfig", "GKDConfig", "GOLDConfig"
#: TRL's name -> ours, where the value stays.
RENAMED = {
    "teacher_model_revision": "teacher_revision",
    "lmbda": "on_policy_share",
    "seq_kd": "teacher_writes",
    "max_completion_length": "max_new_tokens",
}
#: TRL's settings that become options of generation, `generation_options`, under the same name -> the values that
#: change nothing, since tokens are drawn from the whole softmax without options.
GENERATION: dict[str, tuple[Any, ...]] = {
    "top_p": (None, 1.0), "top_k": (None, 0), "min_p": (None, 0.0), "repetition_penalty": (None, 1.0),
    "cache_implementation": (None,),
}  # fmt: skip
#: TRL's settings that become several of ours, or another value.
TRANSLATED = frozenset(
    ("temperature", "beta", "generation_kwargs", "log_completions", "num_completions_to_print", "use_uld_loss",
     "uld_use_hybrid_loss", "uld_hybrid_matched_weight", "uld_hybrid_unmatched_weight", "uld_crossentropy_weight",
     "uld_distillation_weight", "uld_student_temperature", "uld_teacher_temperature")
)  # fmt: skip
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
#: Those that are worth a warning: the others say how `use_vllm` works, or how many texts are written at once.
_WARNED = [name for name in NOT_USED if not name.startswith("vllm_") and name != "generation_batch_size"]
#: Settings of TRL's cross-tokenizer loss, `use_uld_loss`, that have one value here: setting -> (value, why).
OF_ULD: dict[str, tuple[Any, str]] = {
    "uld_token_merge_strategy": ("bayesian", "groups of tokens are merged by the chain rule"),
    "uld_skip_student_eos": (False, "the end of a text is a span that is learned"),
    "uld_skip_teacher_eos": (False, "the end of a text is a span that is learned"),
}
#: TRL's settings that would train something else if they were left out: setting -> (value that is taken, what to do).
ANSWERED: dict[str, tuple[Any, str]] = {
    "vllm_structured_outputs_regex": (None, "texts are not held to a pattern here; leave it out"),
    "max_tool_calling_iterations": (None, "no tool is called while a text is written; leave it out"),
    "chat_template_kwargs": (None, "give them for each row, in a column `chat_template_kwargs`"),
    "num_generations": (1, "take GOLDTrainer of `hf_transfer_ext.trl`, or repeat the prompts in the data"),
    "callbacks": ([], "pass them to the trainer"),
    "teacher_tokenizer_name_or_path": (None, "pass the tokenizer itself, `teacher_processing_class`"),
    "use_extended_uld": (True, "texts are compared by spans, not by the places of tokens; leave it out"),
}
#: Every setting of TRL's configurations that is not one of ours by name.
TRL_NAMES = frozenset((*RENAMED, *GENERATION, *TRANSLATED, *NOT_USED, *OF_ULD, *ANSWERED))
#: `log_rollouts` where TRL would print all texts of a step.
ALL_TEXTS = 1_000_000


def answers_trl_names(config: Config) -> Config:
    """Decorate a configuration so that it refuses TRL's names of settings with the name to use instead.

    A name alone would bring the setting and not the defaults of TRL that go with it.
    """
    own: Callable[..., None] = config.__init__  # type: ignore[misc]

    @functools.wraps(own)
    def __init__(self: Any, *args: Any, **settings: Any) -> None:
        for name in settings:
            if name in TRL_NAMES:
                raise ValueError(trl_name_given(name))
        own(self, *args, **settings)

    config.__init__ = __init__  # type: ignore[misc]
    return config


def trl_name_given(name: str) -> str:
    """What to do about a setting that only TRL's configurations have."""
    ours = {**RENAMED, "beta": "loss", **dict.fromkeys((*GENERATION, "generation_kwargs"), "generation_options")}
    ours |= {"temperature": "sampling_temperature` and `distill_temperature", "log_completions": "log_rollouts"}
    here = f", `{ours[name]}` here" if name in ours else ""
    return (
        f"`{name}` is a setting of TRL{here}. A script for TRL runs with TRL's names and defaults when its "
        "configuration and trainer are imported from `hf_transfer_ext.trl`; docs/coming-from.md lists all settings."
    )


def script_of(args: Any) -> str | None:
    """Which of TRL's configurations `args` is: STABLE, GKD or GOLD; None for every other."""
    for base in type(args).__mro__:
        if base.__module__.split(".")[0] == "trl" and base.__name__ in (STABLE, GKD, GOLD):
            return base.__name__
    return None


def converted(args: Any, kind: type) -> Any:
    """`args` as a configuration of the class `kind`: itself, or made from a `TrainingArguments` of another class.

    Raises:
        TypeError: `args` is not a `TrainingArguments`.
        ValueError: A setting of the other class is not known here and is not at its default, or cannot be followed.
    """
    if isinstance(args, kind):
        return args
    if not isinstance(args, TrainingArguments):
        raise TypeError(
            f"`args` has to be a {kind.__name__} or another `TrainingArguments`, got {type(args).__name__}."
        )
    settings, unused = translated(args, kind)
    for name, why in unused.items():
        logger.warning("`%s` is not used: %s.", name, why)
    return kind(**settings)


def translated(args: TrainingArguments, kind: type) -> tuple[dict[str, Any], dict[str, str]]:
    """(settings for `kind` that mean what `args` means, TRL's settings without effect -> why).

    Settings that `kind` has are taken as they are, and those of TRL translated; others have to be at their default.
    Where a configuration has fields of both, one of ours that is set replaces TRL's default.

    Raises:
        ValueError: A setting is given under both names, cannot be followed, or is not known.
    """
    script = script_of(args)
    known = {field.name: field for field in fields(kind) if field.init}
    ours: dict[str, Any] = {}
    theirs: dict[str, Any] = {}
    changed: set[str] = set()
    for field in (one for one in fields(args) if one.init):
        value = getattr(args, field.name)
        if value != _default(field):
            changed.add(field.name)
        if script is not None and field.name in TRL_NAMES:
            theirs[field.name] = value
        elif field.name in known:
            if value is not None or _default(field) is not None or _default(known[field.name]) is None:
                ours[field.name] = value
        elif field.name in changed:
            raise ValueError(
                f"`{field.name}` of {type(args).__name__} is {value!r}, a setting that {kind.__name__} does not have. "
                "Leave it at its default."
            )
    if script is None:
        return ours, {}
    for name, (taken, advice) in ANSWERED.items():
        read = name != "use_extended_uld" or theirs.get("use_uld_loss")
        if name in theirs and read and theirs[name] not in (taken, None):
            raise ValueError(f"`{name}` is {theirs[name]!r}, a setting of TRL that is not taken: {advice}.")
    found = _Settings(ours, {name: _default(field) for name, field in known.items()}, changed)
    unused = {name: NOT_USED[name] for name in _WARNED if name in changed and theirs.get(name)}
    _data(found, script)
    _teacher(found, theirs)
    _writing(found, script, theirs)
    if theirs.get("use_uld_loss"):
        _cross_tokenizer(found, theirs)
        unused |= {name: why for name, (value, why) in OF_ULD.items() if theirs.get(name, value) != value}
    else:
        loss, options = divergence_of_beta(theirs["beta"])
        if found.put("beta", "loss", loss) and options:
            found.put("beta", "loss_options", options)
        if script != GKD:  # whose temperature is that of sampling alone
            found.put("temperature", "distill_temperature", theirs["temperature"])
    return found.ours, unused


class _Settings:
    """Settings of ours that are filled in from TRL's.

    Args:
        ours: Those that are given already; changed in place.
        defaults: Our defaults.
        changed: Names of the settings that are not at their default.
    """

    def __init__(self, ours: dict[str, Any], defaults: Mapping[str, Any], changed: Iterable[str]) -> None:
        self.ours, self.defaults, self.changed = ours, defaults, set(changed)

    def put(self, theirs: str, ours: str, value: Any) -> bool:
        """Set `ours` to what TRL's setting says, unless it is given itself; says whether it was set.

        Raises:
            ValueError: Both are given.
        """
        if ours in self.ours and ours in self.changed:
            if theirs in self.changed:
                raise ValueError(f"`{ours}` is set twice: by itself, and as `{theirs}`, TRL's name. Leave one out.")
            return False
        self.ours[ours] = value
        return True


def _default(field: Field) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _data(found: _Settings, script: str) -> None:
    """Prompts as long as the models take them in TRL's stable trainer; the ends of long texts in the others."""
    found.ours.pop("remove_unused_columns", None)  # columns that are not read are dropped here in any case
    if script == STABLE:
        found.ours["max_length"] = None
        if not found.ours.pop("shuffle_dataset", True):
            found.ours["train_sampling_strategy"] = "sequential"
        return
    found.ours["truncation_mode"] = "keep_end"
    kwargs = dict(found.ours.get("dataset_kwargs") or {})
    if kwargs.pop("skip_prepare_dataset", None):  # scripts for GKD say so, whose collator reads conversations
        found.ours["dataset_kwargs"] = kwargs or None


def _teacher(found: _Settings, theirs: Mapping[str, Any]) -> None:
    """How the teacher is loaded; a revision among the arguments of `from_pretrained` precedes the setting."""
    kwargs = found.ours.get("teacher_model_init_kwargs")
    if kwargs is not None:
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        found.ours["teacher_model_init_kwargs"] = kwargs or None
    if theirs.get("teacher_model_revision") is not None and "revision" not in (kwargs or {}):
        found.put("teacher_model_revision", "teacher_revision", theirs["teacher_model_revision"])


def _writing(found: _Settings, script: str, theirs: Mapping[str, Any]) -> None:
    """Who writes the texts, and how tokens are drawn."""
    if found.ours.get("on_policy") is None:
        found.ours["on_policy"] = "gkd"
    found.put("lmbda", "on_policy_share", theirs.get("lmbda", 1.0))
    found.put("seq_kd", "teacher_writes", theirs.get("seq_kd", False))
    if script != GKD:  # which has `max_new_tokens` itself
        if theirs["max_completion_length"] is None:
            raise ValueError("`max_completion_length` is None, but texts need a limit. Give the most tokens of one.")
        found.put("max_completion_length", "max_new_tokens", theirs["max_completion_length"])
    found.put("temperature", "sampling_temperature", theirs["temperature"])
    options = {name: theirs[name] for name, neutral in GENERATION.items() if theirs.get(name) not in neutral}
    more = theirs.get("generation_kwargs")
    options |= json.loads(more) if isinstance(more, str) else more or {}
    options |= found.ours.get("generation_options") or {}
    found.ours["generation_options"] = {
        name: value for name, value in options.items() if name not in GENERATION or value not in GENERATION[name]
    }
    if theirs.get("log_completions"):
        shown = theirs.get("num_completions_to_print")
        found.put("log_completions", "log_rollouts", ALL_TEXTS if shown is None else shown)


def _cross_tokenizer(found: _Settings, theirs: Mapping[str, Any]) -> None:
    """GOLD's loss with a teacher of another tokenizer: `uld`, or `gold` where tokens that both have are compared."""
    temperatures = theirs["uld_student_temperature"], theirs["uld_teacher_temperature"]
    if temperatures[0] != temperatures[1]:
        raise ValueError(
            f"`uld_student_temperature` is {temperatures[0]} and `uld_teacher_temperature` {temperatures[1]}, but one "
            "temperature divides the logits of both models here. Set both to the same."
        )
    found.put("uld_student_temperature", "distill_temperature", temperatures[0])
    found.put("uld_crossentropy_weight", "ce_weight", theirs["uld_crossentropy_weight"])
    weight = theirs["uld_distillation_weight"]
    options: dict[str, Any] = {}
    if theirs["uld_use_hybrid_loss"]:
        beta, matched, others = (
            theirs[name] for name in ("beta", "uld_hybrid_matched_weight", "uld_hybrid_unmatched_weight")
        )
        if not 0 < beta < 1:
            raise ValueError(
                f"`beta` is {beta}, but `uld_use_hybrid_loss` compares the tokens that both vocabularies have by a "
                "Jensen-Shannon divergence, whose `beta` lies strictly between 0 and 1."
            )
        options = {"beta": float(beta), "matched_weight": None}
        if matched is not None:
            if not matched + others > 0:
                raise ValueError("`uld_hybrid_matched_weight` and `uld_hybrid_unmatched_weight` are both 0.")
            options["matched_weight"] = matched / (matched + others)
            weight *= matched + others
    found.put("uld_distillation_weight", "kd_weight", weight)
    if found.put("use_uld_loss", "loss", "gold" if options else "uld") and options:
        found.put("uld_use_hybrid_loss", "loss_options", options)


def divergence_of_beta(beta: float) -> tuple[str, dict[str, Any]]:
    """The divergence that TRL's `beta` chooses, with its options: 0 is forward KL, 1 reverse KL, between them JSD.

    Raises:
        ValueError: `beta` is not between 0 and 1.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"`beta` has to lie between 0 and 1, got {beta}.")
    ends = {0: "forward_kl", 1: "reverse_kl"}
    return (ends[int(beta)], {}) if beta in ends else ("generalized_jsd", {"beta": float(beta)})
