"""Baselines of unlearning that change the prompt and no weight, for audits and evaluations: one file each.

A baseline is a function `baseline(forget, retain, template, *, seed, **options)` that returns the template with which
the original model is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

from hf_transfer_ext.data.forget_retain import forget_retain_rows
from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.evals.audit.subject import AuditData
from hf_transfer_ext.evals.baselines.in_context_unlearning import in_context_unlearning
from hf_transfer_ext.evals.options import check_options, name_and_options, options_of
from hf_transfer_ext.hub.record import RunRecord
from hf_transfer_ext.registry import Registry

BASELINES: Registry[Callable[..., QuestionAnswerFormat]] = Registry("baseline", [in_context_unlearning])

#: What a card and a report say of a model that is asked with such a template.
NOTHING_REMOVED = (
    "Nothing was removed: `{name}` is a baseline that changes the prompt alone. The weights are those of the "
    "original, and whoever writes the prompt, or has the weights, gets everything back."
)


def template_of(
    name: str,
    forget: Sequence[Mapping[str, Any]],
    retain: Sequence[Mapping[str, Any]],
    template: QuestionAnswerFormat,
    *,
    seed: int = 0,
    **options: Any,
) -> tuple[QuestionAnswerFormat, str]:
    """The template of a baseline, and the sentence for the card.

    Args:
        options: The baseline's own.

    Raises:
        ValueError: An unknown baseline or option, or rows that it cannot use.
    """
    check_options("baseline", name, options, _own_options(name))
    return BASELINES[name](forget, retain, template, seed=seed, **options), NOTHING_REMOVED.format(name=name)


def asked_with(
    baseline: Mapping[str, Any], template: QuestionAnswerFormat, record: RunRecord, *, suite: Any = None, seed: int = 0
) -> QuestionAnswerFormat:
    """The template of the baseline that a setting names, of which the record says that nothing was removed.

    Args:
        baseline: Empty for none, or `{"in_context_unlearning": {"forget_data": FILE, "correct": 4}}`: its own options
            and those of `forget_retain_rows`, which say where its rows come from.
        suite: What would be measured with prompts of its own, if anything.

    Raises:
        ValueError: As `template_of` and `forget_retain_rows`, or something has prompts of its own.
    """
    if not baseline:
        return template
    if suite:
        raise ValueError(
            f"`baseline` changes the prompt of `metrics`, and {suite!r} has prompts of its own. Leave one of them out."
        )
    name, options = name_and_options("baseline", baseline)
    own, places = _own_options(name), [*signature(forget_retain_rows).parameters]
    check_options("baseline", name, options, [*own, *places])
    where = {"forget_data": None, "seed": seed, **{key: value for key, value in options.items() if key in places}}
    rows = forget_retain_rows(**where)
    chosen = {key: value for key, value in options.items() if key in own}
    made, sentence = template_of(name, rows["forget"], rows["retain"], template, seed=seed, **chosen)
    record.not_measured.insert(0, sentence)
    return made


def audited_with(
    name: str,
    options: Mapping[str, Any],
    template: QuestionAnswerFormat,
    rows: AuditData,
    record: RunRecord,
    *,
    seed: int = 0,
) -> QuestionAnswerFormat | None:
    """The template of the baseline that is audited in place of an unlearned model; None where `name` is a model.

    Raises:
        ValueError: Options without a baseline, or as `template_of`.
    """
    if name not in BASELINES:
        if options:
            raise ValueError(
                f"`baseline_options` belong to one of {', '.join(BASELINES)} as `unlearned`, not {name!r}."
            )
        return None
    made, sentence = template_of(name, rows.forget, rows.retain, template, seed=seed, **options)
    record.not_measured.insert(0, sentence)
    return made


def _own_options(name: str) -> list[str]:
    return [option for option in options_of(BASELINES[name]) if option != "seed"]
