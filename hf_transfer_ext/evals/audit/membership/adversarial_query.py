from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.evals.audit.references import References, optimized_on_retrained
from hf_transfer_ext.evals.audit.subject import Row, Subject
from hf_transfer_ext.evals.metric import Values
from hf_transfer_ext.models.plumbing import evaluation_mode, pad_token_id
from hf_transfer_ext.models.scoring import Batch


def losses_of(subject: Subject, batch: Batch, change: Float[Tensor, "batch length hidden"]) -> Float[Tensor, " batch"]:
    """Mean loss of each answer, in nats per token, with a perturbation of the embeddings of its question."""
    device = next(subject.model.parameters()).device
    embedded = subject.model.get_input_embeddings()(batch.input_ids.to(device))
    output = subject.model(
        inputs_embeds=embedded + change.to(embedded), attention_mask=batch.attention_mask.to(device), use_cache=False
    )
    log_p = output.logits[batch.rows.to(device)].float().log_softmax(-1)
    per_token = -log_p.gather(-1, batch.targets.to(device)[:, None])[:, 0]
    return torch.stack([part.mean() for part in per_token.split(batch.rows.sum(1).tolist())])


def optimized_change(
    references: References, batch: Batch, steps: int, radius: float
) -> Float[Tensor, "batch length hidden"]:
    """A perturbation of each question's embeddings that maximizes the loss difference of the two models."""
    original, untrained = references.original, references.untrained
    if untrained is None:
        raise ValueError("Adversarial queries need a retrained model to be optimized against.")
    with torch.no_grad():
        embedded = original.model.get_input_embeddings()(batch.input_ids)
    if untrained.model.get_input_embeddings().weight.shape != original.model.get_input_embeddings().weight.shape:
        raise ValueError("Adversarial queries need original and retrained models with embeddings of the same shape.")
    # Answers stay unchanged: only tokens before the first position that predicts an answer belong to the question.
    first = batch.rows.int().argmax(1)
    places = torch.arange(batch.input_ids.shape[1], device=first.device)[None] <= first[:, None]
    bound = radius * embedded.norm(dim=-1, keepdim=True).mean() * places[..., None]
    change = torch.zeros_like(embedded)
    for _ in range(steps):
        change.requires_grad_(True)
        gap = losses_of(original, batch, change) - losses_of(untrained, batch, change).to(change.device)
        (slope,) = torch.autograd.grad(gap.sum(), change)
        direction = slope / slope.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        change = (change - bound * direction * (2 / steps)).detach()
        length = change.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        change = change * (bound / length).clamp(max=1.0)
    return change.detach()


@optimized_on_retrained
def adversarial_query(
    subject: Subject, rows: Sequence[Row], references: References, *, steps: int = 3, radius: float = 0.3
) -> Values:
    """Loss of the answer to a question that was optimized to separate a trained from an untrained model.

    Gradient steps on the embeddings of the question decrease the loss of the original and increase that of a model
    without the forget set (`References.untrained`); the loss of the attacked model is then computed for the perturbed
    questions, for forgotten and unseen rows alike. The score of the second model on queries that were optimized
    against it is not a valid floor: a verdict needs two models without the forget set, `shadow` to optimize against
    and `retrained` as floor.

    Args:
        steps: Number of gradient steps, >= 1.
        radius: Maximum norm of the change of a token's embedding, as a share of the mean norm of embeddings.

    Raises:
        ValueError: There is no retrained model, or its embeddings have a different shape.

    Deviations: one original and one retrained model instead of many shadow models, one query per row instead of an
    ensemble, and queries in embedding space.

    Source: Wen et al., "Canary in a coalmine: better membership inference with ensembled adversarial queries", 2023,
    https://arxiv.org/abs/2210.10750
    """
    if references.untrained is None:
        raise ValueError("Adversarial queries need a retrained model to be optimized against.")
    if any(row.get("question") is None for row in rows):
        raise ValueError("Adversarial queries change the question, but there are rows without one.")
    if steps < 1 or radius <= 0:
        raise ValueError(f"`steps` must be at least 1 and `radius` > 0, got {steps} and {radius}.")
    encoded = [subject.template.encode(subject.tokenizer, str(row["question"]), str(row["answer"])) for row in rows]
    found = np.zeros(len(rows))
    order = sorted(range(len(rows)), key=lambda i: -len(encoded[i].input_ids))
    models = [subject.model, references.original.model, references.untrained.model]
    with evaluation_mode(*dict.fromkeys(models)):
        for at in range(0, len(order), subject.batch_size):
            chosen = order[at : at + subject.batch_size]
            device = next(references.original.model.parameters()).device
            batch = Batch.of([encoded[i] for i in chosen], pad_token_id(subject.tokenizer), device)
            key = ("adversarial_query", steps, radius, str([encoded[i].input_ids for i in chosen]))
            if key not in references.made:
                references.made[key] = optimized_change(references, batch, steps, radius)
            with torch.no_grad():
                found[chosen] = losses_of(subject, batch, references.made[key]).double().cpu().numpy()
    return found
