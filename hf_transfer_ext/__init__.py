"""Distil, transfer, merge and unlearn language models on the Hugging Face stack.

Names are imported when they are first used, so that `import hf_transfer_ext` costs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

#: public name -> module that defines it
_EXPORTS: dict[str, str] = {
    "DistillationConfig": "hf_transfer_ext.trainers.distillation",
    "DistillationTrainer": "hf_transfer_ext.trainers.distillation",
    "UnlearningConfig": "hf_transfer_ext.trainers.unlearning",
    "UnlearningTrainer": "hf_transfer_ext.trainers.unlearning",
    "evaluate": "hf_transfer_ext.evals.engine.evaluate",
}

__all__ = ["DistillationConfig", "DistillationTrainer", "UnlearningConfig", "UnlearningTrainer", "evaluate"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
