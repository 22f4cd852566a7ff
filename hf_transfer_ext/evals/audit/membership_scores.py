"""One membership score of every row, from a metric or from an attack of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hf_transfer_ext.evals.audit.membership import MEMBERSHIP_ATTACKS, MEMBERSHIP_METRICS
from hf_transfer_ext.evals.audit.references import References
from hf_transfer_ext.evals.audit.subject import Row, Subject
from hf_transfer_ext.evals.metric import Values
from hf_transfer_ext.models.heads import causal_lm_of

#: Scores that one forward pass gives together; `References.made` keeps them, so one `References` is for one audit.
ONE_PASS = ("loss_attack", "zlib_attack", "min_k", "min_k_plus_plus")


def membership_scores(
    name: str, subject: Subject, rows: Sequence[Row], references: References, **options: Any
) -> Values:
    """Score of each row, higher for "not trained on"; NaN where a row cannot be scored.

    Raises:
        ValueError: The attack is not known, needs a retrained model and there is none, or can score no row.
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
    """Within the block gradients are taken for the weights of the last layer alone: a short way back for each row."""
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
