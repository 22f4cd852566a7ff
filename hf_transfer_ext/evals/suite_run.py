"""Run a suite on several models in turn, compare each with the first, and evaluate all of them as a sequence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from hf_transfer_ext.evals.options import check_options
from hf_transfer_ext.evals.suite import Suite, SuiteResult
from hf_transfer_ext.evals.suites import SUITES
from hf_transfer_ext.evals.text.text_models import entailment_classifier, sentence_encoder
from hf_transfer_ext.measurement import Measurement

#: Parameters of loaders and suites that are not options of the user.
FIXED = {"source", "model", "tokenizer", "sets", "options", "retrained", "before"}


class SuiteRun:
    """Loads the sets once and collects the result of each model.

    Args:
        name: Name of the suite.
        source: Hub id or local folder; None for the default Hub dataset of the suite.
        comparing: Whether to compare the other models with the first one.
        suite_options: Options of the suite, or of its loader. `encoder` and `entails` may be names of models.
        options: Options of all suites (`template`, `batch_size`, `limit`, ...).

    Raises:
        ValueError: Unknown suite or option, no source for a suite without a default dataset, or `comparing` for a
            suite that does not compare models.
    """

    def __init__(
        self,
        name: str,
        source: str | Path | None = None,
        *,
        comparing: bool = False,
        suite_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.suite: Suite = SUITES[name]
        source = source or self.suite.source
        if source is None:
            raise ValueError(f"The suite {name} has no dataset on the Hub: pass a folder with its data.")
        if comparing and self.suite.compares_with is None:
            raise ValueError(f"The suite {name} does not compare with another model: leave that model out.")
        self.role = self.suite.compares_with if comparing else None
        own = dict(suite_options or {})
        known = {*signature(self.suite.load).parameters, *signature(self.suite.run).parameters} - FIXED
        check_options("suite", name, own, known)
        self.sets = self.suite.load(
            source, **{option: own.pop(option) for option in signature(self.suite.load).parameters if option in own}
        )
        for option, load in (("encoder", sentence_encoder), ("entails", entailment_classifier)):
            if isinstance(own.get(option), str):
                own[option] = load(own[option])
        self.options = {**options, **own}
        self.results: dict[str, SuiteResult] = {}

    def evaluate(self, model: Any, tokenizer: Any, title: str, **options: Any) -> SuiteResult:
        """Evaluate one model; with `comparing`, later models are compared with the first."""
        against: dict[str, Any] = {}
        if self.role and self.results:
            against[self.role] = next(iter(self.results.values()))
        found = self.suite(model, tokenizer, self.sets, **against, **{**self.options, **options})
        self.results[title] = found
        return found

    def results_by_folder(
        self, model: Any, tokenizer: Any, title: str, adapter: str | None = None
    ) -> Iterator[tuple[str, SuiteResult]]:
        """The pair of folder name and result of `evaluate`."""
        yield title, self.evaluate(model, tokenizer, title, adapter=adapter)

    def together(self) -> tuple[list[Measurement], list[str]]:
        """Measurements of all models as a sequence (without a retrained one), and why any could not be computed."""
        own = list(self.results.items())[1 if self.role == "retrained" else 0 :]
        if self.suite.sequence is None or len(own) < 2:
            return [], []
        try:
            return self.suite.sequence(dict(own)), []
        except ValueError as error:
            return [], [f"{self.suite.__name__}: {error}"]
