"""Membership attacks: `(subject, rows, references, **options)` -> a score of each row, higher for "not trained on"."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

from hf_transfer_ext.evals.audit.membership.adversarial_query import adversarial_query
from hf_transfer_ext.evals.audit.membership.label_only import label_only
from hf_transfer_ext.registry import Registry


def check_membership_attack(attack: Any) -> None:
    """Refuse a function that cannot be called as a membership attack.

    Raises:
        ValueError: It does not take (subject, rows, references).
    """
    parameters = list(signature(attack).parameters)[:3]
    if parameters != ["subject", "rows", "references"]:
        raise ValueError(
            f"A membership attack must take (subject, rows, references), but {attack.__name__} takes "
            f"({', '.join(parameters)})."
        )


#: In addition, every metric that is a membership score (`MEMBERSHIP_METRICS`) can be used by name.
MEMBERSHIP_ATTACKS: Registry[Callable] = Registry(
    "membership attack", [label_only, adversarial_query], check=check_membership_attack
)

MEMBERSHIP_METRICS = ("loss_attack", "zlib_attack", "min_k", "min_k_plus_plus", "gradient_norm", "reference_attack")
