"""Rows of texts and images as vision-language models read them: messages, placeholders, answers, batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from difflib import SequenceMatcher
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_transfer_ext.data.images import open_image
from hf_transfer_ext.models.loading import call_settings_restored, tokenizer_in
from hf_transfer_ext.models.plumbing import pad_token_id
from hf_transfer_ext.tensors import IGNORE_INDEX

#: Columns that hold images; the first that a row has is used.
IMAGES = ("images", "image")


class Reading(NamedTuple):
    """A row as one model reads it.

    text: The row up to the first answer, with a placeholder for each image.
    text_length: Tokens of that, with all those of its images.
    tail: Tokens of the answers, and of what stands between them.
    labels: As `tail`, with IGNORE_INDEX for tokens that are not of an answer.
    """

    text: str
    text_length: int
    tail: list[int]
    labels: list[int]

    def answers(self) -> list[int]:
        """The tokens of all answers."""
        return [token for token in self.labels if token != IGNORE_INDEX]

    def fitting(self, max_length: int | None) -> int:
        """How many tokens of the answers lie within the first `max_length` of the row."""
        room = len(self.tail) if max_length is None else max(max_length - self.text_length, 0)
        return sum(token != IGNORE_INDEX for token in self.labels[:room])

    def cut(self, count: int) -> Reading:
        """Without what follows the first `count` tokens of the answers."""
        places = [place for place, token in enumerate(self.labels) if token != IGNORE_INDEX]
        end = len(self.tail) if count == len(places) else places[count - 1] + 1
        return self._replace(tail=self.tail[:end], labels=self.labels[:end])


# ---- From a row of the data ----


def images_of(row: Mapping[str, Any], folder: Any) -> list[Any]:
    """The images of a row, opened: those of its column, or else those that its messages hold.

    Args:
        folder: What paths of images are relative to.

    Raises:
        ValueError: It has none, or one cannot be opened.
    """
    found = next((row[name] for name in IMAGES if row.get(name) is not None), None)
    if found is None:
        contents = [turn.get("content") for turn in _turns_of(row)]
        parts = [part for content in contents if isinstance(content, (list, tuple)) for part in content]
        found = [part.get("image") or part.get("path") for part in parts if part.get("type") == "image"]
        found = [image for image in found if image]
    images = list(found) if isinstance(found, (list, tuple)) else [found]
    if not images:
        raise ValueError(
            "it has no image. All rows of the task vision_language need one; distill on texts alone with "
            "`task: causal_lm`."
        )
    return [open_image(image, folder) for image in images]


def messages_of(row: Mapping[str, Any], images: int) -> list[dict[str, Any]]:
    """A row as messages whose contents are parts, with a place for each image; in front of the text by default.

    Raises:
        ValueError: The messages are not a conversation that ends with an answer, or have places for other images.
    """
    messages = [{"role": turn["role"], "content": _parts_of(turn)} for turn in _turns_of(row)]
    roles = [turn["role"] for turn in messages]
    if "user" not in roles or roles[-1] != "assistant":
        shown = ", ".join(roles) or "none"
        raise ValueError(f"it needs a message of the user and, at the end, one of the assistant; it has {shown}.")
    places = sum(part["type"] == "image" for turn in messages for part in turn["content"])
    if places not in (0, images):
        raise ValueError(f"its messages have places for {places} images, but it has {images}.")
    if not places:
        first = messages[roles.index("user")]
        first["content"] = [{"type": "image"}] * images + first["content"]
    return messages


def _turns_of(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if row.get("messages") is not None:
        return list(row["messages"])
    found: list[Mapping[str, Any]] = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        value = row[name]
        found += [{"role": role, "content": value}] if isinstance(value, str) else list(value)
    return found


def _parts_of(turn: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = turn["content"]
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    found = []
    for part in content:
        if part.get("type") not in ("text", "image"):
            raise ValueError(f"parts of a message are of type text or image, got {part.get('type')!r}.")
        is_text = part["type"] == "text"
        found.append({"type": "text", "text": part["text"]} if is_text else {"type": "image"})
    return found


# ---- As a model reads it ----


def reading_of(
    processor: Any, messages: list[dict[str, Any]], images: list[Any], image_tokens: frozenset[int]
) -> Reading:
    """A row as the model of a processor reads it.

    Args:
        image_tokens: Ids of the tokens that stand for images.

    Raises:
        ValueError: Images stand behind the first answer, or the processor puts none into the prompt.
    """
    prompt, *behind = segments(processor, messages)
    tokenizer = tokenizer_in(processor)
    tail: list[int] = []
    labels: list[int] = []
    for place, text in enumerate(behind):
        with call_settings_restored(tokenizer):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        tail += ids
        labels += ids if place % 2 == 0 else [IGNORE_INDEX] * len(ids)
    if image_tokens & set(tail):
        raise ValueError(
            "tokens of images stand in or behind its first answer. Images have to come before it: split the "
            "conversation into rows, and leave placeholders out of the answers."
        )
    read = processed(processor, [prompt], [images])["input_ids"][0].tolist()
    if not image_tokens & set(read):
        raise ValueError(
            f"{type(processor).__name__} puts no token of an image ({sorted(image_tokens)}) into its prompt, so the "
            "model would not see the image. Check the chat template and `image_token` of the processor."
        )
    return Reading(prompt, len(read), tail, labels)


def segments(processor: Any, messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """A conversation as text, cut at its answers: what is before the first one, that answer, what follows it, ...

    Without a chat template, placeholders and texts follow each other, and the end-of-sequence token ends an answer.

    Raises:
        ValueError: The chat template writes the start of a conversation in another way than the whole.
    """
    if template_of(processor) is None:
        placeholder, end = getattr(processor, "image_token", None), tokenizer_in(processor).eos_token or ""
        if placeholder is None:
            raise ValueError(
                f"{type(processor).__name__} has neither a chat template nor an `image_token`, so that nothing says "
                "where images go. Set its `chat_template`."
            )
        texts = ["".join(placeholder if p["type"] == "image" else p["text"] for p in m["content"]) for m in messages]
        learns = [turn["role"] == "assistant" for turn in messages]
        return _joined([(f"{text}{end if own else ''}", own) for text, own in zip(texts, learns, strict=True)])
    whole, pieces, done = _rendered(processor, messages), [], 0
    for place, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        start = _rendered(processor, messages[:place], add_generation_prompt=True)
        end = _rendered(processor, messages[: place + 1])
        if not (whole.startswith(end) and end.startswith(start)):
            raise ValueError(
                "the chat template of its processor writes the start of a conversation in another way than the whole, "
                "so that its answers cannot be found. Give one answer a row, or another `chat_template`."
            )
        pieces += [(whole[done : len(start)], False), (end[len(start) :], True)]
        done = len(end)
    return _joined([*pieces, (whole[done:], False)])


def _joined(pieces: Sequence[tuple[str, bool]]) -> list[str]:
    """Texts that are learned or not, as texts in turn: not learned, learned, not learned, ..."""
    found = [""]
    for text, learned in pieces:
        if learned == (len(found) % 2 == 0):
            found[-1] += text
        elif text:
            found.append(text)
    return found


def template_of(processor: Any) -> str | None:
    """The chat template of a processor, or of its tokenizer; None without one."""
    found = getattr(processor, "chat_template", None) or tokenizer_in(processor).chat_template
    return found.get("default") if isinstance(found, Mapping) else found


def _rendered(processor: Any, messages: Sequence[Any], **how: Any) -> str:
    """A conversation as text; by the tokenizer, whose rendering of templates is guarded."""
    render = tokenizer_in(processor).apply_chat_template
    return str(render(list(messages), chat_template=template_of(processor), tokenize=False, **how))


def processed(processor: Any, texts: list[str], images: list[list[Any]]) -> dict[str, Tensor]:
    """What a processor makes of texts and their images, padded on whichever side."""
    special = template_of(processor) is None  # a template writes the special tokens itself
    how = {"padding": True, "return_tensors": "pt", "add_special_tokens": special}
    with call_settings_restored(processor):
        return dict(processor(text=texts, images=images, **how))


def batch_of(
    processor: Any, readings: Sequence[Reading], images: list[list[Any]], multiple: int | None = None
) -> dict[str, Tensor]:
    """Rows as one batch of a model, padded on the right, with `labels`.

    Args:
        multiple: Lengths are padded to a multiple of this.
    """
    read = processed(processor, [one.text for one in readings], images)
    shape, masks = read["input_ids"].shape, read["attention_mask"].bool()
    starts = masks.sum(1).tolist()
    longest = max(start + len(one.tail) for start, one in zip(starts, readings, strict=True))
    longest += -longest % (multiple or 1)
    batch = dict(read)
    for name, values in read.items():
        if values.shape != shape:
            continue  # of the images
        filling = pad_token_id(tokenizer_in(processor)) if name == "input_ids" else 0
        batch[name] = values.new_full((len(readings), longest), filling)
        for row, (start, one) in enumerate(zip(starts, readings, strict=True)):
            batch[name][row, :start] = values[row][masks[row]]
            if name in ("input_ids", "attention_mask"):  # other ids of a token tell images, and the tail has none
                tail = torch.tensor(one.tail) if name == "input_ids" else 1
                batch[name][row, start : start + len(one.tail)] = tail
    labels = torch.full((len(readings), longest), IGNORE_INDEX)
    for row, (start, one) in enumerate(zip(starts, readings, strict=True)):
        labels[row, start : start + len(one.labels)] = torch.tensor(one.labels)
    return {**batch, "labels": labels}


# ---- As two models read it ----


class Row(NamedTuple):
    """The tokens of a row as one model reads them, those of images included and padding left out.

    ids: The tokens.
    learned: True at the tokens of answers.
    """

    ids: list[int]
    learned: list[bool]


def rows_of(batch: Mapping[str, Tensor], prefix: str = "") -> list[Row]:
    """The rows of a batch, padded on the right.

    Args:
        prefix: In front of the names of the teacher's tensors, where it reads its own.
    """
    ids, labels, masks = (batch[prefix + name].cpu() for name in ("input_ids", "labels", "attention_mask"))
    learned = labels != IGNORE_INDEX
    lengths = masks.sum(1).tolist()
    return [Row(ids[i, :length].tolist(), learned[i, :length].tolist()) for i, length in enumerate(lengths)]


def shared_places(own: Row, other: Row, image_tokens: frozenset[int]) -> tuple[list[int], list[int]]:
    """Where the tokens that both models read stand in the row of each: as many places, in the same order.

    The answers are the same tokens in both. Before and between them, tokens of text are matched in their order (chat
    templates may differ). The tokens of an image are matched if they are as many and the same for both models, which
    have to read the image in as many parts.

    Args:
        image_tokens: Ids of the tokens that stand for images.
    """
    if own.ids == other.ids:
        return list(range(len(own.ids))), list(range(len(own.ids)))
    answers = ([place for place, learned in enumerate(row.learned) if learned] for row in (own, other))
    found = list(zip(*answers, strict=True))
    units, theirs = (_units_of(row, image_tokens) for row in (own, other))
    for gap in units.keys() & theirs.keys():
        keys, other_keys = ([key for key, _ in side[gap]] for side in (units, theirs))
        for start, begin, size in SequenceMatcher(None, keys, other_keys, autojunk=False).get_matching_blocks():
            pairs = zip(units[gap][start : start + size], theirs[gap][begin : begin + size], strict=True)
            for (_, places), (_, others) in pairs:
                found += zip(places, others, strict=True)
    found.sort()
    return [place for place, _ in found], [place for _, place in found]


def _units_of(row: Row, image_tokens: frozenset[int]) -> dict[int, list[tuple[Hashable, list[int]]]]:
    """What stands before and between the answers: (what it is matched by, its places) for each token of text and each
    run of tokens of images, by the number of tokens of answers before it."""
    tokens = groupby(enumerate(row.ids), lambda one: one[1] in image_tokens)
    runs = [(is_image, [place for place, _ in group]) for is_image, group in tokens]
    images, read, answered = sum(is_image for is_image, _ in runs), 0, 0
    found: dict[int, list[tuple[Hashable, list[int]]]] = defaultdict(list)
    for is_image, places in runs:
        if is_image:
            read += 1
            found[answered].append((("image", read, images, tuple(row.ids[place] for place in places)), places))
            continue
        for place in places:
            if row.learned[place]:
                answered += 1
            else:
                found[answered].append((row.ids[place], [place]))
    return found
