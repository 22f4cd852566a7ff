from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from hf_transfer_ext.losses.hidden.hidden_mse import projected
from hf_transfer_ext.losses.ranking import translation_ranking
from hf_transfer_ext.losses.vectors import VECTOR_LOSSES, similarity_mse
from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.models.heads import causal_lm_of
from hf_transfer_ext.registry import unknown_name
from hf_transfer_ext.trainers.distillation_task import DistillationTask, TaskLoss
from hf_transfer_ext.trainers.task_metrics import pair_spearman, ratio, row_spearman

#: In front of the tokens of a pair's second text.
OTHER = "other_"
#: How the states of a text's tokens become its vector.
POOLINGS = ("mean", "cls", "pooler")


class sentence_embedding(DistillationTask):
    r"""Embed texts: vectors, directions or similarities of the student are brought to those of the teacher.

    .. math:: L = \text{kd\_weight} \, D(x_S, x_T) + \text{ce\_weight} \, R(x_S, y_S)

    as a mean over rows. D is one of squared_error, cosine_distance, similarity_mse and lealla (`losses.vectors`);
    where the widths differ, all but similarity_mse train a projection along, which the result does not have. R is a
    translation ranking within the batch, for pairs alone.

    Rows have `text`, and perhaps `other_text`, a translation or paraphrase, and `score`, the similarity of the two
    that people gave, which measurements compare with. The teacher may have another tokenizer.
    `task_options`: `pooling`, mean (of the tokens), cls (the first one) or pooler (the model's own), and
    `teacher_pooling`, by default the same; `margin` and `scale` of the ranking.

    LEALLA is `loss: lealla` with `ce_weight: 1` on pairs of translations, and a thin and deep student.

    When to use it: search and clustering by a smaller model; a student of more languages than its teacher, with the
    teacher's language as one side of each pair.

    Deviation: every text is compared with the teacher's vector of the same text.

    Source: LEALLA, Mao and Nakagawa 2023, https://arxiv.org/abs/2302.08387; Reimers and Gurevych 2020,
    https://arxiv.org/abs/2004.09813
    """

    may_have: ClassVar[tuple[str, ...]] = ("other_text", "score")
    own_losses: ClassVar[Mapping[str, Any]] = dict(VECTOR_LOSSES.items())
    takes_divergences: ClassVar[bool] = False
    options: ClassVar[Mapping[str, Any]] = {"pooling": "mean", "teacher_pooling": None, "margin": 0.3, "scale": 20.0}

    def __init__(self, args: Any, student: Any, teacher: Any, tokenizer: Any, teacher_tokenizer: Any = None) -> None:
        super().__init__(args, student, teacher, tokenizer, teacher_tokenizer)
        self.along = nn.ParameterDict()
        if teacher is None:
            return
        own, other = (causal_lm_of(model).config.hidden_size for model in (student, teacher))
        if own != other and self.loss is not similarity_mse:
            generator = torch.Generator().manual_seed(args.seed)
            self.along["projection"] = nn.Parameter(torch.randn(other, own, generator=generator) / own**0.5)

    @classmethod
    def check(cls, args: Any) -> None:
        super().check(args)
        settings = {**cls.options, **args.task_options}
        for name in ("pooling", "teacher_pooling"):
            if settings[name] not in (*POOLINGS, *([None] if name == "teacher_pooling" else [])):
                raise ValueError(unknown_name(f"{name} of sentence_embedding", settings[name], POOLINGS))
        one = torch.ones(1, 1)
        translation_ranking(one, one, margin=settings["margin"], scale=settings["scale"])  # checks the ranges
        VECTOR_LOSSES[args.loss](one[None], one[None], **args.loss_options)
        for name in ("margin", "scale"):
            if name in args.task_options and not args.ce_weight:
                raise ValueError(f"`{name}` is about the ranking of pairs, which `ce_weight: 0` leaves out.")

    def trained_along(self) -> list[nn.Module]:
        return [self.along] if len(self.along) else []

    # ---- Rows and batches ----

    def row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        texts = [row[name] for name in ("text", "other_text") if name in row]
        if not all(isinstance(text, str) and text for text in texts):
            raise ValueError(f"Columns 'text' and 'other_text' have to hold text, got {str(texts)[:80]}.")
        if len(texts) == 1 and self.args.ce_weight:
            raise ValueError(
                f"`ce_weight` is {self.args.ce_weight}, the weight of the ranking of pairs, but the rows have no "
                "column 'other_text'. Give pairs, or set it to 0."
            )
        found = self.encoded(texts[0])
        if len(texts) == 2:
            found |= {OTHER + name: value for name, value in self.encoded(texts[1]).items()}
        score = row.get("score")
        return {**found, "labels": float("nan") if score is None else float(score)}

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        seconds = [{key.removeprefix(OTHER): v for key, v in row.items() if key.startswith(OTHER)} for row in rows]
        firsts = [{key: v for key, v in row.items() if not key.startswith(OTHER)} for row in rows]
        both = [*firsts, *seconds] if seconds and seconds[0] else firsts
        return {**self.padded(both), "labels": torch.tensor([row["labels"] for row in rows])}

    def items_of_texts(self, batch: Mapping[str, Tensor]) -> Float[Tensor, " texts"]:
        """A row is one item: each of its texts is as much of it."""
        texts = len(batch["input_ids"])
        return torch.full((texts,), len(batch["labels"]) / texts, device=batch["input_ids"].device)

    # ---- Losses ----

    def losses(self, model: Any, teacher: Any, batch: Mapping[str, Tensor], weight: Tensor) -> TaskLoss:
        theirs = self._reference(model, teacher, batch)
        with self.viewed("student", model):
            outputs = model(**self.inputs(model, batch))
        own = self._vectors(outputs, batch)
        total, sums = own.new_zeros(()), {}
        if theirs is not None:
            projection = self.along["projection"] if len(self.along) else None
            values = self.loss(own, theirs.to(own.device), projection, **self.args.loss_options)
            total, sums["kd"] = total + self.args.kd_weight * values.sum(), values.sum()
        if self.args.ce_weight:
            margins = {name: self.settings[name] for name in ("margin", "scale")}
            values = translation_ranking(own[0], own[-1], **margins)
            total, sums["ce"] = total + self.args.ce_weight * values.sum(), values.sum()
        # DDP and FSDP follow all of a model's output to the parameters that made it.
        unused = sum(value[..., :1].sum() for value in outputs.values() if isinstance(value, Tensor))
        return TaskLoss(weight * total + 0.0 * unused, outputs, sums)

    def _reference(self, model: Any, teacher: Any, batch: Mapping[str, Tensor]) -> Tensor | None:
        found = self.taught(model, teacher, batch)
        return None if found is None else self._vectors(found, batch, of_teacher=True).detach()

    def _vectors(
        self, outputs: Any, batch: Mapping[str, Tensor], *, of_teacher: bool = False
    ) -> Float[Tensor, "sides rows width"]:
        """One vector for each text of each row."""
        pooling = (self.settings["teacher_pooling"] if of_teacher else None) or self.settings["pooling"]
        states = outputs.last_hidden_state
        if pooling == "mean":
            apart = of_teacher and self.reads_apart
            mask = batch[("teacher_" if apart else "") + "attention_mask"].to(states)[..., None]
            found = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
        elif pooling == "cls":
            found = states[:, 0]
        else:
            found = getattr(outputs, "pooler_output", None)
            if found is None:
                raise ValueError("`pooling` is pooler, but the model has none. Choose mean or cls.")
        return found.view(-1, len(batch["labels"]), found.shape[-1])

    def measure(
        self, model: Any, rows: Any, reference: Any = None, *, batch_size: int = 16, dataset: str | None = None
    ) -> list[Measurement]:
        """Correlation with given scores, retrieval of the other text, and likeness to a reference.

        The likeness is the rank correlation of all cosines among the texts, and the mean cosine of the vectors
        themselves, behind the projection if there is one. Intervals resample rows; the texts among which
        `retrieval_accuracy` searches stay the same.
        """
        own, other, scores = [], [], []
        for batch in self.batches(model, rows, batch_size):
            own.append(self._vectors(model(**self.inputs(model, batch)), batch).float().cpu())
            if reference is not None:
                signal = self._reference(model, reference, batch)
                assert signal is not None
                other.append(signal.float().cpu())
            scores.append(batch["labels"].cpu())
        vectors, wanted = torch.cat(own, 1), torch.cat(scores)
        found, count = [], vectors.shape[1]
        known = ~wanted.isnan()
        if len(vectors) == 2:
            right = torch.arange(count)
            cosines = _cosines(vectors[0], vectors[1])
            if int(known.sum()) > 2:
                found += row_spearman("spearman", cosines.diagonal()[known], wanted[known], dataset)
            hits = (cosines.argmax(1) == right).int() + (cosines.argmax(0) == right).int()
            found += ratio("retrieval_accuracy", hits.numpy(), np.full(count, 2), dataset)
        if other:
            theirs = torch.cat(other, 1)
            if count > 2:
                own_likeness, their_likeness = (_cosines(side[0], side[0]) for side in (vectors, theirs))
                found += pair_spearman("similarity_to_teacher", own_likeness, their_likeness, dataset)
            projection = self.along["projection"].detach().cpu() if len(self.along) else None
            if projection is not None or vectors.shape == theirs.shape:
                mapped = projected(vectors.flatten(0, 1), theirs.flatten(0, 1), projection).view(theirs.shape)
                alike = cosine_similarity(mapped, theirs, dim=-1).mean(0).numpy()
                found += ratio("cosine_to_teacher", alike, np.ones(count), dataset, unit="cosine")
        return found


def _cosines(vectors: Float[Tensor, "rows width"], others: Float[Tensor, "columns width"]) -> Tensor:
    return normalize(vectors, dim=-1) @ normalize(others, dim=-1).T
