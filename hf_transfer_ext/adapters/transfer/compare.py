"""How much of an adapter a transfer keeps, always next to the controls that a reader needs to judge the number."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from hf_transfer_ext.adapters.transfer.by_training import load_base, train_lora
from hf_transfer_ext.adapters.transfer.method import LinearPair, product_norm, transfer_method
from hf_transfer_ext.adapters.transfer.run import transfer_lora
from hf_transfer_ext.adapters.transfer.trans_lora import TransLoraSettings
from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.evals.adapters import with_adapters
from hf_transfer_ext.evals.engine.evaluate import evaluate
from hf_transfer_ext.evals.metrics.retention import retention
from hf_transfer_ext.hub.table import comparison_table
from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.measurement.bootstrap import interval_of
from hf_transfer_ext.models.loading import load_tokenizer
from hf_transfer_ext.weights.lora import LoraFactors
from hf_transfer_ext.weights.reference import parse_reference

#: Score of each test example, 0 to 1: 1 where the model answers it correctly.
Scores = Float[np.ndarray, " examples"]

SOURCE_BASE, SOURCE_ADAPTED, TARGET_BASE = "source base", "source adapter", "target base"
#: Names of the controls.
COPY, RANDOM, TRUE_DATA = "copy", "random", "true data"


@dataclass(frozen=True)
class TransferRow:
    """One model on the test examples.

    Args:
        accuracy: Mean score (the share answered correctly, where scores are 0 or 1), with a 95 % interval.
        retention: Share of the source adapter's gain that the target has with this adapter.
        negative_flips: Share of examples that the source answers correctly with its adapter, and this model does not.
    """

    name: str
    accuracy: Measurement
    retention: Measurement | None = None
    negative_flips: Measurement | None = None


@dataclass(frozen=True)
class TransferComparison:
    """What was measured.

    Args:
        scores: Model name -> score of each example; the names of both bases and of the source adapter are
            `SOURCE_BASE`, `SOURCE_ADAPTED` and `TARGET_BASE`.
        not_measured: Control (or retention) -> why it is missing.
    """

    scores: dict[str, Scores]
    not_measured: dict[str, str] = field(default_factory=dict)

    def rows(self) -> list[TransferRow]:
        return transfer_rows([self.scores], need_gain=False)

    def measured(self, dataset: str | None = None) -> dict[str, list[Measurement]]:
        """Model name -> its measurements, for a card.

        Args:
            dataset: Name of the test data.
        """
        return {
            row.name: [
                replace(one, dataset=dataset)
                for one in (row.accuracy, row.retention, row.negative_flips)
                if one is not None
            ]
            for row in self.rows()
        }

    def lines(self) -> list[str]:
        """The comparison as lines for a terminal: a table, and what is missing from it."""
        table = comparison_table(self.measured()).splitlines()
        return [*table, *(f"not measured: {name}: {reason}" for name, reason in self.not_measured.items())]


def compare_transfer(
    source_base: str | Path,
    source_adapter: str | Path,
    target_base: str | Path,
    adapters: Mapping[str, str | Path],
    examples: Sequence[Mapping[str, str]],
    work: str | Path,
    *,
    true_rows: Sequence[Mapping[str, str]] | None = None,
    settings: TransLoraSettings | None = None,
    template: QuestionAnswerFormat | None = None,
    score: Callable[[Any, Any], Scores] | None = None,
    dtype: str = "auto",
    batch_size: int = 32,
) -> TransferComparison:
    """Measure transferred adapters next to the target base alone, a copy, random factors and training on the data.

    Args:
        adapters: Name -> folder of an adapter for the target base.
        examples: Test examples with `question` and `answer`.
        work: Folder for the adapters of the controls; those that are there are not made again.
        true_rows: The task's own training data; without it, that control is missing.
        settings: Of the training on the true data: the same as for the transfer, so that the two compare.
        score: `(model, tokenizer) -> scores`; by default 1 where greedy decoding gives exactly the answer, else 0.
        dtype: In which the models are measured and the control is trained.

    Returns:
        The score of every model on each example. A copy is refused, and listed as not measured, where shapes
        differ.
    """
    settings, work = settings or TransLoraSettings(), Path(work)
    reserved = {SOURCE_BASE, SOURCE_ADAPTED, TARGET_BASE, COPY, RANDOM, TRUE_DATA}
    if reserved & set(adapters):
        raise ValueError(f"{sorted(reserved & set(adapters))[0]!r} is the name of a control. Rename the adapter.")
    measure = score or (
        lambda model, tokenizer: answered_exactly(model, tokenizer, examples, template=template, batch_size=batch_size)
    )
    not_measured: dict[str, str] = {}
    controls: dict[str, Path] = {}
    for name, method in ((COPY, COPY), (RANDOM, random_of_same_norm)):
        folder = work / f"control-{name}"
        try:
            if not (folder / "adapter_config.json").is_file():
                options = {"seed": settings.seed} if name == RANDOM else {}
                transfer_lora(
                    source_adapter, target_base, folder, method=method, options=options, source_base=source_base,
                    force=True,
                )  # fmt: skip
            controls[name] = folder
        except ValueError as error:
            not_measured[name] = str(error)
    if true_rows is None:
        not_measured[TRUE_DATA] = "no training data was given"
    else:
        controls[TRUE_DATA] = work / "control-true-data"
        if not (controls[TRUE_DATA] / "adapter_config.json").is_file():
            tokenizer = _tokenizer(target_base)
            tuned = train_lora(
                target_base, tokenizer, true_rows, work, settings, template=template, dtype=dtype, name="true-data"
            )
            tuned.save_pretrained(str(controls[TRUE_DATA]))
            del tuned
    scores = {
        SOURCE_BASE: _measured(source_base, None, measure, dtype),
        SOURCE_ADAPTED: _measured(source_base, source_adapter, measure, dtype),
        TARGET_BASE: _measured(target_base, None, measure, dtype),
    }
    for name, adapter in {**controls, **adapters}.items():
        scores[name] = _measured(target_base, adapter, measure, dtype)
    if not _gain(scores) > 0:
        not_measured["retention"] = (
            f"the source adapter gains nothing on the test data: its accuracy is {scores[SOURCE_ADAPTED].mean():.3g}, "
            f"and {scores[SOURCE_BASE].mean():.3g} without it"
        )
    return TransferComparison(scores, not_measured)


def _gain(scores: Mapping[str, Scores]) -> float:
    return float(scores[SOURCE_ADAPTED].mean() - scores[SOURCE_BASE].mean())


def transfer_rows(runs: Sequence[Mapping[str, Scores]], *, need_gain: bool = True) -> list[TransferRow]:
    """The table of one run, or of several that differ in the seed and share the test examples.

    Numbers are means over the runs. Intervals draw the examples again, the same ones in every run: they do not cover
    the seeds.

    Args:
        need_gain: Refuse a source adapter that gains nothing; without it, the rows then have no retention.

    Raises:
        ValueError: The source adapter gains nothing, and `need_gain` is on.
    """
    examples = len(runs[0][SOURCE_BASE])

    def over(statistic: Callable[..., float], *names: str) -> tuple[float, tuple[float, float] | None]:
        """Mean of `statistic` over the runs, and its interval over the examples."""
        columns = [run[name] for run in runs for name in names]

        def mean(*drawn: np.ndarray) -> float:
            groups = (drawn[i : i + len(names)] for i in range(0, len(drawn), len(names)))
            return float(np.mean([statistic(*group) for group in groups]))

        interval = interval_of(mean, [columns])
        return mean(*columns), interval if interval is None or np.isfinite(interval).all() else None

    def gain_kept(source: np.ndarray, adapted: np.ndarray, target: np.ndarray, moved: np.ndarray) -> float:
        gain = adapted.mean() - source.mean()
        return float((moved.mean() - target.mean()) / gain) if gain > 0 else float("nan")

    rows = []
    for name in runs[0]:
        value, interval = over(lambda one: float(one.mean()), name)
        accuracy = Measurement("accuracy", value, "share of examples", True, examples, interval)
        if name in (SOURCE_BASE, SOURCE_ADAPTED, TARGET_BASE):
            rows.append(TransferRow(name, accuracy))
            continue
        share = None
        if need_gain or all(_gain(run) > 0 for run in runs):
            for run in runs:  # refuses a source adapter without a gain, with the numbers
                retention(*(_accuracy(run[one]) for one in (SOURCE_BASE, SOURCE_ADAPTED, TARGET_BASE, name)))
            kept, interval = over(gain_kept, SOURCE_BASE, SOURCE_ADAPTED, TARGET_BASE, name)
            share = Measurement("retention", kept, "share of the source's gain", True, examples, interval)
        broken, interval = over(lambda old, new: float(((old == 1) & (new < 1)).mean()), SOURCE_ADAPTED, name)
        flips = Measurement("negative_flip_rate", broken, "share of examples", False, examples, interval)
        rows.append(TransferRow(name, accuracy, share, flips))
    return rows


def answered_exactly(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Mapping[str, str]],
    *,
    template: QuestionAnswerFormat | None = None,
    batch_size: int = 32,
) -> Scores:
    """1 where greedy decoding gives an example's answer word for word, its end included, else 0."""
    found = answer_tokens(model, tokenizer, examples, template=template, batch_size=batch_size)
    return (found == 1).astype(np.float64)  # every token of the answer is the most probable one


def answer_tokens(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Mapping[str, str]],
    *,
    template: QuestionAnswerFormat | None = None,
    batch_size: int = 32,
) -> Scores:
    """Share of each answer's tokens that are the most probable ones after the right tokens before them."""
    found = evaluate(
        model, tokenizer, examples, ["exact_memorization"], template=template, resamples=0, batch_size=batch_size
    )
    return next(iter(found.values.values()))


def random_like(factors: LoraFactors, generator: torch.Generator) -> LoraFactors:
    """Gaussian factors of the same shape and rank, with a product of the same Frobenius norm: a control."""
    left = torch.randn(factors.left.shape, generator=generator)
    right = torch.randn(factors.right.shape, generator=generator)
    return _with_norm(LoraFactors(left, right), product_norm(factors))


@transfer_method()
def random_of_same_norm(layer: LinearPair, *, seed: int = 0) -> LoraFactors:
    r"""Random factors of the source's rank, with the norm that the change has relative to its weight at the source.

    .. math:: \lVert \Delta W_t \rVert = \lVert \Delta W_s \rVert \, \lVert W_t \rVert / \lVert W_s \rVert

    When to use it: as a control only. A transfer that is no better than this carried nothing of the adapter.

    Args:
        seed: Of the factors, together with the module's name.

    Source: this package's own.
    """
    digest = hashlib.sha256(f"{seed}/{layer.module}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    rank = layer.change.left.shape[1]
    left = torch.randn(layer.target.shape[0], rank, generator=generator)
    right = torch.randn(rank, layer.target.shape[1], generator=generator)
    norm = product_norm(layer.change) * float(layer.target.norm() / layer.source.norm())
    return _with_norm(LoraFactors(left, right), norm)


def _with_norm(factors: LoraFactors, norm: float) -> LoraFactors:
    own = product_norm(factors)
    return LoraFactors(factors.left * (norm / own if own > 0 else 0.0), factors.right)


def _accuracy(scores: Scores) -> Measurement:
    return Measurement("accuracy", float(scores.mean()), "share of examples", True, len(scores))


def _measured(
    base: str | Path, adapter: str | Path | None, measure: Callable[[Any, Any], Scores], dtype: str
) -> Scores:
    model = load_base(parse_reference(base, "base"), dtype)
    if adapter is not None:
        model = with_adapters(model, [adapter])[0]
    return measure(model.eval(), _tokenizer(base))


def _tokenizer(base: str | Path) -> Any:
    reference = parse_reference(base, "base")
    return load_tokenizer(reference.path, revision=reference.revision)
