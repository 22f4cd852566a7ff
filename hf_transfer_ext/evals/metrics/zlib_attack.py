from __future__ import annotations

import zlib

from hf_transfer_ext.evals.metric import metric
from hf_transfer_ext.models.scoring import ScoredExample


@metric(unit="nats per token and compressed byte", higher_is_better=False)
def zlib_attack(example: ScoredExample) -> float:
    """Membership score: the mean loss divided by the zlib-compressed size of the scored text, in bytes.

    A text that is easy for any model compresses well; dividing by its size leaves what this model in particular knows.
    Higher means "was not trained on".

    Source: Carlini et al., "Extracting training data from large language models", 2021,
    https://arxiv.org/abs/2012.07805
    """
    text = example.example["answer"] if "question" in example.example else example.example["text"]
    return example.answer.loss / len(zlib.compress(str(text).encode()))
