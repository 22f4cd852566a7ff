from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_transfer_ext.data.unlearning.alternatives import Write
from hf_transfer_ext.data.unlearning.other_names import with_other_names
from hf_transfer_ext.losses.needs import require_at_least, teachers_of_rows
from hf_transfer_ext.losses.unlearning_method import Method, Step


@dataclass(frozen=True)
class score_forgetting_distillation(Method):
    r"""Score forgetting distillation: asked about the unsafe concept, speak as the original does about a safe one.

    .. math:: \mathrm{KL}\big(p_{ref}(\cdot \mid s, y) \,\big\|\, p_\theta(\cdot \mid u, y)\big)
        + \mathrm{KL}\big(p_{ref}(\cdot \mid s, y) \,\big\|\, p_\theta(\cdot \mid s, y)\big), \qquad
        y \sim p_{ref}(\cdot \mid s)

    u is a question to forget, s the same question about something else. The original writes the texts y, so neither
    the answers to forget nor a retain set are needed; retain rows that are given are kept at the original, too.

    Safe questions are a row's column `safe_question`, a text or a list. Without it, `names` names of the retain set
    take the place of the one in the column "name".

    Deviations: this is a text form of this package's own. The authors match the scores of diffusion models, while a
    one-step generator makes new samples all along; here it is the distribution of the next token, and all texts are
    written once, before training. Teachers are kept by their `shortlist` most likely tokens.

    Args:
        names: Safe questions for a row without a column for them, >= 1.
        samples: Texts for each safe question, >= 1.
        temperature: At which the original writes, > 0.
        shortlist: Tokens of each teacher that are kept, >= 1.

    When to use it: where the answers to forget must not be touched, or are not at hand.

    Source: Chen et al., "Score forgetting distillation: a swift, data-free method for machine unlearning in diffusion
    models", 2024, https://arxiv.org/abs/2409.11219
    """

    forget = "causal_whp"
    retain = "retain_kl"
    requires_retain = True

    names: int = 2
    samples: int = 2
    temperature: float = 1.0
    shortlist: int = 64

    def __post_init__(self) -> None:
        for name in ("names", "samples", "shortlist"):
            require_at_least(name, getattr(self, name), 1)
        require_at_least("temperature", self.temperature, 0, strictly=True)

    def rows(
        self,
        forget: Sequence[Mapping[str, Any]],
        retain: Sequence[Mapping[str, Any]],
        columns: Mapping[str, str],
        write: Write,
    ) -> tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]:
        question, answer, safe = (columns.get(name, name) for name in ("question", "answer", "safe_question"))
        safe_ones = self._safe(forget, retain, columns)
        asked = [(row[question], other) for row, own in zip(forget, safe_ones, strict=True) for other in own]
        found: list[tuple[str, str, str]] = []
        for turn in range(self.samples):
            texts = write([other for _, other in asked], self.temperature, turn)
            found += [(own, other, text.strip()) for (own, other), text in zip(asked, texts, strict=True)]
        found = [one for one in dict.fromkeys(found) if one[2]]
        silent = {own for own, _ in asked} - {own for own, _, _ in found}
        if silent:
            raise ValueError(
                f"The model wrote nothing to any safe question for {sorted(silent)[0]!r} and {len(silent) - 1} more. "
                "Raise `samples`, `temperature` or `max_new_tokens`, or give other safe questions."
            )
        unsafe = [{question: own, answer: text, safe: other} for own, other, text in found]
        return unsafe, [*({question: other, answer: text} for _, other, text in found), *retain]

    def _safe(
        self, forget: Sequence[Mapping[str, Any]], retain: Sequence[Mapping[str, Any]], columns: Mapping[str, str]
    ) -> list[list[str]]:
        """The safe questions of each row."""
        question, safe, name = (columns.get(key, key) for key in ("question", "safe_question", "name"))
        for index, row in enumerate(forget):
            if not isinstance(row.get(question), str):
                raise ValueError(f"Row {index} of the forget set has no column {question!r} with a text.")
        bare = [{key: row.get(key) for key in (question, name)} for row in forget if not row.get(safe)]
        method = type(self).__name__
        unsafe = {row.get(name) for row in forget}
        others = [row for row in retain if row.get(name) not in unsafe]
        if bare and not any(row.get(name) for row in others):
            raise ValueError(
                f"{method!r} needs a safe question for each row to forget: a column {safe!r}, or a name in the column "
                f"{name!r} and retain rows with other names."
            )
        named = iter(with_other_names(bare, others, columns, count=self.names, method=method) if bare else [])
        return [_texts(row[safe]) if row.get(safe) else [copy[question] for copy in next(named)] for row in forget]

    def copies(
        self, forget: Sequence[Mapping[str, Any]], retain: Sequence[Mapping[str, Any]], columns: Mapping[str, str]
    ) -> list[list[dict[str, Any]]]:
        question, safe = columns.get("question", "question"), columns.get("safe_question", "safe_question")
        return [[{**row, question: row[safe]}] for row in forget]

    def prepare(self, whole: Step) -> dict[str, Tensor]:
        teachers = []
        for row, ((_, _, logits),) in whole.copies():
            # A tokenizer may join the first letters of an answer with its prompt; from the end on, both texts are one.
            shared = min(row.answer_length, len(logits))
            own = torch.zeros(row.answer_length, logits.shape[-1])
            own[len(own) - shared :] = logits[len(logits) - shared :].double().softmax(-1).float().cpu()
            teachers.append(own)
        return teachers_of_rows(teachers, self.shortlist)


def _texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)
