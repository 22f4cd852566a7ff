"""What is attacked, with what is known about the forgotten data, and how knowledge is scored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.evals.engine.evaluate import GenerationSettings, evaluate, generate
from hf_transfer_ext.evals.metric import Values
from hf_transfer_ext.evals.metrics.rouge_l_recall import rouge_l
from hf_transfer_ext.models.plumbing import evaluation_mode

Row = Mapping[str, Any]


@dataclass
class AuditData:
    """What an attacker holds.

    Args:
        forget: Questions and answers that should be forgotten, in the TOFU schema.
        retain: Data that was kept: unrelated text to go on training with.
        holdout: Questions and answers of the same kind that no model was trained on, for membership inference and
            probes. A column `person` (any value) keeps rows about one matter together.
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
        return self.measure(rows, ["answer_probability"], **options)["answer_probability"]

    def recall(self, rows: Sequence[Row], *, temperature: float = 0.0, prefix: str = "", seed: int = 0) -> Values:
        """Share of each answer's words (ROUGE-L recall) in what the model writes."""
        settings = GenerationSettings(self.max_new_tokens, temperature, prefix, self.seed + seed)
        return self.measure(rows, ["rouge_l_recall"], generation=settings)["rouge_l_recall"]

    def measure(self, rows: Sequence[Row], metrics: Sequence[Any], **options: Any) -> dict[str, Values]:
        """The values of some metrics on each row."""
        shared = {"template": self.template, "batch_size": self.batch_size, "accelerator": self.accelerator}
        return evaluate(self.model, self.tokenizer, rows, metrics, **{**shared, **options}, resamples=0).values

    def recall_after(self, rows: Sequence[Row], prompts: Sequence[Sequence[int]]) -> Values:
        """Share of each answer's words in what the model writes after the row's own prompt, with the prompt's part
        that stands beyond the question."""
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
                    found[i] = rouge_l(str(rows[i]["answer"]), begun + text)[0]
        return found


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
    """The highest score of each example over several tries; a try that could not be scored counts as 0."""
    return np.nan_to_num(np.stack(scores)).max(0)
