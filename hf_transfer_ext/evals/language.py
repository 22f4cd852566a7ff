"""Evaluate a language model on held-out data and compare it with another model, in one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.evals.engine.evaluate import evaluate
from hf_transfer_ext.measurement import Measurement

#: Prompt and completion are used unchanged, without template or separator.
VERBATIM = QuestionAnswerFormat(template="plain", prompt="{question}", separator="", end_of_sequence=False)


def measure_language_model(
    model: Any,
    tokenizer: Any,
    rows: Iterable[Mapping[str, Any]],
    *,
    questions: Sequence[Mapping[str, Any]] = (),
    reference: Any = None,
    limit: int | None = None,
    accelerator: Any = None,
    dataset: str | None = None,
) -> list[Measurement]:
    """Perplexity of held-out rows, KL and agreement with a reference, and multiple-choice accuracy.

    Args:
        rows: Rows in one of the formats of `load_text_dataset`: text, prompt and completion, or messages.
        questions: Rows with question, answer and choices.
        reference: The model to compare with; None for no comparison.
        limit: Maximum number of rows, and of questions.
    """
    metrics = ["nats_per_token", "perplexity"]
    if reference is not None:
        metrics += ["kl_to_reference", "token_agreement"]
    examples = [as_example(row, tokenizer) for row in islice(rows, limit)]
    shared = {"template": VERBATIM, "accelerator": accelerator}
    found = evaluate(model, tokenizer, examples, metrics, reference=reference, dataset=dataset, **shared).measurements
    choices = as_choices(islice(questions, limit))
    if choices:
        name = f"{dataset} questions" if dataset else None
        plain = QuestionAnswerFormat(template="plain", end_of_sequence=False)
        answered = evaluate(
            model, tokenizer, choices, ["choice_accuracy"], dataset=name, template=plain, accelerator=accelerator
        )
        found += answered.measurements
    return found


def measure_gain(
    model: Any,
    baseline: Any,
    name: str,
    tokenizer: Any,
    rows: Iterable[Mapping[str, Any]],
    *,
    limit: int | None = None,
    accelerator: Any = None,
    dataset: str | None = None,
) -> list[Measurement]:
    """By how many nats per token `model` predicts held-out rows better than `baseline`, with a paired interval.

    Args:
        name: What the baseline is, for the report.
        rows, limit: As in `measure_language_model`.
    """
    examples = [as_example(row, tokenizer) for row in islice(rows, limit)]
    told = f"{dataset}, compared with the {name}" if dataset else f"compared with the {name}"
    shared = {"template": VERBATIM, "accelerator": accelerator, "dataset": told}
    return evaluate(model, tokenizer, examples, ["nats_gained"], reference=baseline, **shared).measurements


def as_choices(questions: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Convert questions with `answer` and `choices` to the schema of `choice_accuracy`."""
    return [
        {
            "question": row["question"],
            "answer": row["answer"],
            "perturbed_answer": [choice for choice in row["choices"] if choice != row["answer"]],
        }
        for row in questions
    ]


def as_example(row: Mapping[str, Any], tokenizer: Any) -> dict[str, str]:
    """Convert a training row to the schema of the evaluation engine."""
    if "messages" in row:
        return {"text": tokenizer.apply_chat_template(row["messages"], tokenize=False)}
    if "input_ids" in row:
        return {"text": tokenizer.decode(row["input_ids"])}
    if "prompt" in row and isinstance(row["prompt"], list):
        prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([*row["prompt"], *row["completion"]], tokenize=False)
        return {"question": prompt, "answer": whole[len(prompt) :]} if whole.startswith(prompt) else {"text": whole}
    if "prompt" in row:
        return {"question": row["prompt"], "answer": row["completion"]}
    return {"text": row["text"]}
