"""Prepare rows of a dataset for scoring: every text is tokenized once, and invalid rows are refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.nn import Embedding

from hf_transfer_ext.data.question_answer import EncodedAnswer, QuestionAnswerFormat, encode_text
from hf_transfer_ext.evals.metric import Metric
from hf_transfer_ext.models.generation import GenerationSettings
from hf_transfer_ext.models.loading import context_length
from hf_transfer_ext.models.scoring import ScoredExample

#: The columns of the TOFU schema that contain text to score, and may be renamed.
TEXT_COLUMNS = ("answer", "paraphrased_answer", "perturbed_answer")
COLUMNS = ("text", "question", *TEXT_COLUMNS)


@dataclass
class Prepared:
    """Examples that are ready for evaluation.

    Args:
        examples: Each with its tokens.
        prompts: Token ids of the prompt of each example; empty if no metric uses generations.
        generation: Settings for generating from the prompts.
    """

    examples: list[ScoredExample]
    prompts: list[list[int]]
    generation: GenerationSettings


def prepare(
    model: Any,
    tokenizer: Any,
    rows: Iterable[Mapping[str, Any]],
    metrics: Sequence[Metric],
    *,
    template: QuestionAnswerFormat | None = None,
    columns: Mapping[str, str] | None = None,
    generation: GenerationSettings | None = None,
) -> Prepared:
    """Tokenize every text and prompt that the metrics need, and check that they fit the model.

    Raises:
        ValueError: No example, an example without a column that a metric needs, an answer without tokens, or a
            sequence longer than the model supports (each with the example's index).
    """
    template, generation = template or QuestionAnswerFormat(), generation or GenerationSettings()
    examples = prepare_examples(rows, tokenizer, template, columns_of(metrics), columns)
    prompts = []
    if any("generations" in metric.needs for metric in metrics):
        prompts = [prompt_of(example, tokenizer, template, generation.prefix) for example in examples]
    check_lengths(model, examples, prompts, generation)
    return Prepared(examples, prompts, generation)


def needs_of_columns(metrics: Sequence[Metric]) -> dict[str, frozenset[str]]:
    """Column -> quantities to score its texts for; what is needed for one column is not computed for the others."""
    wanted: dict[str, frozenset[str]] = {}
    for metric in metrics:
        needs = metric.needs - {"generations"}
        for column in metric.texts if needs else ():
            wanted[column] = wanted.get(column, frozenset()) | needs
    return wanted


def columns_of(metrics: Sequence[Metric]) -> set[str]:
    """The columns that an example must have: those that a metric scores or compares a generation with."""
    return {column for metric in metrics for column in metric.texts}


def prepare_examples(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    template: QuestionAnswerFormat,
    wanted: set[str],
    columns: Mapping[str, str] | None = None,
) -> list[ScoredExample]:
    """Tokenize every text of the wanted columns. Errors name the example's index."""
    names = {name: name for name in COLUMNS}
    for name, own in (columns or {}).items():
        if name not in names:
            raise ValueError(f"`columns` can rename {', '.join(COLUMNS)}, but not {name!r}.")
        names[name] = own
    prepared = []
    for index, row in enumerate(rows):
        example = {name: row[own] for name, own in names.items() if row.get(own) is not None}
        rest = {name: value for name, value in row.items() if name not in names.values() and _is_json(value)}
        scored = ScoredExample(index, {**rest, **example})
        try:
            scored.sequences = _sequences(example, tokenizer, template, wanted, names)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"Example {index} cannot be measured: {error}") from error
        prepared.append(scored)
    if not prepared:
        raise ValueError("There is no example to measure: the data is empty.")
    return prepared


def _sequences(
    example: Mapping[str, Any],
    tokenizer: Any,
    template: QuestionAnswerFormat,
    wanted: set[str],
    names: Mapping[str, str],
) -> dict[str, list[EncodedAnswer]]:
    if "question" not in example:
        if "text" not in example:
            raise ValueError(f"it needs a column {names['text']!r}, or {names['question']!r} and {names['answer']!r}.")
        if wanted - {"answer"}:
            raise ValueError(f"{', '.join(sorted(wanted - {'answer'}))} need a question, but it has only text.")
        template.refuse_examples("a plain text")
        return {"answer": [encode_text(tokenizer, str(example["text"]), max_length=template.max_length)]}
    sequences = {}
    for column in TEXT_COLUMNS:
        if column not in wanted:
            continue
        texts = example.get(column)
        if texts is None:
            if column == "paraphrased_answer":
                continue  # the answer is used instead: `ScoredExample.paraphrase`
            raise ValueError(f"column {names[column]!r} is missing.")
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise ValueError(f"column {names[column]!r} does not contain text.")
        sequences[column] = [template.encode(tokenizer, str(example["question"]), str(text)) for text in texts]
    return sequences


def prompt_of(example: ScoredExample, tokenizer: Any, template: QuestionAnswerFormat, prefix: str = "") -> list[int]:
    """Token ids that the model continues for this example.

    Raises:
        ValueError: The example has no question.
    """
    if "question" not in example.example:
        raise ValueError(f"Example {example.index} has no question to generate from, only text.")
    ids = template.prompt_ids(tokenizer, str(example.example["question"]))
    return ids + list(tokenizer(prefix, add_special_tokens=False)["input_ids"]) if prefix else ids


def check_lengths(
    model: Any, examples: Sequence[ScoredExample], prompts: Sequence[Sequence[int]], generation: GenerationSettings
) -> None:
    """Refuse sequences that are longer than the model supports, before any forward pass.

    Raises:
        ValueError: With the example's index, its tokens and the model's limit.
    """
    limit = context_length(model)
    if limit is None:
        return
    advice = "Shorten the row, or pass a template with `max_length`."
    for example in examples:
        longest = max((len(s.input_ids) for own in example.sequences.values() for s in own), default=0)
        if longest > limit:
            raise ValueError(
                f"Example {example.index} has {longest} tokens, but the model has {limit} positions. {advice}"
            )
    # A model with a table of positions cannot generate beyond it; others only have a recommended limit.
    room = generation.max_new_tokens if has_position_table(model, limit) else 1
    for example, prompt in zip(examples, prompts, strict=False):
        if len(prompt) + room > limit:
            raise ValueError(
                f"Example {example.index} has a prompt of {len(prompt)} tokens and up to {generation.max_new_tokens} "
                f"new ones, but the model has {limit} positions. Shorten the row, or lower `max_new_tokens`."
            )


def has_position_table(model: Any, limit: int) -> bool:
    """Whether positions are learned embeddings (GPT-2, OPT), so that there are none beyond the last."""
    return any(
        isinstance(module, Embedding)
        and limit <= module.num_embeddings <= limit + 2
        and any(part in name.rpartition(".")[2] for part in ("wpe", "position"))
        for name, module in model.named_modules()
    )


def _is_json(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool, type(None), list, dict))
