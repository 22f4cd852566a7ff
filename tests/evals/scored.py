"""Scored examples written by hand, as the engine would make them."""

from __future__ import annotations

import numpy as np

from hf_transfer_ext.models.scoring import ScoredExample, TokenScores


def tokens(log_probs, first_choice=None, **known) -> TokenScores:
    log_probs = np.asarray(log_probs, dtype=np.float64)
    first = np.asarray(first_choice if first_choice is not None else [True] * len(log_probs), dtype=bool)
    return TokenScores(log_probs, first, **{k: np.asarray(v) for k, v in known.items()})


def example(scores, /, *, paraphrase=None, perturbed=None, generation=None, index=0, **columns) -> ScoredExample:
    """An example from the scores of its texts."""
    texts = {"answer": [scores]}
    if paraphrase is not None:
        texts["paraphrased_answer"] = [paraphrase]
    if perturbed is not None:
        texts["perturbed_answer"] = list(perturbed)
    return ScoredExample(index, columns, texts, generation=generation)
