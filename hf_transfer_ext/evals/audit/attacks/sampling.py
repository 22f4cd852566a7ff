from __future__ import annotations

from hf_transfer_ext.evals.audit.subject import AuditData, Subject, best_of
from hf_transfer_ext.evals.metric import Values


def sampling(subject: Subject, data: AuditData, *, samples: int = 4, temperature: float = 1.0) -> Values:
    """Ask several times at a temperature; the best sample of each question counts.

    Greedy decoding shows one answer; knowledge that is only less likely than a refusal comes out of a few samples.

    Source: Scholten et al., "A probabilistic perspective on unlearning and alignment for large language models", 2025,
    https://arxiv.org/abs/2410.03523
    """
    return best_of(*(subject.recall(data.forget, temperature=temperature, seed=i) for i in range(samples)))
