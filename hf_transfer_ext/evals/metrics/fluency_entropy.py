from __future__ import annotations

import math
import re
from collections import Counter

from hf_transfer_ext.evals.metric import metric
from hf_transfer_ext.models.scoring import ScoredExample


def ngram_entropy(words: list[str], size: int) -> float:
    """Entropy of the distribution of n-grams, in bits; 0 if there are none."""
    grams = Counter(tuple(words[i : i + size]) for i in range(len(words) - size + 1))
    total = sum(grams.values())
    return -sum(n / total * math.log2(n / total) for n in grams.values()) if total else 0.0


@metric(unit="bits", higher_is_better=True, needs=("generations",), texts=())
def fluency_entropy(example: ScoredExample) -> float:
    r"""Weighted entropy of a generation's bigrams and trigrams; low if the model repeats itself.

    .. math:: \tfrac{1}{2} \left( \tfrac{2}{3} H_2 + \tfrac{4}{3} H_3 \right)

    It grows with the length of the text, so only compare generations of the same length. Words are runs of letters and
    digits or single punctuation marks; the original uses an NLTK tokenizer.

    Raises:
        ValueError: The generation has fewer than three words.

    Source: Zhang et al., "Generating informative and diverse conversational responses", 2018,
    https://arxiv.org/abs/1809.05972; weights as in Meng et al., "Locating and editing factual associations in GPT"
    (ROME), 2022, https://arxiv.org/abs/2202.05262, and RWKU, Jin et al. 2024, https://arxiv.org/abs/2406.10890
    """
    words = re.findall(r"\w+|[^\w\s]", example.generation or "")
    if len(words) < 3:
        raise ValueError(f"the generation {example.generation!r} has {len(words)} words, but a trigram needs three.")
    return (2 / 3 * ngram_entropy(words, 2) + 4 / 3 * ngram_entropy(words, 3)) / 2
