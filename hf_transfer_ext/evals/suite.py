"""Define suites: datasets that belong together, the metrics for each, and the results of a model on them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import update_wrapper
from inspect import signature
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.data.text import MissingSet, load_rows, read_rows
from hf_transfer_ext.evals.engine.evaluate import MetricSpec, evaluate_prepared, resolve_metrics
from hf_transfer_ext.evals.engine.examples import prepare
from hf_transfer_ext.evals.engine.result import EvaluationResult
from hf_transfer_ext.files import write_text
from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.models.generation import GenerationSettings
from hf_transfer_ext.reading import read_json

Rows = Sequence[Mapping[str, Any]]

#: Models that a suite may compare with: one that never saw the forget set, or the model before unlearning.
ROLES = ("retrained", "before")

#: The prompt is the question itself, without any template.
BARE = QuestionAnswerFormat(template="plain", prompt="{question}", separator="", end_of_sequence=False)


@dataclass
class SuiteResult:
    """The results of one model on one suite.

    Args:
        measurements: The measurements that the suite reports, most important first.
        sets: Set name -> the evaluation behind the measurements.
        notes: What could not be measured, and why.
    """

    measurements: list[Measurement]
    sets: dict[str, EvaluationResult]
    notes: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """The notes, and one sentence for each example of a set that a metric could not use."""
        return [
            *self.notes,
            *(f"{name}: {problem}" for name, result in self.sets.items() for problem in result.problems),
        ]

    def __getitem__(self, name: str) -> Measurement:
        """The measurement with this name."""
        found = [m for m in self.measurements if m.name == name]
        if len(found) != 1:
            raise KeyError(f"{name!r} is not one measurement of {[m.name for m in self.measurements]}.")
        return found[0]

    def save(self, folder: str | Path, *, per_example: str = "jsonl") -> Path:
        """Write `measurements.json`, and a folder for each set with its examples."""
        folder = Path(folder)
        for name, result in self.sets.items():
            result.save(folder / name.replace(" ", "_"), per_example=per_example)
        content = {"measurements": [m.to_dict() for m in self.measurements], "problems": self.problems}
        write_text(folder / "measurements.json", json.dumps(content, indent=2) + "\n")
        return folder


class Suite:
    """A function `(model, tokenizer, sets, **options) -> SuiteResult`, with a loader for its sets.

    Args:
        load: `(source, **options) -> sets`: from a Hub id or a local folder.
        source: Hub id of the published data; None if there is none.
        compares_with: Name of the option that takes the result of another model: "retrained" (a model that never saw
            the forget set) or "before" (the model before unlearning); None if nothing is compared.
        sequence: Function of the results of several models, by name and in order, for measurements that need all of
            them; None if there is none.
    """

    __name__: str

    def __init__(
        self,
        run: Callable[..., Any],
        *,
        load: Callable[..., Any],
        source: str | None = None,
        compares_with: str | None = None,
        sequence: Callable[[Mapping[str, Any]], list[Measurement]] | None = None,
    ) -> None:
        self.run, self.load, self.source = run, load, source
        self.compares_with, self.sequence = compares_with, sequence
        update_wrapper(self, run)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


def check_suite(suite: Any) -> None:
    """Refuse a suite that cannot be run by name; called by `SUITES.register`.

    Raises:
        ValueError: Not a `Suite`, a function without the arguments that every suite is called with, or without an
            argument for the result that it declares to compare with.
    """
    if not isinstance(suite, Suite):
        raise ValueError(
            f"Declare a suite with `@suite(load=...)` above a function (model, tokenizer, sets); got {suite!r}."
        )
    parameters = signature(suite.run).parameters
    for name in ("model", "tokenizer", "sets"):
        if name not in parameters:
            raise ValueError(
                f"The suite {suite.__name__} needs the argument {name!r}: it is called with (model, tokenizer, sets)."
            )
    if suite.compares_with not in (None, *ROLES):
        raise ValueError(
            f"The suite {suite.__name__} compares with {suite.compares_with!r}, but a suite can only compare with "
            f"{' or '.join(ROLES)}."
        )
    if suite.compares_with is not None and suite.compares_with not in parameters:
        raise ValueError(f"The suite {suite.__name__} compares with {suite.compares_with!r} but has no such argument.")


def suite(**declared: Any) -> Callable[[Callable[..., Any]], Suite]:
    """Decorator: `@suite(load=load_tofu, source="locuslab/TOFU")` above the function that evaluates one model."""
    return lambda run: Suite(run, **declared)


@dataclass(frozen=True)
class Part:
    """One dataset of a suite, with its metrics and settings.

    Args:
        rows: Examples in the schema of the engine.
        metrics: Names, or names with options.
        template: How to format questions as prompts; None for the template of the caller.
        generation: Settings for generating answers.
    """

    rows: Rows
    metrics: Sequence[MetricSpec]
    template: QuestionAnswerFormat | None = None
    generation: GenerationSettings | None = None


def evaluate_parts(
    name: str, model: Any, tokenizer: Any, parts: Mapping[str, Part], **options: Any
) -> dict[str, EvaluationResult]:
    """Evaluate every part; all examples of all parts are checked before the first forward pass.

    Raises:
        ValueError: An example cannot be measured; the message names suite, part and index.
    """
    shared = {key: value for key, value in options.items() if key not in ("template", "generation", "columns")}
    prepared, metrics = {}, {}
    for title, part in parts.items():
        metrics[title] = resolve_metrics(part.metrics, options.get("reference"))
        try:
            prepared[title] = prepare(
                model, tokenizer, part.rows, [m for m, _ in metrics[title]],
                template=part.template or options.get("template"), columns=options.get("columns"),
                generation=part.generation or options.get("generation"),
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"{name}, set {title!r}: {error}") from error
    return {
        title: evaluate_prepared(model, tokenizer, own, metrics[title], dataset=f"{name} {title}", **shared)
        for title, own in prepared.items()
    }


def renamed(measurement: Measurement, name: str, higher_is_better: bool | None = None) -> Measurement:
    """The measurement with a new name and, optionally, a new direction for its role in the suite."""
    better = measurement.higher_is_better if higher_is_better is None else higher_is_better
    return replace(measurement, name=name, higher_is_better=better)


def load_set(
    source: str | Path, name: str, *, files: Sequence[str], config: str | None = None, split: str = "train"
) -> list[dict[str, Any]]:
    """The rows of one set, from a Hub dataset (configuration and split) or from a file in a local folder.

    Args:
        files: Paths inside a local folder, without extension, in search order.

    Raises:
        MissingSet: The folder lacks the file, or the Hub dataset lacks the configuration or split.
        FileNotFoundError: The dataset does not exist.
        ValueError: The set exists but cannot be read, or is empty.
    """
    if not Path(source).is_dir():
        try:
            return load_rows(source, config_name=config, split=split)
        except MissingSet as error:
            raise MissingSet(f"The set {name!r} is missing from {str(source)!r}: {error}") from error
    path = _local_file(Path(source), files)
    if path is None:
        looked_for = ", ".join(f"{file}.json" for file in files)
        raise MissingSet(f"The set {name!r} is missing: no {looked_for} in {str(source)!r}.")
    return read_rows(path)


def load_json(source: str | Path, name: str, *, files: Sequence[str]) -> Any:
    """The content of one JSON file, from a local folder or from a dataset on the Hub.

    Raises:
        FileNotFoundError: None of `files` exists.
    """
    looked_for = ", ".join(f"{file}.json" for file in files)
    if Path(source).is_dir():
        path = next((p for f in files if (p := Path(source, f"{f}.json")).is_file()), None)
    else:
        path = None
        for file in files:
            try:
                path = Path(hf_hub_download(str(source), f"{file}.json", repo_type="dataset"))
                break
            except EntryNotFoundError:
                continue
            except (RepositoryNotFoundError, ValueError, OSError) as error:
                raise FileNotFoundError(
                    f"{str(source)!r} is neither a local folder nor a dataset that can be reached on the Hub "
                    f"({type(error).__name__}). Fix the name, or log in."
                ) from error
    if path is None:
        raise FileNotFoundError(f"The file with {name} is missing: no {looked_for} in {str(source)!r}.")
    return read_json(path, kind=None, max_bytes=None)


def load_optional_set(source: str | Path, name: str, **where: Any) -> list[dict[str, Any]] | None:
    """Like `load_set`, but None if the set does not exist. A set that exists but cannot be read is an error.

    Raises:
        FileNotFoundError, ValueError: As in `load_set`, except for a missing set.
    """
    try:
        return load_set(source, name, **where)
    except MissingSet:
        return None


def require_columns(name: str, rows: Rows, columns: Sequence[str]) -> None:
    """Refuse rows in which one of the columns is missing or empty.

    Raises:
        ValueError: The message names the set, the index of the example and the column.
    """
    for index, row in enumerate(rows):
        for column in columns:
            value = row.get(column)
            if value is None:
                raise ValueError(f"{name}: example {index} lacks the column {column!r}; it has {', '.join(row)}.")
            if isinstance(value, (str, list)) and not (value.strip() if isinstance(value, str) else value):
                raise ValueError(f"{name}: example {index} has an empty {column!r}.")


def _local_file(folder: Path, files: Sequence[str]) -> Path | None:
    for file in files:
        for path in (folder / f"{file}.json", folder / f"{file}.jsonl", folder / f"{file}.parquet"):
            if path.is_file():
                return path
        shards = sorted(folder.glob(f"{file}-00000-of-00001.parquet"))
        if shards:
            return shards[0]
    return None
