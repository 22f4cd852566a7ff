"""The numbers of a configuration, checked before anything is computed from them: one rule for all of its fields."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from hf_transfer_ext.losses.distillation import DISTILLATION_LOSSES
from hf_transfer_ext.losses.hidden import HIDDEN_LOSSES
from hf_transfer_ext.losses.spans import SPAN_LOSSES
from hf_transfer_ext.registry import Registry
from hf_transfer_ext.settings import require_numbers
from hf_transfer_ext.teachers.cache import CacheSpec
from hf_transfer_ext.teachers.server import ServerTeacher
from hf_transfer_ext.trainers.on_policy import ON_POLICY_METHODS

#: Setting -> values that are not finite numbers, and mean something to transformers.
_TAKEN = {"max_grad_norm": (None, math.inf)}  # no clipping
#: Mapping of options -> (the setting that names their owner, where that name is looked up).
_OWNERS: dict[str, tuple[str, tuple[Registry, ...]]] = {
    "loss_options": ("loss", (DISTILLATION_LOSSES, SPAN_LOSSES)),
    "hidden_options": ("hidden_loss", (HIDDEN_LOSSES,)),
    "on_policy_options": ("on_policy", (ON_POLICY_METHODS,)),
}
#: Mapping of options that always have the same owner.
_FIXED_OWNERS: dict[str, Callable] = {"teacher_cache_options": CacheSpec, "teacher_server_options": ServerTeacher}


def check_numbers(config: Any) -> None:
    """Refuse fields that are numbers by their annotation, own or inherited, and hold something else.

    Raises:
        ValueError: With the field, what was needed and what arrived.
    """
    for name, value in require_numbers(vars(config), type(config), taken=_TAKEN).items():
        setattr(config, name, value)


def check_option_numbers(config: Any) -> None:
    """The same for the options of losses, methods, caches and servers; unknown names are refused elsewhere.

    Raises:
        ValueError: With the option, what was needed and what arrived.
    """
    owners = {
        options: registry[getattr(config, setting)]
        for options, (setting, registries) in _OWNERS.items()
        for registry in registries
        if getattr(config, setting) in registry
    } | _FIXED_OWNERS
    for options, owner in owners.items():
        given = getattr(config, options)
        if not isinstance(given, Mapping):
            continue
        try:
            setattr(config, options, {**given, **require_numbers(given, owner)})
        except ValueError as error:
            raise ValueError(f"In `{options}`: {error}") from None
