from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hf_transfer_ext.losses.prototypes import Prototypes, class_means, prototype_alignment
from hf_transfer_ext.losses.vectors import squared_error
from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.models.heads import causal_lm_of
from hf_transfer_ext.models.loading import call_settings_restored
from hf_transfer_ext.tensors import IGNORE_INDEX
from hf_transfer_ext.trainers.class_losses import (
    SINGLE,
    LabelReader,
    class_losses,
    head_loading,
    label_names,
    names_in,
    teacher_places,
)
from hf_transfer_ext.trainers.distillation_task import TEACHER, DistillationTask, TaskLoss
from hf_transfer_ext.trainers.task_metrics import (
    entity_counts,
    entity_f1,
    kl_of,
    label_counts,
    macro_f1,
    measured,
    ratio,
    sums_by_row,
)


class token_classification(DistillationTask):
    r"""Label words: a divergence between the label distributions of both models at the first token of each word.

    .. math:: L = \text{kd\_weight} \, D(p_T, q_S) + \text{ce\_weight} \, CE(y, q_S), \quad \text{a mean over words}

    Rows have `tokens`, a list of words, and perhaps `labels`, a name or id for each; rows without labels learn from
    the teacher alone. Labels of both models meet by name. The teacher may have another tokenizer: words are what both
    share, and those that `max_length` cuts off in either model do not count.

    With labels in one language and none in another, `task_options` add the two parts of ProKD. Both keep a prototype
    of each class, a running mean of the student's last hidden states, for labelled and for unlabelled words (whose
    class is the teacher's choice; the student's own without a teacher):

    - `self_training_weight`: cross entropy of unlabelled words with the class of the nearest prototype, ramped in over
      the first `ramp` of the training.
    - `alignment_weight`: a contrastive loss that brings the prototypes of a class in both languages together. The
      paper trains the teacher with it: fine-tune with `kd_weight: 0, ce_weight: 1` first.

    `prototype_rate` and `prototype_temperature` are those of `losses.prototypes`.

    When to use it: named entities, parts of speech; with prototypes, across languages or domains.

    Source: ProKD, Ge et al. 2023, https://arxiv.org/abs/2301.08855; details that its abstract leaves open are this
    package's own. The divergence: Hinton et al. 2015, https://arxiv.org/abs/1503.02531
    """

    needs: ClassVar[tuple[str, ...]] = ("tokens",)
    may_have: ClassVar[tuple[str, ...]] = ("labels",)
    own_losses: ClassVar[Mapping[str, Any]] = {"squared_error": squared_error}
    options: ClassVar[Mapping[str, Any]] = {
        "self_training_weight": 0.0,
        "alignment_weight": 0.0,
        "ramp": 0.3,
        "prototype_rate": 0.9,
        "prototype_temperature": 0.1,
    }

    def __init__(self, args: Any, student: Any, teacher: Any, tokenizer: Any, teacher_tokenizer: Any = None) -> None:
        super().__init__(args, student, teacher, tokenizer, teacher_tokenizer)
        config = causal_lm_of(student).config
        self.names, self.labels = label_names(config), LabelReader(config, "labels")
        self.places = None if teacher is None else teacher_places(config, causal_lm_of(teacher).config)
        self.share_done = 0.0
        shape, rate = (len(self.names), config.hidden_size), self.settings["prototype_rate"]
        self.prototypes = {name: Prototypes(*shape, rate=rate) for name in ("labelled", "unlabelled")}

    @classmethod
    def check(cls, args: Any) -> None:
        super().check(args)
        settings = {**cls.options, **args.task_options}
        for name in ("self_training_weight", "alignment_weight"):
            if settings[name] < 0:
                raise ValueError(f"`{name}` of token_classification must be >= 0, got {settings[name]}.")
        if not 0 <= settings["ramp"] <= 1:
            raise ValueError(f"`ramp` of token_classification must lie in [0, 1], got {settings['ramp']}.")
        if not any(settings[name] for name in ("self_training_weight", "alignment_weight")):
            unused = [name for name in args.task_options if settings[name] != cls.options[name]]
            if unused:
                raise ValueError(
                    f"`{unused[0]}` is about prototypes, which take no part: set `self_training_weight` or "
                    "`alignment_weight`, or leave it out."
                )

    @classmethod
    def loading(cls, name: Any, revision: str | None = None, *, like: Any = None, data: Any = None) -> dict[str, Any]:
        head = head_loading(name, revision, cls.kind().suffix, "labels", like, data)
        return super().loading(name, revision) | head

    def facts(self) -> dict[str, Any]:
        return {"labels": self.names}

    def read_features(self, features: Mapping[str, Any]) -> None:
        self.labels.read_names(names_in(features.get("labels")))

    def trained_along(self) -> list[nn.Module]:
        return list(self.prototypes.values()) if self._uses_prototypes else []

    @property
    def _uses_prototypes(self) -> bool:
        return bool(self.settings["self_training_weight"] or self.settings["alignment_weight"])

    def progress(self, share: float) -> None:
        self.share_done = share

    # ---- Rows and batches ----

    def row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        words, labels = row["tokens"], row.get("labels")
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError(f"Column 'tokens' has to hold a list of words, got {str(words)[:80]}.")
        if labels is not None and len(labels) != len(words):
            raise ValueError(f"A row has {len(words)} words and {len(labels)} labels: {str(words)[:80]}.")
        found = self.encoded(words, is_split_into_words=True)
        starts = first_tokens(self.tokenizer, words, self.args.max_length)
        theirs = starts
        if self.reads_apart:
            theirs = first_tokens(self.teacher_tokenizer, words, self.args.max_length)
        both = [place for place in range(len(words)) if place in starts and place in theirs]
        found["labels"] = [IGNORE_INDEX if labels is None else self.labels.id_of(labels[place]) for place in both]
        return {**found, "starts": [starts[i] for i in both], TEACHER + "starts": [theirs[i] for i in both]}

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        longest = max((len(row["labels"]) for row in rows), default=0)

        def filled(name: str, filling: int) -> Tensor:
            return torch.tensor([list(row[name]) + [filling] * (longest - len(row[name])) for row in rows])

        words = torch.tensor([[place < len(row["labels"]) for place in range(longest)] for row in rows])
        more = {name: filled(name, 0).long() for name in ("starts", TEACHER + "starts")}
        labels = filled("labels", IGNORE_INDEX).long()
        return {**self.padded(rows), **more, "words": words.bool().view(labels.shape), "labels": labels}

    def items(self, batch: Mapping[str, Tensor]) -> Bool[Tensor, "batch words"]:
        return batch["words"]

    # ---- Losses ----

    def losses(self, model: Any, teacher: Any, batch: Mapping[str, Tensor], weight: Tensor) -> TaskLoss:
        reference = self._reference(model, teacher, batch)
        learns = self._uses_prototypes and model.training
        with self.viewed("student", model):
            outputs = model(**self.inputs(model, batch), **({"output_hidden_states": True} if learns else {}))
        logits = at_words(outputs.logits, batch["starts"], batch["words"])
        labels = batch["labels"][batch["words"]]
        found = class_losses(logits, reference, labels, weight, SINGLE, self.loss, self.args)
        chosen = logits.detach().argmax(-1)
        sums = {
            "kd": found.kd.sum(), "ce": found.ce.sum(), "correct": (chosen == labels).sum(),
            "labelled": (labels != IGNORE_INDEX).sum(),
        }  # fmt: skip
        if reference is not None:
            sums["agrees"] = (chosen == reference.argmax(-1)).sum()
        loss = found.loss
        if learns:
            features = at_words(outputs.hidden_states[-1], batch["starts"], batch["words"])
            parts = self._of_prototypes(
                features, logits, labels, chosen if reference is None else reference.argmax(-1)
            )
            loss = loss + weight * sum(parts.values())
            sums |= {name: value.detach() for name, value in parts.items()}
        # Words may be missing in a batch, and the whole output has to lead to the loss under DDP.
        return TaskLoss(loss + 0.0 * outputs.logits[..., :1].sum(), outputs, sums)

    def _reference(self, model: Any, teacher: Any, batch: Mapping[str, Tensor]) -> Tensor | None:
        """The teacher's logits at each word, in the order of the student's labels."""
        theirs = self.taught(model, teacher, batch)
        if theirs is None:
            return None
        assert self.places is not None
        rows = at_words(theirs.logits.detach(), batch[TEACHER + "starts"], batch["words"])
        return rows[:, self.places.to(rows.device)]

    def _of_prototypes(self, features: Tensor, logits: Tensor, labels: Tensor, chosen: Tensor) -> dict[str, Tensor]:
        """The parts of ProKD as sums over the words of a batch, and the prototypes moved on."""
        is_labelled = labels != IGNORE_INDEX
        sides = {"labelled": (is_labelled, labels), "unlabelled": (~is_labelled, chosen)}
        parts: dict[str, Tensor] = {}
        if self.settings["alignment_weight"]:
            others = {"labelled": self.prototypes["unlabelled"], "unlabelled": self.prototypes["labelled"]}
            temperature, total = self.settings["prototype_temperature"], features.new_zeros(())
            for name, (mask, classes) in sides.items():
                means, occurs = class_means(features[mask].float(), classes[mask], len(self.names))
                total = total + prototype_alignment(means, occurs, others[name], temperature=temperature) / 2
            parts["alignment"] = self.settings["alignment_weight"] * total * len(labels)
        for name, (mask, classes) in sides.items():
            self.prototypes[name].update(features[mask], classes[mask])
        if self.settings["self_training_weight"]:
            ramp = min(1.0, self.share_done / self.settings["ramp"]) if self.settings["ramp"] else 1.0
            pseudo = torch.where(is_labelled, IGNORE_INDEX, self.prototypes["unlabelled"].nearest(features))
            loss = cross_entropy(logits.float(), pseudo, ignore_index=IGNORE_INDEX, reduction="sum")
            parts["self_training"] = self.settings["self_training_weight"] * ramp * loss
        return parts

    def measure(
        self, model: Any, rows: Any, reference: Any = None, *, batch_size: int = 16, dataset: str | None = None
    ) -> list[Measurement]:
        """Accuracy and F1 of words, F1 of entities (labels B-, I- and O), KL and agreement with a reference."""
        own, other, labels, ends = [], [], [], []
        for batch in self.batches(model, rows, batch_size):
            logits = model(**self.inputs(model, batch)).logits
            own.append(at_words(logits, batch["starts"], batch["words"]).float().cpu())
            if reference is not None:
                signal = self._reference(model, reference, batch)
                assert signal is not None
                other.append(signal.float().cpu())
            labels.append(batch["labels"][batch["words"]].cpu())
            ends += batch["words"].sum(1).tolist()
        logits, wanted = torch.cat(own), torch.cat(labels)
        known, chosen, texts = wanted != IGNORE_INDEX, logits.argmax(-1), len(ends)
        text = torch.repeat_interleave(torch.arange(texts), torch.tensor(ends))  # the one that each word is in
        count, labelled = int(known.sum()), sums_by_row(known, text, texts)
        found = ratio("accuracy", sums_by_row(chosen == wanted, text, texts), labelled, dataset)
        scores: dict[str, tuple[Any, Any]] = {}
        if count:
            counts = label_counts(chosen[known], wanted[known], text[known], texts, len(self.names))
            scores["macro_f1"] = macro_f1, counts
        if count and all(name == "O" or name[:2] in ("B-", "I-") for name in self.names):
            sides = [
                [["O" if gold < 0 else self.names[tag] for tag, gold in pairs.tolist()]
                 for pairs in torch.stack([one, wanted], 1).split(ends)]
                for one in (chosen, wanted)
            ]  # fmt: skip
            scores["entity_f1"] = entity_f1, entity_counts(*sides)
        for name, (statistic, counts) in scores.items():
            of_labelled = [one[labelled > 0] for one in counts]
            found += measured(name, statistic, of_labelled, "share", True, count, dataset)
        if other:
            theirs, words = torch.cat(other), sums_by_row(torch.ones_like(wanted), text, texts)
            same = sums_by_row(chosen == theirs.argmax(-1), text, texts)
            found += ratio("teacher_agreement", same, words, dataset)
            kl = sums_by_row(kl_of(theirs, logits), text, texts)
            found += ratio("kl_to_teacher", kl, words, dataset, unit="nats per word", higher_is_better=False)
        return found


def first_tokens(tokenizer: Any, words: list[str], max_length: int | None) -> dict[int, int]:
    """Word -> place of its first token, for the words that are not cut off.

    Raises:
        ValueError: The tokenizer does not tell which token belongs to which word.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"Words need a fast tokenizer, which knows their tokens, got {type(tokenizer).__name__}.")
    cut = {} if max_length is None else {"truncation": True, "max_length": min(max_length, tokenizer.model_max_length)}
    places: dict[int, int] = {}
    with call_settings_restored(tokenizer):
        tokens = tokenizer(words, is_split_into_words=True, **cut)
    for place, word in enumerate(tokens.word_ids()):
        if word is not None:
            places.setdefault(word, place)
    return places


def at_words(states: Tensor, starts: Tensor, words: Tensor) -> Tensor:
    """Hidden states or logits `(batch, length, size)` at the first token of each word: `(items, size)`."""
    found = states.gather(1, starts.to(states.device)[..., None].expand(-1, -1, states.shape[-1]))
    return found[words.to(states.device)]
