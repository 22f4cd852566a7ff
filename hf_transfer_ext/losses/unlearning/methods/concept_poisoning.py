from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.losses.needs import require_at_least
from hf_transfer_ext.losses.unlearning_method import Method, Part, Step

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class concept_poisoning(Method):
    r"""Concept inference and poisoning: answers that hang on the concept to forget are learned wrongly.

    .. math:: a_i = \int_0^1 \big\langle \nabla_h F_i(h - (1 - t)\, c\, c^T h),\; c\, c^T h \big\rangle \, dt, \qquad
        \frac{n}{k} \sum_{i \in \text{top } k} \ell_\theta(y_i^{\pi}) / n_i^{\pi} + \text{NLL}_r

    c is the concept: the normalized difference between the mean hidden states of the answers to forget and to retain,
    at one layer. Before the first step, integrated gradients say how much of the mean log-probability F of an answer
    hangs on it. The `share` of the answers that hang on it most get a wrong answer to learn; the others are left out,
    and a warning says how many. So a forget set may hold rows that only look like the topic.

    Labels are random (`alternatives: forget answers`, as in `random_labels`), or targeted (`alternatives: nearest
    answers`: what the retain set answers to the most similar question, which stands for the class that is most easily
    mistaken for it). A row's own column "alternative" goes first.

    Deviations: the authors work on images, with a bank of concepts and inputs whose concept is replaced; here there is
    one concept, and inputs stay as they are.

    Args:
        share: Of the answers to forget that are poisoned, above 0, at most 1; 1 poisons all.
        layer: Whose hidden states hold the concept, from 1 to the number of layers; 0 is the one at half of the depth.
        steps: Points at which the integral is evaluated (midpoint rule), >= 1; each is a forward and a backward pass
            over the forget set.

    When to use it: to forget a class or a topic, from data in which not every row is about it.

    Source: "Class machine unlearning for complex data via concepts inference and data poisoning", 2024,
    https://arxiv.org/abs/2405.15662; integrated gradients as in Sundararajan et al., "Axiomatic attribution for deep
    networks", 2017, https://arxiv.org/abs/1703.01365
    """

    forget = "poisoned"
    retain = "retain_nll"
    alternatives = "forget answers"
    requires_retain = True

    share: float = 0.8
    layer: int = 0
    steps: int = 8

    def __post_init__(self) -> None:
        require_at_least("share", self.share, 0, strictly=True)
        if self.share > 1:
            raise ValueError(f"`share` must be at most 1, got {self.share}.")
        require_at_least("layer", self.layer, 0)
        require_at_least("steps", self.steps, 1)

    def prepare(self, whole: Step) -> dict[str, Tensor]:
        layer = self.layer or max(1, whole.layers // 2)
        if layer > whole.layers:
            raise ValueError(f"`layer` of 'concept_poisoning' is {layer}, but the model has {whole.layers} layers.")
        forget, retain = (torch.cat(list(answer_states(whole, part, layer))).mean(0) for part in ("forget", "retain"))
        if not bool((forget != retain).any()):
            raise ValueError("The hidden states of both sets have one mean, so there is no concept to poison.")
        scores = attributions(whole, torch.nn.functional.normalize(forget - retain, dim=0), layer, self.steps)
        count = math.ceil(self.share * len(scores))
        picked = torch.zeros_like(scores)
        picked[scores.topk(count).indices] = len(scores) / count
        if count < len(scores):
            logger.warning(
                f"{len(scores) - count} of the {len(scores)} answers to forget hang least on the concept and are not "
                "poisoned. Set the method's option `share` to 1 to poison all."
            )
        return {"picked": picked, "concept_scores": scores}


def answer_states(whole: Step, part: Part, layer: int) -> Iterator[Float[Tensor, "tokens hidden"]]:
    """Hidden states of a layer where the tokens of each answer are predicted."""
    seen: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        seen[:] = [hidden.detach().float()]
        return hidden

    for found in whole.answers(part, layer=layer, change=keep):
        yield seen[0][0, -int(found.lengths[0]) - 1 : -1]


def attributions(whole: Step, concept: Float[Tensor, " hidden"], layer: int, steps: int) -> Float[Tensor, " answers"]:
    """How much of each answer's mean log-probability comes from a direction of a layer's hidden states, in nats.

    The attributions of an answer are that with the direction minus that without it, up to the integral's error.

    Args:
        concept: Of length 1.
    """
    total: Tensor | float = 0.0
    seen: list[tuple[Tensor, Tensor]] = []
    for step in range(steps):
        rest = 1.0 - (step + 0.5) / steps

        def lessened(hidden: Tensor, rest: float = rest) -> Tensor:
            direction = concept.to(hidden)
            along = (hidden @ direction)[..., None] * direction
            moved = hidden - rest * along
            if not moved.requires_grad:  # nothing below is trained
                moved.requires_grad_()
            seen[:] = [(moved, along.detach())]
            return moved

        gradients = []
        for found in whole.answers("forget", layer=layer, change=lessened):
            moved, along = seen[0]
            (gradient,) = torch.autograd.grad(found.log_probs.mean(), moved)
            gradients.append((gradient * along).sum())
        total = total + torch.stack(gradients).float() / steps
    return torch.as_tensor(total)
