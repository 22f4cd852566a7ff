"""Modules of version 0.1 under their old names: importing one gives the module that took its place, and a warning."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType
from typing import Any

#: old module -> new module, below this package.
MOVED = {
    "adapters.factors": "weights.lora",
    "adapters.servable": "hub.servable",
    "checkpoints": "weights.checkpoints",
    "evals.audit.audit": "evals.audit.run",
    "evals.audit.membership.references": "evals.audit.references",
    "evals.audit.membership.scores": "evals.audit.membership_scores",
    "evals.bootstrap": "measurement.bootstrap",
    "evals.cache": "evals.engine.cache",
    "evals.measurement": "measurement",
    "evals.models": "evals.adapters",
    "evals.report": "evals.audit.report.html",
    "evals.scoring": "models.scoring",
    "evals.stemming": "evals.text.stemming",
    "evals.suites.forget_retain": "evals.forget_retain",
    "evals.text_models": "evals.text.text_models",
    "heads": "models.heads",
    "hub.repository": "weights.repository",
    "loading": "models.loading",
    "losses.unlearning.asks": "losses.needs",
    "merging.adapter": "merging.streaming.as_lora",
    "merging.chat_templates": "merging.planning.chat_templates",
    "merging.compatibility": "merging.planning.compatibility",
    "merging.devices": "weights.devices",
    "merging.inputs": "weights.opened",
    "merging.kernels": "merging.arithmetic.kernels",
    "merging.layout": "merging.planning.layout",
    "merging.plan": "merging.planning.config",
    "merging.ranks": "weights.ranks",
    "merging.resume": "weights.resume",
    "merging.stream": "merging.streaming.stream",
    "merging.vocabulary": "merging.planning.vocabulary",
    "merging.whole_model": "merging.streaming.whole_model",
    "teachers.taught": "trainers.taught",
}


class MovedModules(MetaPathFinder, Loader):
    """Finds the old names of `MOVED`, after every other finder has failed."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return spec_from_loader(fullname, self) if package == __package__ and name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        new = f"{__package__}.{MOVED[old.partition('.')[2]]}"
        warnings.warn(f"{old} is now {new}; the old name goes away in version 0.3.", DeprecationWarning, stacklevel=2)
        sys.modules[old] = import_module(new)


def install() -> None:
    """Make the old names importable; calling it again changes nothing."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(MovedModules())
