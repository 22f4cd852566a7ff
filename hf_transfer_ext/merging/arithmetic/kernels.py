"""Compiled arithmetic for tensors on the CPU, from which `fast` builds the fast forms of methods.

The methods implement a merge as a sequence of torch operations, each with one pass over memory. `kernels.c` does the
same in a single pass, and reads tensors as stored in the files, in float32, bfloat16 or float16. It is built with the
package if there is a C compiler; without it, on a GPU and for other tensors, torch is used: the results are the same
up to float32 rounding, but it takes several times as long.

The functions take numpy arrays (bfloat16 as uint16 words, `Dtype.numpy`), for which torch is not imported, and tensors
of torch. Results are of the same kind.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hf_transfer_ext.weights.dtypes import BF16, F16, F32, Dtype, stored_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from hf_transfer_ext.merging.types import Values

#: Version of the functions in `kernels.c`. Increase it in both files whenever their arguments change: a library with
#: another version, from an old installation, is not used.
VERSION = 3

#: Maximum number of models that the kernels support.
MAX_MODELS = 32

#: What the kernels read and write; the positions are the numbers of the dtypes in `kernels.c`.
DTYPES = (F32, BF16, F16)

#: dtype of an array or a tensor -> its number.
_NUMBERS = {
    **{str(dtype.numpy): number for number, dtype in enumerate(DTYPES)},
    **{f"torch.{dtype.name}": number for number, dtype in enumerate(DTYPES)},
}


class _Tensor(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("dtype", ctypes.c_int64))


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

#: The arguments of each function in `kernels.c`, one letter each.
_ARGUMENTS = {
    "merge_changes": "tpiipufppifip",
    "first_nonfinite": "ti",
    "convert": "piip",
    "add_products": "piip",
    "take_magnitudes": "tpiiipppppp",
    "values_at": "pipippp",
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
                function.restype = ctypes.c_int64 if name == "first_nonfinite" else None
            return library
    return None


LIBRARY = _load()


def can_take(*tensors: Values | None) -> bool:
    """Whether the kernels are available and support these arrays or tensors; None means no tensor.

    They treat all tensors as having the same length and do not compute gradients. Tensors of different shapes are left
    to torch, which broadcasts or refuses them.
    """
    there = [tensor for tensor in tensors if tensor is not None]
    alike = len({tuple(tensor.shape) for tensor in there}) <= 1
    return LIBRARY is not None and alike and len(there) <= MAX_MODELS and all(map(_fits, there))


def _fits(tensor: Values) -> bool:
    if str(tensor.dtype) not in _NUMBERS:
        return False
    if isinstance(tensor, np.ndarray):
        return bool(tensor.flags.c_contiguous)
    return tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.requires_grad


def tensor_of(values: Values) -> Tensor:
    """A tensor as it is, and an array as a tensor that shares its memory."""
    if not isinstance(values, np.ndarray):
        return values
    import torch

    return torch.from_numpy(values).view(DTYPES[_NUMBERS[str(values.dtype)]].torch)


def array_of(tensor: Tensor) -> np.ndarray:
    """A tensor on the CPU as an array that shares its memory."""
    import torch

    found: np.ndarray = tensor.view(torch.uint8).numpy().view(stored_dtype(tensor.dtype).numpy)
    return found


def in_float32(array: np.ndarray) -> np.ndarray:
    """The elements of an array that may hold bfloat16 in float32."""
    if array.dtype == BF16.numpy:
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return array.astype(np.float32, copy=False)


class Kept(NamedTuple):
    """Which elements of a change t are kept, and their scale.

    Args:
        low: The smallest |t| that is kept.
        high: The largest |t| that is kept.
        scale: Factor of the kept elements.
        limit: An element is kept if its random word is below this (`noise.limit_of`); the largest word keeps all.
        keys: Keys of the sequence of random words (`Noise.keys`).
    """

    low: float = 0.0
    high: float = float("inf")
    scale: float = 1.0
    limit: int = (1 << 32) - 1
    keys: tuple[int, int] = (0, 0)


def merge_changes(
    base: Values | None,
    tensors: Sequence[Values],
    weights: Sequence[float],
    *,
    lambda_: float = 1.0,
    subtract: bool = False,
    masks: Sequence[Kept] | None = None,
    counter: int = 0,
    variance: float = 0.0,
    votes: Sequence[float] | None = None,
    normalize: bool = False,
) -> Values:
    """theta_0 + lambda sum_i w_i m_i t_i, in float32, with the shape of the tensors.

    Args:
        base: theta_0; 0 if None.
        tensors: The changes t_i; with `subtract`, the models.
        masks: Which elements of each change are kept.
        counter: Place of the first element in the sequences of random words, modulo 2**32.
        variance: Elements with a smaller variance over the models are dropped.
        votes: Only changes with the sign of sum_i vote_i t_i count.
        normalize: With `votes`, divide by the sum of the weights of the changes that count.
    """
    out = _empty_like(tensors[0])
    kept = masks and (_Mask * len(masks))(*(_Mask(m.low, m.high, m.scale, m.limit, *m.keys) for m in masks))
    _library().merge_changes(
        _described(base), _array(tensors), len(tensors), subtract, kept or None, counter, variance, _floats(weights),
        votes and _floats(votes), normalize, lambda_, _size(out), _address(out),
    )  # fmt: skip
    return out


def first_nonfinite(tensor: Values) -> int:
    """Index of the first element that is NaN or infinite; -1 if there is none."""
    place: int = _library().first_nonfinite(_described(tensor), _size(tensor))
    return place


def convert(values: np.ndarray, dtype: Dtype) -> np.ndarray:
    """float32 numbers in another dtype, rounded to the nearest, ties to even."""
    if dtype not in DTYPES:
        return values.astype(dtype.numpy)
    if dtype == F32:
        return values
    out = np.empty(values.shape, dtype=dtype.numpy)
    _library().convert(_address(values), _size(values), DTYPES.index(dtype), _address(out))
    return out


def products(vectors: Sequence[Values]) -> np.ndarray:
    """The scalar products of vectors, in float64: entry [i, j] is <x_i, x_j>."""
    out = np.zeros((len(vectors), len(vectors)))
    _library().add_products(_array(vectors), len(vectors), _size(vectors[0]), _address(out))
    return out


class Taken(NamedTuple):
    """Counts from one piece of a tensor: for each bracket, the numbers of magnitudes < low, > low and > high, and the
    magnitudes between; and the number of magnitudes above 0."""

    counts: np.ndarray
    inside: list[np.ndarray]
    positive: int


def take_magnitudes(tensors: Sequence[Values], base: Values | None, edges: np.ndarray) -> list[Taken]:
    """Count |tensor - base| relative to the edges of brackets, and collect the values inside.

    Args:
        edges: `(2, tensors, brackets)`, float32: lower and upper edges.
    """
    size = _size(tensors[0])
    _, models, brackets = edges.shape
    low, high = np.ascontiguousarray(edges, dtype=np.float32)
    counts = np.zeros((models, brackets, 3), dtype=np.int64)
    collected, positive = np.zeros((models, brackets), dtype=np.int64), np.zeros(models, dtype=np.int64)
    room = _room(models * brackets, size + 8)
    places = np.array([row.ctypes.data for row in room], dtype=np.uint64)
    _library().take_magnitudes(
        _described(base), _array(tensors), models, size, brackets, low.ctypes.data, high.ctypes.data,
        counts.ctypes.data, places.ctypes.data, collected.ctypes.data, positive.ctypes.data,
    )  # fmt: skip
    found = []
    for i in range(models):
        own = zip(room[i * brackets : (i + 1) * brackets], collected[i], strict=True)
        found.append(Taken(counts[i], [row[:count].copy() for row, count in own], int(positive[i])))
    return found


_LOCAL = threading.local()


def _room(rows: int, size: int) -> np.ndarray:
    """Per-thread buffers for the collected values; allocating memory costs more than the work on it."""
    kept: np.ndarray | None = getattr(_LOCAL, "room", None)
    if kept is None or kept.shape[0] < rows or kept.shape[1] < size:
        kept = _LOCAL.room = np.empty((rows, size), dtype=np.float32)
    return kept[:rows]


def values_at(numbers: np.ndarray, places: Sequence[int]) -> list[float]:
    """The float32 numbers at some positions of the sorted sequence."""
    words, out = np.empty((2, len(numbers)), dtype=np.uint32), np.empty(len(places), dtype=np.float32)
    wanted = np.array(places, dtype=np.int64)
    _library().values_at(
        numbers.ctypes.data, len(numbers), wanted.ctypes.data, len(wanted), words[0].ctypes.data, words[1].ctypes.data,
        out.ctypes.data,
    )  # fmt: skip
    return out.tolist()


def variances(models: Sequence[Values]) -> Values:
    """The elementwise variance over the models."""
    out = _empty_like(models[0])
    _library().variances(_array(models), len(models), _size(out), _address(out))
    return out


def energies(base: Values, models: Sequence[Values], threshold: float) -> np.ndarray:
    """Per model, the sum of its squared changes where the variance over the models reaches the threshold."""
    out = np.zeros(len(models))
    _library().add_energies(
        _described(base), _array(models), len(models), _size(base), threshold, out.ctypes.data
    )  # fmt: skip
    return out


def drop_by_rank(
    base: Values,
    model: Values,
    limits: np.ndarray,
    scales: np.ndarray,
    *,
    width: int,
    wide: bool,
    counter: int,
    keys: tuple[int, int],
) -> Values:
    """The changes of a model, each multiplied by the factor of its rank in its row.

    Args:
        limits: uint32, for each rank the bound below which a random word keeps an element.
        scales: float32, factor of each rank.
        width: Number of bits for the position in a row.
        wide: Sort by all bits of a magnitude, in 64-bit words.
        counter: Place of the first element in the sequence of random words, modulo 2**32.
    """
    rows, columns = model.shape
    out = _empty_like(model)
    words = np.empty((3, columns), dtype=np.uint64 if wide else np.uint32)
    factors = np.empty(columns, dtype=np.float32)
    _library().drop_by_rank(
        _described(base), _described(model), rows, columns, width, wide, limits.ctypes.data, scales.ctypes.data,
        counter, *keys, *(row.ctypes.data for row in words), factors.ctypes.data, _address(out),
    )  # fmt: skip
    return out


def _library() -> ctypes.CDLL:
    assert LIBRARY is not None, "ask `can_take` first"
    return LIBRARY


def _described(tensor: Values | None) -> _Tensor:
    return _Tensor(None, 0) if tensor is None else _Tensor(_address(tensor), _NUMBERS[str(tensor.dtype)])


def _array(tensors: Sequence[Values]) -> ctypes.Array[_Tensor]:
    return (_Tensor * len(tensors))(*map(_described, tensors))


def _floats(values: Sequence[float]) -> ctypes.Array[ctypes.c_float]:
    return (ctypes.c_float * len(values))(*values)


def _empty_like(values: Values) -> Values:
    """A float32 array or tensor of the same shape."""
    if isinstance(values, np.ndarray):
        return np.empty(values.shape, dtype=np.float32)
    import torch

    return torch.empty(values.shape, dtype=torch.float32)


def _address(values: Values) -> int:
    return values.ctypes.data if isinstance(values, np.ndarray) else values.data_ptr()


def _size(values: Values) -> int:
    return values.size if isinstance(values, np.ndarray) else values.numel()
