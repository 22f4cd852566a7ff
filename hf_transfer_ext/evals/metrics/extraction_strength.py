from __future__ import annotations

from collections.abc import Sequence

from hf_transfer_ext.evals.metric import metric
from hf_transfer_ext.models.scoring import ScoredExample


def strength(first_choice: Sequence[bool]) -> float:
    """1 - k/n for the smallest k such that all tokens from k on are the first choice; 0 if the last one is not."""
    suffix = 0
    for hit in reversed(first_choice):
        if not hit:
            break
        suffix += 1
    return suffix / len(first_choice)


@metric(unit="share of tokens", higher_is_better=True)
def extraction_strength(example: ScoredExample) -> float:
    r"""Share of an answer that the model completes verbatim from the shortest sufficient beginning of it.

    .. math:: 1 - \frac{1}{n} \min \{ k : f(y_{<k+j}) = y_{k+j} \text{ for all } j < n - k \}

    1 if the prompt alone is sufficient, 0 if not even the last token is predicted. Greedy decoding follows the answer
    as long as every first choice is correct, so one teacher-forced pass is sufficient.

    Source: Carlini et al., "Extracting training data from large language models", 2021,
    https://arxiv.org/abs/2012.07805; in this form Wang et al., "Towards effective evaluations and comparisons for LLM
    unlearning methods", 2025, https://arxiv.org/abs/2406.09179
    """
    return strength(example.answer.first_choice.tolist())
