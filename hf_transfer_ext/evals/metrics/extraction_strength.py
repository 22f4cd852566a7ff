from __future__ import annotations

from collections.abc import Sequence

from hf_transfer_ext.evals.metric import metric
from hf_transfer_ext.models.scoring import ScoredExample


def strength(first_choice: Sequence[bool]) -> float:
    """1 - k/n for the smallest k from which on every token is the first choice; 0 where the last one is not."""
    suffix = 0
    for hit in reversed(first_choice):
        if not hit:
            break
        suffix += 1
    return suffix / len(first_choice)


@metric(unit="share of tokens", higher_is_better=True)
def extraction_strength(example: ScoredExample) -> float:
    r"""How little of an answer must be given until the model completes the rest word for word.

    .. math:: 1 - \frac{1}{n} \min \{ k : f(y_{<k+j}) = y_{k+j} \text{ for all } j < n - k \}

    1 where nothing must be given, 0 where not even the last token is predicted. As greedy decoding follows the
    answer as long as each first choice is right, one teacher-forced pass decides it.

    Source: Carlini et al., "Extracting training data from large language models", 2021,
    https://arxiv.org/abs/2012.07805; in this form Wang et al., "Towards effective evaluations and comparisons for LLM
    unlearning methods", 2025, https://arxiv.org/abs/2406.09179
    """
    return strength(example.answer.first_choice.tolist())
