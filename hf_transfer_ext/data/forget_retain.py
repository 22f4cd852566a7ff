"""What is to be forgotten beside what is to be kept: nested batches `{"forget": ..., "retain": ...}`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from hf_transfer_ext.data.fictitious_people import fictitious_people
from hf_transfer_ext.data.question_answer import EncodedAnswer, QuestionAnswerFormat, encode_text
from hf_transfer_ext.tensors import IGNORE_INDEX

#: What a model that does not know would say; preference and refusal losses pull towards one of these.
REFUSALS = (
    "I do not know anything about that.",
    "I am afraid I have no answer to this question.",
    "That is something I have not learned about.",
    "I cannot tell you, as I have no information on it.",
    "My knowledge does not cover that.",
    "I have never heard of it.",
    "There is nothing I can say about that.",
    "I am not able to answer that.",
)


#: Columns of a row with a question that training, evaluation and audits read.
QUESTION_COLUMNS = (
    "question", "answer", "paraphrased_answer", "perturbed_answer", "alternative", "paraphrased_question",
    "translated_question", "person",
)  # fmt: skip


def forget_retain_rows(
    forget_data: str | None,
    retain_data: str | None = None,
    holdout_data: str | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    people: int = 20,
    forget_people: int = 2,
    holdout_people: int = 0,
    facts: int | None = None,
    seed: int = 0,
    **where: Any,
) -> dict[str, list[dict[str, Any]]]:
    """Rows of "forget", "retain" and "holdout", in the TOFU schema: from data sets, or made up where none is named.

    Args:
        forget_data: File, folder or Hub id; None makes up `people` people, and `holdout_people` beyond them. The first
            ones are the same whatever is asked for, so a holdout can be added to a run that was made without one.
        columns: Schema name -> the data's own column; the rows come back with the schema's names.
        where: `split`, `revision` and `config_name` of the data sets.

    Raises:
        FileNotFoundError, ValueError: As `data.text.load_rows`; or a column that is not there.
    """
    if forget_data is None:
        return fictitious_people(
            people + holdout_people, forget=forget_people, holdout=holdout_people, facts=facts, seed=seed
        )
    from hf_transfer_ext.data.text import load_rows, warn_of_unused

    splits = {}
    for name, source in (("forget", forget_data), ("retain", retain_data), ("holdout", holdout_data)):
        rows = [] if source is None else load_rows(source, **where)
        for index, row in enumerate(rows):
            missing = [own for own in (columns or {}).values() if own not in row]
            if missing:
                raise ValueError(
                    f"Row {index} of {source!r} has no column {missing[0]!r}; it has {', '.join(map(str, row))}."
                )
        renamed = {own: name for name, own in (columns or {}).items()}
        warn_of_unused(str(source), rows[0] if rows else (), _used_columns(rows, renamed))
        splits[name] = [{renamed.get(key, key): value for key, value in row.items()} for row in rows]
    return splits


def _used_columns(rows: Sequence[Mapping[str, Any]], renamed: Mapping[str, str]) -> set[str]:
    """The rows' own columns that a question with its answer, or a text, is read from."""
    own = {renamed.get(column, column): column for row in rows[:1] for column in row}
    asked = {"question", "answer"} <= set(own)
    return {column for name, column in own.items() if (name in QUESTION_COLUMNS if asked else name == "text")}


def encode_example(
    tokenizer: Any, example: Mapping[str, Any], template: QuestionAnswerFormat, columns: Mapping[str, str]
) -> EncodedAnswer:
    """A question with its answer, or a text, by the data's own column names."""
    question, answer, text = (columns.get(name, name) for name in ("question", "answer", "text"))
    if example.get(question) is not None and example.get(answer) is not None:
        return template.encode(tokenizer, str(example[question]), str(example[answer]))
    if example.get(text) is not None:
        return encode_text(tokenizer, str(example[text]), max_length=template.max_length)
    raise ValueError(f"it needs the columns {question!r} and {answer!r}, or {text!r}; it has {', '.join(example)}.")


class ForgetRetainPairs(Dataset):
    """Each sample to forget with one to retain; an epoch is one pass over the forget set.

    The retain samples are taken in a shuffled order that goes on from epoch to epoch, so that every one of them comes
    before any comes twice. The order follows from `seed` alone: not from the number of processes or workers.

    Args:
        forget: Examples with a question and an answer, or a text.
        retain: The same; None trains without a retain set.
        template: How a question becomes a prompt.
        columns: Schema name -> the data's own name, for "question", "answer", "text" and "alternative".
        alternatives: Texts that may be answered instead, drawn by example and epoch; a column "alternative" in the
            forget set (a text, or a list of them) goes first. None leaves the alternative out.

    Raises:
        ValueError: An empty set, or an example without a token to learn (with its set and index).
    """

    def __init__(
        self,
        forget: Sequence[Mapping[str, Any]],
        retain: Sequence[Mapping[str, Any]] | None,
        tokenizer: Any,
        *,
        template: QuestionAnswerFormat | None = None,
        columns: Mapping[str, str] | None = None,
        alternatives: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        self.template = template or QuestionAnswerFormat()
        self.columns = dict(columns or {})
        self.seed = seed
        self.epoch = 0
        self._orders: dict[int, list[int]] = {}
        self.forget = self._encode("forget", forget, tokenizer)
        self.retain = self._encode("retain", retain, tokenizer) if retain is not None else None
        self.alternatives = self._alternatives(forget, tokenizer, alternatives) if alternatives is not None else None

    def _encode(self, name: str, examples: Sequence[Mapping[str, Any]], tokenizer: Any) -> list[EncodedAnswer]:
        encoded = []
        for index, example in enumerate(examples):
            try:
                encoded.append(encode_example(tokenizer, example, self.template, self.columns))
            except (ValueError, TypeError) as error:
                raise ValueError(f"Example {index} of the {name} set cannot be used: {error}") from error
        if not encoded:
            raise ValueError(f"The {name} set is empty.")
        return encoded

    def _alternatives(
        self, forget: Sequence[Mapping[str, Any]], tokenizer: Any, alternatives: Sequence[str]
    ) -> list[list[EncodedAnswer]]:
        question, own = self.columns.get("question", "question"), self.columns.get("alternative", "alternative")
        encoded = []
        for index, example in enumerate(forget):
            texts = example.get(own) or list(alternatives)
            texts = [texts] if isinstance(texts, str) else texts
            if example.get(question) is None or not texts:
                raise ValueError(
                    f"Example {index} of the forget set needs a question and an alternative answer to it."
                )
            encoded.append([self.template.encode(tokenizer, str(example[question]), str(text)) for text in texts])
        return encoded

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose retain samples and alternatives are given; the trainer calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.forget)

    def retain_index(self, index: int) -> int:
        """Which retain sample goes with the forget sample `index` in this epoch."""
        turn, place = divmod(self.epoch * len(self.forget) + index, len(self.retain or ()))
        return self._order(turn)[place]

    def _order(self, turn: int) -> list[int]:
        """The order of the `turn`-th pass over the retain set."""
        if turn not in self._orders:
            shuffled = torch.Generator().manual_seed(self.seed * 100_003 + turn)
            self._orders[turn] = torch.randperm(len(self.retain or ()), generator=shuffled).tolist()
        return self._orders[turn]

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample: dict[str, Any] = {"forget": _with_labels(self.forget[index], index)}
        if self.retain is not None:
            chosen = self.retain_index(index)
            sample["retain"] = _with_labels(self.retain[chosen], chosen)
        if self.alternatives is not None:
            texts = self.alternatives[index]
            draw = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch * len(self.forget) + index)
            chosen = int(torch.randint(len(texts), (), generator=draw))
            sample["alternative"] = _with_labels(texts[chosen], index)
        return sample


def _with_labels(encoded: EncodedAnswer, index: int) -> dict[str, Any]:
    labels = [IGNORE_INDEX] * encoded.answer_start + encoded.input_ids[encoded.answer_start :]
    return {"input_ids": encoded.input_ids, "labels": labels, "index": index}


def forget_retain_collator(pad_token_id: int) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]:
    """Pads each part of nested samples on the right.

    The attention mask comes from the lengths, not from `input_ids != pad_token_id`: where the padding token is the
    end-of-sequence token, the end that belongs to an answer stays attended to and is learnt.
    """

    def pad(samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        length = max(len(sample["input_ids"]) for sample in samples)
        input_ids = torch.full((len(samples), length), pad_token_id)
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        attention_mask = torch.zeros_like(input_ids)
        for row, sample in enumerate(samples):
            size = len(sample["input_ids"])
            input_ids[row, :size] = torch.tensor(sample["input_ids"])
            labels[row, :size] = torch.tensor(sample["labels"])
            attention_mask[row, :size] = 1
        index = torch.tensor([sample["index"] for sample in samples])
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, "index": index}

    def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {part: pad([sample[part] for sample in samples]) for part in samples[0]}

    return collate
