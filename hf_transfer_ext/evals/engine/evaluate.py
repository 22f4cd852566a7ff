"""Measure a model: every forward pass and every generation is made once, and all metrics read from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from hf_transfer_ext.data.question_answer import EncodedAnswer, QuestionAnswerFormat, encode_text
from hf_transfer_ext.evals.engine.cache import ScoreCache, digest, model_fingerprint
from hf_transfer_ext.evals.metric import Metric, summarize
from hf_transfer_ext.evals.metrics import METRICS
from hf_transfer_ext.files import write_text
from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.models.plumbing import active_adapter, evaluation_mode, is_sharded, pad_token_id
from hf_transfer_ext.models.scoring import ScoredExample, Scorer, TokenScores

#: The columns of the TOFU schema that are texts to be scored, and may be renamed.
TEXT_COLUMNS = ("answer", "paraphrased_answer", "perturbed_answer")
COLUMNS = ("text", "question", *TEXT_COLUMNS)

MetricSpec = str | Mapping[str, Any] | tuple[str, Mapping[str, Any]]


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are generated: greedy by default.

    Args:
        max_new_tokens: Longest generation.
        temperature: 0 for greedy decoding; > 0 samples, seeded anew for each batch, so that samples (unlike everything
            else here) depend on the batch size.
        prefix: Text the answer is forced to begin with (a jailbreak prefix, an empty thought); not part of the result.
    """

    max_new_tokens: int = 200
    temperature: float = 0.0
    prefix: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` has to be at least 1, got {self.max_new_tokens}.")
        if self.temperature < 0:
            raise ValueError(f"`temperature` has to be 0 (greedy) or above, got {self.temperature}.")


@dataclass
class EvaluationResult:
    """What was measured, and what it was computed from.

    Args:
        measurements: One per metric, in the order asked.
        scored: Every example with its per-token scores and its generation.
        values: Measurement name -> value of each example; NaN where the example was left out.
        problems: One sentence for each example that a metric could not use.
        cost: Tokens and passes that were really computed, this process and all others together.
    """

    measurements: list[Measurement]
    scored: list[ScoredExample]
    values: dict[str, Float[np.ndarray, " examples"]]
    problems: list[str] = field(default_factory=list)
    cost: dict[str, int] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Measurement:
        """The measurement of this name; the options in brackets may be left out where the name stays unique."""
        found = [m for m in self.measurements if m.name == name or m.name.split("(")[0] == name]
        if len(found) != 1:
            raise KeyError(f"{name!r} is not one measurement of {[m.name for m in self.measurements]}.")
        return found[0]

    def per_example(self) -> list[dict[str, Any]]:
        """One row per example: its texts, its generation and the value of each metric (None where left out)."""
        rows = []
        for place, scored in enumerate(self.scored):
            values = {name: None if np.isnan(v[place]) else float(v[place]) for name, v in self.values.items()}
            generation = {} if scored.generation is None else {"generation": scored.generation}
            rows.append({"index": scored.index, **scored.example, **generation, "metrics": values})
        return rows

    def save(self, folder: str | Path, *, per_example: str = "jsonl") -> Path:
        """Write `measurements.json`, and the examples as `per_example.jsonl` or `per_example.parquet`.

        Raises:
            ValueError: `per_example` is neither "jsonl" nor "parquet".
        """
        if per_example not in ("jsonl", "parquet"):
            raise ValueError(f"`per_example` has to be jsonl or parquet, got {per_example!r}.")
        folder = Path(folder)
        summary = {
            "measurements": [m.to_dict() for m in self.measurements],
            "problems": self.problems,
            "cost": self.cost,
        }
        write_text(folder / "measurements.json", json.dumps(summary, indent=2) + "\n")
        rows = self.per_example()
        if per_example == "parquet":
            write_parquet(folder / "per_example.parquet", rows)
        else:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_text(folder / "per_example.jsonl", lines)
        return folder


def evaluate(
    model: Any,
    tokenizer: Any,
    examples: Iterable[Mapping[str, Any]],
    metrics: Sequence[MetricSpec],
    *,
    reference: Any = None,
    adapter: str | None = None,
    template: QuestionAnswerFormat | None = None,
    columns: Mapping[str, str] | None = None,
    generation: GenerationSettings | None = None,
    batch_size: int = 16,
    accelerator: Any = None,
    cache: str | Path | None = None,
    dataset: str | None = None,
    resamples: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> EvaluationResult:
    """Score every example once and compute all metrics from the scores.

    Args:
        examples: Dictionaries with "text", or with "question" and "answer" and, where a metric asks for them,
            "paraphrased_answer" and "perturbed_answer" (a list): the TOFU schema.
        metrics: Names, or names with options: `["perplexity", {"truth_ratio": {"definition": "geometric"}}]`.
        reference: For metrics that compare: another model, or the name of an adapter of `model` ("base": none).
        adapter: Adapter of `model` that is measured, "base" for its base; None for the active one.
        template: How a question becomes a prompt; the chat template where the tokenizer has one.
        columns: Schema name -> the data's own column name: `{"question": "prompt"}`.
        batch_size: Sequences in one forward pass; the results do not depend on it beyond rounding.
        accelerator: An `accelerate.Accelerator`: the work is shared by its processes, the result is whole on each.
        cache: Folder that keeps scores by content, so that a stopped run goes on and a second one is free.
        dataset: Name of the data for the measurements.
        resamples: Bootstrap resamples of each interval; 0 for none.

    Raises:
        ValueError: Unknown metric, no example, an example without a column that a metric needs (with its index),
            an answer without tokens. All before the first forward pass.
    """
    template = template or QuestionAnswerFormat()
    generation = generation or GenerationSettings()
    chosen = [resolve_metric(spec) for spec in metrics]
    if not chosen:
        raise ValueError(f"`metrics` is empty. Available: {', '.join(sorted(METRICS))}.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` has to be at least 1, got {batch_size}.")
    needs = frozenset().union(*(m.needs for m, _ in chosen))
    if "reference" in needs and reference is None:
        asking = [m.__name__ for m, _ in chosen if "reference" in m.needs]
        raise ValueError(f"{', '.join(asking)} compare with a reference: give `reference=` a model or adapter name.")
    wanted = needs_of_columns([m for m, _ in chosen])
    prepared = prepare_examples(examples, tokenizer, template, columns_of([m for m, _ in chosen]), columns)
    model = accelerator.unwrap_model(model) if accelerator is not None else model
    ranks = accelerator.num_processes if accelerator is not None else 1
    rank = accelerator.process_index if accelerator is not None else 0

    pad_id = pad_token_id(tokenizer)
    fingerprint = ""
    if cache is not None:
        parts = [model_fingerprint(model, adapter)]
        if "reference" in needs:
            named = isinstance(reference, str)
            parts.append(model_fingerprint(model if named else reference, reference if named else None))
        fingerprint = digest(parts)
    store = ScoreCache(cache, fingerprint, rank)
    if accelerator is not None:
        accelerator.wait_for_everyone()  # every process has read the same files before one of them writes
    scorer = Scorer(model, reference=reference if "reference" in needs else None, adapter=adapter, pad_id=pad_id)
    cost = {"forward_tokens": 0, "forwards": 0, "generated_tokens": 0, "cached": 0}
    with evaluation_mode(model, None if isinstance(reference, str) else reference):
        if wanted:
            _score_all(prepared, wanted, scorer, store, batch_size, rank, ranks, cost, progress)
            cost["forward_tokens"], cost["forwards"] = scorer.forward_tokens, scorer.forwards
        if "generations" in needs:
            with active_adapter(model, adapter):
                _generate_all(
                    prepared, model, tokenizer, template, generation, store, batch_size, rank, ranks, cost, progress
                )
    if ranks > 1:
        from accelerate.utils import gather_object

        gathered = gather_object([cost])
        cost = {name: sum(c[name] for c in gathered) for name in cost}
    result = measure(prepared, chosen, dataset=dataset, resamples=resamples, seed=seed, cost=cost)
    empty = [e.index for e in prepared if e.generation is not None and not e.generation.strip()]
    if empty:
        result.problems.append(
            f"The model wrote nothing for {len(empty)} of {len(prepared)} examples (first: example {empty[0]}); "
            "their empty generations are scored as they are."
        )
    return result


def needs_of_columns(metrics: Sequence[Metric]) -> dict[str, frozenset[str]]:
    """Column -> what has to be known of its texts: a reference for the answer is none for its five wrong variants."""
    wanted: dict[str, frozenset[str]] = {}
    for metric in metrics:
        needs = metric.needs - {"generations"}
        for column in metric.texts if needs else ():
            wanted[column] = wanted.get(column, frozenset()) | needs
    return wanted


def columns_of(metrics: Sequence[Metric]) -> set[str]:
    """The columns that an example has to have: those that a metric scores, or compares a generation with."""
    return {column for metric in metrics for column in metric.texts}


def measure(
    scored: Sequence[ScoredExample],
    metrics: Sequence[MetricSpec | tuple[Metric, dict[str, Any]]],
    *,
    dataset: str | None = None,
    resamples: int = 1000,
    seed: int = 0,
    cost: dict[str, int] | None = None,
) -> EvaluationResult:
    """Compute metrics from examples that are scored already: a new metric on an old pass costs no forward."""
    measurements, all_values, problems = [], {}, []
    for spec in metrics:
        metric, options = resolve_metric(spec)
        values = np.full(len(scored), np.nan)
        weights = np.ones(len(scored))
        for place, example in enumerate(scored):
            try:
                value = metric(example, **options)
            except Exception as error:  # whatever one example does, the others stay measured
                told = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
                problems.append(f"{metric.label(options)} leaves example {example.index} out: {told}")
                continue
            values[place], weights[place] = value if isinstance(value, tuple) else (value, 1.0)
            if not np.isfinite(values[place]):
                values[place] = np.nan
                problems.append(
                    f"{metric.label(options)} leaves example {example.index} out: its value is not finite."
                )
        kept = ~np.isnan(values)
        all_values[metric.label(options)] = values
        if not kept.any():
            problems.append(f"{metric.label(options)} could not be measured: every example was left out.")
            continue
        measurements.append(
            summarize(
                metric,
                values[kept],
                weights[kept],
                options=options,
                dataset=dataset,
                resamples=resamples,
                seed=seed,
            )
        )
    return EvaluationResult(measurements, list(scored), all_values, problems, cost or {})


def resolve_metric(spec: Any) -> tuple[Metric, dict[str, Any]]:
    """`"perplexity"`, `{"truth_ratio": {...}}` or `("truth_ratio", {...})` -> the metric and its options."""
    if isinstance(spec, str):
        return METRICS[spec], {}
    if isinstance(spec, Mapping) and len(spec) == 1:
        spec = next(iter(spec.items()))
    if isinstance(spec, tuple) and len(spec) == 2:
        metric = spec[0] if isinstance(spec[0], Metric) else METRICS[spec[0]]
        return metric, dict(spec[1] or {})
    raise ValueError(f"A metric is a name, or a name with its options ({{'truth_ratio': {{...}}}}); got {spec!r}.")


def prepare_examples(
    examples: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    template: QuestionAnswerFormat,
    wanted: set[str],
    columns: Mapping[str, str] | None = None,
) -> list[ScoredExample]:
    """Tokenise every text that is wanted. Errors name the example's index."""
    names = {name: name for name in COLUMNS}
    for name, own in (columns or {}).items():
        if name not in names:
            raise ValueError(f"`columns` renames {', '.join(COLUMNS)}; not {name!r}.")
        names[name] = own
    prepared = []
    for index, row in enumerate(examples):
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
            raise ValueError(f"{', '.join(sorted(wanted - {'answer'}))} need a question, and it has only a text.")
        return {"answer": [encode_text(tokenizer, str(example["text"]), max_length=template.max_length)]}
    sequences = {}
    for column in TEXT_COLUMNS:
        if column not in wanted:
            continue
        texts = example.get(column)
        if texts is None:
            if column == "paraphrased_answer":
                continue  # the answer stands for it: `ScoredExample.paraphrase`
            raise ValueError(f"column {names[column]!r} is missing.")
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise ValueError(f"column {names[column]!r} holds no text.")
        sequences[column] = [template.encode(tokenizer, str(example["question"]), str(text)) for text in texts]
    return sequences


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One column for each key of any row, `metrics` as a struct; what has no one type stands as JSON."""
    import pyarrow
    from pyarrow import parquet

    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {}
    for name in names:
        values = [row.get(name) for row in rows]
        as_json = name != "metrics" and any(isinstance(value, dict) for value in values)
        try:
            columns[name] = pyarrow.array([json.dumps(v, ensure_ascii=False) for v in values] if as_json else values)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError):
            columns[name] = pyarrow.array([json.dumps(value, ensure_ascii=False) for value in values])
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.new")
    parquet.write_table(pyarrow.table(columns), aside)
    aside.replace(path)


def _is_json(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool, type(None), list, dict))


def _batches(
    keys: Sequence[str], length: Callable[[str], int], batch_size: int, group: Callable[[str], Any] = lambda key: key
) -> list[list[str]]:
    """Longest first: batches of nearly one length, and a batch that does not fit in memory fails at once.

    The keys of one group (the answers to one prompt) stand together.
    """
    longest: dict[Any, int] = {}
    for key in keys:
        longest[group(key)] = max(length(key), longest.get(group(key), 0))
    ordered = sorted(keys, key=lambda key: (-longest[group(key)], group(key), -length(key), key))
    return [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]


def _shared(
    batches: list[list[str]],
    work: Callable[[list[str]], dict[str, Any]],
    rank: int,
    ranks: int,
    *,
    lockstep: bool = False,
    title: str = "",
    bar: bool = False,
) -> dict[str, Any]:
    """Every process works on each `ranks`-th batch; all get all the results.

    In `lockstep`, which sharded models need, a process with one batch fewer repeats its last one.
    """
    done: dict[str, Any] = {}
    mine = batches[rank::ranks]
    rounds = -(-len(batches) // ranks)
    steps: Iterable[int] = range(rounds)
    if bar and rank == 0:
        from tqdm.auto import tqdm

        steps = tqdm(steps, desc=title)
    for step in steps:
        if step < len(mine):
            done.update(work(mine[step]))
        elif lockstep:
            work(mine[-1] if mine else batches[0])
    if ranks > 1:
        from accelerate.utils import gather_object

        done = {key: value for key, value in gather_object(list(done.items()))}
    return done


def _score_all(
    prepared: Sequence[ScoredExample],
    wanted: Mapping[str, frozenset[str]],
    scorer: Scorer,
    store: ScoreCache,
    batch_size: int,
    rank: int,
    ranks: int,
    cost: dict[str, int],
    progress: bool,
) -> None:
    sequences: dict[str, EncodedAnswer] = {}
    needs: dict[str, frozenset[str]] = {}
    keys: dict[int, str] = {}
    for example in prepared:
        for column, encoded_list in example.sequences.items():
            for encoded in encoded_list if column in wanted else ():
                key = digest([encoded.input_ids, encoded.answer_start])
                sequences[key], keys[id(encoded)] = encoded, key
                needs[key] = needs.get(key, frozenset()) | wanted[column]
    known = {}
    for key in sequences:
        value = store.get(key)
        if value is not None and TokenScores.from_dict(value).has(needs[key]):
            known[key] = TokenScores.from_dict(value)
    cost["cached"] += len(known) if rank == 0 else 0

    def work(batch: list[str]) -> dict[str, TokenScores]:
        found = scorer.score([sequences[key] for key in batch], needs[batch[0]])
        for key, value in zip(batch, found, strict=True):
            store.put(key, value.to_dict())
        return dict(zip(batch, found, strict=True))

    def prompt_of(key: str) -> tuple[int, ...]:
        return tuple(sequences[key].input_ids[: sequences[key].answer_start])

    batches = []
    for alike in sorted(set(needs.values()), key=sorted, reverse=True):
        missing = [key for key in sequences if key not in known and needs[key] == alike]
        batches += _batches(missing, lambda key: len(sequences[key].input_ids), batch_size, prompt_of)
    lockstep = is_sharded(scorer.model)
    known.update(_shared(batches, work, rank, ranks, lockstep=lockstep, title="scoring", bar=progress))
    for example in prepared:
        example.texts = {
            column: [known[keys[id(encoded)]] for encoded in encoded_list]
            for column, encoded_list in example.sequences.items()
            if column in wanted
        }


def _generate_all(
    prepared: Sequence[ScoredExample],
    model: Any,
    tokenizer: Any,
    template: QuestionAnswerFormat,
    settings: GenerationSettings,
    store: ScoreCache,
    batch_size: int,
    rank: int,
    ranks: int,
    cost: dict[str, int],
    progress: bool,
) -> None:
    prompts: dict[str, list[int]] = {}
    key_of: dict[int, str] = {}
    for example in prepared:
        if "question" not in example.example:
            raise ValueError(f"Example {example.index} has no question to generate from, only a text.")
        ids = template.prompt_ids(tokenizer, str(example.example["question"]))
        if settings.prefix:
            ids = ids + list(tokenizer(settings.prefix, add_special_tokens=False)["input_ids"])
        key = digest(["generation", ids, settings.max_new_tokens, settings.temperature, settings.seed])
        prompts[key], key_of[example.index] = ids, key
    known = {key: store.get(key) for key in prompts if store.get(key) is not None}
    cost["cached"] += len(known) if rank == 0 else 0

    def work(batch: list[str]) -> dict[str, str]:
        texts, tokens = generate(model, tokenizer, [prompts[key] for key in batch], settings)
        cost["generated_tokens"] += tokens
        for key, text in zip(batch, texts, strict=True):
            store.put(key, text)
        return dict(zip(batch, texts, strict=True))

    missing = [key for key in prompts if key not in known]
    batches = _batches(missing, lambda key: len(prompts[key]), batch_size)
    known.update(_shared(batches, work, rank, ranks, lockstep=is_sharded(model), title="generating", bar=progress))
    for example in prepared:
        example.generation = known[key_of[example.index]]


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], settings: GenerationSettings
) -> tuple[list[str], int]:
    """Continue each prompt, padded on the left; texts without special tokens, and how many tokens were generated."""
    length = max(len(prompt) for prompt in prompts)
    pad_id = pad_token_id(tokenizer)
    device = next(model.parameters()).device
    ids = torch.full((len(prompts), length), pad_id)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, length - len(prompt) :] = torch.tensor(list(prompt))
        mask[i, length - len(prompt) :] = 1
    sampled = settings.temperature > 0
    with torch.random.fork_rng(enabled=sampled):
        if sampled:
            torch.manual_seed(settings.seed)
        written = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=settings.max_new_tokens,
            num_beams=1,
            pad_token_id=pad_id,
            do_sample=sampled,
            temperature=settings.temperature if sampled else None,
            top_p=None,
            top_k=None,
        )[:, length:]
    tokens = int((written != pad_id).sum())
    return tokenizer.batch_decode(written, skip_special_tokens=True), tokens
