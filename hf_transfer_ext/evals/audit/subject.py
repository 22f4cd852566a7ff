"""What is attacked, with what is known about the forgotten data, and how knowledge is scored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.evals.engine import GenerationSettings, evaluate
from hf_transfer_ext.evals.metric import Values

Row = Mapping[str, Any]


@dataclass
class AuditData:
    """What an attacker holds.

    Args:
        forget: Questions and answers that should be forgotten, in the TOFU schema.
        retain: Data that was kept: unrelated text to go on training with.
        holdout: Questions and answers of the same kind that no model was trained on, for membership inference.
    """

    forget: Sequence[Row]
    retain: Sequence[Row] = ()
    holdout: Sequence[Row] = ()


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
        return self._values(rows, "answer_probability", **options)

    def recall(self, rows: Sequence[Row], *, temperature: float = 0.0, prefix: str = "", seed: int = 0) -> Values:
        """Share of each answer's words (ROUGE-L recall) in what the model writes."""
        settings = GenerationSettings(self.max_new_tokens, temperature, prefix, self.seed + seed)
        return self._values(rows, "rouge_l_recall", generation=settings)

    def _values(self, rows: Sequence[Row], metric: str, **options: Any) -> Values:
        shared = {"template": self.template, "batch_size": self.batch_size, "accelerator": self.accelerator}
        result = evaluate(self.model, self.tokenizer, rows, [metric], **{**shared, **options}, resamples=0)
        return result.values[metric]


def reworded(rows: Sequence[Row], wording: str) -> list[dict[str, Any]]:
    """The rows with every question put into a wording (`{question}`)."""
    return [{**row, "question": wording.replace("{question}", str(row["question"]))} for row in rows]


@contextmanager
def restored_weights(model: Any) -> Iterator[None]:
    """Whatever the block does to the model's weights is undone at its end."""
    kept = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(kept[name])


def best_of(*scores: Values) -> Values:
    """The highest score of each example over several tries; a try that could not be scored counts as 0."""
    return np.nan_to_num(np.stack(scores)).max(0)
