"""Distill, transfer, merge and unlearn language models on the Hugging Face stack.

Names are imported when they are first used, so that `import hf_transfer_ext` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from hf_transfer_ext.moved import install as _install_old_names

_install_old_names()

__version__ = "0.1.0"

#: public name -> module that defines it
_EXPORTS: dict[str, str] = {
    "DistillationConfig": "hf_transfer_ext.trainers.distillation_config",
    "DistillationTrainer": "hf_transfer_ext.trainers.distillation",
    "GKDConfig": "hf_transfer_ext.trl",
    "GKDTrainer": "hf_transfer_ext.trl",
    "GOLDConfig": "hf_transfer_ext.trl",
    "GOLDTrainer": "hf_transfer_ext.trl",
    "TaskDistillationTrainer": "hf_transfer_ext.trainers.task_distillation",
    "TransferConfig": "hf_transfer_ext.adapters.transfer.trainer",
    "TransferTrainer": "hf_transfer_ext.adapters.transfer.trainer",
    "UnlearningConfig": "hf_transfer_ext.trainers.unlearning",
    "UnlearningCurve": "hf_transfer_ext.evals.unlearning_curve",
    "UnlearningTrainer": "hf_transfer_ext.trainers.unlearning",
    "audit": "hf_transfer_ext.evals.audit.run",
    "evaluate": "hf_transfer_ext.evals.engine.evaluate",
    "extract_lora": "hf_transfer_ext.adapters.extract",
    "merge": "hf_transfer_ext.merging.run",
    "model_card": "hf_transfer_ext.hub.card",
    "pull": "hf_transfer_ext.hub.publish",
    "push": "hf_transfer_ext.hub.publish",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    from difflib import get_close_matches

    near = get_close_matches(name, _EXPORTS, n=1, cutoff=0.6)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}.{hint}")


def __dir__() -> list[str]:
    return sorted([*_EXPORTS, "__version__"])
