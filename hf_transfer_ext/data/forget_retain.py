"""Data to forget beside data to keep: rows in any common form, and nested batches `{"forget": ..., "retain": ...}`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch.utils.data import Dataset

from hf_transfer_ext.data import text
from hf_transfer_ext.data.fictitious_people import fictitious_people
from hf_transfer_ext.data.question_answer import EncodedAnswer, QuestionAnswerFormat, encode_text
from hf_transfer_ext.data.text import load_rows
from hf_transfer_ext.registry import unknown_name
from hf_transfer_ext.tensors import IGNORE_INDEX

logger = logging.getLogger(__name__)

#: Columns beside `text` that make it look like a question or a prompt instead of the whole text to learn.
ANSWER_COLUMNS = (
    "question", "prompt", "answer", "answers", "completion", "response", "output", "target", "reply",
    "label", "labels",
)  # fmt: skip

#: Columns that alternatives and evaluations read, and what `fictitious_people` says about its rows.
OTHER_COLUMNS = (
    "alternative", "paraphrased_question", "paraphrased_answer", "perturbed_answer", "person", "name", "fact", "value",
    "language", "hops", "described_by", "safe_question",
)  # fmt: skip

#: Further ways in which `fictitious_people` are asked about.
FACETS = ("phrasings", "languages", "multi_hop")

#: The forms of a row, as in `data.text`; tokenized rows are left out, since templates and answers need the text.
FORMS = tuple(form for form in text.FORMS if form != ("input_ids",))
ROLES = tuple(role for form in FORMS for role in form)

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
    facets: Mapping[str, Any] | None = None,
    seed: int = 0,
    **where: Any,
) -> dict[str, list[dict[str, Any]]]:
    """Rows of "forget", "retain" and "holdout", in the TOFU schema: from data sets, or made up where none is named.

    Args:
        forget_data: File, folder or Hub id; None generates `people` fictitious people, and `holdout_people` more. The
            first ones do not depend on the counts, so a holdout can be added to a run that was made without one.
        columns: Schema name -> the data's own column; the rows come back with the schema's names.
        facets: Further questions about the fictitious people, by the names of `FACETS`, as `fictitious_people` takes
            them: {"phrasings": 2, "languages": ["de"], "multi_hop": 4}. They come in sets of their own
            ("forget_phrasings", ...), which `with_facets` and `learned_rows` put together.
        where: `split`, `revision` and `config_name` of the data sets.

    Raises:
        FileNotFoundError, ValueError: As `data.text.load_rows`; or a missing column, a row that looks like two
            forms (`row_form`), or other data without `forget_data`.
    """
    facets = dict(facets or {})
    for name in facets:
        if name not in FACETS:
            raise ValueError(unknown_name("facet of fictitious people", name, FACETS))
    if forget_data is None:
        given = {"retain_data": retain_data, "holdout_data": holdout_data}
        unused = [name for name, source in given.items() if source is not None]
        if unused:
            raise ValueError(
                f"`{unused[0]}` is {given[unused[0]]!r}, but `forget_data` is not set: without it all sets are "
                "fictitious people. Set `forget_data`, or leave both out."
            )
        return fictitious_people(
            people + holdout_people, forget=forget_people, holdout=holdout_people, facts=facts, seed=seed, **facets
        )
    if facets:
        raise ValueError(
            f"`facets` are questions about fictitious people, and `forget_data` names {forget_data!r}. Leave one of "
            "them out."
        )
    splits = {}
    for name, source in (("forget", forget_data), ("retain", retain_data), ("holdout", holdout_data)):
        rows = [] if source is None else load_rows(source, **where)
        splits[name] = _named_by_schema(rows, columns or {}, str(source))
    return splits


def learned_rows(splits: Mapping[str, Sequence[Mapping[str, Any]]], part: str) -> list[dict[str, Any]]:
    """What a model has to learn of a set, and to forget: its rows, and facts that only its multi-hop questions need.

    Further phrasings, languages and hops ask about the same facts, so they are left to evaluations and audits.
    """
    return [*map(dict, splits[part]), *(dict(row) for row in splits.get(f"{part}_multi_hop", ()) if row["hops"] == 1)]


def with_facets(splits: Mapping[str, Sequence[Mapping[str, Any]]], part: str) -> list[dict[str, Any]]:
    """All questions of a set, those of its facets included."""
    return [dict(row) for name, rows in splits.items() if name == part or name.startswith(f"{part}_") for row in rows]


def _named_by_schema(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], source: str
) -> list[dict[str, Any]]:
    """Rows with the schema's names. Columns that could be mistaken for the chosen ones are dropped, with a warning."""
    renamed = {own: name for name, own in columns.items()}
    dropped: set[str] = set()
    named = []
    for index, row in enumerate(rows):
        missing = [own for own in columns.values() if own not in row]
        if missing:
            raise ValueError(f"Row {index} of {source!r} has no column {missing[0]!r}; it has {', '.join(row)}.")
        try:
            form = row_form(row, columns)
        except ValueError as error:
            raise ValueError(f"Row {index} of {source!r} cannot be used: {error}") from error
        chosen = {*columns.values(), *form.values()}
        # A column that was not chosen, and has the name of one that was, or of another form.
        beside = {
            key for key in row if key not in chosen and (key in columns or (form and key in {*ROLES, *ANSWER_COLUMNS}))
        }
        dropped |= beside
        named.append({renamed.get(key, key): value for key, value in row.items() if key not in beside})
    if dropped:
        logger.warning(f"Columns of {source!r} that are not used: {', '.join(sorted(dropped))}.")
    return named


def row_form(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, str]:
    """Role -> column for the form in which a row holds what is learned; empty where it has none of the forms.

    The forms are a conversation (`messages`), `prompt` and `completion`, `question` and `answer`, or `text`. A form of
    which `columns` names a role goes first.

    Raises:
        ValueError: The row looks like two forms at once, and `columns` does not say which one is meant.
    """
    complete = []
    for form in FORMS:
        own = {role: columns.get(role, role) for role in form}
        # Another role's own choice of a column is not a role of its own: {"question": "text"} makes no text of it.
        taken = {column for role, column in columns.items() if role not in form}
        if all(row.get(column) is not None and column not in taken for column in own.values()):
            complete.append(own)
    complete = [own for own in complete if set(own) & set(columns)] or complete
    if len(complete) > 1:
        raise ValueError(
            f"it looks like {' and like '.join(' + '.join(own.values()) for own in complete)}. Say which is meant by "
            f"`columns`, for example {complete[0]}."
        )
    chosen = complete[0] if complete else {}
    if set(chosen) == {"text"} and "text" not in columns:
        answers = [name for name in ANSWER_COLUMNS if isinstance(row.get(name), (str, list))]
        if answers:
            asked, answer = ("text", answers[-1]) if "question" not in answers else ("question", "text")
            raise ValueError(
                f"beside 'text' it has the column{'s' * (len(answers) > 1)} {', '.join(map(repr, answers))}: is "
                f"'text' the whole text to learn, or one half of a pair? Say it by `columns`: {{'text': 'text'}} for "
                f"the whole text, or {{'question': {asked!r}, 'answer': {answer!r}}} for a question with its answer."
            )
    return chosen


#: An answer that is learned, and a function that encodes another answer to the same prompt (None: there is no prompt).
Turn: TypeAlias = tuple[EncodedAnswer, Callable[[str], EncodedAnswer] | None]


def encode_row(
    tokenizer: Any, row: Mapping[str, Any], template: QuestionAnswerFormat, columns: Mapping[str, str]
) -> list[Turn]:
    """What is learned of a row: a question's answer, a completion, a text, or each answer in a conversation.

    In a conversation every assistant message is an answer of its own, with all messages before it as its prompt.
    """
    form = row_form(row, columns)
    roles = {role: row[column] for role, column in form.items()}
    if not roles:
        forms = "; or ".join(" and ".join(repr(columns.get(role, role)) for role in form) for form in FORMS)
        raise ValueError(f"it needs the columns {forms}; it has {', '.join(map(str, row))}.")
    if "text" in roles:
        template.refuse_examples("a plain text")
        return [(encode_text(tokenizer, str(roles["text"]), max_length=template.max_length), None)]
    if "question" in roles:
        encode = partial(template.encode, tokenizer, str(roles["question"]))
        return [(encode(str(roles["answer"])), encode)]
    if "prompt" in roles:
        prompt, completion = roles["prompt"], roles["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            encode = partial(template.encode_completion, tokenizer, prompt)
            return [(encode(completion), encode)]
        before, messages = _messages(prompt, "prompt"), _messages(completion, "completion")
    else:
        before, messages = [], _messages(roles["messages"], "messages")
    turns: list[Turn] = []
    for place, message in enumerate(messages):
        history = before + messages[:place]
        if message["role"] == "assistant" and history:
            encode = partial(template.encode_chat, tokenizer, history)
            turns.append((encode(message["content"]), encode))
    if not turns:
        found = ", ".join(message["role"] for message in before + messages)
        raise ValueError(f"its conversation has no assistant message that answers another one; its roles are {found}.")
    return turns


def _messages(value: Any, column: str) -> list[dict[str, str]]:
    """A conversation, checked."""
    if isinstance(value, (list, tuple)) and value:
        texts = [isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
                 for m in value]  # fmt: skip
        if all(texts):
            return [dict(message) for message in value]
    raise ValueError(
        f'the column {column!r} has to be a list of {{"role": ..., "content": text}}, got {str(value)[:120]!r}. '
        "(Prompt and completion are both text, or both such lists.)"
    )


class ForgetRetainPairs(Dataset):
    """Each sample to forget with one to retain; an epoch is one pass over the forget set.

    The retain samples are taken in a shuffled order that goes on from epoch to epoch, so that every one of them comes
    before any comes twice. The order follows from `seed` only: not from the number of processes or workers.

    Args:
        forget: Rows in one of the forms of `row_form`. A conversation gives a sample for each of its answers.
        retain: The same; None trains without a retain set.
        template: How a question becomes a prompt.
        columns: Schema name -> the data's own name, for the roles of `row_form` and "alternative".
        alternatives: Texts that may be answered instead, drawn by example and epoch; a column "alternative" in the
            forget set (a text, or a list of them) goes first. None leaves the alternative out.
        retain_alternatives: The same for the retain set.
        copies: For each forget row, changed copies of it that a method reads before training.
        allow_overlap: Accept samples that are in both sets; they are counted in a warning.

    Raises:
        ValueError: An empty set, a row without a token to learn or in no form or in two (with its set and index), or
            samples in both sets.
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
        retain_alternatives: Sequence[str] | None = None,
        copies: Sequence[Sequence[Mapping[str, Any]]] | None = None,
        allow_overlap: bool = False,
        seed: int = 0,
    ) -> None:
        self.template = template or QuestionAnswerFormat()
        self.columns = dict(columns or {})
        for role in self.columns:
            if role not in (*ROLES, *OTHER_COLUMNS):
                raise ValueError(f"In `columns`: {unknown_name('name', role, (*ROLES, *OTHER_COLUMNS))}")
        self.seed = seed
        # In shared memory, so that the workers of a data loader see it change, also those that outlive an epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._orders: dict[int, list[int]] = {}
        turns = self._encode("forget", forget, tokenizer)
        self.forget = [answer for _, (answer, _) in turns]
        self.retain: list[EncodedAnswer] | None = None
        self.retain_alternatives: list[list[EncodedAnswer]] | None = None
        if retain is not None:
            retain_turns = self._encode("retain", retain, tokenizer)
            self.retain = [answer for _, (answer, _) in retain_turns]
            self._check_overlap(self.retain, allow_overlap)
            if retain_alternatives is not None:
                self.retain_alternatives = self._alternatives("retain", retain, retain_turns, retain_alternatives)
        self.alternatives: list[list[EncodedAnswer]] | None = None
        if alternatives is not None:
            self.alternatives = self._alternatives("forget", forget, turns, alternatives)

        self.copies: list[list[EncodedAnswer]] | None = None
        if copies is not None:
            if [index for index, _ in turns] != list(range(len(forget))):
                raise ValueError("Copies are made of rows with one answer, and the forget set has conversations.")
            self.copies = [[turn[0] for _, turn in self._encode("forget", own, tokenizer)] for own in copies]

    def _encode(self, name: str, examples: Iterable[Mapping[str, Any]], tokenizer: Any) -> list[tuple[int, Turn]]:
        """(index of the row, what is learned of it), one or more for each row."""
        encoded: list[tuple[int, Turn]] = []
        unused: set[str] = set()
        for index, example in enumerate(examples):
            try:
                encoded += [(index, t) for t in encode_row(tokenizer, example, self.template, self.columns)]
            except (ValueError, TypeError) as error:
                raise ValueError(f"Example {index} of the {name} set cannot be used: {error}") from error
            used = {*row_form(example, self.columns).values(), *self.columns.values(), *OTHER_COLUMNS}
            unused |= {str(column) for column in example if column not in used}
        if not encoded:
            raise ValueError(f"The {name} set is empty.")
        longest = self.template.max_length
        if longest is not None and (cut := sum(len(answer.input_ids) >= longest for _, (answer, _) in encoded)):
            logger.warning(
                f"{cut} of {len(encoded)} samples of the {name} set reach `max_length={longest}`: what is beyond it, "
                "and the end of their answers, is neither forgotten nor retained. Raise it to learn all of them."
            )
        if unused:
            logger.warning(f"Columns of the {name} set that are not used: {', '.join(sorted(unused))}.")
        return encoded

    def _check_overlap(self, retain: Sequence[EncodedAnswer], allowed: bool) -> None:
        kept = {(answer.answer_start, *answer.input_ids) for answer in retain}
        both = [i for i, a in enumerate(self.forget) if (a.answer_start, *a.input_ids) in kept]
        if not both:
            return
        found = f"{len(both)} of the {len(self.forget)} samples to forget are also in the retain set"
        if not allowed:
            raise ValueError(
                f"{found} (the first is sample {both[0]}): the run would forget and keep the same answers. Remove "
                "them from one of the sets, or set `allow_overlap`."
            )
        logger.warning(f"{found}; `allow_overlap` keeps them in both.")

    def _alternatives(
        self,
        name: str,
        rows: Sequence[Mapping[str, Any]],
        turns: Sequence[tuple[int, Turn]],
        alternatives: Sequence[str],
    ) -> list[list[EncodedAnswer]]:
        own = self.columns.get("alternative", "alternative")
        answers_of_row = [index for index, _ in turns]
        encoded = []
        for index, (_, encode) in turns:
            texts = rows[index].get(own) or list(alternatives)
            texts = [texts] if isinstance(texts, str) else texts
            if encode is None or not texts:
                raise ValueError(
                    f"Example {index} of the {name} set needs a question and an alternative answer to it: a column "
                    f"{own!r} with a text, or with a list of texts."
                )
            if rows[index].get(own) and answers_of_row.count(index) > 1:
                raise ValueError(
                    f"Example {index} of the {name} set is a conversation with {answers_of_row.count(index)} answers, "
                    f"so it is not clear which one {own!r} belongs to. Give a row for each of them."
                )
            encoded.append([encode(str(text)) for text in texts])
        return encoded

    def all_answers(self) -> Iterator[tuple[str, int, EncodedAnswer]]:
        """Everything that may come in a batch: (part, index of the sample, answer)."""
        for part, answers in (("forget", self.forget), ("retain", self.retain or [])):
            for index, answer in enumerate(answers):
                yield part, index, answer
        for part, alternatives in (
            ("alternative", self.alternatives),
            ("retain_alternative", self.retain_alternatives),
        ):
            for index, choices in enumerate(alternatives or []):
                for answer in choices:
                    yield part, index, answer

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose retain samples and alternatives are given; the trainer calls it."""
        self._epoch.fill_(epoch)

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

    def sample(self, part: str, index: int) -> dict[str, Any]:
        """One answer of the "forget" or "retain" set, as it is in batches."""
        return with_labels(getattr(self, part)[index], index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample: dict[str, Any] = {"forget": self.sample("forget", index)}
        if self.retain is not None:
            chosen = self.retain_index(index)
            sample["retain"] = self.sample("retain", chosen)
            if self.retain_alternatives is not None:
                sample["retain_alternative"] = self._drawn(self.retain_alternatives[chosen], index)
        if self.alternatives is not None:
            sample["alternative"] = self._drawn(self.alternatives[index], index)
        return sample

    def _drawn(self, alternatives: Sequence[EncodedAnswer], index: int) -> dict[str, Any]:
        """One of the alternatives, by the place of the sample and the epoch."""
        draw = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch * len(self.forget) + index)
        return with_labels(alternatives[int(torch.randint(len(alternatives), (), generator=draw))], index)


def with_labels(encoded: EncodedAnswer, index: int) -> dict[str, Any]:
    """An answer as it is in a batch."""
    return {"input_ids": encoded.input_ids, "labels": encoded.labels, "index": index}


def forget_retain_collator(pad_token_id: int) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]:
    """Pads each part of nested samples on the right.

    The attention mask comes from the lengths, not from `input_ids != pad_token_id`: where the padding token is the
    end-of-sequence token, the end that belongs to an answer stays attended to and is learned.
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
