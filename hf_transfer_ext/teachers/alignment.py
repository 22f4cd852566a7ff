"""Two tokenizations of one text, aligned by bytes; and two vocabularies, aligned by tokens.

Tokens are compared by the bytes that they stand for, so that spaces written as `▁` or `Ġ`, characters that are split
into bytes, and a BOS token that only one side puts in front all come out right.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@lru_cache(maxsize=1)
def _byte_of_symbol() -> dict[str, int]:
    """The symbol that byte-level tokenizers (GPT-2, Qwen, Llama 3) write for each byte -> the byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class TokenBytes:
    """The bytes that each token of a tokenizer stands for.

    Those in `all_special_ids` (bos, eos, pad, ...) stand for none. Other special tokens, often `<|im_start|>`, stand
    for the bytes of their own text; `special` tells them from tokens that ordinary text becomes.

    Args:
        tokenizer: A fast one, byte-level or with `▁` for spaces and `<0x..>` for bytes.

    Raises:
        ValueError: Tokens of this tokenizer do not stand for bytes of the text (WordPiece, slow tokenizers).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer; its tokens cannot be aligned.")
        described = str(backend.decoder) + str(backend.pre_tokenizer)
        if "ByteLevel" in described:
            self._kind = "byte-level"
        elif "▁" in described or "Metaspace" in described:
            self._kind = "metaspace"
        else:
            raise ValueError(
                f"The tokens of {type(tokenizer).__name__} ({tokenizer.name_or_path or 'without a name'}) do not "
                "stand for the bytes of a text, as those of byte-level and SentencePiece tokenizers do: they cannot "
                "be aligned with another tokenizer's."
            )
        self._without_text = set(tokenizer.all_special_ids)
        marked = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        #: Every special token and its text: those in `all_special_ids`, and those that were added as special.
        self.special = {i: str(tokenizer.convert_ids_to_tokens(i)) for i in sorted(self._without_text | marked)}
        self._added = {i: str(token.content) for i, token in tokenizer.added_tokens_decoder.items()}
        self._found: dict[int, bytes] = {}

    def __getitem__(self, token: int) -> bytes:
        if token not in self._found:
            self._found[token] = self._bytes(token)
        return self._found[token]

    def _bytes(self, token: int) -> bytes:
        if token in self._without_text:
            return b""
        if token in self._added:
            return self._added[token].encode()
        text: Any = self.tokenizer.convert_ids_to_tokens(token)
        if text is None:  # a row of the head that no token uses
            return b""
        if self._kind == "byte-level":
            symbols = _byte_of_symbol()
            return bytes(symbols[symbol] for symbol in text)
        byte = _BYTE.fullmatch(text)
        return bytes([int(byte[1], 16)]) if byte else text.replace("▁", " ").encode()


@dataclass(frozen=True)
class Alignment:
    """Groups of tokens that stand for the same bytes.

    Args:
        student: (first, last + 1) token of each group, on the student's side.
        teacher: The same on the teacher's side.
    """

    student: tuple[tuple[int, int], ...]
    teacher: tuple[tuple[int, int], ...]


def align(
    student_ids: Sequence[int], teacher_ids: Sequence[int], student_bytes: TokenBytes, teacher_bytes: TokenBytes
) -> Alignment:
    """Cut two tokenizations of one text into the smallest groups that end at the same byte.

    Special tokens stand for no bytes and are in no group: a BOS on one side shifts nothing. A leading space that only
    one tokenizer writes (the `▁` in front of a text) is left out of the count.

    Raises:
        ValueError: They are not tokenizations of the same text; the message shows where they part.
    """
    ours = [(i, student_bytes[token]) for i, token in enumerate(student_ids) if student_bytes[token]]
    theirs = [(i, teacher_bytes[token]) for i, token in enumerate(teacher_ids) if teacher_bytes[token]]
    texts = [b"".join(part for _, part in side) for side in (ours, theirs)]
    extra = [0, 0]
    if texts[0] != texts[1]:
        extra = [int(texts[0] == b" " + texts[1]), int(texts[1] == b" " + texts[0])]
        if not any(extra):
            first = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
            shown = [text[max(0, first - 10) : first + 20].decode("utf-8", "replace") for text in texts]
            raise ValueError(
                f"Student and teacher read different texts from byte {first} on: {shown[0]!r} and {shown[1]!r}. Both "
                "tokenizations have to be of one text, without normalization (lower case, NFKC) on one side alone, "
                "and without unknown characters."
            )
    groups: list[tuple[tuple[int, int], tuple[int, int]]] = []
    i = j = first_i = first_j = 0
    end_i, end_j = -extra[0], -extra[1]
    while i < len(ours) or j < len(theirs):
        if j >= len(theirs) or (i < len(ours) and end_i <= end_j):
            end_i += len(ours[i][1])
            i += 1
        else:
            end_j += len(theirs[j][1])
            j += 1
        if end_i == end_j and i > first_i and j > first_j:
            groups.append(((ours[first_i][0], ours[i - 1][0] + 1), (theirs[first_j][0], theirs[j - 1][0] + 1)))
            first_i, first_j = i, j
    if (first_i < len(ours) or first_j < len(theirs)) and groups:  # a token of a space alone on one side
        last = groups.pop()
        i_end = ours[-1][0] + 1 if ours else last[0][1]
        groups.append(((last[0][0], i_end), (last[1][0], theirs[-1][0] + 1)))
    return Alignment(tuple(one for one, _ in groups), tuple(other for _, other in groups))


@dataclass(frozen=True)
class VocabularyAlignment:
    """Tokens that stand for the same bytes in both vocabularies.

    Args:
        student_ids: Ids of matched tokens in the student's vocabulary, increasing.
        teacher_ids: The same tokens in the teacher's.
        student_size: Tokens of the student's vocabulary.
        teacher_size: Tokens of the teacher's.
    """

    student_ids: Int[Tensor, " matched"]
    teacher_ids: Int[Tensor, " matched"]
    student_size: int
    teacher_size: int

    def __str__(self) -> str:
        matched = len(self.student_ids)
        return (
            f"{matched} tokens match exactly: {matched / max(self.student_size, 1):.1%} of the student's "
            f"{self.student_size}, {matched / max(self.teacher_size, 1):.1%} of the teacher's {self.teacher_size}"
        )


def special_tokens(
    student: TokenBytes, teacher: TokenBytes, roles: Sequence[str], teacher_rows: int | None = None
) -> dict[int, int]:
    """Each special token of the student -> the teacher's of the same text, or else of the same role.

    Tokens with a role come first. Two tokens of the student may lead to one of the teacher.

    Args:
        roles: Which roles count, of bos, eos, pad and unk.
        teacher_rows: Tokens from this id on are unknown to the teacher's model. None: it knows all of its tokenizer's.
    """
    known = {text: i for i, text in teacher.special.items() if teacher_rows is None or i < teacher_rows}
    by_text = {i: known[text] for i, text in student.special.items() if text in known}
    by_role: dict[int, int] = {}
    for role in roles:
        own, other = (getattr(one.tokenizer, f"{role}_token_id") for one in (student, teacher))
        if own is not None and (found := by_text.get(own, other)) is not None:
            by_role.setdefault(own, found)
    return by_role | by_text


def align_vocabularies(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> VocabularyAlignment:
    """Match tokens by what they mean. Each matches at most once.

    Special tokens match by their text, or else by their role (bos, eos, pad, unk); all others by their bytes. Tokens
    that one side lacks, added ones among them, are not matched.
    """
    own, other = TokenBytes(student), TokenBytes(teacher)
    pairs: dict[int, int] = {}
    for token, same in special_tokens(own, other, ("bos", "eos", "pad", "unk")).items():
        if same not in pairs.values():
            pairs[token] = same
    taken = set(pairs.values())
    ours, theirs = _tokens_by_bytes(own), _tokens_by_bytes(other)
    for meaning in ours.keys() & theirs.keys():
        if ours[meaning] not in pairs and theirs[meaning] not in taken:
            pairs[ours[meaning]] = theirs[meaning]
    found = sorted(pairs.items())
    return VocabularyAlignment(
        torch.tensor([one for one, _ in found], dtype=torch.long),
        torch.tensor([two for _, two in found], dtype=torch.long),
        len(student.get_vocab()),
        len(teacher.get_vocab()),
    )


def _tokens_by_bytes(known: TokenBytes) -> dict[bytes, int]:
    found: dict[bytes, int] = {}
    for token in sorted(known.tokenizer.get_vocab().values()):
        if known[token]:
            found.setdefault(known[token], token)
    return found
