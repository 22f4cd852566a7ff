from __future__ import annotations

from hf_transfer_ext.evals.metric import metric
from hf_transfer_ext.evals.text.rouge import rouge_l_of_answer
from hf_transfer_ext.models.scoring import ScoredExample


@metric(unit="share of the answer's tokens", higher_is_better=True, needs=("generations",))
def rouge_l_recall(
    example: ScoredExample, *, stemmed: bool = True, first_line: bool = False, letters: str = "auto"
) -> float:
    """Share of the answer's words that occur in the generation in the same order, after stemming.

    Args:
        stemmed: Whether to reduce words to their stems first.
        first_line: Whether to use only the first non-empty line of the generation.
        letters: "ascii": words of a-z and 0-9 only. "unicode": words of any script, and single letters in scripts
            without spaces. "auto": "ascii" if at least half of the answer's letters are a-z.

    Tokens and stems under "ascii" are those of the `rouge-score` package with `use_stemmer=True`; other scripts are
    this package's extension.

    Raises:
        ValueError: The answer has no letters or digits.

    Source: Lin, "ROUGE: a package for automatic evaluation of summaries", 2004, https://aclanthology.org/W04-1013
    """
    written = example.generation or ""
    if first_line:
        written = next((line for line in written.splitlines() if line.strip()), "")
    return rouge_l_of_answer(str(example.example["answer"]), written, stemmed=stemmed, letters=letters)[0]
