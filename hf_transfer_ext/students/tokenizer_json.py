"""Trim a tokenizer: find the tokens that it must keep, and rewrite its `tokenizer.json`."""

from __future__ import annotations

import copy
import re
import string
from collections.abc import Iterable, Iterator
from typing import Any

from tokenizers import pre_tokenizers

#: SentencePiece's token for a byte; unknown characters are split into these ("byte fallback").
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")

KNOWN_MODELS = ("BPE", "Unigram", "WordPiece", "WordLevel")


def model_vocabulary(data: dict[str, Any]) -> dict[str, int]:
    """Token -> id of the model part of a `tokenizer.json`, without added tokens."""
    vocabulary = data["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: [[token, score], ...]
        return {token: i for i, (token, _) in enumerate(vocabulary)}
    return vocabulary


def added_vocabulary(data: dict[str, Any]) -> dict[str, int]:
    """Token -> id of the added tokens; some tokenizers list them in the model's vocabulary as well."""
    return {token["content"]: token["id"] for token in data["added_tokens"] or ()}


def indispensable(data: dict[str, Any]) -> set[int]:
    """Ids that every trimmed tokenizer keeps, for any corpus: without them some text could not be tokenized at all.

    These are the bytes (of byte-level BPE or of byte fallback), the unknown token, printable ASCII characters, the
    tokens that the post-processor inserts, and, only if there is no byte fallback, all single characters.
    """
    vocabulary, model = model_vocabulary(data), data["model"]
    keep = set(string.printable) & set(vocabulary)
    if _is_byte_level(data):
        keep |= set(pre_tokenizers.ByteLevel.alphabet()) & set(vocabulary)
    elif model.get("byte_fallback"):
        keep |= {token for token in vocabulary if BYTE_TOKEN.fullmatch(token)}
    else:
        prefix = model.get("continuing_subword_prefix") or ""
        keep |= {token for token in vocabulary if len(token.removeprefix(prefix) or token) == 1}
    if model.get("unk_token") in vocabulary:
        keep.add(model["unk_token"])
    ids = {vocabulary[token] for token in keep}
    if model["type"] == "Unigram":
        # The unknown token scores 10 below the worst piece: keep that piece, so all relative scores stay the same.
        ids |= {min(range(len(model["vocab"])), key=lambda i: model["vocab"][i][1])}
        ids |= {model["unk_id"]} if model.get("unk_id") is not None else set()
    everything = vocabulary | added_vocabulary(data)
    return ids | {everything[token] for token in _inserted_tokens(data) if token in everything}


def closure(data: dict[str, Any], wanted: Iterable[int]) -> set[int]:
    """The wanted ids and all ids needed to build them: for BPE, every piece that is merged into a wanted token.

    Text whose tokens are all wanted is tokenized as before. BPE repeatedly applies the earliest merge in its list that
    matches. The trimmed list has every merge that led to the wanted tokens and no new one, so the earliest matching
    merge stays the same at every step. Unigram (best sum of scores), WordPiece (longest match) and WordLevel choose
    among pieces, and only pieces that were not chosen are removed.
    """
    wanted = set(wanted)
    if data["model"]["type"] != "BPE":
        return wanted
    vocabulary, ranks = model_vocabulary(data), merge_ranks(data)
    token_of = {i: token for token, i in vocabulary.items()}
    added = set(added_vocabulary(data).values())
    for i in wanted - added:
        if i in token_of:
            pieces = {piece for merge in _merges_to(token_of[i], ranks) for piece in (*merge, "".join(merge))}
            wanted = wanted | {vocabulary[piece] for piece in pieces}
    return wanted


def trimmed(data: dict[str, Any], keep: set[int]) -> tuple[dict[str, Any], list[int]]:
    """A `tokenizer.json` with only the tokens of `keep` (closed under `closure`), renumbered from 0.

    Returns:
        The content of the new file, and the old id of every new id: first the tokens of the model in their old order,
        then added tokens that the model's vocabulary does not list, in their old order.
    """
    vocabulary, added = model_vocabulary(data), added_vocabulary(data)
    old_ids = sorted(i for i in vocabulary.values() if i in keep)
    old_ids += sorted(i for token, i in added.items() if i in keep and token not in vocabulary)
    new_id = {old: new for new, old in enumerate(old_ids)}

    result = {key: value for key, value in data.items() if key not in ("model", "added_tokens", "post_processor")}
    result |= {"truncation": None, "padding": None}
    model = {key: value for key, value in data["model"].items() if key not in ("vocab", "merges")}
    if isinstance(data["model"]["vocab"], list):
        model["vocab"] = [piece for i, piece in enumerate(data["model"]["vocab"]) if i in new_id]
    else:
        model["vocab"] = {
            token: new_id[i] for token, i in sorted(vocabulary.items(), key=lambda item: item[1]) if i in new_id
        }
    if model["type"] == "BPE":
        ranks = merge_ranks(data)
        paths = (_merges_to(token, ranks) for token in model["vocab"] if token not in added)
        model["merges"] = [list(merge) for merge in sorted({m for path in paths for m in path}, key=ranks.__getitem__)]
    if model.get("unk_id") is not None:
        model["unk_id"] = new_id[model["unk_id"]]
    result["model"] = model
    kept = [{**token, "id": new_id[token["id"]]} for token in data["added_tokens"] or () if token["id"] in new_id]
    result["added_tokens"] = sorted(kept, key=lambda token: token["id"])
    result["post_processor"] = _renumbered(copy.deepcopy(data["post_processor"]), new_id)
    return result, old_ids


def refuse_unknown_model(data: dict[str, Any]) -> None:
    model = data["model"]
    if model["type"] not in KNOWN_MODELS:
        raise ValueError(
            f"A tokenizer of type {model['type']!r} cannot be trimmed; known types: {', '.join(KNOWN_MODELS)}."
        )
    if model["type"] == "BPE" and (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")):
        raise ValueError(
            "A BPE tokenizer with markers inside or at the end of words (`continuing_subword_prefix`, "
            "`end_of_word_suffix`) cannot be trimmed yet. Keep the full vocabulary."
        )


def merge_ranks(data: dict[str, Any]) -> dict[tuple[str, str], int]:
    """BPE merge -> its rank in the list; older files write a merge as one string with a space."""
    merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in data["model"]["merges"])
    return {(left, right): rank for rank, (left, right) in enumerate(merges)}


def _merges_to(token: str, ranks: dict[tuple[str, str], int]) -> list[tuple[str, str]]:
    """The merges that BPE applies to the characters of `token`; they end in the token itself.

    A token that is not built by merges (one that is matched as a whole) needs none.
    """
    pieces, path = list(token), []
    while len(pieces) > 1:
        rank, i = min((ranks.get((pieces[i], pieces[i + 1]), len(ranks)), i) for i in range(len(pieces) - 1))
        if rank == len(ranks):
            return []
        path.append((pieces[i], pieces[i + 1]))
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return path


def _is_byte_level(data: dict[str, Any]) -> bool:
    return any(
        part.get("type") == "ByteLevel"
        for key in ("normalizer", "pre_tokenizer", "decoder")
        for part in _parts(data.get(key))
    )


def _inserted_tokens(data: dict[str, Any]) -> set[str]:
    tokens: set[str] = set()
    for part in _parts(data.get("post_processor")):
        if part.get("type") == "TemplateProcessing":
            tokens |= {token for special in part["special_tokens"].values() for token in special["tokens"]}
        else:  # BertProcessing, RobertaProcessing: "sep": ["[SEP]", 102]
            tokens |= {part[key][0] for key in ("sep", "cls") if key in part}
    return tokens


def _renumbered(processor: dict[str, Any] | None, new_id: dict[int, int]) -> dict[str, Any] | None:
    for part in _parts(processor):
        if part.get("type") == "TemplateProcessing":
            for special in part["special_tokens"].values():
                special["ids"] = [new_id[i] for i in special["ids"]]
        else:
            for key in ("sep", "cls"):
                if key in part:
                    part[key] = [part[key][0], new_id[part[key][1]]]
    return processor


def _parts(component: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A normalizer, pre-tokenizer, post-processor or decoder, and its components if it is a sequence."""
    if component:
        yield component
        for key in ("normalizers", "pretokenizers", "processors", "decoders"):
            for part in component.get(key) or ():
                yield from _parts(part)
