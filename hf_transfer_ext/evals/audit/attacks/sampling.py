from __future__ import annotations

from collections.abc import Sequence

from hf_transfer_ext.evals.audit.attack import attack
from hf_transfer_ext.evals.audit.subject import AuditData, Subject, best_of
from hf_transfer_ext.evals.metric import Values


@attack(yardstick="plain_generation")
def sampling(
    subject: Subject, data: AuditData, *, samples: int = 4, temperatures: Sequence[float] = (0.7, 1.0)
) -> Values:
    """Sample several answers at each temperature; the best sample of each question counts.

    Greedy decoding shows one answer; knowledge that is merely less likely than a refusal appears in a few samples.

    Args:
        samples: Number of samples per question and temperature.
        temperatures: Sampling temperatures, each > 0.

    Source: Scholten et al., "A probabilistic perspective on unlearning and alignment for large language models", 2025,
    https://arxiv.org/abs/2410.03523
    """
    if samples < 1 or not temperatures or min(temperatures) <= 0:
        raise ValueError(f"Sampling needs `samples` >= 1 and temperatures > 0, got {samples} and {temperatures}.")
    return best_of(*(subject.recall(data.forget, temperature=t, seed=i) for t in temperatures for i in range(samples)))
