from __future__ import annotations

from hf_transfer_ext.evals.metric import metric
from hf_transfer_ext.models.scoring import ScoredExample


@metric(unit="nats per unit of weight", higher_is_better=False, needs=("token_log_probs", "gradients"))
def gradient_norm(example: ScoredExample) -> float:
    """Membership score: L2 norm of the gradient of the mean loss over the trainable weights. Higher: "not trained on".

    With PEFT, these are the weights of the adapter only. Sequences share backward passes, and no weight's gradient is
    stored (`models.sample_gradients`); for a model whose weights are used in other ways (experts, recurrent layers,
    DoRA), a warning says so and each sequence has a backward pass of its own.

    Source: Wang et al., "Pandora's white-box: precise training data detection and extraction in large language
    models", 2024, https://arxiv.org/abs/2402.17012
    """
    norm = example.answer.gradient_norm
    if norm is None:
        raise ValueError("`gradient_norm` was not scored.")
    return norm
