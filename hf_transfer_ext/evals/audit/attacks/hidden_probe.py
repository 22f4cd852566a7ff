from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float

from hf_transfer_ext.evals.audit.attack import attack
from hf_transfer_ext.evals.audit.subject import AuditData, Row, Subject
from hf_transfer_ext.evals.metric import Values
from hf_transfer_ext.models.plumbing import evaluation_mode, hidden_states, pad_token_id
from hf_transfer_ext.models.scoring import Batch

States = Float[np.ndarray, "examples layers hidden"]


def states_of_answers(subject: Subject, rows: Sequence[Row]) -> States:
    """Mean of the hidden states of each answer's tokens, after the embedding and after each layer."""
    encoded = [subject.encode(row) for row in rows]
    device = next(subject.model.parameters()).device
    found: list[np.ndarray] = [np.empty(0)] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: -len(encoded[i].input_ids))  # batches of similar length
    with evaluation_mode(subject.model), torch.no_grad():
        for at in range(0, len(order), subject.batch_size):
            chosen = order[at : at + subject.batch_size]
            batch = Batch.of([encoded[i] for i in chosen], pad_token_id(subject.tokenizer), device)
            # Run the whole (possibly wrapped) model, but with a head that does not project.
            _, output = hidden_states(
                subject.model, **batch.inputs_of(subject.model), use_cache=False, output_hidden_states=True
            )
            layers = output.hidden_states
            for place, i in enumerate(chosen):
                own = slice(encoded[i].answer_start, len(encoded[i].input_ids))
                found[i] = torch.stack([layer[place, own].double().mean(0) for layer in layers]).cpu().numpy()
    return np.stack(found)


def parts_of(rows: Sequence[Row], count: int) -> np.ndarray:
    """The fold of each row, from 0: rows about one `person` stay together, so that a probe cannot rely on names."""
    matters = [row.get("person", index) for index, row in enumerate(rows)]
    places = {matter: place for place, matter in enumerate(dict.fromkeys(matters))}
    return np.array([places[matter] % count for matter in matters])


def ridge_direction(
    known: Float[np.ndarray, "examples hidden"], unknown: Float[np.ndarray, "others hidden"], ridge: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean, deviation, weights) of a linear classifier by ridge regression; both classes have equal weight."""
    both = np.concatenate([known, unknown])
    mean, deviation = both.mean(0), both.std(0) + 1e-6
    inputs = (both - mean) / deviation
    sides = np.r_[np.full(len(known), 1 / len(known)), np.full(len(unknown), -1 / len(unknown))]
    # Solve in the space of examples, which are fewer than the dimensions: w = X' (X X' / d + ridge)^-1 y.
    weights = inputs.T @ np.linalg.solve(inputs @ inputs.T / inputs.shape[1] + ridge * np.eye(len(both)), sides)
    return mean, deviation, weights


def probe_by_layer(
    subject: Subject, data: AuditData, *, folds: int = 4, ridge: float = 0.1
) -> tuple[Float[np.ndarray, " layers"], Float[np.ndarray, "layers examples"]]:
    """Results of a linear probe for "was trained on", layer by layer.

    It is fitted to retained rows and rows that were never seen, on all folds but one; it then ranks the rows of the
    held-out fold and of the forget set.

    Returns:
        For each layer, how often the probe ranks a retained row above an unseen one (the area under its ROC curve);
        and for each layer and forget row, the share of unseen rows below it, in [0, 1]: .5 if it also looks unseen.
    """
    if len(data.retain) < 2 or len(data.holdout) < 2:
        raise ValueError(
            f"The probe needs retained rows and rows that were never seen: got {len(data.retain)} `retain` and "
            f"{len(data.holdout)} `holdout` rows."
        )
    kept, unseen = parts_of(data.retain, folds), parts_of(data.holdout, folds)
    folds = min(folds, int(kept.max()) + 1, int(unseen.max()) + 1)
    if folds < 2:
        raise ValueError("The probe needs retained and unseen rows about two persons each, for cross-validation.")
    kept, unseen = kept % folds, unseen % folds
    rows = [*data.forget, *data.retain, *data.holdout]
    states = states_of_answers(subject, rows)
    forget = states[: len(data.forget)]
    retain, holdout = states[len(data.forget) :][: len(data.retain)], states[len(rows) - len(data.holdout) :]
    layers = states.shape[1]
    area, above = np.zeros((folds, layers)), np.zeros((folds, layers, len(forget)))
    for fold in range(folds):
        for layer in range(layers):
            mean, deviation, weights = ridge_direction(
                retain[kept != fold, layer], holdout[unseen != fold, layer], ridge
            )
            score = [((part[:, layer] - mean) / deviation) @ weights for part in (retain, holdout, forget)]
            tried = score[1][unseen == fold]
            area[fold, layer] = _share_above(score[0][kept == fold], tried).mean()
            above[fold, layer] = _share_above(score[2], tried)
    return area.mean(0), above.mean(0)


def _share_above(scores: np.ndarray, others: np.ndarray) -> np.ndarray:
    return ((scores[:, None] > others).mean(1) + (scores[:, None] >= others).mean(1)) / 2


@attack(access="weights", yardstick=None, texts=True, needs_floor=True)
def hidden_probe(subject: Subject, data: AuditData, *, folds: int = 4, ridge: float = 0.1) -> Values:
    """Whether the hidden states of the answers still reveal that the model was trained on them.

    A linear probe learns to separate retained rows from rows that were never seen, and is then applied to the
    forgotten rows, in the layer that best separates retained from unseen rows of other people. A score is the share of
    unseen rows that rank below the forgotten row: 1 as if it were known, .5 as if it were unseen. The hidden states of
    a model that was never trained on any of the rows also separate them by their words, so a retrained model is
    required as floor.

    Args:
        folds: Number of folds; each is scored by a probe that was fitted to the others.
        ridge: Strength of the ridge penalty, > 0.

    Raises:
        ValueError: No `retain` or `holdout` rows, or rows about one person only.

    Source: Alain and Bengio, "Understanding intermediate layers using linear classifier probes", 2016,
    https://arxiv.org/abs/1610.01644; on unlearned models Patil et al., 2024, https://arxiv.org/abs/2309.17410
    """
    area, above = probe_by_layer(subject, data, folds=folds, ridge=ridge)
    return above[int(area.argmax())]
