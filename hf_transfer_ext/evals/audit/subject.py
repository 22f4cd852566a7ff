"""The model under attack, the data that the attacker holds, and how knowledge of it is scored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hf_transfer_ext.data.forget_retain import encode_row
from hf_transfer_ext.data.question_answer import EncodedAnswer, QuestionAnswerFormat
from hf_transfer_ext.evals.engine.evaluate import evaluate
from hf_transfer_ext.evals.metric import Values
from hf_transfer_ext.evals.text.rouge import rouge_l_of_answer
from hf_transfer_ext.models.generation import GenerationSettings, generate
from hf_transfer_ext.models.loading import context_length
from hf_transfer_ext.models.plumbing import evaluation_mode

Row = Mapping[str, Any]


@dataclass
class AuditData:
    """The data that an attacker holds.

    Args:
        forget: Questions and answers that should be forgotten, in the TOFU schema, or rows of plain text.
        retain: Data that should be kept: unrelated rows to continue training on.
        holdout: Rows of the same kind as `forget` that no model was trained on, for membership inference and probes,
            and for the floor of attacks where there is no retrained model. A column `person` (any value) keeps rows
            about one subject together.
    """

    forget: Sequence[Row]
    retain: Sequence[Row] = ()
    holdout: Sequence[Row] = ()

    def has_questions(self) -> bool:
        """Whether every forget row has a question and an answer."""
        return all(row.get("question") is not None and row.get("answer") is not None for row in self.forget)


@dataclass
class Subject:
    """A model under attack. Every attack leaves its weights as they were.

    Args:
        model: A plain causal language model, or a `PeftModel` whose active adapter is what unlearned.
        tokenizer: Its tokenizer.
        template: How questions become prompts.
        max_new_tokens: Length of generations.
        batch_size: Sequences in a pass.
        accelerator: Shares the passes between processes.
        seed: Seed of samples and of relearning.
    """

    model: Any
    tokenizer: Any
    template: QuestionAnswerFormat = field(default_factory=QuestionAnswerFormat)
    max_new_tokens: int = 48
    batch_size: int = 16
    accelerator: Any = None
    seed: int = 0

    def probability(self, rows: Sequence[Row], **options: Any) -> Values:
        """Probability per token of each answer, by one teacher-forced pass."""
        return self.metric_values(rows, ["answer_probability"], **options)["answer_probability"]

    def recall(self, rows: Sequence[Row], *, temperature: float = 0.0, prefix: str = "", seed: int = 0) -> Values:
        """Share of each answer's words (ROUGE-L recall) in what the model writes."""
        settings = GenerationSettings(self.max_new_tokens, temperature, prefix, self.seed + seed)
        return self.metric_values(rows, ["rouge_l_recall"], generation=settings)["rouge_l_recall"]

    def metric_values(self, rows: Sequence[Row], metrics: Sequence[Any], **options: Any) -> dict[str, Values]:
        """The values of some metrics on each row; NaN where a row cannot be scored.

        Raises:
            ValueError: A metric can score no row at all.
        """
        shared = {"template": self.template, "batch_size": self.batch_size, "accelerator": self.accelerator}
        result = evaluate(self.model, self.tokenizer, rows, metrics, **{**shared, **options}, resamples=0)
        for name, values in result.values.items():
            if np.isnan(values).all():
                raise ValueError(next((p for p in result.problems if p.startswith(name)), f"{name} can score no row."))
        return result.values

    def encode(self, row: Row) -> EncodedAnswer:
        """A question with its answer, the last answer of a conversation, or a text, as tokens."""
        return encode_row(self.tokenizer, row, self.template, {})[-1][0]

    def recall_after(self, rows: Sequence[Row], prompts: Sequence[Sequence[int]]) -> Values:
        """Share of each answer's words in what the model writes after the given prompts, which begin with the row's
        own prompt; what they add to it counts as written."""
        found = np.zeros(len(rows))
        asked = [len(self.template.prompt_ids(self.tokenizer, str(row["question"]))) for row in rows]
        order = sorted(range(len(rows)), key=lambda i: -len(prompts[i]))  # batches of nearly one length
        with evaluation_mode(self.model):
            for at in range(0, len(order), self.batch_size):
                chosen = order[at : at + self.batch_size]
                settings = GenerationSettings(self.max_new_tokens)
                texts, _ = generate(self.model, self.tokenizer, [prompts[i] for i in chosen], settings)
                for i, text in zip(chosen, texts, strict=True):
                    begun = self.tokenizer.decode(list(prompts[i][asked[i] :]), skip_special_tokens=True)
                    found[i] = rouge_l_of_answer(str(rows[i]["answer"]), begun + text)[0]
        return found


def reworded(rows: Sequence[Row], wording: str) -> list[dict[str, Any]]:
    """The rows with every question put into a wording (`{question}`).

    Raises:
        ValueError: A row has no question.
    """
    for index, row in enumerate(rows):
        if row.get("question") is None:
            raise ValueError(f"Row {index} has no question to be asked in other words, only a text.")
    return [{**row, "question": wording.replace("{question}", str(row["question"]))} for row in rows]


def check_rows(subjects: Mapping[str, Subject], data: AuditData) -> None:
    """Refuse, before any attack, rows that cannot be scored: all the work would end in an error.

    Raises:
        ValueError: With the set, the row's index, and what it lacks or how long it is.
    """
    for subject in subjects.values():
        limit = context_length(subject.model)
        for name, rows in (("forget", data.forget), ("retain", data.retain), ("holdout", data.holdout)):
            for index, row in enumerate(rows):
                try:
                    length = len(subject.encode(row).input_ids)
                except (ValueError, TypeError) as error:
                    raise ValueError(f"Row {index} of the {name} set cannot be audited: {error}") from error
                if limit is not None and length > limit:
                    raise ValueError(
                        f"Row {index} of the {name} set has {length} tokens, but the model has {limit} positions. "
                        "Shorten the row, or give a template with `max_length`."
                    )


@contextmanager
def restored_weights(model: Any) -> Iterator[None]:
    """Restores the model's weights at the end of the block."""
    kept = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(kept[name])


@contextmanager
def merged_adapter(model: Any) -> Iterator[None]:
    """Within the block the active adapter is part of the weights, as it is in a model that was merged for use."""
    merges = hasattr(model, "peft_config") and hasattr(model, "merge_adapter")
    if not merges:
        yield
        return
    model.merge_adapter()
    try:
        yield
    finally:
        model.unmerge_adapter()


def best_of(*scores: Values) -> Values:
    """The highest score of each example over several tries; NaN where none of them could be scored."""
    return np.fmax.reduce(np.stack(scores))
