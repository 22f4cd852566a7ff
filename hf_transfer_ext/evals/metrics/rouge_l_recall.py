from __future__ import annotations

import re
from collections.abc import Sequence

from hf_transfer_ext.evals.metric import metric
from hf_transfer_ext.evals.text.stemming import stem
from hf_transfer_ext.models.scoring import ScoredExample


def rouge_tokens(text: str, *, stemmed: bool = True) -> list[str]:
    """Lower-case runs of a-z and 0-9; those of more than three characters are stemmed. Other scripts give no token."""
    words = re.findall("[a-z0-9]+", text.lower())
    return [stem(word) if len(word) > 3 else word for word in words] if stemmed else words


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest sequence of tokens that stands in both, in order but not necessarily side by side."""
    row = [0] * (len(second) + 1)
    for token in first:
        diagonal = 0
        for j, other in enumerate(second, start=1):
            above = row[j]
            row[j] = diagonal + 1 if token == other else max(above, row[j - 1])
            diagonal = above
    return row[-1]


def rouge_l(reference: str, prediction: str, *, stemmed: bool = True) -> tuple[float, float, float]:
    """(recall, precision, F1), each 0 where either text has no token."""
    wanted, written = rouge_tokens(reference, stemmed=stemmed), rouge_tokens(prediction, stemmed=stemmed)
    if not wanted or not written:
        return 0.0, 0.0, 0.0
    common = longest_common_subsequence(wanted, written)
    recall, precision = common / len(wanted), common / len(written)
    return recall, precision, 2 * recall * precision / (recall + precision) if common else 0.0


@metric(unit="share of the answer's tokens", higher_is_better=True, needs=("generations",))
def rouge_l_recall(example: ScoredExample, *, stemmed: bool = True, first_line: bool = False) -> float:
    """Share of the answer's words that the generation has in the same order, after stemming.

    Args:
        stemmed: Whether words are cut to their stems first.
        first_line: Whether only the first line of the generation that is not empty counts.

    Tokens and stems are those of the `rouge-score` package with `use_stemmer=True`. They are made for English: an
    answer without a letter from a to z or a digit cannot be scored and is left out.

    Source: Lin, "ROUGE: a package for automatic evaluation of summaries", 2004, https://aclanthology.org/W04-1013
    """
    answer = str(example.example["answer"])
    if not rouge_tokens(answer):
        raise ValueError(f"ROUGE knows a-z and 0-9 only, and the answer {answer!r} has none of them.")
    written = example.generation or ""
    if first_line:
        written = next((line for line in written.splitlines() if line.strip()), "")
    return rouge_l(answer, written, stemmed=stemmed)[0]
