"""The attacked model, the data of the attacker, and how knowledge of the data is scored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hf_transfer_ext.data.forget_retain import encode_row, learned_rows, with_facets
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
    """The data of an attacker.

    Args:
        forget: Questions and answers to forget, in the TOFU schema, or rows of plain text.
        retain: Data to retain: unrelated rows to continue training on.
        holdout: Rows like those of `forget` that no model was trained on, for membership inference and probes, and for
            the floor of attacks if there is no retrained model. A column `person` (any value) groups rows about the
            same subject.
    """

    forget: Sequence[Row]
    retain: Sequence[Row] = ()
    holdout: Sequence[Row] = ()

    @classmethod
    def of(cls, splits: Mapping[str, Sequence[Row]], limit: int | None = None) -> AuditData:
        """The sets "forget", "retain" and "holdout" of `data.forget_retain.forget_retain_rows`, facets included.

        Questions of all facets are asked; models that are trained learn each fact of the retain set once.

        Args:
            limit: Only the first rows of each set.
        """
        asked = {part: with_facets(splits, part) for part in ("forget", "holdout")}
        return cls(asked["forget"][:limit], learned_rows(splits, "retain")[:limit], asked["holdout"][:limit])

    def has_questions(self) -> bool:
        """Whether every forget row has a question and an answer."""
        return all(row.get("question") is not None and row.get("answer") is not None for row in self.forget)


@dataclass
class Subject:
    """A model under attack. Every attack restores its weights.

    Args:
        model: A plain causal language model, or a `PeftModel` whose active adapter was trained to unlearn.
        tokenizer: The tokenizer of the model.
        template: How to format questions as prompts.
        max_new_tokens: Maximum length of generations.
        batch_size: Sequences per forward pass.
        accelerator: Splits the passes among processes.
        seed: Seed for sampling and relearning.
    """

    model: Any
    tokenizer: Any
    template: QuestionAnswerFormat = field(default_factory=QuestionAnswerFormat)
    max_new_tokens: int = 48
    batch_size: int = 16
    accelerator: Any = None
    seed: int = 0

    def probability(self, rows: Sequence[Row], **options: Any) -> Values:
        """Probability per token of each answer, from one teacher-forced pass."""
        return self.metric_values(rows, ["answer_probability"], **options)["answer_probability"]

    def recall(self, rows: Sequence[Row], *, temperature: float = 0.0, prefix: str = "", seed: int = 0) -> Values:
        """Share of each answer's words (ROUGE-L recall) in the generated text."""
        settings = GenerationSettings(self.max_new_tokens, temperature, prefix, self.seed + seed)
        return self.metric_values(rows, ["rouge_l_recall"], generation=settings)["rouge_l_recall"]

    def answers(self, rows: Sequence[Row], *, temperature: float = 0.0, seed: int = 0) -> list[str]:
        """The text generated for each question; nothing else of the model is read."""
        settings = GenerationSettings(self.max_new_tokens, temperature, seed=self.seed + seed)
        shared: dict[str, Any] = {"template": self.template, "batch_size": self.batch_size, "resamples": 0}
        shared |= {"accelerator": self.accelerator, "generation": settings}
        result = evaluate(self.model, self.tokenizer, rows, ["rouge_l_recall"], **shared)
        return [scored.generation or "" for scored in result.scored]

    def metric_values(self, rows: Sequence[Row], metrics: Sequence[Any], **options: Any) -> dict[str, Values]:
        """The values of some metrics on each row; NaN if a row cannot be scored.

        Raises:
            ValueError: A metric cannot score any row.
        """
        shared = {"template": self.template, "batch_size": self.batch_size, "accelerator": self.accelerator}
        result = evaluate(self.model, self.tokenizer, rows, metrics, **{**shared, **options}, resamples=0)
        for name, values in result.values.items():
            if np.isnan(values).all():
                raise ValueError(next((p for p in result.problems if p.startswith(name)), f"{name} can score no row."))
        return result.values

    def encode(self, row: Row) -> EncodedAnswer:
        """Tokenize a question with its answer, the last answer of a conversation, or a text."""
        return encode_row(self.tokenizer, row, self.template, {})[-1][0]

    def recall_after(self, rows: Sequence[Row], prompts: Sequence[Sequence[int]]) -> Values:
        """Share of each answer's words in the text generated after these prompts. Each of them begins with the prompt
        of its row; whatever follows in it counts as generated."""
        found = np.zeros(len(rows))
        lengths = [len(self.template.prompt_ids(self.tokenizer, str(row["question"]))) for row in rows]
        order = sorted(range(len(rows)), key=lambda i: -len(prompts[i]))  # batches of similar length
        with evaluation_mode(self.model):
            for at in range(0, len(order), self.batch_size):
                chosen = order[at : at + self.batch_size]
                settings = GenerationSettings(self.max_new_tokens)
                texts, _ = generate(self.model, self.tokenizer, [prompts[i] for i in chosen], settings)
                for i, text in zip(chosen, texts, strict=True):
                    begun = self.tokenizer.decode(list(prompts[i][lengths[i] :]), skip_special_tokens=True)
                    found[i] = rouge_l_of_answer(str(rows[i]["answer"]), begun + text)[0]
        return found


def reworded(rows: Sequence[Row], wording: str) -> list[dict[str, Any]]:
    """The rows with every question inserted into a wording (`{question}`).

    Raises:
        ValueError: A row has no question.
    """
    for index, row in enumerate(rows):
        if row.get("question") is None:
            raise ValueError(f"Row {index} has no question to reword, only text.")
    return [{**row, "question": wording.replace("{question}", str(row["question"]))} for row in rows]


def check_rows(subjects: Mapping[str, Subject], data: AuditData) -> None:
    """Refuse rows that cannot be scored, before any attack.

    Raises:
        ValueError: The message names the set, the index of the row, and what is missing or how long it is.
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
                        "Shorten the row, or pass a template with `max_length`."
                    )


@contextmanager
def restored_weights(model: Any) -> Iterator[None]:
    """Restore the weights of the model at the end of the block."""
    kept = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(kept[name])


@contextmanager
def merged_adapter(model: Any) -> Iterator[None]:
    """Within the block, the active adapter is merged into the weights, as in a model merged for inference."""
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
    """The highest score of each example over several attempts; NaN if none of them could be scored."""
    return np.fmax.reduce(np.stack(scores))
