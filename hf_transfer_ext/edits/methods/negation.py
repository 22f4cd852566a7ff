"""Negation: subtract what a fine-tune, or an adapter, learned."""

from __future__ import annotations

from typing import Any

from hf_transfer_ext.edits.method import Edited, edit_method
from hf_transfer_ext.edits.subject import Subject
from hf_transfer_ext.merging.method import Interval
from hf_transfer_ext.merging.planning.config import parse_config
from hf_transfer_ext.merging.planning.layout import plan_tensors
from hf_transfer_ext.weights.reference import ModelReference


@edit_method(needs=("tuned",), ranges={"strength": Interval(0)})
def negation(subject: Subject, *, strength: float = 1.0) -> Edited:
    r"""Take back a task vector: go from the model in the direction opposite to a fine-tune on what is to be forgotten.

    .. math:: \theta' = \theta - \lambda (\theta_{tuned} - \theta)

    It is task arithmetic with the weight -lambda, so the fine-tune may be a model or an adapter on the model, and the
    result of an adapter can be written as the negated adapter (`lora_rank`).

    When to use it: the knowledge can be taught further, on the forget set alone, and a quick first attempt is wanted.
    Utility falls with the strength; `retain_bound` of `apply_edit` looks for the largest one that a bound on the
    retain loss allows. Do not use it where forget and retain data share most of what the fine-tune learns.

    Args:
        strength: lambda, from 0 (nothing changes); 1 is the mirror image of the fine-tune, and published runs go up
            to 5.

    Returns:
        Jobs for all tensors, of which those that the fine-tune left alone stay as they are.

    Source: Editing models with task arithmetic, Ilharco et al. 2023, https://arxiv.org/abs/2212.04089
    """
    if strength == 0 or subject.tuned is None:
        return Edited()
    config = parse_config(
        {
            "merge_method": "task_arithmetic",
            "base_model": _mapping(subject.model.reference),
            "models": [{"model": _mapping(subject.tuned.reference), "parameters": {"weight": -float(strength)}}],
        }
    )
    models = {subject.model.reference: subject.model, subject.tuned.reference: subject.tuned}
    return Edited({job.name: job for job in plan_tensors(config, models)})


def _mapping(reference: ModelReference) -> dict[str, Any]:
    """A reference in the form that is read in one way only, whatever signs a folder's name holds."""
    model: dict[str, Any] = {"path": reference.path, "revision": reference.revision}
    if reference.lora is None:
        return model
    return {"model": model, "lora": {"path": reference.lora, "revision": reference.lora_revision}}
