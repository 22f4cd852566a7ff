"""ROUGE-L: tokenization, and the longest common subsequence of two texts."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from hf_transfer_ext.evals.text.stemming import stem

#: Code points of scripts that are written without spaces between words: each letter is a token.
UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3134F),
)
LETTERS = ("auto", "ascii", "unicode")


def rouge_tokens(text: str, *, stemmed: bool = True, letters: str = "ascii") -> list[str]:
    """Split a text into lower-case words.

    Args:
        stemmed: Reduce ASCII words of more than three characters to their stems.
        letters: "ascii": runs of a-z and 0-9, as in the `rouge-score` package; other letters separate words.
            "unicode": runs of letters, marks and digits of any script, and single letters in scripts that are written
            without spaces (Chinese, Japanese, Thai, ...). "auto": "ascii" if at least half of the text's letters
            are a-z, "unicode" otherwise.
    """
    if letters not in LETTERS:
        raise ValueError(f"`letters` must be one of {', '.join(LETTERS)}, got {letters!r}.")
    if letters == "auto":
        letters = letters_of(text)
    words = re.findall("[a-z0-9]+", text.lower()) if letters == "ascii" else unicode_words(text)
    return [stem(word) if len(word) > 3 and word.isascii() else word for word in words] if stemmed else words


def letters_of(text: str) -> str:
    """ "ascii" if at least half of the text's letters are a-z, "unicode" otherwise."""
    alphabetic = [character for character in text if character.isalpha()]
    return "ascii" if 2 * sum(character.isascii() for character in alphabetic) >= len(alphabetic) else "unicode"


def unicode_words(text: str) -> list[str]:
    """Runs of letters, marks and digits in any script; single letters in scripts without spaces."""
    words, word, single = [], "", False
    for character in unicodedata.normalize("NFKC", text).casefold():
        kind = unicodedata.category(character)[0]
        if kind == "M":  # a vowel sign or an accent belongs to the letter before it
            word += character
            continue
        alone = kind == "L" and any(low <= ord(character) <= high for low, high in UNSPACED)
        if kind not in "LN" or alone or single:
            words.append(word)
            word = ""
        word += character if kind in "LN" else ""
        single = alone
    return [word for word in [*words, word] if word]


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest sequence of tokens that both contain, in order but not necessarily contiguous."""
    row = [0] * (len(second) + 1)
    for token in first:
        diagonal = 0
        for j, other in enumerate(second, start=1):
            above = row[j]
            row[j] = diagonal + 1 if token == other else max(above, row[j - 1])
            diagonal = above
    return row[-1]


def rouge_l(
    reference: str, prediction: str, *, stemmed: bool = True, letters: str = "auto"
) -> tuple[float, float, float]:
    """(recall, precision, F1) in [0, 1], each 0 if either text has no tokens.

    Args:
        letters: As in `rouge_tokens`; "auto" depends on the reference only, for both texts.
    """
    letters = letters_of(reference) if letters == "auto" else letters
    wanted = rouge_tokens(reference, stemmed=stemmed, letters=letters)
    written = rouge_tokens(prediction, stemmed=stemmed, letters=letters)
    if not wanted or not written:
        return 0.0, 0.0, 0.0
    common = longest_common_subsequence(wanted, written)
    recall, precision = common / len(wanted), common / len(written)
    return recall, precision, 2 * recall * precision / (recall + precision) if common else 0.0


def rouge_l_of_answer(
    answer: str, written: str, *, stemmed: bool = True, letters: str = "auto"
) -> tuple[float, float, float]:
    """Like `rouge_l`, but an answer without tokens is an error instead of a score of 0.

    Raises:
        ValueError: The answer has no tokens.
    """
    letters = letters_of(answer) if letters == "auto" else letters
    if not rouge_tokens(answer, letters=letters):
        known = "a-z and 0-9" if letters == "ascii" else "letters and digits"
        raise ValueError(f"ROUGE compares {known}, but the answer {answer!r} has none of them.")
    return rouge_l(answer, written, stemmed=stemmed, letters=letters)
