"""Models with different tokenizers: one vocabulary for the result, and each model's embeddings in its order.

The embeddings of every model are rearranged row by row while they are read, so that the methods see tensors of one
shape. A token that a model lacks gets a row from elsewhere: what the configuration says, else the base model's, else
that of the only model that has it, else the mean of those that have it.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_transfer_ext.files import write_text
from hf_transfer_ext.merging.planning.config import MergeConfig, TokenSource
from hf_transfer_ext.reading import read_json
from hf_transfer_ext.weights.opened import DerivedInput, InputModel, InputTensor, Scratch, has_token_rows
from hf_transfer_ext.weights.reference import ModelReference

if TYPE_CHECKING:
    from torch import Tensor

#: Biases with one entry for each token.
_TOKEN_BIAS = re.compile(r"(^|\.)(lm_head|embed_out|predictions|(predictions|lm_head)\.decoder)\.bias$")


def is_rearranged(name: str, models: Sequence[InputModel]) -> bool:
    """Whether a tensor has one row for each token in all models, and so follows the vocabulary of the result.

    Raises:
        ValueError: A bias has its tokens in another dimension, which cannot be rearranged.
    """
    if name.endswith("final_logits_bias"):
        raise ValueError(
            f"Tensor {name!r} has one number for each token in its second dimension, which `tokenizer` cannot "
            "rearrange. Merge models of one vocabulary, without `tokenizer`."
        )
    if not has_token_rows(name) and not _TOKEN_BIAS.search(name):
        return False
    rows = [(_embedding_rows(model), model.tensors.get(name)) for model in models]
    fits = all(tensor is None or tensor.shape[:1] == (count,) for count, tensor in rows)
    if "per_layer" in name and not fits:
        raise ValueError(
            f"Tensor {name!r} has other rows than the input embeddings, so `tokenizer` cannot rearrange it. Merge "
            "models of one vocabulary, without `tokenizer`."
        )
    return fits


@dataclass(frozen=True)
class RearrangedInput(DerivedInput):
    """A model's embeddings in the order of another vocabulary.

    Args:
        rows: For each row of the result the row of `inner`; -1 where `defaults` has it, -2 for the mean of the rest.
        defaults: Rows that come from elsewhere, by their place in the result.
        mean: Mean of all rows that are no padding.
    """

    inner: InputTensor
    rows: np.ndarray
    defaults: dict[int, Tensor]
    mean: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.rows), *self.inner.shape[1:]

    def read(self, start: int, out: Tensor, scratch: Scratch) -> None:
        import torch

        columns = math.prod(self.shape[1:])
        first, last = start // columns, -(-(start + out.numel()) // columns)
        whole = torch.empty(last - first, columns)
        row = first
        while row < last:
            source = int(self.rows[row])
            if source < 0:
                whole[row - first] = self.mean if source == -2 else self.defaults[row]
                row += 1
                continue
            stop = row + 1  # neighbours that were neighbours before are read at once
            while stop < last and self.rows[stop] == source + stop - row:
                stop += 1
            self.inner.read(source * columns, whole[row - first : stop - first].view(-1), scratch)
            row = stop
        out.copy_(whole.view(-1)[start - first * columns :][: out.numel()])


@dataclass
class Vocabulary:
    """The vocabulary of the result.

    Args:
        tokenizer: Of the result.
        size: Rows of its embeddings, padding included.
        rows: Model -> for each token of the result its row in that model, or -1.
        own: Model -> its own vocabulary.
    """

    tokenizer: Any
    size: int
    rows: dict[ModelReference, np.ndarray]
    own: dict[ModelReference, dict[str, int]]

    @property
    def tokens(self) -> dict[str, int]:
        return self.tokenizer.get_vocab()


def build_vocabulary(config: MergeConfig, models: Mapping[ModelReference, InputModel]) -> Vocabulary:
    """Load the tokenizers, make that of the result, and find every token of it in every model.

    Raises:
        ValueError: A token of the configuration is not where it is said to be, or `source: base` without a base.
    """
    plan = config.tokenizer
    if plan is None:
        raise ValueError("The configuration has no `tokenizer`.")
    tokenizers = {reference: _tokenizer_of(model) for reference, model in models.items()}
    own = {reference: dict(one.get_vocab()) for reference, one in tokenizers.items()}  # before tokens are added
    base = config.base_model or next(iter(models))
    if isinstance(plan.source, ModelReference):
        tokenizer = tokenizers[plan.source]
    elif plan.source == "base":
        tokenizer = tokenizers[base]
    else:
        tokenizer = _union(tokenizers[base], [(one, _embedding_rows(models[key])) for key, one in tokenizers.items()])
    tokenizer.add_tokens([token for token in plan.tokens if token not in tokenizer.get_vocab()])
    vocabulary = tokenizer.get_vocab()
    size = max(vocabulary.values()) + 1
    multiple = plan.pad_to_multiple_of or 1
    rows = {}
    for reference, model in models.items():
        count = _embedding_rows(model)
        found = np.full(size, -1, dtype=np.int64)
        for token, place in vocabulary.items():
            old = own[reference].get(token, -1)
            # Tokenizers may name more tokens than the model has rows for.
            found[place] = old if old < count else -1
        rows[reference] = found
    return Vocabulary(tokenizer, -(-size // multiple) * multiple, rows, own)


def rearranged(
    config: MergeConfig,
    vocabulary: Vocabulary,
    models: Mapping[ModelReference, InputModel],
    name: str,
    taking_part: list[ModelReference],
) -> dict[ModelReference, InputTensor]:
    """The tensor `name` of the models in the order of the vocabulary."""
    import torch

    tokens = config.tokenizer.tokens if config.tokenizer is not None else {}
    tensors = {reference: models[reference][name] for reference in models}
    scratch = Scratch()

    def row_of(reference: ModelReference, row: int) -> Tensor:
        out = torch.empty(math.prod(tensors[reference].shape[1:]))
        tensors[reference].read(row * len(out), out, scratch)
        return out

    columns = math.prod(tensors[taking_part[0]].shape[1:])
    places = vocabulary.tokens
    defaults: dict[int, Tensor] = {}
    forced: set[int] = set()
    known = np.zeros(vocabulary.size, dtype=bool)
    known[list(places.values())] = True
    have = np.stack([vocabulary.rows[one] >= 0 for one in taking_part])
    for token, place in places.items():
        said = tokens.get(token)
        if said is not None:
            defaults[place] = _said(token, said, vocabulary, tensors, row_of, place, columns)
            if said.force:
                forced.add(place)
        elif not have[:, place].all():
            owners = [one for one, has in zip(taking_part, have[:, place], strict=True) if has]
            base = config.base_model
            if base is not None and vocabulary.rows[base][place] >= 0:
                owners = [base]
            found = [row_of(one, int(vocabulary.rows[one][place])) for one in owners]
            defaults[place] = torch.stack(found).mean(0) if found else torch.zeros(columns)
    result: dict[ModelReference, InputTensor] = {}
    for reference in taking_part:
        rows = np.full(vocabulary.size, -2, dtype=np.int64)
        rows[: len(vocabulary.rows[reference])] = vocabulary.rows[reference]
        rows[~known] = -2
        rows[list(forced)] = -1
        plain = RearrangedInput(tensors[reference], rows, defaults, torch.zeros(columns))
        if (rows == -2).any():
            total, count = torch.zeros(columns, dtype=torch.float64), 0
            piece = torch.empty(1024, columns)
            for start in range(0, len(rows), 1024):
                some = piece[: len(rows[start : start + 1024])]
                plain.read(start * columns, some.view(-1), scratch)
                total += some[torch.from_numpy(rows[start : start + 1024] != -2)].double().sum(0)
                count += int((rows[start : start + 1024] != -2).sum())
            plain = RearrangedInput(tensors[reference], rows, defaults, (total / count).float())
        result[reference] = plain
    return result


def _said(
    token: str,
    source: TokenSource,
    vocabulary: Vocabulary,
    tensors: Mapping[ModelReference, InputTensor],
    row_of: Any,
    place: int,
    columns: int,
) -> Tensor:
    """The row that the configuration gives a token."""
    if source.zero:
        import torch

        return torch.zeros(columns)
    if source.model is None:
        raise ValueError(f"`tokenizer.tokens.{token}` has no `source`: name a model, or `kind: zero`.")
    row = int(vocabulary.rows[source.model][place])
    if source.token is not None or source.token_id is not None:
        own = vocabulary.own[source.model]
        row = source.token_id if source.token_id is not None else own.get(str(source.token), -1)
    if not 0 <= row < tensors[source.model].shape[0]:
        wanted = next(one for one in (source.token, source.token_id, token) if one is not None)
        raise ValueError(f"`tokenizer.tokens.{token}`: model {str(source.model)!r} has no token {wanted!r}.")
    return row_of(source.model, row)


def _tokenizer_of(model: InputModel) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(model.folder), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Model {str(model.reference)!r} has no tokenizer that can be loaded, which `tokenizer` needs."
        ) from error


def _union(first: Any, others: list[tuple[Any, int]]) -> Any:
    """The first tokenizer with the tokens of the others added; how text is cut otherwise is decided by the first.

    Args:
        others: Tokenizers and how many rows their models have; a token without a row is left out.
    """
    for other, rows in others:
        added = {token.content: token for token in other.added_tokens_decoder.values()}
        known = first.get_vocab()
        new = sorted((place, token) for token, place in other.get_vocab().items() if token not in known)
        first.add_tokens([added.get(token, token) for place, token in new if place < rows])
    return first


def _embedding_rows(model: InputModel) -> int:
    for name, tensor in model.tensors.items():
        if has_token_rows(name) and len(tensor.shape) == 2:
            return tensor.shape[0]
    raise ValueError(f"Model {str(model.reference)!r} has no embeddings with a known name, which `tokenizer` needs.")


def chat_template_of(config: MergeConfig, models: Mapping[ModelReference, InputModel]) -> str | None:
    """The template that the configuration asks for: its own text, or with "auto" the most common one of the models."""
    if config.chat_template != "auto":
        return config.chat_template
    found = [_tokenizer_of(model).chat_template for model in models.values()]
    texts = [text.strip() for text in found if isinstance(text, str)]
    return Counter(texts).most_common(1)[0][0] if texts else None


def set_special_tokens(vocabulary: Vocabulary, donor: InputModel, content: dict[str, Any], folder: Path) -> None:
    """Write the ids of the tokenizer's special tokens into config.json's content and into generation_config.json.

    An id is written where the tokenizer has the token and a file has the key. Where a file has more ends of text than
    one, all of them are found again by their tokens; those that the new tokenizer lacks go.

    Args:
        content: Of config.json; changed in place.
        folder: May hold a generation_config.json, which is rewritten.
    """
    old = {place: token for token, place in vocabulary.own[donor.reference].items()}
    new = vocabulary.tokens
    path = folder / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    for part in (content, content.get("text_config", {}), generation):
        for name in ("bos", "eos", "pad"):
            key, own = f"{name}_token_id", getattr(vocabulary.tokenizer, f"{name}_token_id", None)
            if part.get(key) is None:
                continue
            if isinstance(part[key], list):
                moved = [new[old[one]] for one in part[key] if old.get(one) in new]
                part[key] = list(dict.fromkeys([*([own] if own is not None else []), *moved])) or None
            elif own is not None:
                part[key] = own
            else:
                part[key] = new.get(old.get(part[key], ""))
    if generation:
        write_text(path, json.dumps(generation, indent=2) + "\n")


def write_tokenizer(vocabulary: Vocabulary | None, template: str | None, donor: InputModel, folder: Path) -> None:
    """Write the tokenizer of the result, with its chat template, in the place of the donor's."""
    tokenizer = vocabulary.tokenizer if vocabulary is not None else _tokenizer_of(donor)
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(str(folder))
