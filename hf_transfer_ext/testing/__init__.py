"""Contract checks that code outside the package can hold its own methods to, as scikit-learn's `check_estimator` does.

Each check raises an `AssertionError` that names the broken promise. The package's own tests run the same checks on
every registered method.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

#: check -> module that defines it; imported when first used.
_CHECKS = {
    "check_divergence": "hf_transfer_ext.testing.divergence",
    "check_merge_method": "hf_transfer_ext.testing.merge_method",
    "check_metric": "hf_transfer_ext.testing.metric",
    "check_unlearning_loss": "hf_transfer_ext.testing.unlearning_loss",
}

__all__ = ["check_divergence", "check_merge_method", "check_metric", "check_unlearning_loss"]


def __getattr__(name: str) -> Any:
    if name in _CHECKS:
        return getattr(import_module(_CHECKS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
