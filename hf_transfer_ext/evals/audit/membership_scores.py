"""One membership score per row, from a metric or from a membership attack."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hf_transfer_ext.evals.audit.membership import MEMBERSHIP_ATTACKS, MEMBERSHIP_METRICS
from hf_transfer_ext.evals.audit.references import References
from hf_transfer_ext.evals.audit.subject import Row, Subject
from hf_transfer_ext.evals.metric import Values
from hf_transfer_ext.models.heads import causal_lm_of

#: Scores from one shared forward pass; `References.made` caches them, so use one `References` per audit.
ONE_PASS = ("loss_attack", "zlib_attack", "min_k", "min_k_plus_plus")


def membership_scores(
    name: str, subject: Subject, rows: Sequence[Row], references: References, **options: Any
) -> Values:
    """Score of each row, higher for "not trained on"; NaN if a row cannot be scored.

    Raises:
        ValueError: The attack is unknown, needs a retrained model and there is none, or cannot score any row.
    """
    if name not in MEMBERSHIP_METRICS:
        return MEMBERSHIP_ATTACKS[name](subject, rows, references, **options)
    if name in ONE_PASS and not options:
        key = ("one pass", id(subject.model))
        if key not in references.made:
            references.made[key] = subject.metric_values(rows, list(ONE_PASS))
        return references.made[key][name]
    settings: dict[str, Any] = {}
    if name == "reference_attack":
        if references.retrained is None:
            raise ValueError("The reference attack needs a retrained model to compare with.")
        settings["reference"] = references.retrained.model
    with last_layer_trainable(subject.model):
        values = next(iter(subject.metric_values(rows, [(name, options)], **settings).values()))
    return values


@contextmanager
def last_layer_trainable(model: Any) -> Iterator[None]:
    """Within the block, only the last layer is trainable, which keeps the backward pass of each row short."""
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    layers = getattr(getattr(causal_lm_of(model), causal_lm_of(model).base_model_prefix, None), "layers", None)
    chosen = set(map(id, layers[-1].parameters())) if layers is not None else set(map(id, model.parameters()))
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in chosen and parameter.is_floating_point())
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])
