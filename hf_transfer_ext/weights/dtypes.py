"""dtypes of stored tensors, known without torch: importing torch takes longer than merging a small model."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from typing import TypeGuard

    import torch


@dataclass(frozen=True)
class Dtype:
    """A dtype of the safetensors format.

    Args:
        code: Its name in the header of a file, such as `BF16`.
        name: Its name in torch and in config.json, such as `bfloat16`.
        itemsize: Bytes of an element.
        numpy: The dtype of the elements in numpy; unsigned integers with the same bits for floats that numpy lacks.
        infinity: The bits of infinity, or of NaN where the dtype has no infinity; None for integers. The bits of all
            finite numbers, without the sign, are below.
    """

    code: str
    name: str
    itemsize: int
    numpy: np.dtype
    infinity: int | None = None

    @property
    def is_floating_point(self) -> bool:
        return self.infinity is not None

    @property
    def torch(self) -> torch.dtype:
        """The same dtype in torch, which is imported."""
        import torch

        found: torch.dtype = getattr(torch, self.name)
        return found

    def __str__(self) -> str:
        return self.name


F64 = Dtype("F64", "float64", 8, np.dtype(np.float64), 0x7FF << 52)
F32 = Dtype("F32", "float32", 4, np.dtype(np.float32), 0xFF << 23)
F16 = Dtype("F16", "float16", 2, np.dtype(np.float16), 0x1F << 10)
BF16 = Dtype("BF16", "bfloat16", 2, np.dtype(np.uint16), 0xFF << 7)
F8_E4M3 = Dtype("F8_E4M3", "float8_e4m3fn", 1, np.dtype(np.uint8), 0x7F)
F8_E5M2 = Dtype("F8_E5M2", "float8_e5m2", 1, np.dtype(np.uint8), 0x1F << 2)
I64 = Dtype("I64", "int64", 8, np.dtype(np.int64))
I32 = Dtype("I32", "int32", 4, np.dtype(np.int32))
I16 = Dtype("I16", "int16", 2, np.dtype(np.int16))
I8 = Dtype("I8", "int8", 1, np.dtype(np.int8))
U8 = Dtype("U8", "uint8", 1, np.dtype(np.uint8))
BOOL = Dtype("BOOL", "bool", 1, np.dtype(np.bool_))

#: Name in the file format -> dtype.
DTYPES = {one.code: one for one in (F64, F32, F16, BF16, F8_E4M3, F8_E5M2, I64, I32, I16, I8, U8, BOOL)}

#: The dtypes that a merge or an extraction can compute with.
FLOAT_DTYPES = (F64, F32, F16, BF16)

#: Other names that torch has for them.
_ALIASES = {"double": "float64", "float": "float32", "half": "float16"}


def dtype_named(name: Any) -> Dtype | None:
    """`"bfloat16"`, `"torch.bfloat16"` or `torch.bfloat16` -> `BF16`; None if files have no such dtype."""
    text = str(name).removeprefix("torch.")
    return next((one for one in DTYPES.values() if one.name == _ALIASES.get(text, text)), None)


def stored_dtype(name: torch.dtype) -> Dtype:
    """The dtype in which a tensor is stored.

    Raises:
        ValueError: The file format has no such dtype.
    """
    found = dtype_named(name)
    if found is None:
        known = ", ".join(one.name for one in DTYPES.values())
        raise ValueError(f"Tensors of dtype {name} cannot be stored. Convert them to one of {known}.")
    return found


def is_tensor(value: object) -> TypeGuard[torch.Tensor]:
    """Whether a value is a tensor of torch, which is not imported to find out."""
    loaded = sys.modules.get("torch")
    return loaded is not None and isinstance(value, loaded.Tensor)
