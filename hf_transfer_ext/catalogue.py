"""The catalogue of all methods, from their registries and docstrings: `hf-transfer-ext methods`, `docs/methods.md`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from textwrap import shorten
from typing import Any

from hf_transfer_ext.registry import unknown_name
from hf_transfer_ext.settings import arguments_for

#: Title -> (module, registry in it), or name -> (module, what stands for it there).
CATALOGUE: dict[str, tuple[str, str] | dict[str, tuple[str, str]]] = {
    "Tasks of distillation": ("hf_transfer_ext.trainers.tasks", "TASKS"),
    "Distillation losses": ("hf_transfer_ext.losses.distillation", "DISTILLATION_LOSSES"),
    "On-policy distillation": ("hf_transfer_ext.trainers.on_policy", "ON_POLICY_METHODS"),
    "Losses across tokenizers": ("hf_transfer_ext.losses.spans", "SPAN_LOSSES"),
    "Losses inside the network": ("hf_transfer_ext.losses.hidden", "HIDDEN_LOSSES"),
    "Layer maps": ("hf_transfer_ext.losses.layer_map", "LAYER_MAP_FORMS"),
    "Losses between vectors": ("hf_transfer_ext.losses.vectors", "VECTOR_LOSSES"),
    "Teachers": ("hf_transfer_ext.teachers.combinations", "TEACHER_KINDS"),
    "Teachers combined": ("hf_transfer_ext.teachers.combinations", "COMBINED_TEACHERS"),
    "Kinds of teacher caches": ("hf_transfer_ext.teachers.cache_kinds", "CACHE_KINDS"),
    "Parts of distillation methods": {
        "trust_region": ("hf_transfer_ext.teachers.sampled", "within_trust_region"),
        "prototypes": ("hf_transfer_ext.losses.prototypes", "Prototypes"),
        "prototype_alignment": ("hf_transfer_ext.losses.prototypes", "prototype_alignment"),
    },
    "Student initializations": ("hf_transfer_ext.students", "STUDENT_INITS"),
    "Merge methods": ("hf_transfer_ext.merging.methods", "MERGE_METHODS"),
    "Transfer methods of adapters": ("hf_transfer_ext.adapters.transfer.methods", "TRANSFER_METHODS"),
    "Transfer by training": ("hf_transfer_ext.adapters.transfer.trained", "TRAINED_TRANSFERS"),
    "Unlearning methods": ("hf_transfer_ext.losses.unlearning.methods", "METHODS"),
    "Unlearning losses": ("hf_transfer_ext.losses.unlearning", "UNLEARNING_LOSSES"),
    "Retain losses": ("hf_transfer_ext.losses.unlearning", "RETAIN_LOSSES"),
    "Choices of a forget set": ("hf_transfer_ext.data.selection", "SELECTIONS"),
    "Edits": ("hf_transfer_ext.edits.methods", "EDITS"),
    "Unlearning baselines": ("hf_transfer_ext.evals.baselines", "BASELINES"),
    "Metrics": ("hf_transfer_ext.evals.metrics", "METRICS"),
    "Comparisons of measured models": ("hf_transfer_ext.evals.metrics", "COMPARISONS"),
    "Suites": ("hf_transfer_ext.evals.suites", "SUITES"),
    "Attacks": ("hf_transfer_ext.evals.audit.attacks", "ATTACKS"),
    "Membership attacks": ("hf_transfer_ext.evals.audit.membership", "MEMBERSHIP_ATTACKS"),
}


def registries() -> dict[str, Mapping[str, Any]]:
    """Title -> name -> method."""

    def found(place: tuple[str, str]) -> Any:
        return getattr(import_module(place[0]), place[1])

    return {
        title: {name: found(place) for name, place in listed.items()}
        if isinstance(listed, dict)
        else dict(found(listed).items())
        for title, listed in CATALOGUE.items()
    }


def summary(method: Any) -> str:
    """The first sentence of a method's docstring, in one line; a published combination lists its parts."""
    if not callable(method):
        parts = {name: value for name, value in vars(method).items() if value not in (None, {})}
        return ", ".join(f"{name}: {value}" for name, value in parts.items())
    paragraph = (inspect.getdoc(method) or "").split("\n\n")[0]
    return " ".join(paragraph.split())


def when_to_use(method: Any) -> str:
    """What a method's docstring says after "When to use it:", in one line; empty if it does not say."""
    text = inspect.getdoc(method) or "" if callable(method) else ""
    _, _, rest = text.partition("When to use it: ")
    sentence = " ".join(rest.split("\n\n")[0].split())
    return sentence[:1].upper() + sentence[1:]


def explained(name: str) -> str:
    """Everything that is written about the methods of this name, or of this name in Python (`ServerTeacher`).

    Raises:
        ValueError: There is none.
    """
    found = [
        (title, method)
        for title, methods in registries().items()
        for own, method in methods.items()
        if name in (own, getattr(method, "__name__", None))
    ]
    if not found:
        known = {name for methods in registries().values() for name in methods}
        raise ValueError(unknown_name("method", name, known))
    parts = []
    for title, method in found:
        text = inspect.getdoc(method) if callable(method) else summary(method)
        module = getattr(method, "__module__", "")
        parts.append(f"{name} ({title})\n\n{text}" + (f"\n\nDefined in {module}." if callable(method) else ""))
    return "\n\n---\n\n".join(parts)


def as_markdown() -> str:
    """The text of `docs/methods.md`."""
    lines = ["# Methods", "", "Generated by `python -m hf_transfer_ext methods --markdown > docs/methods.md`."]
    for title, methods in registries().items():
        columns = {
            "name": [f"`{name}`" for name in methods],
            "what it does": [summary(one) for one in methods.values()],
        }
        uses = [when_to_use(one) for one in methods.values()]
        if any(uses):
            columns["when to use it"] = uses
        lines += ["", f"## {title}", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        for row in zip(*columns.values(), strict=True):
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |")
    return "\n".join(lines) + "\n"


def methods(name: str | None = None, *, markdown: bool = False) -> str:
    """List all methods, or explain one.

    Args:
        name: One method.
        markdown: The list as Markdown.
    """
    if name is not None:
        return explained(name)
    if markdown:
        return as_markdown().rstrip("\n")
    lines = []
    for title, found in registries().items():
        width = max(len(one) for one in found)
        lines += [
            f"{title}:",
            *(f"  {one:<{width}}  {shorten(summary(m), 100, placeholder=' ...')}" for one, m in found.items()),
            "",
        ]
    return "\n".join([*lines, "`hf-transfer-ext methods NAME` explains one."])


def main(argv: list[str] | None = None) -> int:
    about = "List the methods of this package, or explain one."
    print(methods(**arguments_for(methods, argv, program="hf-transfer-ext methods", about=about)))
    return 0
