"""Attack an unlearned model, the original and a retrained one in the same way, and report how much is recovered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from hf_transfer_ext.evals.audit.attack import Attack, explanation_of
from hf_transfer_ext.evals.audit.attacks import ATTACKS
from hf_transfer_ext.evals.audit.attacks.hidden_probe import probe_by_layer
from hf_transfer_ext.evals.audit.journal import Journal
from hf_transfer_ext.evals.audit.membership import MEMBERSHIP_ATTACKS, MEMBERSHIP_METRICS
from hf_transfer_ext.evals.audit.membership_scores import membership_scores
from hf_transfer_ext.evals.audit.references import References, is_optimized_on_retrained
from hf_transfer_ext.evals.audit.subject import AuditData, Subject, check_rows
from hf_transfer_ext.evals.audit.verdict import Evidence, Verdict, judge_membership, judge_recovery
from hf_transfer_ext.evals.audit.weight_distance import weight_distance
from hf_transfer_ext.evals.metric import Values
from hf_transfer_ext.evals.metrics import METRICS
from hf_transfer_ext.evals.metrics.membership_auc import membership_auc
from hf_transfer_ext.evals.options import check_options, label_with, name_and_options, options_of
from hf_transfer_ext.measurement import Measurement

AttackSpec = str | Mapping[str, Any] | tuple[str, Mapping[str, Any]]

#: (id of the subject, attack, options) -> the subject, which stays alive for its id, and its scores.
KnownScores: TypeAlias = dict[tuple[int, str, str], tuple[Subject, Values]]


@dataclass
class Audit:
    """All verdicts, worst first.

    Args:
        verdicts: One per attack.
        scores: Attack -> score of each forget example.
        membership: Model -> its measurements under each membership attack.
        probes: Model -> share of unseen rows that a linear probe ranks below the forgotten ones, by layer.
        weights: Distance of the weights from those of the original.
    """

    verdicts: list[Verdict]
    scores: dict[str, Values]
    membership: dict[str, list[Measurement]] = field(default_factory=dict)
    probes: dict[str, list[float]] = field(default_factory=dict)
    weights: list[Measurement] = field(default_factory=list)

    @property
    def worst(self) -> Verdict | None:
        """The attack that recovered most of the knowledge; membership attacks do not recover any."""
        return next((v for v in self.verdicts if v.recovered is not None and v.access != "membership"), None)

    def worst_with(self, access: str) -> Verdict | None:
        """The attack that recovered most among those that need exactly the access level `access`."""
        return next((v for v in self.verdicts if v.recovered is not None and v.access == access), None)

    def measurements(self) -> list[Measurement]:
        """The worst case and each verdict as measurements, for a model card."""
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
    shadow: Subject | None = None,
    attacks: Sequence[AttackSpec] = tuple(ATTACKS),
    membership: Sequence[AttackSpec] = (*MEMBERSHIP_METRICS, *MEMBERSHIP_ATTACKS),
    resamples: int = 1000,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    known: KnownScores | None = None,
    journal: str | Path | None = None,
) -> Audit:
    """Run every attack on the unlearned model (and on a retrained one), and compare with the original.

    Args:
        original: The model before unlearning, which defines what there was to forget.
        retrained: A model that never saw the forget set: attacked in the same way, it gives the floor of every attack.
            Without it, the floor is the same attack on `data.holdout`, and without that 0, as noted in the verdict.
        shadow: A second model that never saw the forget set. Attacks that are optimized against such a model, or build
            on one, use this one, so that the retrained one can give their floor.
        attacks: Names, or names with options: `["sampling", {"quantization": {"bits": 8}}]`.
        membership: Likewise for membership attacks, which need `data.holdout`, and `retrained` for a verdict.
        progress: Called with the name of each attack before it runs.
        known: Scores of the original and the retrained model, filled by this audit. Give the same dictionary to
            several audits with the same `data`, `original` and `retrained`: these are then attacked once.
        journal: Folder that keeps each finished attack, so that the same audit goes on after an interruption. Its
            entries are keyed by models, data and settings; the caller removes it.

    Raises:
        ValueError: An unknown attack or option, no example, a row that cannot be used, or a model whose logits are
            NaN: all before the first attack. If an attack does not apply (no adapter to remove), its verdict says so.
    """
    chosen = [_resolve_attack(spec) for spec in attacks]
    chosen_membership = [_resolve_membership(spec) for spec in membership]
    if not len(data.forget):
        raise ValueError("The forget set is empty: there is nothing to audit.")
    subjects = {"unlearned": unlearned, "original": original}
    if retrained is not None:
        subjects["retrained"] = retrained
    announce = progress or (lambda name: None)
    check_rows(subjects, data)
    campaign = Campaign(unlearned, original, retrained, data, {} if known is None else known, shadow)
    for model, subject in subjects.items():
        try:
            campaign.plain(subject, "plain_question")
        except ValueError as error:
            raise ValueError(f"The {model} model cannot be audited: {error}") from error
    involved = subjects if shadow is None else {**subjects, "shadow": shadow}
    finished = Journal(journal, involved, data, {"seed": seed, "resamples": resamples})
    verdicts, scores = [], {}
    for method, options in chosen:
        label = method.label(options)
        before = finished.attack(label)
        if before is not None:
            verdicts.append(before[0])
            if before[1] is not None:
                scores[label] = before[1]
            continue
        announce(label)
        verdict = Verdict(label, None, None, None, None, None, "", method.access, explanation_of(method))
        try:
            evidence = campaign.attack(method, options)
        except ValueError as error:
            verdict.note = str(error)
        else:
            scores[label] = evidence.found
            judge_recovery(evidence, verdict, needs_floor=method.needs_floor, resamples=resamples, seed=seed)
        verdicts.append(verdict)
        finished.note_attack(label, verdict, scores.get(label))
    references = References(original, retrained, shadow)
    areas: dict[str, list[Measurement]] = {}
    for name, options in chosen_membership if len(data.holdout) else ():
        label = label_with(name, options)
        judged = finished.membership(label)
        if judged is None:
            announce(f"membership: {name}")
            judged = _membership(name, options, subjects, data, references, resamples, seed)
            finished.note_membership(label, *judged)
        verdict, found = judged
        verdicts.append(verdict)
        for model, measurement in found.items():
            areas.setdefault(model, []).append(measurement)
    verdicts.sort(key=lambda v: -1.0 if v.recovered is None else v.recovered, reverse=True)
    probes = {}
    if any(name.split("(")[0] == "hidden_probe" for name in scores):
        probes = {model: probe_by_layer(subject, data)[1].mean(1).tolist() for model, subject in subjects.items()}
    return Audit(verdicts, scores, areas, probes, weight_distance(unlearned.model, original.model))


@dataclass
class Campaign:
    """The models and data of one audit; no attack runs twice on the same model.

    Args:
        known: Scores of all models but the unlearned one, which later audits may use.
        shadow: A second model that never saw the forget set, for attacks that need one of the auditor's own.
    """

    unlearned: Subject
    original: Subject
    retrained: Subject | None
    data: AuditData
    known: KnownScores = field(default_factory=dict)
    shadow: Subject | None = None
    _own: KnownScores = field(default_factory=dict)

    def attack(self, method: Attack, options: dict[str, Any]) -> Evidence:
        """Run one attack on all models that its verdict needs.

        Raises:
            ValueError: The attack does not apply to these models or data.
        """
        if not method.texts and not self.data.has_questions():
            raise ValueError("It needs rows with a question and an answer, but the forget set contains plain text.")
        notes = []
        if method.fit is not None:
            plain = self.plain(self.original, method.yardstick or method.__name__)
            options, note = method.fit(self.original, self.data, plain, options)
            notes.append(note)
        found = self.run(method, self.unlearned, options)
        shown = (
            self.plain(self.original, method.yardstick)
            if method.yardstick
            else self.run(method, self.original, options)
        )
        if method.second_reading is not None:
            notes.append(method.second_reading(found, self.run(method, self.original, options)))
        floor, floor_from = self.floor(method, options)
        return Evidence(found, shown, floor, floor_from, [note for note in notes if note])

    def floor(self, method: Attack, options: dict[str, Any]) -> tuple[Values | None, str]:
        """Scores if there is nothing to recover, and where they were measured."""
        if self.retrained is not None:
            if method.floor_attack is not None:
                return self.plain(self.retrained, method.floor_attack), "retrained"
            return self.run(method, self.retrained, options), "retrained"
        if len(self.data.holdout):
            unseen = replace(self.data, forget=self.data.holdout, holdout=())
            try:
                if method.texts or unseen.has_questions():
                    return self.scores(method, self.unlearned, unseen, options), "holdout"
            except ValueError:  # the holdout rows lack what the attack needs (wrong answers, two rows, ...)
                pass
        return None, ""

    def run(self, method: Attack, subject: Subject, options: dict[str, Any]) -> Values:
        key = (id(subject), method.__name__, repr(sorted(options.items())))
        scores = self._own if subject is self.unlearned else self.known
        if key not in scores:
            scores[key] = subject, self.scores(method, subject, self.data, options)
        return scores[key][1]

    def scores(self, method: Attack, subject: Subject, data: AuditData, options: dict[str, Any]) -> Values:
        """Scores of an attack, which gets the auditor's own model if it takes one."""
        own = {"untrained": self.shadow or self.retrained} if method.takes_untrained else {}
        return method(subject, data, **own, **options)

    def plain(self, subject: Subject, name: str) -> Values:
        """Scores of an attack without options."""
        return self.run(ATTACKS[name], subject, {})


def _resolve_attack(spec: Any) -> tuple[Attack, dict[str, Any]]:
    name, options = name_and_options("attack", spec)
    method = ATTACKS[name]
    check_options("attack", name, options, options_of(method.function))
    return method, options


def _resolve_membership(spec: Any) -> tuple[str, dict[str, Any]]:
    name, options = name_and_options("membership attack", spec)
    function = METRICS[name].per_example if name in MEMBERSHIP_METRICS else MEMBERSHIP_ATTACKS[name]
    check_options("membership attack", name, options, options_of(function))
    return name, options


def _membership(
    name: str,
    options: Mapping[str, Any],
    subjects: Mapping[str, Subject],
    data: AuditData,
    references: References,
    resamples: int,
    seed: int,
) -> tuple[Verdict, dict[str, Measurement]]:
    """The verdict of one membership attack, and the area under its ROC curve for each model."""
    label = label_with(name, options)
    method = METRICS[name] if name in MEMBERSHIP_METRICS else MEMBERSHIP_ATTACKS[name]
    verdict = Verdict(label, None, None, None, None, None, "", "membership", explanation_of(method))
    scores: dict[str, Values] = {}
    sides, found = {}, {}
    try:
        for model, subject in subjects.items():
            scores[model] = membership_scores(name, subject, [*data.forget, *data.holdout], references, **options)
        known = ~np.isnan(np.stack(list(scores.values()))).any(0)  # rows that have a score for every model
        places = np.arange(len(known))
        inside, outside = places[known & (places < len(data.forget))], places[known & (places >= len(data.forget))]
        for model, both in scores.items():
            sides[model] = (both[inside], both[outside])
            title = f"membership_auc({label})"
            found[model] = membership_auc(*sides[model], name=title, resamples=resamples, seed=seed)
    except ValueError as error:
        verdict.note = str(error)
        return verdict, {}
    optimized = is_optimized_on_retrained(method) and references.shadow is None
    return judge_membership(sides, verdict, optimized_on_retrained=optimized, resamples=resamples, seed=seed), found
