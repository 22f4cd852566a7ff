"""Attack an unlearned model, the original and a retrained one in the same way, and say how much came back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hf_transfer_ext.evals.audit.attacks import ATTACKS
from hf_transfer_ext.evals.audit.subject import AuditData, Subject
from hf_transfer_ext.evals.engine import evaluate
from hf_transfer_ext.evals.measurement import Measurement
from hf_transfer_ext.evals.metric import Values
from hf_transfer_ext.evals.metrics.membership_auc import membership_auc

#: Membership scores that one pass gives; a higher score means "was not trained on".
MEMBERSHIP = ("loss_attack", "zlib_attack", "min_k", "min_k_plus_plus")

#: Attacks whose score a model earns that never knew, too: shown, and never counted as recovery without a reference.
NEEDS_RETRAINED = ("in_context",)

AttackSpec = str | Mapping[str, Any] | tuple[str, Mapping[str, Any]]


@dataclass
class Verdict:
    """What one attack brought back.

    Args:
        attack: Its name, with options in brackets.
        recovered: Share of the original's knowledge that the attack finds in the unlearned model, in [0, 1]; None
            where it cannot be told.
        interval: 95 % bootstrap interval over examples.
        unlearned: Mean score of the unlearned model under this attack.
        original: Mean score of the original model, asked plainly in the same way of scoring.
        floor: Mean score of the retrained model under this attack; None where there is none (0 is taken).
        note: Why it was left out, or how to read it.
    """

    attack: str
    recovered: float | None
    interval: tuple[float, float] | None
    unlearned: float | None
    original: float | None
    floor: float | None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Audit:
    """All verdicts, the worst first; scores of every example under every attack; membership inference."""

    verdicts: list[Verdict]
    scores: dict[str, Values]
    membership: list[Measurement]

    @property
    def worst(self) -> Verdict | None:
        """The attack that brought most back."""
        return next((v for v in self.verdicts if v.recovered is not None), None)


def audit(
    unlearned: Subject,
    data: AuditData,
    *,
    original: Subject,
    retrained: Subject | None = None,
    attacks: Sequence[AttackSpec] = tuple(ATTACKS),
    resamples: int = 1000,
    seed: int = 0,
) -> Audit:
    """Run every attack on the unlearned model (and on a retrained one), and relate it to the original.

    Args:
        original: The model before unlearning: what there was to forget.
        retrained: A model that never saw the forget set, given the same treatment: what nobody has to forget. Without
            it the floor is 0, so that words any answer has in common with its question count as recovered.
        attacks: Names, or names with options: `["sampling", {"quantization": {"bits": 8}}]`.

    Raises:
        ValueError: An attack that is not known, or no example. An attack that does not apply (no adapter to remove)
            is noted in its verdict instead.
    """
    chosen = [_resolve(spec) for spec in attacks]
    if not len(data.forget):
        raise ValueError("There is no forget example to audit.")
    plain = {
        "plain_question": ATTACKS["plain_question"](original, data),
        "plain_generation": ATTACKS["plain_generation"](original, data) if _any_generation(chosen) else None,
    }
    verdicts, scores = [], {}
    for name, options in chosen:
        label = name + (f"({', '.join(f'{k}={v}' for k, v in sorted(options.items()))})" if options else "")
        try:
            found = ATTACKS[name](unlearned, data, **options)
            floor = None
            if retrained is not None and name != "adapter_removal":  # a retrained model has no adapter that unlearned
                floor = ATTACKS[name](retrained, data, **options)
        except ValueError as error:
            verdicts.append(Verdict(label, None, None, None, None, None, str(error)))
            continue
        scores[label] = found
        reached = plain["plain_generation" if name in GENERATED else "plain_question"]
        verdicts.append(_verdict(label, name, found, reached, floor, resamples, seed))
    verdicts.sort(key=lambda v: -1.0 if v.recovered is None else v.recovered, reverse=True)
    membership = _membership(unlearned, data, seed) if len(data.holdout) else []
    return Audit(verdicts, scores, membership)


#: Attacks that score what is generated; the others score the probability of the answer.
GENERATED = ("plain_generation", "prefix_injection", "sampling")


def _any_generation(chosen: Sequence[tuple[str, dict[str, Any]]]) -> bool:
    return any(name in GENERATED for name, _ in chosen)


def _resolve(spec: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(spec, Mapping) and len(spec) == 1:
        spec = next(iter(spec.items()))
    name, options = (spec, {}) if isinstance(spec, str) else spec
    ATTACKS[name]
    return name, dict(options or {})


def recovered_share(found: Values, original: Values, floor: Values) -> float:
    """(found - floor) / (original - floor), of means, within [0, 1]; NaN where there was nothing to forget."""
    there = original.mean() - floor.mean()
    return float(np.clip((found.mean() - floor.mean()) / there, 0.0, 1.0)) if there > 0 else float("nan")


def _verdict(label: str, name: str, found: Values, original: Any, floor: Any, resamples: int, seed: int) -> Verdict:
    found, original = np.nan_to_num(found), np.nan_to_num(original)
    base = np.zeros_like(found) if floor is None else np.nan_to_num(floor)
    means = (float(found.mean()), float(original.mean()), None if floor is None else float(base.mean()))
    if name in NEEDS_RETRAINED and floor is None:
        return Verdict(label, None, None, *means, note="a model that never knew scores here too: give a retrained one")
    share = recovered_share(found, original, base)
    if np.isnan(share):
        note = "the original shows nothing here that a model without the data does not show"
        return Verdict(label, None, None, *means, note=note)
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(found), size=(resamples, len(found)))
    drawn = [recovered_share(found[d], original[d], base[d]) for d in draws]
    interval = None
    if len(drawn) and not np.isnan(drawn).all():
        low, high = np.nanquantile(drawn, [0.025, 0.975])
        interval = (float(low), float(high))
    return Verdict(label, share, interval, *means)


def _membership(subject: Subject, data: AuditData, seed: int) -> list[Measurement]:
    """AUC of each membership score: the forget set against a holdout of the same kind."""
    options = {"template": subject.template, "batch_size": subject.batch_size, "accelerator": subject.accelerator}
    sides = [
        evaluate(subject.model, subject.tokenizer, rows, list(MEMBERSHIP), resamples=0, **options).values
        for rows in (data.forget, data.holdout)
    ]
    return [membership_auc(sides[0][n], sides[1][n], name=f"membership_auc({n})", seed=seed) for n in MEMBERSHIP]
