"""Attack an unlearned model, the original and a retrained one in the same way, and say how much came back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from hf_transfer_ext.evals.audit.attack import Attack
from hf_transfer_ext.evals.audit.attacks import ATTACKS
from hf_transfer_ext.evals.audit.attacks.hidden_probe import probe_by_layer
from hf_transfer_ext.evals.audit.membership import MEMBERSHIP_ATTACKS, MEMBERSHIP_METRICS
from hf_transfer_ext.evals.audit.membership.references import References
from hf_transfer_ext.evals.audit.membership.scores import membership_scores
from hf_transfer_ext.evals.audit.subject import AuditData, Subject
from hf_transfer_ext.evals.audit.weight_distance import weight_distance
from hf_transfer_ext.evals.metric import Values
from hf_transfer_ext.evals.metrics.membership_auc import area, membership_auc
from hf_transfer_ext.measurement import Measurement

AttackSpec = str | Mapping[str, Any] | tuple[str, Mapping[str, Any]]

#: Where original and floor are no further apart than this, a share of what lies between them would be noise.
LEAST_GAP = 0.1


@dataclass
class Verdict:
    """What one attack brought back.

    Args:
        attack: Its name, with options in brackets.
        recovered: Share of the original's knowledge that the attack finds in the unlearned model, in [0, 1]; None
            where it cannot be told.
        interval: 95 % bootstrap interval over examples.
        unlearned: Mean score of the unlearned model under this attack.
        original: Mean score of the original model, asked plainly in the same way of scoring, or attacked in the same
            way where the score has a scale of its own.
        floor: Mean score of the retrained model under this attack, or of a guess where the attack knows what that
            earns; None where there is neither (0 is taken).
        note: Why it was left out, or how to read it.
        access: What the attacker needs: "prompts", "weights", "fine-tuning", or "membership" for an attack that tells
            only that the data was trained on.
    """

    attack: str
    recovered: float | None
    interval: tuple[float, float] | None
    unlearned: float | None
    original: float | None
    floor: float | None
    note: str = ""
    access: str = "prompts"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Audit:
    """All verdicts, the worst first.

    Args:
        verdicts: One for each attack.
        scores: Attack -> score of each forget example.
        membership: Model -> its measurements under each membership attack.
        probes: Model -> share of unseen rows above which a linear probe puts the forgotten ones, layer by layer.
        weights: How far the weights are from the original's.
    """

    verdicts: list[Verdict]
    scores: dict[str, Values]
    membership: dict[str, list[Measurement]] = field(default_factory=dict)
    probes: dict[str, list[float]] = field(default_factory=dict)
    weights: list[Measurement] = field(default_factory=list)

    @property
    def worst(self) -> Verdict | None:
        """The attack that brought most of the knowledge back; telling membership brings none back."""
        return next((v for v in self.verdicts if v.recovered is not None and v.access != "membership"), None)

    def worst_with(self, access: str) -> Verdict | None:
        """The attack that brought most back among those that need no more than `access`."""
        return next((v for v in self.verdicts if v.recovered is not None and v.access == access), None)

    def measurements(self) -> list[Measurement]:
        """The worst case and each verdict as measurements, for a card."""
        examples = len(next(iter(self.scores.values()))) if self.scores else 0
        unit = "share of the original's knowledge"
        judged = [v for v in self.verdicts if v.recovered is not None]
        named = [(f"recovered by {v.attack}", v) for v in judged]
        if self.worst is not None:
            named.insert(0, ("recovered at worst", self.worst))
        return [
            Measurement(name, float(v.recovered or 0.0), unit, False, examples, v.interval, "forget set")
            for name, v in named
        ]


def audit(
    unlearned: Subject,
    data: AuditData,
    *,
    original: Subject,
    retrained: Subject | None = None,
    attacks: Sequence[AttackSpec] = tuple(ATTACKS),
    membership: Sequence[AttackSpec] = (*MEMBERSHIP_METRICS, *MEMBERSHIP_ATTACKS),
    resamples: int = 1000,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Audit:
    """Run every attack on the unlearned model (and on a retrained one), and relate it to the original.

    Args:
        original: The model before unlearning: what there was to forget.
        retrained: A model that never saw the forget set, given the same treatment: what nobody has to forget. Without
            it the floor is 0, so that words any answer has in common with its question count as recovered.
        attacks: Names, or names with options: `["sampling", {"quantization": {"bits": 8}}]`.
        membership: The same for membership attacks, which need `data.holdout`.
        progress: Told the name of each attack before it is run.

    Raises:
        ValueError: An attack that is not known, or no example. An attack that does not apply (no adapter to remove)
            is noted in its verdict instead.
    """
    chosen = [_resolve(spec, ATTACKS.__getitem__) for spec in attacks]
    asked = [_resolve(spec, _membership_name) for spec in membership]
    if not len(data.forget):
        raise ValueError("There is no forget example to audit.")
    tell = progress or (lambda name: None)
    yardsticks: dict[str, Values] = {}

    def plain(name: str) -> Values:
        if name not in yardsticks:
            yardsticks[name] = ATTACKS[name](original, data)
        return yardsticks[name]

    verdicts, scores = [], {}
    for name, options in chosen:
        method = ATTACKS[name]
        label, note = method.label(options), ""
        tell(label)
        try:
            if method.fit is not None:
                options, note = method.fit(original, data, plain(method.yardstick or name), options)
            found = np.nan_to_num(method(unlearned, data, **options))
            own = method.yardstick is None or method.second_reading is not None
            attacked = np.nan_to_num(method(original, data, **options)) if own else None
            floor = method.chance(data) if method.chance is not None else None
            if retrained is not None and name != "adapter_removal":  # a retrained model has no adapter that unlearned
                floor = np.nan_to_num(method(retrained, data, **options))
        except ValueError as error:
            verdicts.append(Verdict(label, None, None, None, None, None, str(error), method.access))
            continue
        scores[label] = found
        if method.second_reading is not None and attacked is not None:
            note = method.second_reading(found, attacked)
        reached = np.nan_to_num(plain(method.yardstick)) if method.yardstick else attacked
        verdict = _verdict(label, method, found, reached, floor, resamples, seed)
        verdict.note = "; ".join(part for part in (verdict.note, note) if part)
        verdicts.append(verdict)
    subjects = {"unlearned": unlearned, "original": original}
    if retrained is not None:
        subjects["retrained"] = retrained
    references = References(original, retrained)
    told: dict[str, list[Measurement]] = {}
    for name, options in asked if len(data.holdout) else ():
        tell(f"membership: {name}")
        verdict, measured = _membership(name, options, subjects, data, references, resamples, seed)
        verdicts.append(verdict)
        for model, measurement in measured.items():
            told.setdefault(model, []).append(measurement)
    verdicts.sort(key=lambda v: -1.0 if v.recovered is None else v.recovered, reverse=True)
    probes = {}
    if any(ATTACKS["hidden_probe"].label(options) in scores for name, options in chosen if name == "hidden_probe"):
        probes = {model: probe_by_layer(subject, data)[1].mean(1).tolist() for model, subject in subjects.items()}
    return Audit(verdicts, scores, told, probes, weight_distance(unlearned.model, original.model))


def _membership_name(name: str) -> Any:
    return name if name in MEMBERSHIP_METRICS else MEMBERSHIP_ATTACKS[name]


def _resolve(spec: Any, look_up: Callable[[str], Any]) -> tuple[str, dict[str, Any]]:
    if isinstance(spec, Mapping) and len(spec) == 1:
        spec = next(iter(spec.items()))
    name, options = (spec, {}) if isinstance(spec, str) else spec
    look_up(name)
    return name, dict(options or {})


def recovered_share(found: Values, original: Values, floor: Values) -> float:
    """(found - floor) / (original - floor), of means, within [0, 1]; NaN where there was nothing to forget."""
    there = original.mean() - floor.mean()
    return float(np.clip((found.mean() - floor.mean()) / there, 0.0, 1.0)) if there > 0 else float("nan")


def _interval(drawn: Sequence[float]) -> tuple[float, float] | None:
    if not len(drawn) or np.isnan(drawn).all():
        return None
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def _verdict(
    label: str, method: Attack, found: Values, original: Any, floor: Any, resamples: int, seed: int
) -> Verdict:
    base = np.zeros_like(found) if floor is None else floor
    means = (float(found.mean()), float(original.mean()), None if floor is None else float(base.mean()))
    if method.needs_retrained and floor is None:
        note = "a model that never knew scores here too: give a retrained one"
        return Verdict(label, None, None, *means, note=note, access=method.access)
    share = recovered_share(found, original, base)
    if np.isnan(share) or original.mean() - base.mean() < LEAST_GAP:
        note = "the original shows hardly more here than a model without the data"
        return Verdict(label, None, None, *means, note=note, access=method.access)
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(found), size=(resamples, len(found)))
    drawn = [recovered_share(found[d], original[d], base[d]) for d in draws]
    return Verdict(label, share, _interval(drawn), *means, access=method.access)


def _membership(
    name: str,
    options: Mapping[str, Any],
    subjects: Mapping[str, Subject],
    data: AuditData,
    references: References,
    resamples: int,
    seed: int,
) -> tuple[Verdict, dict[str, Measurement]]:
    """How much better than a guess, or than on a retrained model, the forget set is told from a holdout."""
    told = ", ".join(f"{key}={value}" for key, value in sorted(options.items()))
    label = name + (f"({told})" if told else "")
    sides, measured = {}, {}
    try:
        for model, subject in subjects.items():
            both = membership_scores(name, subject, [*data.forget, *data.holdout], references, **options)
            sides[model] = (both[: len(data.forget)], both[len(data.forget) :])
            measured[model] = membership_auc(
                *sides[model], name=f"membership_auc({label})", resamples=resamples, seed=seed
            )
    except ValueError as error:
        return Verdict(label, None, None, None, None, None, str(error), "membership"), {}
    values = {model: m.value for model, m in measured.items()}
    floor = values.get("retrained", 0.5)
    means = (values["unlearned"], values["original"], floor)
    if values["original"] - floor < LEAST_GAP:
        note = "the original's forget set cannot be told from the holdout either"
        return Verdict(label, None, None, *means, note=note, access="membership"), measured

    def share(areas: Mapping[str, float]) -> float:
        there = areas["original"] - areas.get("retrained", 0.5)
        gone = areas["unlearned"] - areas.get("retrained", 0.5)
        return float(np.clip(gone / there, 0.0, 1.0)) if there > 0 else float("nan")

    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        inside = rng.integers(0, len(data.forget), len(data.forget))
        outside = rng.integers(0, len(data.holdout), len(data.holdout))
        drawn.append(share({model: area(ins[inside], outs[outside]) for model, (ins, outs) in sides.items()}))
    below = 0.5 - values["unlearned"] > 0.25
    note = "the forget set looks less likely than unseen text, which is a trace as well" if below else ""
    return Verdict(label, share(values), _interval(drawn), *means, note=note, access="membership"), measured
