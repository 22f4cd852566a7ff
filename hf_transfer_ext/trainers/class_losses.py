"""Losses and labels of classifiers, of texts or of words: labels meet by their names, divergences by the fused core.

Several labels at once are a yes or no for each: the divergence is taken over these two outcomes, and averaged over the
labels, so that every divergence of language models is one of theirs, too.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hf_transfer_ext.losses.distillation import forward_kl
from hf_transfer_ext.losses.fused import divergence_of_logits
from hf_transfer_ext.losses.vectors import squared_error
from hf_transfer_ext.reading import read_json
from hf_transfer_ext.registry import unknown_name
from hf_transfer_ext.tensors import IGNORE_INDEX
from hf_transfer_ext.weights.repository import base_of_adapter, file_of

logger = logging.getLogger(__name__)

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
#: Names that transformers gives where nobody named the labels.
_PLACEHOLDER = re.compile(r"LABEL_\d+")


class ClassLosses(NamedTuple):
    """loss: Sum over rows of weight * (kd_weight * divergence + ce_weight * loss of the label); carries the gradient.

    kd: The divergence of each row, without weight and gradient.
    ce: The loss of each row's label, without weight and gradient; 0 where it has none.
    """

    loss: Float[Tensor, ""]
    kd: Float[Tensor, " rows"]
    ce: Float[Tensor, " rows"]


def class_losses(
    student_logits: Float[Tensor, "rows classes"],
    teacher_logits: Float[Tensor, "rows classes"] | None,
    labels: Int[Tensor, " rows"] | Float[Tensor, "rows classes"] | Float[Tensor, " rows"],
    weight: Float[Tensor, ""],
    problem: str,
    loss: Any,
    args: Any,
) -> ClassLosses:
    """The distillation loss and the loss of the labels, for some texts or words.

    Args:
        teacher_logits: In the order of the student's labels; None for plain fine-tuning.
        labels: Ids; of several labels at once 0 or 1 for each; of a regression a number. IGNORE_INDEX, or NaN, for a
            row without a label.
        weight: Of each row.
        problem: `problem_type` in the config of transformers.
        loss: A divergence, or `squared_error` between the logits (`losses.vectors`).
        args: A `DistillationConfig`.
    """
    kd_weight = 0.0 if teacher_logits is None else args.kd_weight
    if loss is squared_error:
        return _squared(student_logits, teacher_logits, labels, weight, problem, args, kd_weight)
    classes = student_logits.shape[1]
    if problem == MULTI:
        student_logits, labels = _yes_or_no(student_logits), labels.flatten()
        teacher_logits = None if teacher_logits is None else _yes_or_no(teacher_logits)
        weight = weight / classes
    labelled = _is_label(labels)
    found = divergence_of_logits(
        student_logits,
        teacher_logits,
        loss,
        weights=weight.expand(len(student_logits)),
        labels=torch.where(labelled, labels, 0).long(),
        kd_weight=kd_weight,
        ce_weight=args.ce_weight,
        temperature=args.distill_temperature,
        ce_factors=labelled.float(),
        **args.loss_options,
    )
    kd, ce = found.divergence, torch.where(labelled.to(found.cross_entropy.device), found.cross_entropy, 0.0)
    if problem == MULTI:
        kd, ce = kd.view(-1, classes).mean(1), ce.view(-1, classes).mean(1)
    return ClassLosses(found.loss, kd, ce)


def _squared(
    student: Tensor, teacher: Tensor | None, labels: Tensor, weight: Tensor, problem: str, args: Any, kd_weight: float
) -> ClassLosses:  # fmt: skip
    """Squared differences of the logits; of a regression, of its prediction and the label as well."""
    kd = student.new_zeros(len(student)) if teacher is None else squared_error(student[None], teacher[None])
    if problem == REGRESSION:
        label = labels.view(len(student), -1).to(student)
        known = _is_label(label)
        ce = torch.where(known, student - torch.where(known, label, 0.0), 0.0).square().sum(1)
        total = (weight * (kd_weight * kd + args.ce_weight * ce)).sum()
        return ClassLosses(total, kd.detach(), ce.detach())
    plain = _of_labels(student, labels, weight, problem, args)
    return ClassLosses(plain.loss + (weight * kd_weight * kd).sum(), kd.detach(), plain.ce)


def _of_labels(student: Tensor, labels: Tensor, weight: Tensor, problem: str, args: Any) -> ClassLosses:
    """The loss of the labels alone, whatever the divergence and its options."""
    alone = copy.copy(args)
    alone.loss_options = {}
    return class_losses(student, None, labels, weight, problem, forward_kl, alone)


def _yes_or_no(logits: Float[Tensor, "rows classes"]) -> Float[Tensor, "outcomes 2"]:
    """Each label's logit as the logits of no and yes."""
    return torch.stack([torch.zeros_like(logits), logits], -1).flatten(0, 1)


def _is_label(labels: Tensor) -> Tensor:
    return ~torch.isnan(labels) if labels.is_floating_point() else labels != IGNORE_INDEX


def problem_of(config: Any) -> str:
    """The kind of classification that a config states; one label alone is a regression, as in transformers."""
    return config.problem_type or (REGRESSION if config.num_labels == 1 else SINGLE)


def label_names(config: Any) -> list[str]:
    """The names of a classifier's labels in the order of its logits."""
    return [config.id2label[place] for place in range(config.num_labels)]


def are_named(names: Sequence[str]) -> bool:
    """Whether labels have names of their own, other than LABEL_0, LABEL_1, ..."""
    return not all(_PLACEHOLDER.fullmatch(name) for name in names)


def teacher_places(student: Any, teacher: Any) -> Int[Tensor, " classes"]:
    """For each of the student's labels, the place of the teacher's logit for the label of that name.

    Args:
        student: The student's config.
        teacher: The teacher's config.

    Raises:
        ValueError: The models are of different kinds, or have different labels.
    """
    problems = problem_of(student), problem_of(teacher)
    own, other = label_names(student), label_names(teacher)
    if problems[0] != problems[1]:
        raise ValueError(
            f"The student is a model of {problems[0]} and the teacher of {problems[1]}. Set `problem_type` in the "
            "student's config to that of the teacher."
        )
    if set(own) == set(other) and len(own) == len(other):
        return torch.tensor([other.index(name) for name in own])
    missing = [name for name in own if name not in other] or [name for name in other if name not in own]
    raise ValueError(
        f"Student and teacher have to know the same labels by name, but {len(own)} and {len(other)} labels differ, "
        f"for example in {missing[0]!r}: student {', '.join(own[:8])}; teacher {', '.join(other[:8])}. Load the "
        "student with `id2label=teacher.config.id2label, label2id=teacher.config.label2id`."
    )


class LabelReader:
    """Labels of the data as ids of the student: by name, or as ids; names of a `ClassLabel` are matched by name.

    Args:
        config: The student's.
        column: Where the labels are, for messages.
    """

    def __init__(self, config: Any, column: str) -> None:
        self.names, self.column = label_names(config), column
        self.ids = {name: place for place, name in enumerate(self.names)}
        self.of_data: list[str] | None = None

    def read_names(self, names: Sequence[str] | None) -> None:
        """Names that the data set itself gives to its integers.

        Raises:
            ValueError: The model does not know one of them.
        """
        if names is None:
            return
        if are_named(self.names):
            for name in names:
                self.id_of(name)
            self.of_data = list(names)
        else:
            logger.warning(
                "The model's labels have no names; those of the data (%s) are taken in their order. Set `id2label` "
                "and `label2id` in the config to name them.",
                ", ".join(map(str, names)),
            )
            if len(names) != len(self.names):
                raise ValueError(f"The data have {len(names)} labels, the model has {len(self.names)}.")

    def id_of(self, value: Any) -> int:
        """The id of a label; IGNORE_INDEX for None and negative numbers.

        Raises:
            ValueError: The model has no such label.
        """
        if value is None or (isinstance(value, int) and value < 0):
            return IGNORE_INDEX
        if isinstance(value, str):
            if value not in self.ids:
                raise ValueError(f"{unknown_name(f'label in the column {self.column!r}', value, self.ids)}")
            return self.ids[value]
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or value >= len(self.of_data or self.names):
            raise ValueError(
                f"Column {self.column!r} has to hold names of labels or ids from 0 to {len(self.names) - 1}, got "
                f"{value!r}."
            )
        return self.ids[self.of_data[value]] if self.of_data is not None else value


def head_loading(name: Any, revision: str | None, suffix: str, column: str, like: Any, data: Any) -> dict[str, Any]:
    """Arguments of loading that give a checkpoint without an output layer one for the labels of a model, or of data.

    Args:
        name: Folder or Hub id.
        suffix: How the classes that have such a layer end.
        column: Of the labels in the data.
        like: Config of a model with labels; None to take those of the data.
        data: Rows, or None.

    Raises:
        ValueError: The data do not name their labels.
    """
    adapter = file_of(name, "adapter_config.json", revision=revision)
    if adapter is not None:
        name, revision = base_of_adapter(adapter)
    path = file_of(name, "config.json", revision=revision)
    known = [] if path is None else read_json(path).get("architectures") or []
    if any(str(one).endswith(suffix) for one in known):
        return {}
    labels = label_names(like) if like is not None else None if data is None else labels_of(data, column)
    if labels is None:
        return {}
    problem = None if like is None else like.problem_type
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: place for place, label in enumerate(labels)},
        **({} if problem is None else {"problem_type": problem}),
    }


def labels_of(data: Any, column: str) -> list[str]:
    """The names of the labels in a data set: those of its type, or all strings in the column, sorted.

    Raises:
        ValueError: It has no such names.
    """
    names = names_in((getattr(data, "features", None) or {}).get(column))
    if names is not None:
        return names
    found: set[str] = set()
    for row in data:
        value = row.get(column)
        values = value if isinstance(value, (list, tuple)) else [value]
        if not all(one is None or isinstance(one, str) for one in values):
            raise ValueError(
                f"Column {column!r} holds {values[0]!r}, which does not name its label. A model without an output "
                "layer needs the names of its labels: write them into the data, or load a model that has the layer."
            )
        found |= {one for one in values if one is not None}
    return sorted(found)


def names_in(feature: Any) -> list[str] | None:
    """The names in a feature of `datasets`: of a `ClassLabel`, or of a list of them."""
    while hasattr(feature, "feature"):
        feature = feature.feature
    return list(feature.names) if hasattr(feature, "names") else None
