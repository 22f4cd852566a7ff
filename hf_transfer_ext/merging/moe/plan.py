"""The YAML of a mixture of experts, in the grammar of mergekit-moe, as typed values. Unknown keys are refused.

    base_model: org/attention-and-embeddings
    gate_mode: hidden                     # hidden, hidden_avg, cheap_embed, random or uniform_random
    experts_per_token: 2
    experts:
      - source_model: org/math
        positive_prompts: ["Solve for x:"]
        negative_prompts: ["Write a poem"]
      - source_model: org/poems
        positive_prompts: ["Write a poem"]

Beyond mergekit: `seed` of the random gates and of `noise_scale`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_transfer_ext.merging.planning.config import number, parse_dtype, whole_number, without_anchors, yaml_mapping
from hf_transfer_ext.reading import shown
from hf_transfer_ext.registry import known_keys, unknown_name
from hf_transfer_ext.weights.dtypes import Dtype
from hf_transfer_ext.weights.reference import ModelReference, parse_reference

#: Where the gates come from; `hidden_last` is another name of `hidden`.
GATE_MODES = ("hidden", "hidden_last", "hidden_avg", "cheap_embed", "random", "uniform_random")

#: The modes that need no prompts.
RANDOM_MODES = ("random", "uniform_random")

_TOP_KEYS = (
    "base_model",
    "experts",
    "gate_mode",
    "dtype",
    "experts_per_token",
    "shared_experts",
    "architecture",
    "seed",
)

_EXPERT_KEYS = ("source_model", "positive_prompts", "negative_prompts", "noise_scale", "residual_scale")


@dataclass(frozen=True)
class Expert:
    """A model whose feed-forward layers become one expert of each layer.

    Args:
        positive_prompts: Texts that should reach this expert.
        negative_prompts: Texts that should not.
        noise_scale: Standard deviation of normal noise that is added to its weights, to tell equal experts apart.
        residual_scale: Factor of its output (of its down projection).
    """

    source_model: ModelReference
    positive_prompts: tuple[str, ...] = ()
    negative_prompts: tuple[str, ...] = ()
    noise_scale: float = 0.0
    residual_scale: float = 1.0


@dataclass(frozen=True)
class MoeConfig:
    """A whole configuration.

    Args:
        base_model: Gives everything but the feed-forward layers, and the tokenizer.
        shared_experts: Experts that see every token.
        architecture: Beginning of the name of the architecture to write; None takes the first that fits.
    """

    base_model: ModelReference
    experts: tuple[Expert, ...]
    gate_mode: str = "hidden"
    dtype: Dtype | None = None
    experts_per_token: int = 2
    shared_experts: tuple[Expert, ...] = ()
    architecture: str | None = None
    seed: int = 0

    @property
    def references(self) -> list[ModelReference]:
        """All models, the base first."""
        return list(dict.fromkeys([self.base_model, *(e.source_model for e in (*self.experts, *self.shared_experts))]))


def load_moe_config(config: Mapping[str, Any] | str | Path) -> MoeConfig:
    """Parse a configuration: a mapping, or the path of a YAML file."""
    return parse_moe_config(yaml_mapping(config, "configuration of a mixture", "`base_model` and `experts`"))


def parse_moe_config(content: Any) -> MoeConfig:
    """Check everything that can be checked before a model is opened.

    Raises:
        ValueError: An unknown key, a value out of its range, or prompts that are missing or tell no experts apart.
    """
    content = without_anchors(content)
    known_keys(content, _TOP_KEYS, "the configuration of the mixture")
    mode = content.get("gate_mode", "hidden")
    if mode not in GATE_MODES:
        raise ValueError(f"`gate_mode`: {unknown_name('mode', mode, GATE_MODES)}")
    experts = _experts(content.get("experts"), "experts")
    shared = _experts(content["shared_experts"], "shared_experts") if content.get("shared_experts") else ()
    per_token = whole_number(content.get("experts_per_token", 2), "experts_per_token")
    if per_token is None or not 1 <= per_token <= len(experts):
        raise ValueError(
            f"`experts_per_token` has to be from 1 to {len(experts)}, the number of experts, got {shown(per_token)}."
        )
    seed = whole_number(content.get("seed"), "seed") or 0
    if mode not in RANDOM_MODES:
        _check_prompts(experts, mode)
    architecture = content.get("architecture")
    return MoeConfig(
        base_model=parse_reference(content.get("base_model"), "base_model"),
        experts=experts,
        gate_mode=mode,
        dtype=parse_dtype(content.get("dtype"), "dtype"),
        experts_per_token=per_token,
        shared_experts=shared,
        architecture=str(architecture) if architecture is not None else None,
        seed=seed,
    )


def _experts(value: Any, where: str) -> tuple[Expert, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"`{where}` has to be a list with at least one expert, got {shown(value)}.")
    experts = []
    for i, one in enumerate(value):
        known_keys(one, _EXPERT_KEYS, f"{where}[{i}]")
        experts.append(
            Expert(
                source_model=parse_reference(one.get("source_model"), f"{where}[{i}].source_model"),
                positive_prompts=_prompts(one.get("positive_prompts"), f"{where}[{i}].positive_prompts"),
                negative_prompts=_prompts(one.get("negative_prompts"), f"{where}[{i}].negative_prompts"),
                noise_scale=_number(one.get("noise_scale"), 0.0, f"{where}[{i}].noise_scale"),
                residual_scale=_number(one.get("residual_scale"), 1.0, f"{where}[{i}].residual_scale"),
            )
        )
    return tuple(experts)


def _prompts(value: Any, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
        raise ValueError(f"`{where}` has to be a list of texts, got {shown(value)}.")
    return tuple(value)


def _number(value: Any, default: float, where: str) -> float:
    return default if value is None else float(number(value, where))


def _check_prompts(experts: tuple[Expert, ...], mode: str) -> None:
    for i, expert in enumerate(experts):
        if not expert.positive_prompts:
            raise ValueError(
                f"`experts[{i}]` has no `positive_prompts`, which `gate_mode: {mode}` makes its gate from. Give some, "
                "or choose `gate_mode: random` for a model that will be trained."
            )
    if len(experts) > 1 and len({(one.positive_prompts, one.negative_prompts) for one in experts}) == 1:
        raise ValueError(
            "All experts have the same prompts, so the gate could not tell them apart. Change the prompts."
        )
