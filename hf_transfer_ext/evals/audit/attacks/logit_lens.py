from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float

from hf_transfer_ext.evals.audit.attack import attack
from hf_transfer_ext.evals.audit.subject import AuditData, Row, Subject
from hf_transfer_ext.evals.metric import Values
from hf_transfer_ext.models.heads import causal_lm_of
from hf_transfer_ext.models.plumbing import evaluation_mode, output_head

#: Names of the final norm before the head, within the decoder of each model family.
FINAL_NORMS = ("norm", "final_layernorm", "ln_f", "final_layer_norm", "final_norm")


def probability_by_layer(subject: Subject, row: Row) -> Float[np.ndarray, " layers"]:
    """Probability per token of the answer when the final norm and head are applied after each layer but the last."""
    causal = causal_lm_of(subject.model)
    decoder = getattr(causal, causal.base_model_prefix, None)
    norm = next((getattr(decoder, name) for name in FINAL_NORMS if hasattr(decoder, name)), None)
    if norm is None:
        raise ValueError(f"The final norm of {type(causal).__name__} is unknown: none of {', '.join(FINAL_NORMS)}.")
    encoded = subject.encode(row)
    ids = torch.tensor([encoded.input_ids], device=next(subject.model.parameters()).device)
    output = subject.model(
        input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, output_hidden_states=True
    )
    project, targets = output_head(subject.model), ids[0, encoded.answer_start :]
    found = []
    for hidden in output.hidden_states[1:-1]:
        rows = norm(hidden[0, encoded.answer_start - 1 : -1])
        log_p = project(rows).log_softmax(-1).gather(-1, targets[:, None])
        found.append(float(log_p.double().mean().exp()))
    return np.array(found)


@attack(access="weights", texts=True)
def logit_lens(subject: Subject, data: AuditData) -> Values:
    """Read the answer from the layers before the last one, where it may be present before it is suppressed.

    The best layer of each example counts.

    Raises:
        ValueError: The model has only one layer, or its final norm is unknown.

    Source: Patil et al., "Can sensitive information be deleted from LLMs?", 2024 (head projection attack),
    https://arxiv.org/abs/2309.17410
    """
    with evaluation_mode(subject.model), torch.no_grad():
        layers = [probability_by_layer(subject, row) for row in data.forget]
    if not layers[0].size:
        raise ValueError("There is no layer before the last one: the model has only one layer.")
    return np.stack(layers).max(1)
