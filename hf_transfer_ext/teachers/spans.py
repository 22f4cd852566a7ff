"""A teacher with another tokenizer: it reads the same text in its own tokens, and both sides are compared on spans."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hf_transfer_ext.losses.fused_spans import SpanTokens
from hf_transfer_ext.losses.rows import DenseRows, LogitRows
from hf_transfer_ext.models.heads import causal_lm_of, head_rows
from hf_transfer_ext.models.loading import context_length
from hf_transfer_ext.models.plumbing import pad_token_id
from hf_transfer_ext.teachers.alignment import TokenBytes, align, align_vocabularies, special_tokens
from hf_transfer_ext.teachers.cache import CachedTeacher
from hf_transfer_ext.teachers.documents import Document, documents_of, documents_of_row, require_text_alone
from hf_transfer_ext.teachers.live import LiveTeacher
from hf_transfer_ext.teachers.server import ServerTeacher
from hf_transfer_ext.tensors import Mask

logger = logging.getLogger(__name__)

#: A server's 0 is taken as this, in nats, so that sums over tokens stay finite.
LEAST_LOG_PROB = -1e3


@dataclass(frozen=True)
class Respelled:
    """A text in the teacher's tokens.

    Args:
        ids: The teacher's tokens.
        own: (first, last + 1) token of each group on the student's side.
        other: The same on the teacher's side.
        problem: Why a part of the text is in no group; "" where all of it is.
    """

    ids: tuple[int, ...]
    own: tuple[tuple[int, int], ...]
    other: tuple[tuple[int, int], ...]
    problem: str = ""


class Respelling:
    """Retokenizes the student's tokens in the teacher's, with the groups of tokens that stand for the same bytes.

    A special token of the student becomes the teacher's special token of the same text, or else of the same role
    (bos, eos). Where the teacher has neither, tokens in `all_special_ids` are left out, and others (often
    `<|im_start|>`) are read as their text. Only ids that are special for the student count: the text of a special
    token that a user typed stays text for the teacher. A BOS that the teacher's tokenizer puts in front is put in
    front here, too. A character that is cut at the end of a row belongs to no group.

    Args:
        student: The student's tokenizer.
        teacher: The teacher's.
        teacher_rows: Rows of the teacher's head; special tokens beyond them, which the model does not know, count as
            missing. None: it has a row for every token.

    Raises:
        ValueError: The tokens of a tokenizer do not stand for bytes.
    """

    def __init__(
        self, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, teacher_rows: int | None = None
    ) -> None:
        self.tokenizer = teacher
        self.own, self.other = TokenBytes(student), TokenBytes(teacher)
        self.special = special_tokens(self.own, self.other, ("bos", "eos"), teacher_rows)
        self.prefix = _prefix(teacher)
        alone = teacher("a", add_special_tokens=False)["input_ids"]
        self._writes_space = b"".join(self.other[token] for token in alone) == b" a"
        self._of_text = lru_cache(maxsize=10_000)(self._respell)

    def __call__(self, ids: np.ndarray) -> Respelled:
        """The text of some tokens in the teacher's; each text is retokenized once."""
        return self._of_text(tuple(ids.tolist()))

    def _respell(self, ids: tuple[int, ...]) -> Respelled:
        found: list[int] = []
        if ids and self.special.get(ids[0]) not in self.prefix:
            found += self.prefix
        own, other, problem, i = [], [], "", 0
        while i < len(ids):
            if self._is_special(ids[i]):
                if ids[i] in self.special:
                    own.append((i, i + 1))
                    other.append((len(found), len(found) + 1))
                    found.append(self.special[ids[i]])
                i += 1
                continue
            end = next((j for j in range(i, len(ids)) if self._is_special(ids[j])), len(ids))
            first, last, text = self._readable(ids, i, end)
            spelled = self._spelled(text, after=found[-1] if len(found) > len(self.prefix) else None)
            try:
                groups = align(ids[first:last], spelled, self.own, self.other)
            except ValueError as error:
                problem = str(error)
            else:
                own += [(a + first, b + first) for a, b in groups.student]
                other += [(a + len(found), b + len(found)) for a, b in groups.teacher]
            found += spelled
            i = end
        return Respelled(tuple(found), tuple(own), tuple(other), problem)

    def _is_special(self, token: int) -> bool:
        return token in self.special or not self.own[token]

    def _spelled(self, text: str, *, after: int | None) -> list[int]:
        """The teacher's tokens of a text without special tokens.

        Args:
            after: The teacher's special token in front of the text, where there is more in front than its BOS: some
                tokenizers write a space at the start of a text alone, and none after a special token.
        """
        plain: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        mark = self.other.special.get(after) if after is not None and self._writes_space else None
        if mark is None or any(special in text for special in self.other.special.values()):
            return plain
        joined: list[int] = self.tokenizer(mark + text, add_special_tokens=False)["input_ids"]
        meant = text.encode()
        inside = joined[1:] if joined[:1] == [after] else []
        return inside if b"".join(self.other[token] for token in inside) in (meant, b" " + meant) else plain

    def _readable(self, ids: Sequence[int], first: int, end: int) -> tuple[int, int, str]:
        """The part of some tokens that is valid UTF-8, without characters that are cut at its ends, and its text."""
        while first < end:
            parts = [self.own[token] for token in ids[first:end]]
            try:
                return first, end, b"".join(parts).decode()
            except UnicodeDecodeError as error:
                if error.start == 0:
                    first += 1
                    continue
                ends = np.cumsum([len(part) for part in parts])
                end = first + int((ends <= error.start).sum())
        return first, first, ""


def _prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that a tokenizer puts in front of each text."""
    whole, plain = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (True, False))
    starts = [i for i in range(len(whole)) if whole[i : i + len(plain)] == plain]
    return whole[: starts[0]] if starts else []


@dataclass(frozen=True)
class SpanSignal:
    """The spans of a batch that count, and what the teacher predicts for them.

    Args:
        places: Positions that predict the student's tokens of the spans, in the batch counted row after row.
        student: The student's tokens of the spans.
        rows: The teacher's rows at the positions that predict its tokens of the spans.
        teacher: The teacher's tokens of the spans, as entries of its rows.
        read: The teacher's tokens at these positions.
        texts: The text of each span, increasing.
    """

    places: Int[Tensor, " rows"]
    student: SpanTokens
    rows: DenseRows
    teacher: SpanTokens
    read: Int[Tensor, " teacher_rows"]
    texts: Int[Tensor, " spans"]


class SpanTeacher:
    """Runs a teacher on the text of each row, in its own tokens.

    A span counts where all its tokens on the student's side are labeled, and both models predict its first token.
    With the student's own tokenizer, spans are single tokens, unless the text is in other tokens than the tokenizer
    makes of it, as a student may write it.

    Args:
        teacher: The model, or an adapter on the student's base.
        student_tokenizer: Of the student.
        teacher_tokenizer: Of the teacher.
        student_rows: Vocabulary entries of the student's head.
    """

    #: Whether the model is split across processes, which have to run it together.
    sharded: bool = False

    def __init__(
        self,
        teacher: LiveTeacher,
        student_tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase,
        student_rows: int,
    ) -> None:
        self.live, self.sharded = teacher, teacher.sharded
        #: The model whose memory is the teacher's own; None of an adapter on the student's base.
        self.model = getattr(teacher, "model", None)
        self.pad = pad_token_id(teacher_tokenizer)
        limit, rows = context_length(causal_lm_of(teacher.network)), head_rows(teacher.network)
        self._align(student_tokenizer, teacher_tokenizer, student_rows, rows, limit)

    def _align(
        self,
        student: PreTrainedTokenizerBase,
        teacher: PreTrainedTokenizerBase,
        student_rows: int,
        teacher_rows: int,
        limit: int | None,
    ) -> None:
        self.respelling, self.limit = Respelling(student, teacher, teacher_rows), limit
        #: The share of tokens that both vocabularies have; its text says it in words.
        self.vocabularies = align_vocabularies(student, teacher)
        kept = (self.vocabularies.student_ids < student_rows) & (self.vocabularies.teacher_ids < teacher_rows)
        #: Ids of matched tokens, the student's and the teacher's.
        self.matched = self.vocabularies.student_ids[kept], self.vocabularies.teacher_ids[kept]
        self._warned = False

    @property
    def network(self) -> nn.Module:
        """The module that runs as the teacher."""
        return self.live.network

    def spans(self, student: nn.Module, inputs: dict[str, Any], mask: Mask) -> SpanSignal:
        """The teacher's view of the labeled spans of a batch.

        Raises:
            ValueError: The student reads more than text.
        """
        require_text_alone(inputs, "A teacher with another tokenizer")
        documents = documents_of(inputs, mask)
        spelled = [self.respelling(document.ids) for document in documents]
        chosen = [self._counting(*pair) for pair in zip(documents, spelled, strict=True)]
        self._warn_once(spelled)
        texts = [one.ids[: self.limit] for one in spelled]
        predicting: list[list[int]] = [[] for _ in texts]
        places: list[int] = []
        targets: list[int] = []
        other_targets: list[int] = []
        sizes: list[int] = []
        other_sizes: list[int] = []
        other_read: list[int] = []
        of_text: list[int] = []
        for i, (document, one, text) in enumerate(zip(documents, spelled, texts, strict=True)):
            for g in chosen[i]:
                (a, b), (c, d) = one.own[g], one.other[g]
                places += document.places[a - 1 : b - 1].tolist()
                targets += document.ids[a:b].tolist()
                other_targets += text[c:d]
                predicting[i] += range(c - 1, d - 1)
                sizes.append(b - a)
                other_sizes.append(d - c)
                other_read += text[c - 1 : d - 1]
                of_text.append(i)
        device = inputs["input_ids"].device
        tensors = [
            torch.tensor(values, dtype=torch.long, device=device)
            for values in (places, targets, sizes, other_targets, other_sizes, other_read, of_text)
        ]
        rows, named = self._rows(student, texts, predicting, tensors[3])
        return SpanSignal(tensors[0], SpanTokens(*tensors[1:3]), rows, SpanTokens(named, tensors[4]), *tensors[5:])

    def _rows(
        self, student: nn.Module, texts: list[tuple[int, ...]], predicting: list[list[int]], targets: Tensor
    ) -> tuple[DenseRows, Tensor]:
        """The teacher's rows at some positions of its texts, and which entry of each is the token that comes.

        Args:
            predicting: For each text, positions that predict a token of a span, increasing.
            targets: These tokens, one text after the other.
        """
        longest = max((len(text) for text in texts), default=2)
        ids = torch.full((max(len(texts), 1), max(longest, 2)), self.pad, dtype=torch.long)
        attended, needed = torch.zeros_like(ids), torch.zeros(ids.shape[0], ids.shape[1] - 1, dtype=torch.bool)
        attended[:, 0] = 1  # a batch without any text runs on padding, as all processes have to
        for i, text in enumerate(texts):
            ids[i, : len(text)] = torch.tensor(text)
            attended[i, : len(text)] = 1
            needed[i, predicting[i]] = True
        read = {"input_ids": ids.to(targets.device), "attention_mask": attended.to(targets.device)}
        rows: Any = self.live.signal(student, read, needed.to(targets.device)).rows
        return rows, targets

    def _counting(self, document: Document, spelled: Respelled) -> list[int]:
        labeled = np.zeros(len(document.ids) + 1, dtype=bool)
        labeled[document.positions + 1] = True
        limit = self.limit or len(spelled.ids)
        return [
            g
            for g, ((a, b), (c, d)) in enumerate(zip(spelled.own, spelled.other, strict=True))
            if a > 0 and c > 0 and d <= limit and labeled[a:b].all()
        ]

    def _warn_once(self, spelled: list[Respelled]) -> None:
        problems = [one.problem for one in spelled if one.problem]
        if problems and not self._warned:
            self._warned = True
            logger.warning(
                "A part of a text teaches nothing, because the tokens of both sides do not stand for the same bytes: "
                "%s The share of labeled tokens that are taught is logged as `aligned`.",
                problems[0],
            )


class LikelihoodTeacher(SpanTeacher):
    """Asks a server, or a cache, for the likelihood of each span, in the tokens of the teacher's own tokenizer.

    It knows nothing but the tokens that come: the rows of its signal have two entries, the token that comes and all
    others together. Losses that read more than likelihoods cannot use it.

    Args:
        source: A server with the tokenizer of its own model, or a cache of kind "likelihoods". The cache runs its
            teacher on a text that it does not hold, once for the whole of it, and stores that.
        student_tokenizer: Of the student.
        teacher_tokenizer: Of the teacher.
        student_rows: Vocabulary entries of the student's head.
    """

    def __init__(
        self,
        source: ServerTeacher | CachedTeacher,
        student_tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase,
        student_rows: int,
    ) -> None:
        self.source = source
        self.temperature, live = 1.0, None
        known: Mapping[str, Any] = {"context": None}
        if isinstance(source, CachedTeacher):
            known, self.temperature, live = source.cache.fingerprint, source.cache.spec.temperature, source.teacher
        self.model = live.model if isinstance(live, LiveTeacher) else None
        rows = source.vocab_size if isinstance(source, ServerTeacher) else known["vocab_size"]
        self._align(student_tokenizer, teacher_tokenizer, student_rows, rows, known["context"])

    def respelled(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, list[int]]]:
        """The texts of tokenized rows of the student in the teacher's tokens, as a cache is filled from them."""
        for row in rows:
            for document in documents_of_row(row):
                ids = self.respelling(document.ids).ids[: self.limit]
                if len(ids) > 1:
                    yield {"input_ids": list(ids)}

    def _rows(
        self, student: nn.Module, texts: list[tuple[int, ...]], predicting: list[list[int]], targets: Tensor
    ) -> tuple[DenseRows, Tensor]:
        read = [
            Document(np.array(text), np.array(where)) for text, where in zip(texts, predicting, strict=True) if where
        ]
        if isinstance(self.source, CachedTeacher):
            whole = [Document(one.ids, np.arange(len(one.ids) - 1)) for one in read]
            self.source.add_missing(self.model or student, whole, targets.device)
            told = self.source.cache.own_log_probs(read)
        else:
            told = self.source.own_log_probs(read)
        log_probs = told.double().clamp(min=LEAST_LOG_PROB, max=0.0)
        entries = torch.stack([log_probs, torch.log(-torch.expm1(log_probs))], 1)
        # Logits whose softmax at the temperature of the loss has these two probabilities.
        return LogitRows((self.temperature * entries).float().to(targets.device)), torch.zeros_like(targets)
