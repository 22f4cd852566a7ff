"""TLEG: a student of any depth whose layers are a linear function of their position in the stack."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from hf_transfer_ext.students.layers import (
    LayerTensors,
    depths,
    layer_stack,
    layer_tensors,
    mark_auxiliary,
    with_layers,
)
from hf_transfer_ext.students.shape import StudentShape


@dataclass(frozen=True)
class Learngene:
    """The two tensors per parameter that define every layer: `base` (theta_B) and `slope` (theta_A)."""

    base: dict[str, Tensor]
    slope: dict[str, Tensor]

    def layer(self, position: float) -> dict[str, Tensor]:
        """The layer at `position` = l / L, from 0 (the first layer, which is the base) to below 1."""
        return {
            name: base + position * self.slope[name] if name in self.slope else base
            for name, base in self.base.items()
        }


def linear_expansion(
    teacher: PreTrainedModel, shape: StudentShape, *, learngene: Learngene | None = None
) -> PreTrainedModel:
    r"""A student of any depth L, also deeper than the teacher, whose layers are linear in their position.

    .. math:: \theta_l = \theta_B + \frac{l}{L} \theta_A, \quad l = 0 \dots L - 1

    Embeddings, final norm and head come from the teacher. If the teacher has layers of several kinds (sliding and full
    attention), each layer has the kind of the teacher's layer at the same relative position.

    When to use it: for students of several depths from one teacher, deeper ones too; train a learngene first
    (`learngene_steps`).

    Args:
        teacher: A model, or a trained `auxiliary_model`, whose learngene is then used unchanged.
        shape: The shape of the student: any depth, everything else as in the teacher.
        learngene: theta_B and theta_A; by default those of `learngene_of(teacher)`.

    Returns:
        A new model of the teacher's class with independent layers, which shares no memory with the teacher.

    Source: TLEG, Xia et al. 2024, https://arxiv.org/abs/2312.05614; that l starts at 0 is from the authors' code.
    The paper trains theta_A and theta_B by soft distillation (`auxiliary_model` here). The default, fitting them to a
    teacher's layers by least squares, is our own addition: for a trained transformer, a rough start.
    """
    depth, theirs = depths(teacher, shape, "linear_expansion")
    learngene = learngene or learngene_of(teacher)
    layers = [learngene.layer(i / depth) for i in range(depth)]
    return with_layers(teacher, layers, [i * theirs // depth for i in range(depth)])


def learngene_of(model: PreTrainedModel) -> Learngene:
    r"""The learngene of an auxiliary model, or else the least-squares fit to a model's layers.

    With positions :math:`x_l = l / L` and means over the layers,

    .. math:: \theta_A = \frac{\sum_l (x_l - \bar x) \theta_l}{\sum_l (x_l - \bar x)^2}, \quad
        \theta_B = \bar\theta - \bar x \theta_A

    for every entry separately. A single layer has slope 0. Integer buffers are those of the first layer.
    """
    shared = _auxiliary_learngene(model)
    if shared is not None:
        return shared
    return fit_learngene(layer_tensors(model))


def fit_learngene(layers: list[dict[str, Tensor]]) -> Learngene:
    """Least squares over the layers; float64 inside, the layers' dtype outside."""
    if len({tuple((name, tensor.shape) for name, tensor in layer.items()) for layer in layers}) != 1:
        raise ValueError("The layers differ in the names or shapes of their parameters, so no line can be fitted.")
    count = len(layers)
    offsets = [l / count - (count - 1) / (2 * count) for l in range(count)]  # x_l minus its mean  # noqa: E741
    spread = sum(offset**2 for offset in offsets)
    base, slope = {}, {}
    for name, first in layers[0].items():
        if not first.is_floating_point():
            base[name] = first.clone()
            continue
        mean = torch.zeros_like(first, dtype=torch.float64)
        rise = torch.zeros_like(mean)
        for offset, layer in zip(offsets, layers, strict=True):
            mean += layer[name].double() / count
            rise += layer[name].double() * (offset / spread if spread else 0.0)
        base[name] = (mean - rise * (count - 1) / (2 * count)).to(first.dtype)
        slope[name] = rise.to(first.dtype)
    return Learngene(base, slope)


def auxiliary_model(
    teacher: PreTrainedModel, shape: StudentShape | None = None, *, learngene: Learngene | None = None
) -> PreTrainedModel:
    """The model that TLEG trains: all layers share one theta_B and one theta_A, which are its parameters.

    Train it by distillation like any model, then expand it: `linear_expansion(auxiliary, StudentShape(depth=...))`. It
    holds torch parametrizations, which `save_pretrained` cannot save: a trainer saves what is expanded from it
    (`students/auxiliary.py`).

    Args:
        shape: Shape of the model; by default the teacher's.
        learngene: Where training starts; by default `learngene_of(teacher)`.
    """
    shape = shape or StudentShape()
    count, _ = depths(teacher, shape, "auxiliary_model")
    learngene = learngene or learngene_of(teacher)
    model = linear_expansion(teacher, shape, learngene=learngene)
    base = {name: nn.Parameter(learngene.base[name].clone()) for name in learngene.slope}
    slope = {name: nn.Parameter(tensor.clone()) for name, tensor in learngene.slope.items()}
    for i, layer in enumerate(layer_stack(model)[1]):
        for name, _ in list(layer.named_parameters()):
            path, _, leaf = name.rpartition(".")
            module = layer.get_submodule(path)
            setattr(module, leaf, base[name])
            parametrize.register_parametrization(module, leaf, _LinearInDepth(slope[name], i / count))
    return mark_auxiliary(model)


class _LinearInDepth(nn.Module):
    """theta_B -> theta_B + (l / L) theta_A."""

    def __init__(self, slope: nn.Parameter, position: float) -> None:
        super().__init__()
        self.slope = slope
        self.position = position

    def forward(self, base: Tensor) -> Tensor:
        return base + self.position * self.slope


def _auxiliary_learngene(model: PreTrainedModel) -> Learngene | None:
    first: LayerTensors = layer_stack(model)[1][0].state_dict()
    base, slope = {}, {}
    for name, tensor in first.items():
        if name.endswith(".original"):
            base[name.replace("parametrizations.", "").removesuffix(".original")] = tensor.clone()
        elif name.endswith(".0.slope"):
            slope[name.replace("parametrizations.", "").removesuffix(".0.slope")] = tensor.clone()
        else:
            base[name] = tensor.clone()
    return Learngene(base, slope) if slope else None
