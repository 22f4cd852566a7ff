"""Compiled arithmetic for tensors on the CPU: what `changes`, `masks`, `selection`, `trimming`, `variance` define.

Those files write a merge as a chain of torch's operations, each of which goes through memory once. `kernels.c` does
the same in one pass, and takes tensors as they lie in files, in float32 or bfloat16. It is built with the package
where there is a C compiler; without it, on a GPU and for other tensors, torch does the work: same results to the
rounding of float32, in several times the time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

#: Of the functions in `kernels.c`; a library of another version is not used.
VERSION = 1

#: Models that the kernels have room for.
MAX_MODELS = 32

DTYPES = (torch.float32, torch.bfloat16)


class _Tensor(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("is_bfloat16", ctypes.c_int64))


class _Mask(ctypes.Structure):
    _fields_ = (
        ("low", ctypes.c_float),
        ("high", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("limit", ctypes.c_uint32),
        ("key", ctypes.c_uint32),
        ("second_key", ctypes.c_uint32),
    )


_TYPES = {"t": _Tensor, "p": ctypes.c_void_p, "i": ctypes.c_int64, "u": ctypes.c_uint32, "f": ctypes.c_float}

#: The arguments of each function in `kernels.c`, a letter for each.
_ARGUMENTS = {
    "merge_changes": "tpiipufppifip",
    "first_nonfinite": "ti",
    "take_magnitudes": "ttiippppp",
    "variances": "piip",
    "add_energies": "tpiifp",
    "drop_by_rank": "ttiiiippuuuppppp",
}


def _load() -> ctypes.CDLL | None:
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_kernels{suffix}")
        if path.exists():
            library = ctypes.CDLL(str(path))
            library.version.restype = ctypes.c_int64
            if library.version() != VERSION:
                return None
            for name, arguments in _ARGUMENTS.items():
                function = getattr(library, name)
                function.argtypes = [_TYPES[letter] for letter in arguments]
                function.restype = ctypes.c_int64 if name in ("first_nonfinite", "take_magnitudes") else None
            return library
    return None


LIBRARY = _load()


def take(*tensors: Tensor | None) -> bool:
    """Whether the kernels are there and take these tensors; None stands for no tensor."""
    return (
        LIBRARY is not None
        and len(tensors) <= MAX_MODELS
        and all(t is None or (t.dtype in DTYPES and t.device.type == "cpu" and t.is_contiguous()) for t in tensors)
    )


class Kept(NamedTuple):
    """A mask as the kernels take it; see `masks.Mask`. `limit` is the share of random words that keep an element."""

    low: float = 0.0
    high: float = float("inf")
    scale: float = 1.0
    limit: int = (1 << 32) - 1
    keys: tuple[int, int] = (0, 0)


def merge_changes(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    lambda_: float = 1.0,
    subtract: bool = False,
    masks: Sequence[Kept] | None = None,
    counter: int = 0,
    variance: float = 0.0,
    votes: Sequence[float] | None = None,
    normalize: bool = False,
) -> Tensor:
    """theta_0 + lambda sum_i w_i m_i t_i, in float32 and in the shape of the tensors.

    Args:
        base: theta_0; 0 if None.
        tensors: The changes t_i; with `subtract` the models.
        masks: What is kept of each change.
        counter: Place of the first element in the sequences of random words, modulo 2**32.
        variance: Elements that vary less over the models are dropped.
        votes: Only changes with the sign of sum_i vote_i t_i count.
        normalize: With `votes`, divide by the sum of the weights that count.
    """
    out = torch.empty(tensors[0].shape, dtype=torch.float32)
    kept = masks and (_Mask * len(masks))(*(_Mask(m.low, m.high, m.scale, m.limit, *m.keys) for m in masks))
    _library().merge_changes(
        _described(base), _array(tensors), len(tensors), subtract, kept or None, counter, variance, _floats(weights),
        votes and _floats(votes), normalize, lambda_, out.numel(), out.data_ptr(),
    )  # fmt: skip
    return out


def first_nonfinite(tensor: Tensor) -> int:
    """The place of the first element that is NaN or infinite; -1 if there is none."""
    place: int = _library().first_nonfinite(_described(tensor), tensor.numel())
    return place


class Taken(NamedTuple):
    """What one piece tells about brackets: numbers of magnitudes < low, > low and > high, and those between."""

    counts: np.ndarray
    inside: list[np.ndarray]
    positive: int


def take_magnitudes(
    tensor: Tensor, base: Tensor | None, lows: Sequence[np.float32], highs: Sequence[np.float32]
) -> Taken:
    """Count |tensor - base| by the edges of brackets, and collect what lies inside of them."""
    brackets = len(lows)
    counts, collected = np.zeros((brackets, 3), dtype=np.int64), np.zeros(brackets, dtype=np.int64)
    inside = [np.empty(tensor.numel() + 8, dtype=np.float32) for _ in lows]
    edges = [np.array(one, dtype=np.float32) for one in (lows, highs)]
    addresses = np.array([one.ctypes.data for one in inside], dtype=np.uint64)
    positive = _library().take_magnitudes(
        _described(base), _described(tensor), tensor.numel(), brackets, *(edge.ctypes.data for edge in edges),
        counts.ctypes.data, addresses.ctypes.data, collected.ctypes.data,
    )  # fmt: skip
    return Taken(counts, [one[:count].copy() for one, count in zip(inside, collected, strict=True)], positive)


def variances(models: Sequence[Tensor]) -> Tensor:
    """The variance over the models, element by element."""
    out = torch.empty(models[0].shape, dtype=torch.float32)
    _library().variances(_array(models), len(models), out.numel(), out.data_ptr())
    return out


def energies(base: Tensor, models: Sequence[Tensor], threshold: float) -> np.ndarray:
    """For each model the sum of its squared changes where the variance over the models reaches the threshold."""
    out = np.zeros(len(models))
    _library().add_energies(
        _described(base), _array(models), len(models), base.numel(), threshold, out.ctypes.data
    )  # fmt: skip
    return out


def drop_by_rank(
    base: Tensor,
    model: Tensor,
    limits: np.ndarray,
    scales: np.ndarray,
    *,
    width: int,
    wide: bool,
    counter: int,
    keys: tuple[int, int],
) -> Tensor:
    """The changes of a model, each times the factor of its rank in its row.

    Args:
        limits: uint32, for each rank the share of random words that keep an element.
        scales: float32, the factor of each rank.
        width: Bits for the place in a row.
        wide: Sort by all bits of a magnitude, in words of 64 bits.
        counter: Place of the first element in the sequence of random words, modulo 2**32.
    """
    rows, columns = model.shape
    out = torch.empty(model.shape, dtype=torch.float32)
    words = np.empty((3, columns), dtype=np.uint64 if wide else np.uint32)
    factors = np.empty(columns, dtype=np.float32)
    _library().drop_by_rank(
        _described(base), _described(model), rows, columns, width, wide, limits.ctypes.data, scales.ctypes.data,
        counter, *keys, *(row.ctypes.data for row in words), factors.ctypes.data, out.data_ptr(),
    )  # fmt: skip
    return out


def _library() -> ctypes.CDLL:
    assert LIBRARY is not None, "ask `take` first"
    return LIBRARY


def _described(tensor: Tensor | None) -> _Tensor:
    return _Tensor(None, 0) if tensor is None else _Tensor(tensor.data_ptr(), tensor.dtype == torch.bfloat16)


def _array(tensors: Sequence[Tensor]) -> ctypes.Array[_Tensor]:
    return (_Tensor * len(tensors))(*map(_described, tensors))


def _floats(values: Sequence[float]) -> ctypes.Array[ctypes.c_float]:
    return (ctypes.c_float * len(values))(*values)
