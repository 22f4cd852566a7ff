"""The texts of a batch: padding left out, packed rows split, and which of their tokens the student predicts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from hf_transfer_ext.teachers.live import HOW_TO_RUN, OPTIONAL_INPUTS
from hf_transfer_ext.tensors import IGNORE_INDEX, Mask


@dataclass(frozen=True)
class Document:
    """One text of a batch, and the tokens in it that the student predicts.

    Args:
        ids: `(length,)`, its token ids.
        positions: Positions that predict a labeled token, increasing.
        places: `(length,)`, where its tokens stand in the batch, counted row after row; empty for one that is not
            part of a batch.
    """

    ids: np.ndarray
    positions: np.ndarray
    places: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    @property
    def key(self) -> bytes:
        """What its rows are found by."""
        return hashlib.blake2b(self.ids.astype("<i8").tobytes(), digest_size=16).digest()


def require_text_alone(inputs: Mapping[str, Any], reader: str) -> None:
    """Refuse a batch of which the token ids do not tell everything.

    Args:
        reader: What reads the token ids alone, in words.

    Raises:
        ValueError: The student reads more than text (images, say), or no token ids.
    """
    known = {"input_ids", "attention_mask", *HOW_TO_RUN, *OPTIONAL_INPUTS}
    more = sorted(name for name, value in inputs.items() if name not in known and value is not None)
    if more or inputs.get("input_ids") is None:
        raise ValueError(
            f"{reader} reads `input_ids` alone, but the student reads {', '.join(more) or 'no such ids'}. Leave these "
            "columns out of the data, or use a live teacher that reads them, too."
        )


def documents_of(inputs: Mapping[str, Any], mask: Mask) -> list[Document]:
    """The documents of a batch with labeled tokens, in the reading order of these.

    Padding is left out, on either side. Packed rows are split where `position_ids` start anew, or at `cu_seq_lens_q`.

    Raises:
        ValueError: The attention mask or the positions have another shape than the usual one.
    """
    ids = inputs["input_ids"].cpu().numpy()
    chosen = np.zeros(ids.shape, dtype=bool)
    chosen[:, :-1] = mask.cpu().numpy()
    attended = inputs.get("attention_mask")
    real = (
        np.ones(ids.shape, dtype=bool) if attended is None else _two_dimensional(attended).cpu().numpy().astype(bool)
    )
    starts = np.zeros(ids.shape, dtype=bool)
    if inputs.get("position_ids") is not None:
        places = inputs["position_ids"]
        if places.shape != inputs["input_ids"].shape:
            raise ValueError(
                f"Splitting a batch into texts needs `position_ids` of the shape of `input_ids`, {tuple(ids.shape)}, "
                f"got {tuple(places.shape)}."
            )
        starts = (places.cpu().numpy() == 0) & real
    elif inputs.get("cu_seq_lens_q") is not None:
        bounds = inputs["cu_seq_lens_q"].cpu().numpy()
        starts.reshape(-1)[bounds[bounds < starts.size]] = True
    found = []
    places = np.arange(ids.size).reshape(ids.shape)
    for row, kept, begins, predicts, place in zip(ids, real, starts, chosen, places, strict=True):
        cuts = np.flatnonzero(begins[kept])
        pieces = (np.split(values[kept], cuts[cuts > 0]) for values in (row, predicts, place))
        for text, predicted, where in zip(*pieces, strict=True):
            if predicted.any():
                found.append(Document(text, np.flatnonzero(predicted), where))
    return found


def _two_dimensional(attention_mask: Any) -> Tensor:
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        raise ValueError(
            "Splitting a batch into texts needs the usual attention mask, 0 and 1 of shape (batch, length), got "
            f"{getattr(attention_mask, 'shape', type(attention_mask).__name__)}. Packed rows are told apart by "
            "`position_ids`."
        )
    return attention_mask


def documents_of_row(row: Mapping[str, Any]) -> list[Document]:
    """The documents of a tokenized row, several where it is packed (`seq_lengths`), with the tokens to predict.

    Args:
        row: `input_ids`, and perhaps `labels` (-100: not learned) or, without labels, a 0/1 `completion_mask` or
            `assistant_masks`; and `seq_lengths`.
    """
    ids = np.asarray(row["input_ids"], dtype=np.int64)
    learned = np.ones(len(ids), dtype=bool)
    if row.get("labels") is not None:  # a trainer has made them of the masks that it obeys
        learned &= np.asarray(row["labels"]) != IGNORE_INDEX
    else:
        for name in ("completion_mask", "assistant_masks"):
            if row.get(name) is not None:
                learned &= np.asarray(row[name]).astype(bool)
    cuts = np.cumsum(row.get("seq_lengths") or [len(ids)])[:-1]
    pieces = zip(np.split(ids, cuts), np.split(learned, cuts), strict=True)
    found = [Document(text, np.flatnonzero(predicted[1:])) for text, predicted in pieces]
    return [document for document in found if len(document.positions)]
