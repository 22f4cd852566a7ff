from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.losses.needs import require_at_least
from hf_transfer_ext.losses.unlearning.dmm import mean_margins
from hf_transfer_ext.losses.unlearning_method import Method, Part, Step


@dataclass(frozen=True)
class dmm(Method):
    r"""Datamodel matching: predict what a model without the forget set would give, then train towards that.

    .. math:: \big(f_\theta(x) - \hat f(x)\big)^2 \text{ on both sets}, \qquad
        \hat f(x) = f_0(x) - m\, \phi(x)^T (\Phi_r^T W_r \Phi_r + \lambda I)^{-1} \Phi_f^T q_f

    The output f of an answer is the mean margin of its tokens. Before the first step, its gradient over the trained
    weights is computed for every answer of both sets and projected to `projection` random signs (phi). The targets
    are those of one Newton step that removes the forget set from a logistic loss on f: q = 1 - sigmoid(f) and
    W = sigmoid(f) (1 - sigmoid(f)) of each row, lambda in units of the mean diagonal of the retain set's matrix. For
    linear least squares (q the residual, W = 1) that is exactly the refit.

    This costs a forward and a backward pass for every row of both sets, once.

    Deviations: the authors attribute with several retrained checkpoints, and draw three times as many rows to retain
    as to forget for each step, which `alpha: 3` stands for; here it is the one model at hand. One Newton step goes too
    far where a forgotten row shares no direction with those to retain, so a change of an output is bounded.

    Args:
        projection: Length of a projected gradient, >= 1; 2048 and more are common.
        ridge: lambda, > 0. It decides how far rows fall that have no direction in common with the retain set.
        multiplier: m, >= 0; 0 trains towards the outputs as they are.
        largest_change: Bound on the predicted change of an output, in nats, >= 0.

    When to use it: where the result should be like a retrained model, with its confidence and not below it.

    Source: Georgiev et al., "Attribute-to-delete: machine unlearning via datamodel matching", 2025, algorithm 1,
    https://arxiv.org/abs/2410.23232; projected gradients as in Park et al., "TRAK", 2023,
    https://arxiv.org/abs/2303.14186
    """

    forget = "dmm"
    retain = "retain_dmm"
    alpha = 3.0
    requires_retain = True

    projection: int = 2048
    ridge: float = 1.0
    multiplier: float = 1.0
    largest_change: float = 10.0

    def __post_init__(self) -> None:
        require_at_least("projection", self.projection, 1)
        require_at_least("ridge", self.ridge, 0, strictly=True)
        require_at_least("multiplier", self.multiplier, 0)
        require_at_least("largest_change", self.largest_change, 0)

    def prepare(self, whole: Step) -> dict[str, Tensor]:
        parts: tuple[Part, ...] = ("forget", "retain")
        outputs: dict[Part, Tensor] = {}
        features: dict[Part, Tensor] = {}
        for part in parts:
            found = [self._projected(whole, one) for one in _each_output(whole, part)]
            outputs[part] = torch.stack([output for output, _ in found])
            features[part] = torch.stack([feature for _, feature in found])
        certainty = {part: outputs[part].double().sigmoid() for part in parts}
        change = change_without(
            features["forget"].double(), 1 - certainty["forget"], features["retain"].double(),
            certainty["retain"] * (1 - certainty["retain"]), self.ridge,
        )  # fmt: skip
        targets = {}
        for part in parts:
            changes = self.multiplier * (features[part].double() @ change)
            bounded = changes.clamp(-self.largest_change, self.largest_change)
            targets[f"{part}_outputs"] = (outputs[part].double() + bounded).float()
        return targets

    def _projected(self, whole: Step, output: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and its gradient: each weight is added, with a random sign, to one of the places."""
        gradient = torch.autograd.grad(output, whole.parameters, allow_unused=True)
        feature = torch.zeros(self.projection, device=output.device)
        generator = torch.Generator().manual_seed(0)
        for parameter, own in zip(whole.parameters, gradient, strict=True):
            place = torch.randint(2 * self.projection, (parameter.numel(),), generator=generator)
            if own is not None:
                sign = (1 - 2 * (place % 2)).to(own.device, torch.float32)
                feature.index_add_(0, (place // 2).to(own.device), own.float().flatten() * sign)
        return output.detach().float(), feature


def _each_output(whole: Step, part: Part) -> Iterator[Tensor]:
    for found in whole.answers(part):
        yield mean_margins(found.log_probs, found.lengths.to(found.log_probs))[0]


def change_without(
    removed: Float[Tensor, "removed features"],
    residuals: Float[Tensor, " removed"],
    kept: Float[Tensor, "kept features"],
    curvatures: Float[Tensor, " kept"],
    ridge: float,
) -> Float[Tensor, " features"]:
    r"""How weights change if rows are removed from a fit: :math:`-(\Phi_r^T W \Phi_r + \lambda I)^{-1} \Phi_f^T q`.

    Solved in the space of the rows to keep where these are fewer than the features.

    Args:
        ridge: lambda in units of the mean diagonal of the matrix that is inverted, > 0.
    """
    rows = kept * curvatures.sqrt()[:, None]
    gradient = removed.T @ residuals
    amount = ridge * max(float(rows.square().sum()) / rows.shape[1], 1e-30)
    if len(rows) >= rows.shape[1]:
        matrix = rows.T @ rows
        matrix.diagonal().add_(amount)
        return -torch.linalg.solve(matrix, gradient)
    # (R'R + a I)^-1 g = (g - R' (R R' + a I)^-1 R g) / a
    inner = rows @ rows.T
    inner.diagonal().add_(amount)
    return -(gradient - rows.T @ torch.linalg.solve(inner, rows @ gradient)) / amount
