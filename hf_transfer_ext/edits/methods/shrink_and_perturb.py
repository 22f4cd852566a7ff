"""Shrink and perturb: make all weights smaller and add noise, before a model is distilled again."""

from __future__ import annotations

import hashlib
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hf_transfer_ext.edits.method import Edited, edit_method
from hf_transfer_ext.edits.subject import Subject
from hf_transfer_ext.merging.method import Interval
from hf_transfer_ext.weights.dtypes import FLOAT_DTYPES


def perturbed(
    weight: Float[Tensor, "*shape"], *, name: str, share: float, noise_scale: float, seed: int
) -> Float[Tensor, "*shape"]:
    """A weight after shrinking and perturbing; what is drawn depends on its name and the seed alone."""
    shrunk = (1.0 - share) * weight
    if weight.dim() < 2:
        return shrunk
    bound = (6.0 / (weight.shape[-1] + weight.shape[-2])) ** 0.5
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    noise = torch.empty(weight.shape).uniform_(-bound, bound, generator=generator)
    return shrunk + (share * noise_scale) * noise.to(shrunk)


@torch.no_grad()
def perturb_model(model: nn.Module, *, share: float, noise_scale: float, seed: int) -> None:
    """`shrink_and_perturb` of a loaded model, in place; tied weights are changed once."""
    for name, weight in model.named_parameters():
        if weight.is_floating_point():
            weight.copy_(perturbed(weight.float(), name=name, share=share, noise_scale=noise_scale, seed=seed))


@edit_method(ranges={"share": Interval(0, 1), "noise_scale": Interval(0)})
def shrink_and_perturb(subject: Subject, *, share: float = 0.6, noise_scale: float = 0.1) -> Edited:
    r"""Shrink all weights of an unlearned model and add noise: distilled again, it leaves behind what it hides.

    With a the share, b the scale of the noise, and N uniform within Xavier's bound for matrices and 0 for vectors:

    .. math:: \theta' = (1 - a) \theta + a b N, \qquad |N_{ij}| \le \sqrt{6 / (in + out)}

    The result is no finished model: it is the student of the second half of UNDO (unlearn, noise, distill on outputs),
    in which the unlearned model teaches it. `recipes/robustify.py` does both. Expert weights stored as one tensor are
    perturbed as the matrices that they hold.

    When to use it: an unlearned model that relearns what it forgot, and data at hand that covers what has to stay.
    What that data does not cover is lost with the noise. A larger share holds longer against relearning and takes
    longer to distill.

    Args:
        share: a, from 0 (nothing changes) to 1 (a new model); published runs use 0.2 to 0.8.
        noise_scale: b, at least 0; 0.1 in the published runs on language.

    Returns:
        Jobs for all tensors of floating point numbers.

    Source: Distillation robustifies unlearning, Lee et al. 2025, https://arxiv.org/abs/2506.06278
    """
    if share == 0:
        return Edited()
    how: dict[str, Any] = {"share": share, "noise_scale": noise_scale, "seed": subject.seed}
    floating = [name for name, tensor in subject.model.tensors.items() if tensor.dtype in FLOAT_DTYPES]
    return Edited({name: subject.edit(name, partial(perturbed, name=name, **how)) for name in floating})
