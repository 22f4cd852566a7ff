from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from hf_transfer_ext.losses.vectors import squared_error
from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.models.heads import causal_lm_of
from hf_transfer_ext.tensors import IGNORE_INDEX
from hf_transfer_ext.trainers.class_losses import (
    MULTI,
    REGRESSION,
    SINGLE,
    LabelReader,
    class_losses,
    head_loading,
    label_names,
    names_in,
    problem_of,
    teacher_places,
)
from hf_transfer_ext.trainers.distillation_task import DistillationTask, TaskLoss
from hf_transfer_ext.trainers.task_metrics import kl_of, label_counts, macro_f1, measured, ratio, row_spearman


class sequence_classification(DistillationTask):
    r"""Classify texts, or pairs of texts: a divergence between the label distributions of student and teacher.

    .. math:: L = \text{kd\_weight} \, D(p_T, q_S) + \text{ce\_weight} \, CE(y, q_S), \quad \text{a mean over texts}

    Rows have `text`, perhaps `text_pair`, and perhaps `label`: a name or an id; a list of names (an empty one where
    none applies), or of 0 and 1, of a model with several labels at once; a number of a regression. Rows without a
    label learn from the teacher alone.
    Labels of both models meet by name. The teacher may have another tokenizer. Several labels at once are a yes or no
    each, averaged over the labels; a regression needs `loss: squared_error`, which also compares logits of classes.

    When to use it: a classifier that is too slow, and texts as it will read them, with labels or without.

    Source: Hinton et al. 2015, https://arxiv.org/abs/1503.02531; logits by squares: Ba and Caruana 2014,
    https://arxiv.org/abs/1312.6184
    """

    may_have: ClassVar[tuple[str, ...]] = ("text_pair", "label")
    own_losses: ClassVar[Mapping[str, Any]] = {"squared_error": squared_error}

    def __init__(self, args: Any, student: Any, teacher: Any, tokenizer: Any, teacher_tokenizer: Any = None) -> None:
        super().__init__(args, student, teacher, tokenizer, teacher_tokenizer)
        config = causal_lm_of(student).config
        self.problem, self.names = problem_of(config), label_names(config)
        self.labels = LabelReader(config, "label")
        self.lists_numbers = False  # else an empty list is a text to which no label applies
        self.places = None if teacher is None else teacher_places(config, causal_lm_of(teacher).config)
        if self.problem == REGRESSION and teacher is not None and self.loss is not squared_error:
            raise ValueError(
                f"`loss` is {args.loss}, but a regression has no probabilities. Set `loss: squared_error`, or "
                "`problem_type` in the config of a classifier."
            )

    @classmethod
    def loading(cls, name: Any, revision: str | None = None, *, like: Any = None, data: Any = None) -> dict[str, Any]:
        head = head_loading(name, revision, cls.kind().suffix, "label", like, data)
        return super().loading(name, revision) | head

    def facts(self) -> dict[str, Any]:
        return {"labels": self.names}

    def read_features(self, features: Mapping[str, Any]) -> None:
        if self.problem != REGRESSION:
            self.labels.read_names(names_in(features.get("label")))
        inner = getattr(getattr(features.get("label"), "feature", None), "dtype", "string")
        self.lists_numbers = inner not in ("string", "large_string", "null")

    def row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        texts = [row["text"]] + ([row["text_pair"]] if row.get("text_pair") is not None else [])
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"Column 'text' has to hold text, got {str(texts)[:80]}.")
        return {**self.encoded(*texts), "labels": self._label(row.get("label"))}

    def _label(self, value: Any) -> Any:
        if self.problem == REGRESSION:
            return float("nan") if value is None else float(value)
        if self.problem == SINGLE:
            return self.labels.id_of(value)
        if value is None:
            return [float("nan")] * len(self.names)
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"Column 'label' of a model with several labels has to hold lists, got {value!r}.")
        if any(isinstance(one, str) for one in value) or (not value and not self.lists_numbers):
            chosen = {self.labels.id_of(one) for one in value}
            return [float(place in chosen) for place in range(len(self.names))]
        if len(value) != len(self.names) or any(one not in (0, 1) for one in value):
            raise ValueError(
                f"Column 'label' has to hold names of labels, or 0 and 1 for each of {', '.join(self.names)}; got "
                f"{value!r}."
            )
        return [float(one) for one in value]

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return {**self.padded(rows), "labels": torch.tensor([row["labels"] for row in rows])}

    def losses(self, model: Any, teacher: Any, batch: Mapping[str, Tensor], weight: Tensor) -> TaskLoss:
        theirs = self.taught(model, teacher, batch)
        with self.viewed("student", model):
            outputs = model(**self.inputs(model, batch))
        logits, labels = outputs.logits, batch["labels"]
        reference = None if theirs is None else self._in_order(theirs.logits).to(logits.device)
        found = class_losses(logits, reference, labels, weight, self.problem, self.loss, self.args)
        sums = {"kd": found.kd.sum(), "ce": found.ce.sum()}
        if self.problem == SINGLE:
            chosen = logits.detach().argmax(-1)
            sums |= {"correct": (chosen == labels).sum(), "labelled": (labels != IGNORE_INDEX).sum()}
            if reference is not None:
                sums["agrees"] = (chosen == reference.argmax(-1)).sum()
        return TaskLoss(found.loss, outputs, sums)

    def _in_order(self, logits: Tensor) -> Tensor:
        assert self.places is not None
        return logits.detach()[:, self.places.to(logits.device)]

    def measure(
        self, model: Any, rows: Any, reference: Any = None, *, batch_size: int = 16, dataset: str | None = None
    ) -> list[Measurement]:
        """Accuracy and F1 (of a regression, rank correlation and squared error), KL and agreement with a reference."""
        own, other, labels = [], [], []
        for batch in self.batches(model, rows, batch_size):
            own.append(model(**self.inputs(model, batch)).logits.float().cpu())
            if reference is not None:
                other.append(self._in_order(self.taught(model, reference, batch).logits).float().cpu())
            labels.append(batch["labels"].cpu())
        logits, wanted = torch.cat(own), torch.cat(labels)
        theirs = torch.cat(other) if other else None
        measures = {SINGLE: self._classes, MULTI: self._several, REGRESSION: self._numbers}[self.problem]
        return measures(logits, theirs, wanted, dataset)

    def _classes(self, logits: Tensor, theirs: Tensor | None, labels: Tensor, dataset: str | None) -> Any:
        chosen, known = logits.argmax(-1), labels != IGNORE_INDEX
        count, ones = int(known.sum()), np.ones(len(chosen))
        found = ratio("accuracy", (chosen == labels).numpy(), known.numpy(), dataset)
        counts = label_counts(chosen[known], labels[known], torch.arange(count), count, logits.shape[1])
        found += measured("macro_f1", macro_f1, counts, "share", True, count, dataset)
        if theirs is not None:
            found += ratio("teacher_agreement", (chosen == theirs.argmax(-1)).numpy(), ones, dataset)
            kl = kl_of(theirs, logits).numpy()
            found += ratio("kl_to_teacher", kl, ones, dataset, unit="nats per text", higher_is_better=False)
        return found

    def _several(self, logits: Tensor, theirs: Tensor | None, labels: Tensor, dataset: str | None) -> Any:
        chosen, known = (logits > 0).long(), ~labels.isnan().any(1)
        found = ratio("exact_match", (chosen == labels).all(1).numpy(), known.numpy(), dataset)
        own, wanted = chosen[known], labels[known].long()
        counts = [(own * wanted).numpy(), (own + wanted).numpy()]
        found += measured("macro_f1", macro_f1, counts, "share", True, len(own), dataset)
        if theirs is not None:
            same = (chosen == (theirs > 0).long()).all(1)
            found += ratio("teacher_agreement", same.numpy(), np.ones(len(same)), dataset)
        return found

    def _numbers(self, logits: Tensor, theirs: Tensor | None, labels: Tensor, dataset: str | None) -> Any:
        found, values = [], logits[:, 0]
        sides = {"": labels.flatten()} | ({} if theirs is None else {"_to_teacher": theirs[:, 0]})
        for name, wanted in sides.items():
            known = ~wanted.isnan()
            if int(known.sum()) > 1:
                one, two = values[known], wanted[known]
                errors, ones = (one - two).square().numpy(), np.ones(len(one))
                found += ratio(f"squared_error{name}", errors, ones, dataset, unit="square", higher_is_better=False)
                found += row_spearman(f"spearman{name}", one, two, dataset)
        return found
