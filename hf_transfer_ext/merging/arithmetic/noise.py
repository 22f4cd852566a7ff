"""Random numbers by position: they depend only on the seed, the tensor, the model and the index of the element.

A mask drawn from a stateful generator would depend on the order of the work. Here, each element's number is a hash of
its position, so a merge gives the same bytes for any pieces, threads and machine.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from hf_transfer_ext.weights.devices import on_host

if TYPE_CHECKING:
    import torch
    from jaxtyping import Bool, Int64
    from torch import Tensor

_WORD = 1 << 32

#: 2**32 divided by the golden ratio.
_WEYL = 0x9E3779B1


@dataclass(frozen=True)
class Noise:
    """The random numbers of one tensor.

    Args:
        seed: Seed of the merge.
        tensor: Name of the output tensor; each tensor has its own numbers.
        start: Index of the piece's first element in the flattened tensor.
    """

    seed: int = 0
    tensor: str = ""
    start: int = 0

    def at(self, place: int) -> Noise:
        """The numbers starting at a position, counted from the first element of this one."""
        return replace(self, start=self.start + place)

    def words(self, model: int, count: int) -> np.ndarray:
        """`count` uint32 words, uniform over 0 .. 2**32 - 1, for the elements `start`, `start + 1`, ... of a model."""
        words = np.empty(count, dtype=np.uint32)
        done = 0
        while done < count:
            high, low = divmod(self.start + done, _WORD)
            run = min(count - done, _WORD - low)
            _mix(low, self._key(model, high), words[done : done + run])
            done += run
        return words

    def words_on(self, device: torch.device, model: int, count: int) -> Int64[Tensor, " count"]:
        """The same words as 64-bit integers on a device."""
        import torch

        parts = []
        done = 0
        while done < count:
            high, low = divmod(self.start + done, _WORD)
            run = min(count - done, _WORD - low)
            parts.append(_mix_on(device, low, self._key(model, high), run))
            done += run
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=device)

    def counter(self, count: int) -> int | None:
        """Start of the words of the next `count` elements in their sequence; None if they are in two sequences."""
        low = self.start % _WORD
        return low if low + count <= _WORD else None

    def keys(self, model: int) -> tuple[int, int]:
        """The two words that identify a sequence."""
        first, second = self._key(model, self.start // _WORD)
        return int(first), int(second)

    def keep(self, model: int, like: Tensor, share: float) -> Bool[Tensor, "*shape"]:
        """A mask with the shape of `like`; each element is True with probability `share` (resolution 2**-32)."""
        import torch

        if share >= 1:
            return torch.ones(like.shape, dtype=torch.bool, device=like.device)
        limit = limit_of(share)
        if on_host(like):
            mask = torch.from_numpy(self.words(model, like.numel()) < np.uint32(limit))
        else:
            mask = self.words_on(like.device, model, like.numel()) < limit
        return mask.reshape(like.shape)

    def _key(self, model: int, high: int) -> np.ndarray:
        key = hashlib.blake2b(f"{self.seed}/{self.tensor}/{model}/{high}".encode(), digest_size=8).digest()
        return np.frombuffer(key, dtype="<u4")


def limit_of(share: float) -> int:
    """The bound below which a random word keeps an element, with probability `share`."""
    return max(0, min(round(share * _WORD), _WORD - 1))


def _mix(low: int, key: np.ndarray, out: np.ndarray) -> None:
    """Scramble the counter `low, low + 1, ...`: a Weyl sequence and two rounds of multiply and shift.

    The constants are those of Chris Wellons' lowbias32; the second half of the key enters between the rounds, so that
    no stream is a shifted copy of another.
    """
    scratch = np.empty_like(out)
    first = np.array((low * _WEYL + int(key[0])) % _WORD, dtype=np.uint32)
    np.add(_weyl_sequence(len(out)), first, out=out)
    for shift, add, factor in _rounds(key):
        np.right_shift(out, np.uint32(shift), out=scratch)
        out ^= scratch
        out += np.uint32(add)
        out *= np.uint32(factor)
    np.right_shift(out, np.uint32(16), out=scratch)
    out ^= scratch


def _rounds(key: np.ndarray) -> tuple[tuple[int, int, int], ...]:
    """Shift, addend and factor of each round."""
    return ((16, 0, 0x7FEB352D), (15, int(key[1]), 0x846CA68B))


def _mix_on(device: torch.device, low: int, key: np.ndarray, count: int) -> Tensor:
    """The same as `_mix`, in 64 bits with the upper half masked off: torch has no uint32 arithmetic."""
    import torch

    mask = _WORD - 1
    words = torch.arange(count, dtype=torch.int64, device=device)
    words.mul_(_WEYL).add_((low * _WEYL + int(key[0])) % _WORD).bitwise_and_(mask)
    for shift, add, factor in _rounds(key):
        words.bitwise_xor_(words >> shift).add_(add).mul_(factor).bitwise_and_(mask)
    return words.bitwise_xor_(words >> 16)


@functools.lru_cache(maxsize=4)
def _weyl_sequence(count: int) -> np.ndarray:
    """i * _WEYL modulo 2**32, cached: a merge needs the same few lengths repeatedly."""
    sequence = np.arange(count, dtype=np.uint32)
    sequence *= np.uint32(_WEYL)
    sequence.flags.writeable = False
    return sequence
