"""Tensors and numbers as types, for the annotations of merge methods.

This file imports torch, which takes longer than a small merge. Files that the compiled kernels need import it under
`if TYPE_CHECKING` only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Float
from torch import Tensor

#: A number that the result is differentiable in: if it is a tensor, it gets a gradient.
Coefficient: TypeAlias = float | Float[Tensor, ""]

#: One coefficient for all models, or one per model.
PerModelCoefficient: TypeAlias = Coefficient | Sequence[Coefficient] | Float[Tensor, " models"]

#: A weight, its change, or any other tensor with the same shape.
Weights: TypeAlias = Float[Tensor, "*shape"]

Matrix: TypeAlias = Float[Tensor, "rows columns"]

Scalar: TypeAlias = Float[Tensor, ""]

#: One number for each of some vectors: as a tensor, or without torch.
Numbers: TypeAlias = float | np.ndarray | Float[Tensor, "*vectors"]

#: Scalar products of vectors.
Gram: TypeAlias = Float[Tensor, "models models"]

#: Elements of a tensor: a tensor of torch, or an array that the compiled kernels take (`arithmetic.kernels`).
Values: TypeAlias = Tensor | np.ndarray
