"""A suite on several models, one after the other: what each is compared with, and what all of them tell together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from hf_transfer_ext.evals.suite import Suite, SuiteResult
from hf_transfer_ext.evals.suites import SUITES
from hf_transfer_ext.evals.text.text_models import entailment_classifier, sentence_encoder
from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.registry import unknown_name

#: Parameters of loaders and suites that are no options of the user.
FIXED = {"source", "model", "tokenizer", "sets", "options", "retrained", "before"}


class SuiteRun:
    """Loads the sets once and keeps the result of each model.

    Args:
        name: Name of the suite.
        source: Hub id or local folder; None for the suite's own data set on the Hub.
        comparing: Whether the first model is the one that the others are compared with.
        suite_options: Options of the suite, or of its loader. `encoder` and `entails` may be names of models.
        options: What all suites take (`template`, `batch_size`, `limit`, ...).

    Raises:
        ValueError: Unknown suite or option, a suite without a data set of its own and no source, or one that compares
            nothing and was asked to.
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
            raise ValueError(f"The suite {name} has no data set of its own on the Hub: give a folder of its data.")
        if comparing and self.suite.compares_with is None:
            raise ValueError(f"The suite {name} compares with no other model: leave that model out.")
        self.role = self.suite.compares_with if comparing else None
        told = dict(suite_options or {})
        known = {*signature(self.suite.load).parameters, *signature(self.suite.run).parameters} - FIXED
        for option in told:
            if option not in known:
                raise ValueError(unknown_name(f"option of the suite {name}", option, known))
        self.sets = self.suite.load(
            source, **{option: told.pop(option) for option in signature(self.suite.load).parameters if option in told}
        )
        for option, load in (("encoder", sentence_encoder), ("entails", entailment_classifier)):
            if isinstance(told.get(option), str):
                told[option] = load(told[option])
        self.options = {**options, **told}
        self.results: dict[str, SuiteResult] = {}

    def measure(self, model: Any, tokenizer: Any, title: str, **options: Any) -> SuiteResult:
        """Measure one model; from the second on it is compared with the first, where that was asked for."""
        against: dict[str, Any] = {}
        if self.role and self.results:
            against[self.role] = next(iter(self.results.values()))
        found = self.suite(model, tokenizer, self.sets, **against, **{**self.options, **options})
        self.results[title] = found
        return found

    def measured(
        self, model: Any, tokenizer: Any, title: str, adapter: str | None = None
    ) -> Iterator[tuple[str, SuiteResult]]:
        """The one result of `measure`, with the name of its folder."""
        yield title, self.measure(model, tokenizer, title, adapter=adapter)

    def together(self) -> tuple[list[Measurement], list[str]]:
        """What the models tell in their order, and why something could not be told; a retrained model is not one."""
        own = list(self.results.items())[1 if self.role == "retrained" else 0 :]
        if self.suite.sequence is None or len(own) < 2:
            return [], []
        try:
            return self.suite.sequence(dict(own)), []
        except ValueError as error:
            return [], [f"{self.suite.__name__}: {error}"]
