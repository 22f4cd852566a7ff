"""How well a language model predicts held-out data, and how near it is to another one: one call, several metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.evals.engine.evaluate import evaluate
from hf_transfer_ext.measurement import Measurement

#: Prompt and completion stand for themselves: nothing is put around or between them.
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
    """Perplexity of held-out rows; KL and agreement with a reference; questions answered right among their choices.

    Args:
        rows: Rows in one of the forms of `load_text_dataset`: text, prompt and completion, or messages.
        questions: Rows of question, answer and choices.
        reference: The model to compare with; None for no comparison.
        limit: At most so many rows, and as many questions.
    """
    metrics = ["nats_per_token", "perplexity"]
    if reference is not None:
        metrics += ["kl_to_reference", "token_agreement"]
    examples = [as_example(row, tokenizer) for row in islice(rows, limit)]
    shared = {"template": VERBATIM, "accelerator": accelerator}
    found = evaluate(model, tokenizer, examples, metrics, reference=reference, dataset=dataset, **shared).measurements
    asked = [
        {
            "question": row["question"],
            "answer": row["answer"],
            "perturbed_answer": [choice for choice in row["choices"] if choice != row["answer"]],
        }
        for row in islice(questions, limit)
    ]
    if asked:
        name = f"{dataset} questions" if dataset else None
        plain = QuestionAnswerFormat(template="plain", end_of_sequence=False)
        answered = evaluate(
            model, tokenizer, asked, ["choice_accuracy"], dataset=name, template=plain, accelerator=accelerator
        )
        found += answered.measurements
    return found


def as_example(row: Mapping[str, Any], tokenizer: Any) -> dict[str, str]:
    """A training row as the evaluation engine takes it."""
    if "messages" in row:
        return {"text": tokenizer.apply_chat_template(row["messages"], tokenize=False)}
    if "input_ids" in row:
        return {"text": tokenizer.decode(row["input_ids"])}
    if "prompt" in row and isinstance(row["prompt"], list):
        asked = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([*row["prompt"], *row["completion"]], tokenize=False)
        return {"question": asked, "answer": whole[len(asked) :]} if whole.startswith(asked) else {"text": whole}
    if "prompt" in row:
        return {"question": row["prompt"], "answer": row["completion"]}
    return {"text": row["text"]}
