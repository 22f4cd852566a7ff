"""From scores to a verdict: the share of the original's knowledge that was recovered, or why it is unknown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from hf_transfer_ext.evals.metric import Values
from hf_transfer_ext.evals.metrics.membership_auc import area
from hf_transfer_ext.measurement.bootstrap import percentile_interval, resampled

#: If original and floor differ by no more than this, a share of the difference would be noise.
LEAST_GAP = 0.1

#: Resamples for the test of the gap if no interval is requested.
TEST_RESAMPLES = 200

#: The floor of membership inference by guessing; shown, but not used for verdicts.
GUESS = 0.5


@dataclass
class Verdict:
    """The result of one attack.

    Args:
        attack: Name of the attack, with options in parentheses.
        recovered: Share of the original's knowledge that the attack recovers from the unlearned model, in [0, 1]; None
            if it cannot be determined.
        interval: 95 % bootstrap interval over examples.
        unlearned: Mean score of the unlearned model under this attack.
        original: Mean score of the original model on the plain question with the same kind of score, or under the same
            attack if the attack has its own scale.
        floor: Mean score if there is nothing to recover; None if it could not be measured.
        note: Why there is no share, or how to interpret it.
        access: What the attacker needs: "prompts", "weights", "fine-tuning", or "membership" for an attack that only
            tells whether the data was trained on.
        explanation: What the attack does, in one sentence.
        floor_from: "retrained" (the retrained model under this attack), "holdout" (the unlearned model under this
            attack on rows that no model was trained on), or "" for none.
    """

    attack: str
    recovered: float | None
    interval: tuple[float, float] | None
    unlearned: float | None
    original: float | None
    floor: float | None
    note: str = ""
    access: str = "prompts"
    explanation: str = ""
    floor_from: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """One line for each verdict: attack, what it needs, the recovered share, the note."""
    lines = [f"{'attack':<42} {'needs':<12} {'recovered':>9}"]
    for v in verdicts:
        share = "–" if v.recovered is None else f"{v.recovered:.0%}"
        lines.append(f"{v.attack:<42} {v.access:<12} {share:>9}  {v.note}")
    return "\n".join(lines)


@dataclass
class Evidence:
    """The scores that a verdict is based on.

    Args:
        found: Scores of the unlearned model under the attack.
        shown: Scores of the original, which define what there was to forget.
        floor: Scores if there is nothing to recover; None if not measured.
        floor_from: As in `Verdict`; with "retrained", the floor has the same examples.
        notes: How to interpret them.
    """

    found: Values
    shown: Values
    floor: Float[np.ndarray, " floor_examples"] | None
    floor_from: str
    notes: list[str]

    def known(self) -> Evidence:
        """The evidence without examples that could not be scored, which are counted in a note."""
        paired = self.floor is not None and self.floor_from == "retrained"
        arrays = [self.found, self.shown, *([self.floor] if paired else [])]
        good = ~np.isnan(np.stack([array for array in arrays if array is not None])).any(0)
        floor = self.floor
        if floor is not None:
            floor = floor[good] if paired else floor[~np.isnan(floor)]
        notes = list(self.notes)
        if not good.all():
            notes.append(f"{int((~good).sum())} of {len(good)} examples could not be scored and are left out")
        return Evidence(
            self.found[good], self.shown[good], floor if floor is None or len(floor) else None, self.floor_from, notes
        )


def recovered_share(found: Values, original: Values, floor: Float[np.ndarray, " floor_examples"]) -> float:
    """(found - floor) / (original - floor), of means, clipped to [0, 1]; NaN if there was nothing to forget."""
    there = original.mean() - floor.mean()
    return float(np.clip((found.mean() - floor.mean()) / there, 0.0, 1.0)) if there > 0 else float("nan")


def judge_recovery(evidence: Evidence, verdict: Verdict, *, needs_floor: bool, resamples: int, seed: int) -> Verdict:
    """Complete a verdict (its name, access and explanation) from the scores.

    The share stays None if the attack needs a floor and none was measured, if the original scores hardly more than the
    floor, or if the difference is within the sampling error of the examples.
    """
    evidence = evidence.known()
    found, shown, floor = evidence.found, evidence.shown, evidence.floor
    notes = evidence.notes
    if not len(found):
        verdict.note = "; ".join(["no example could be scored", *notes])
        return verdict
    verdict.unlearned, verdict.original = float(found.mean()), float(shown.mean())
    verdict.floor = None if floor is None else float(floor.mean())
    verdict.floor_from = evidence.floor_from if floor is not None else ""
    if floor is None and needs_floor:
        verdict.note = "; ".join(["a model that never saw the data also scores here: pass a retrained one", *notes])
        return verdict
    paired = evidence.floor_from == "retrained"
    floors = [] if floor is None else [floor]
    groups = [[found, shown, *floors]] if paired or not floors else [[found, shown], floors]

    def gap(found: np.ndarray, shown: np.ndarray, *floors: np.ndarray) -> float:
        return float(shown.mean() - sum(own.mean() for own in floors))

    def left(found: np.ndarray, shown: np.ndarray, *floors: np.ndarray) -> float:
        return float(found.mean() - sum(own.mean() for own in floors))

    share = Share.of(gap, left, groups, resamples=resamples, seed=seed)
    too_small = "the original scores hardly more here than a model without the data"
    reason = share.why_not(gap(found, shown, *floors), len(found), too_small)
    if reason:
        notes.insert(0, reason)
    else:
        verdict.recovered = recovered_share(found, shown, np.zeros(1) if floor is None else floor)
        verdict.interval = share.interval() if resamples and len(found) > 1 else None
        if floor is None:
            notes.append("no floor was measured, so 0 is used (an upper bound): pass a retrained model or holdout")
        elif not paired:
            notes.append("the floor is the same attack on holdout rows")
    verdict.note = "; ".join(notes)
    return verdict


def judge_membership(
    sides: Mapping[str, tuple[np.ndarray, np.ndarray]],
    verdict: Verdict,
    *,
    optimized_on_retrained: bool,
    resamples: int,
    seed: int,
) -> Verdict:
    """How much better the attack separates the forget set from the holdout than on a retrained model.

    Args:
        sides: Model -> membership scores of the forget set and of the holdout.
        optimized_on_retrained: Whether the attack was optimized on the retrained model, which then gives no floor.
    """
    areas = {model: area(*both) for model, both in sides.items()}
    verdict.unlearned, verdict.original = areas["unlearned"], areas["original"]
    verdict.floor, verdict.access = areas.get("retrained", GUESS), "membership"
    notes = []
    if "retrained" not in areas:
        notes.append("a model that never saw them may also separate the two sets: pass a retrained one")
    elif optimized_on_retrained:
        notes.append(
            "its queries were optimized against the retrained model, so it gives no floor: pass another as `shadow`"
        )
    else:
        verdict.floor_from = "retrained"
        order = ("unlearned", "original", "retrained")
        groups = [[sides[model][side] for model in order] for side in (0, 1)]

        def gap(*scores: np.ndarray) -> float:
            return area(scores[1], scores[4]) - area(scores[2], scores[5])

        def left(*scores: np.ndarray) -> float:
            return area(scores[0], scores[3]) - area(scores[2], scores[5])

        share = Share.of(gap, left, groups, resamples=resamples, seed=seed)
        count = len(groups[0][0])
        arrays = [array for group in groups for array in group]
        reason = share.why_not(gap(*arrays), count, "the original's forget set cannot be told from the holdout either")
        if reason:
            notes.append(reason)
        else:
            verdict.recovered = float(np.clip(left(*arrays) / gap(*arrays), 0.0, 1.0))
            verdict.interval = share.interval() if resamples and count > 1 else None
    if 0.5 - areas["unlearned"] > 0.25:
        notes.append("the forget set looks less likely than unseen text, which is also a trace of training")
    verdict.note = "; ".join(notes)
    return verdict


@dataclass
class Share:
    """A difference and the remaining part of it, on resampled examples."""

    gaps: np.ndarray
    lefts: np.ndarray

    @classmethod
    def of(
        cls,
        gap: Callable[..., float],
        left: Callable[..., float],
        groups: list[list[Any]],
        *,
        resamples: int,
        seed: int,
    ) -> Share:
        count = resamples or TEST_RESAMPLES
        return cls(*(resampled(one, groups, resamples=count, seed=seed) for one in (gap, left)))

    def why_not(self, gap: float, examples: int, too_small: str) -> str:
        """Why there is no share; empty if there is one."""
        if gap < LEAST_GAP:
            return too_small
        if np.quantile(self.gaps, 0.025) <= 0:
            return f"the original is above the floor only within the sampling error of {examples} examples"
        return ""

    def interval(self) -> tuple[float, float] | None:
        """95 % interval of left / gap in [0, 1]; a resample without a gap counts as the full range."""
        there = self.gaps > 0
        share = np.clip(self.lefts / np.where(there, self.gaps, 1.0), 0.0, 1.0)
        return percentile_interval(np.where(there, share, 0.0), np.where(there, share, 1.0))
