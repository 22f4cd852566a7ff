"""Trim a model to the vocabulary of a corpus: fewer embedding rows, a matching tokenizer, and how to restore it."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_transfer_ext.files import write_text
from hf_transfer_ext.hub.privacy import public_text
from hf_transfer_ext.progress import steps
from hf_transfer_ext.reading import field_of, read_json
from hf_transfer_ext.students import tokenizer_json
from hf_transfer_ext.students.layers import rebuilt, refuse_wrapped

MAP_FILE = "vocabulary_map.json"


@dataclass(frozen=True)
class VocabularyMap:
    """Maps each row of a trimmed model to its row in the original model.

    Args:
        old_ids: The original id for every new id.
        original_size: Rows of the original embedding.
        tokens: Number of new ids that the trimmed tokenizer knows; the remaining rows are padding.
        original: Name of the original model.
    """

    old_ids: tuple[int, ...]
    original_size: int
    tokens: int
    original: str = ""

    @cached_property
    def _old(self) -> Int[Tensor, " new"]:
        return torch.tensor(self.old_ids, dtype=torch.long)

    @cached_property
    def _new(self) -> Int[Tensor, " old"]:
        new = torch.full((self.original_size,), -1, dtype=torch.long)
        new[self._old] = torch.arange(len(self.old_ids))
        return new

    def to_old(self, ids: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Ids of the trimmed model -> ids of the original model; negative ids (ignored labels) stay."""
        return torch.where(ids < 0, ids, self._old.to(ids.device)[ids.clamp(min=0)])

    def to_new(self, ids: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Ids of the original model -> ids of the trimmed model; negative ids (ignored labels) stay.

        Raises:
            ValueError: One of the ids was trimmed away.
        """
        new = torch.where(ids < 0, ids, self._new.to(ids.device)[ids.clamp(min=0)])
        lost = ids[(ids >= 0) & (new < 0)]
        if lost.numel():
            raise ValueError(
                f"{lost.numel()} ids are not in the trimmed vocabulary, among them {lost.unique()[:5].tolist()}. "
                "Tokenize the text with the trimmed tokenizer instead, or trim with a corpus that contains it."
            )
        return new

    def save(self, folder: str | Path) -> Path:
        """Write `vocabulary_map.json` into a model's folder."""
        path = Path(folder) / MAP_FILE
        content = {
            "original": self.original,
            "original_size": self.original_size,
            "tokens": self.tokens,
            "old_ids": list(self.old_ids),
        }
        write_text(path, json.dumps(content) + "\n")
        return path

    @classmethod
    def load(cls, folder: str | Path) -> VocabularyMap:
        """Read `vocabulary_map.json` from a model's folder."""
        path = Path(folder) / MAP_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{str(folder)!r} has no {MAP_FILE}: its vocabulary was not trimmed here.")
        content, where = read_json(path), repr(str(path))
        old_ids = tuple(field_of(content, "old_ids", list, where=where))
        size, tokens = (field_of(content, key, int, where=where) for key in ("original_size", "tokens"))
        if (
            not all(type(old) is int for old in old_ids)
            or len(set(old_ids)) != len(old_ids)
            or not 0 < tokens <= len(old_ids)
            or not _all_below(old_ids, size)
        ):
            raise ValueError(f"{str(path)!r} is damaged: ids repeat or are outside 0 to {size - 1}. Trim it again.")
        return cls(old_ids, size, tokens, field_of(content, "original", str, where=where))


def trim_vocabulary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Iterable[str],
    *,
    extra_tokens: Sequence[str] = (),
    min_count: int = 1,
    pad_to_multiple_of: int | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, VocabularyMap]:
    """A copy of the model with only the tokens that a corpus uses, and its tokenizer; save both as usual.

    These tokens are kept: tokens that occur in the corpus and, for BPE, the pieces they are merged from; special
    tokens of the tokenizer, of the model's configs and of the chat template; bytes, so that any other text can still
    be tokenized; printable ASCII. Other added tokens (`<unused17>`) are removed unless the corpus or `extra_tokens`
    contains them.

    With `min_count=1`, text from the corpus is tokenized exactly as before, and for its ids

    .. math:: q(v \\mid x) = \\frac{p(v \\mid x)}{\\sum_{w \\in K} p(w \\mid x)}, \\quad v \\in K

    where p and q are the next-token distributions of the original and the trimmed model, and K are the kept tokens.
    Words missing from the corpus are split into small pieces, which the model hardly knows: the corpus must contain
    all text that matters, including prompts and questions of the evaluation. Text that is tokenized in parts (prompt
    and completion, rendered chats) must be in the corpus in the same parts.

    Args:
        corpus: Texts, iterated once and tokenized without special tokens.
        extra_tokens: Additional tokens to keep, spelled as in the tokenizer's vocabulary.
        min_count: Tokens that occur less often are dropped; words with them are split into smaller pieces.
        pad_to_multiple_of: Pad the embedding to a multiple of this many rows. The added rows are the last trimmed rows
            of the original (unused or rare ids); the tokenizer does not know them.

    Returns:
        A new model that shares no memory with `model`, the trimmed tokenizer, and the map between the ids.

    Raises:
        ValueError: The corpus is empty, a token of `extra_tokens` does not exist, the tokenizer is of a kind that
            cannot be trimmed, or model and tokenizer do not belong together.

    Source: the idea, Abdaoui et al. 2020, Load What You Need, https://arxiv.org/abs/2010.05609; closing the kept
    tokens under merges, so that tokenization stays the same, is our own.
    """
    refuse_wrapped(model)
    if min_count < 1 or (pad_to_multiple_of is not None and pad_to_multiple_of < 1):
        raise ValueError(
            f"`min_count` and `pad_to_multiple_of` must be at least 1, got {min_count} and {pad_to_multiple_of}."
        )
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"Only tokenizers with a tokenizer.json can be trimmed, got a {type(tokenizer).__name__}.")
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    tokenizer_json.refuse_unknown_model(data)
    size = len(_input_rows(model))
    known = tokenizer.get_vocab()
    if max(known.values()) >= size:
        raise ValueError(
            f"The tokenizer knows ids up to {max(known.values())}, but the model has {size} embedding rows: they do "
            "not belong together."
        )

    counts = _token_counts(tokenizer, corpus)
    if not counts:
        raise ValueError("The corpus has no tokens, so no vocabulary can be derived from it. Give at least one text.")
    wanted = {i for i, count in counts.items() if count >= min_count}
    wanted |= {known[token] for token in _special_tokens(tokenizer, data)}
    wanted |= set(_token_counts(tokenizer, _template_samples(tokenizer)))
    wanted |= {_known_id(token, known) for token in extra_tokens}
    wanted |= tokenizer_json.indispensable(data)
    configured = {i for i in _configured_ids(model) if 0 <= i < size}
    tokens = set(known.values())
    new_data, old_ids = tokenizer_json.trimmed(data, tokenizer_json.closure(data, wanted | (configured & tokens)))

    rows = old_ids + sorted(configured - tokens)
    if pad_to_multiple_of:
        missing = min(-len(rows) % pad_to_multiple_of, size - len(rows))
        rows += sorted(sorted(set(range(size)) - set(rows))[-missing:]) if missing else []
    name = public_text(str(model.config.name_or_path or ""))
    vocabulary_map = VocabularyMap(tuple(rows), size, len(old_ids), name)

    def take(tensor: Tensor) -> Tensor:
        return tensor[vocabulary_map._old.to(tensor.device)]

    new_model = _with_rows(model, len(rows), take, lambda i: _position(vocabulary_map, i))
    return new_model, _tokenizer_like(tokenizer, new_data), vocabulary_map


def restore_vocabulary(
    model: PreTrainedModel, vocabulary_map: VocabularyMap, original: PreTrainedModel | Float[Tensor, "old width"]
) -> PreTrainedModel:
    """A copy of a trimmed model (possibly trained or cut in depth since) with the full original vocabulary.

    Rows kept by the trimming come from the model, the others from the original. Use it with the original tokenizer.

    Args:
        original: The model that was trimmed, or its embedding matrix if input and output embeddings are tied.

    Raises:
        ValueError: The rows do not fit the map or the model.
    """
    own = _vocabulary_tensors(model)
    if isinstance(original, Tensor):
        if not model.config.get_text_config().tie_word_embeddings:
            raise ValueError("This model's output embeddings are not tied: pass the original model, not one matrix.")
        rows = {name: original for name in own}
    else:
        rows = _vocabulary_tensors(original)
    for name, tensor in own.items():
        expected = (vocabulary_map.original_size, *tensor.shape[1:])
        if len(tensor) != len(vocabulary_map.old_ids) or name not in rows or rows[name].shape != expected:
            found = tuple(rows[name].shape) if name in rows else "nothing"
            raise ValueError(
                f"{name!r} of the trimmed model has {len(tensor)} rows and the map {len(vocabulary_map.old_ids)}; the "
                f"original has {found} where {expected} is needed. Pass the map and the original of this model."
            )

    by_pointer = {tensor.data_ptr(): rows[name] for name, tensor in own.items()}

    def put_back(tensor: Tensor) -> Tensor:
        whole = by_pointer[tensor.data_ptr()].detach().to(tensor).clone()
        whole[vocabulary_map._old.to(tensor.device)] = tensor
        return whole

    return _with_rows(model, vocabulary_map.original_size, put_back, lambda i: vocabulary_map.old_ids[i])


def _with_rows(
    model: PreTrainedModel, size: int, rows: Callable[[Tensor], Tensor], new_id: Callable[[int], int | None]
) -> PreTrainedModel:
    """A copy of the model with different vocabulary rows and all ids in its configs renumbered."""
    config = copy.deepcopy(model.config)
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        _renumber(part, new_id)
        if hasattr(part, "vocab_size"):
            part.vocab_size = size
    vocabulary = _vocabulary_tensors(model)
    tensors = {name: rows(tensor) if name in vocabulary else tensor for name, tensor in model.state_dict().items()}
    new_model = rebuilt(model, config, tensors)
    if new_model.generation_config is not None:
        _renumber(new_model.generation_config, new_id)
    return new_model


def _vocabulary_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors with one row per token: input embedding, output embedding and its bias, by state-dict name."""
    head = model.get_output_embeddings()
    owners = [_input_rows(model)]
    owners += [tensor for tensor in (getattr(head, "weight", None), getattr(head, "bias", None)) if tensor is not None]
    pointers = {tensor.data_ptr() for tensor in owners}
    return {name: tensor for name, tensor in model.state_dict().items() if tensor.data_ptr() in pointers}


def _input_rows(model: PreTrainedModel) -> Tensor:
    rows = model.get_input_embeddings().weight
    if not isinstance(rows, Tensor):
        raise TypeError(f"{type(model).__name__} has no embedding matrix with one row per token.")
    return rows


def _token_counts(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Counter[int]:
    counts: Counter[int] = Counter()
    iterator: Iterator[str] = iter(steps(texts, "counting the tokens of the corpus", "text"))
    while batch := list(islice(iterator, 1000)):
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            counts.update(ids)
    return counts


def _special_tokens(tokenizer: PreTrainedTokenizerBase, data: dict[str, Any]) -> set[str]:
    """Tokens with a role (end, padding, extra ones), and added tokens that the chat template writes."""
    template = tokenizer.chat_template or ""
    templates = "".join(template.values()) if isinstance(template, dict) else template
    in_template = {token for token in tokenizer_json.added_vocabulary(data) if token in templates}
    return (set(tokenizer.all_special_tokens) & set(tokenizer.get_vocab())) | in_template


def _template_samples(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text that the chat template writes around messages: role names and newlines need tokens too."""
    if not tokenizer.chat_template:
        return []
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    samples = []
    for messages in (turns, [{"role": "system", "content": "c"}, *turns]):
        for prompt in (False, True):
            try:
                samples.append(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
            except Exception:  # templates raise anything for a role they refuse, and then never write it
                continue
    return [str(sample) for sample in samples]


def _known_id(token: str, known: dict[str, int]) -> int:
    if token not in known:
        raise ValueError(
            f"`extra_tokens` has {token!r}, which is not one token of this tokenizer. "
            "Spell it as in the vocabulary (a leading space is often 'Ġ' or '▁'), or add it to the corpus."
        )
    return known[token]


def _tokenizer_like(tokenizer: PreTrainedTokenizerFast, data: dict[str, Any]) -> PreTrainedTokenizerFast:
    """A tokenizer with the same roles and templates on another `tokenizer.json`.

    It has the generic class, which uses tokenizer.json unchanged; model-specific classes rebuild parts of it.
    """
    result = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)),
        **{role: token for role, token in tokenizer.special_tokens_map.items() if isinstance(token, str)},
        extra_special_tokens=list(tokenizer.extra_special_tokens),
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        model_input_names=tokenizer.model_input_names,
        clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
        chat_template=tokenizer.chat_template,
        name_or_path=tokenizer.name_or_path,
    )
    known = tokenizer_json.model_vocabulary(data) | tokenizer_json.added_vocabulary(data)
    if result.get_vocab() != known:
        raise ValueError(
            "The trimmed tokenizer gained or lost tokens when it was built; please report this tokenizer."
        )
    return result


def _position(vocabulary_map: VocabularyMap, old: int) -> int | None:
    new = int(vocabulary_map._new[old]) if 0 <= old < vocabulary_map.original_size else old
    return None if old >= 0 > new else new


def _configured_ids(model: PreTrainedModel) -> set[int]:
    """Every token id in the configs: these rows are required for generation."""
    found: set[int] = set()

    def collect(i: int) -> int:
        found.add(i)
        return i

    config = copy.deepcopy(model.config)
    for part in (config, config.get_text_config(), copy.deepcopy(model.generation_config)):
        if part is not None:
            _renumber(part, collect, only_tokens=True)
    return found


def _renumber(config: Any, new_id: Callable[[int], int | None], *, only_tokens: bool = False) -> None:
    """Rewrite every token id in a config in place; lists of suppressed tokens are skipped with `only_tokens`."""
    for name, value in list(vars(config).items()):
        if name.endswith(("_token_id", "_token_ids", "_token_index")):
            setattr(config, name, _renumbered(value, new_id))
        elif name in ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids") and value and not only_tokens:
            setattr(config, name, _renumbered(value, new_id))


def _renumbered(value: Any, new_id: Callable[[int], int | None]) -> Any:
    """New ids in the structure of the old ones; trimmed ids are removed, and so are nested lists that had one."""
    if isinstance(value, (list, tuple)):
        if value and all(isinstance(entry, (list, tuple)) for entry in value):
            lists = [(entry, _renumbered(entry, new_id)) for entry in value]
            return [new for old, new in lists if len(new) == len(old)]
        return [new for new in (_renumbered(entry, new_id) for entry in value) if new is not None]
    return new_id(value) if isinstance(value, int) and value >= 0 else value


def _all_below(ids: tuple[int, ...], size: int) -> bool:
    return all(isinstance(i, int) and 0 <= i < size for i in ids)
