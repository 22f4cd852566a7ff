"""Random numbers by position: the number of an element depends on the seed, the tensor, the model and its place only.

A mask that is drawn from a running generator changes with the order of the work. Here each element's number is a hash
of its place, so a merge gives the same bytes whatever the pieces, the threads and the machine.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

_WORD = 1 << 32

#: 2**32 divided by the golden ratio.
_WEYL = 0x9E3779B1


@dataclass(frozen=True)
class Noise:
    """The random numbers of one tensor.

    Args:
        seed: Of the merge.
        tensor: Name of the output tensor; other tensors get other numbers.
        start: Place of the piece's first element in the flat tensor.
    """

    seed: int = 0
    tensor: str = ""
    start: int = 0

    def words(self, model: int, count: int) -> np.ndarray:
        """`count` uint32 words, uniform over 0 .. 2**32 - 1, for the elements `start`, `start + 1`, ... of a model."""
        words = np.empty(count, dtype=np.uint32)
        done = 0
        while done < count:
            high, low = divmod(self.start + done, _WORD)
            run = min(count - done, _WORD - low)
            key = hashlib.blake2b(f"{self.seed}/{self.tensor}/{model}/{high}".encode(), digest_size=8).digest()
            _mix(low, np.frombuffer(key, dtype="<u4"), words[done : done + run])
            done += run
        return words

    def keep(self, model: int, like: Tensor, share: float) -> Bool[Tensor, "*shape"]:
        """A mask in the shape of `like`, each element True with probability `share` (resolution 2**-32)."""
        if share >= 1:
            return torch.ones(like.shape, dtype=torch.bool)
        mask = self.words(model, like.numel()) < np.uint32(min(round(share * _WORD), _WORD - 1))
        return torch.from_numpy(mask).reshape(like.shape)


def _mix(low: int, key: np.ndarray, out: np.ndarray) -> None:
    """Scramble the counter `low, low + 1, ...`: a Weyl sequence and two rounds of multiply and shift.

    The constants are those of Chris Wellons' lowbias32; the second half of the key enters between the rounds, so that
    two streams are no shifts of each other.
    """
    scratch = np.empty_like(out)
    first = np.array((low * _WEYL + int(key[0])) % _WORD, dtype=np.uint32)
    np.add(_weyl_sequence(len(out)), first, out=out)
    for shift, add, factor in ((16, 0, 0x7FEB352D), (15, key[1], 0x846CA68B)):
        np.right_shift(out, np.uint32(shift), out=scratch)
        out ^= scratch
        out += np.uint32(add)
        out *= np.uint32(factor)
    np.right_shift(out, np.uint32(16), out=scratch)
    out ^= scratch


@functools.lru_cache(maxsize=4)
def _weyl_sequence(count: int) -> np.ndarray:
    """i * _WEYL modulo 2**32; the same few lengths are asked for again and again."""
    sequence = np.arange(count, dtype=np.uint32)
    sequence *= np.uint32(_WEYL)
    sequence.flags.writeable = False
    return sequence
