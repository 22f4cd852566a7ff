"""A bound on the retain loss, above which a run stops or goes back to its last weights within it."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

logger = logging.getLogger(__name__)


class RetainBound(TrainerCallback):
    """Ends a run whose retain loss gets above a bound.

    Args:
        bound: The largest retain loss that is allowed.
        on_bound: "stop", or "restore" for the trained weights that were last measured within the bound.
        model: The trained model; before any measurement, its weights count as within the bound.
    """

    def __init__(self, bound: float, on_bound: str, model: Any) -> None:
        self.bound, self.restores, self.model = bound, on_bound == "restore", model
        #: The retain loss of the evaluation that is under way.
        self.evaluated: float | None = None
        self.good: list[Tensor] = []
        self.good_step = 0
        self.above: str | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.above = None
        self._keep(state.global_step)

    def measured(self, retain_loss: float, step: int) -> None:
        """Note the retain loss at the weights after `step` updates; called before the next update.

        Raises:
            ValueError: The weights that the run starts from are above the bound.
        """
        if retain_loss <= self.bound:
            self._keep(step)
        elif step == 0:
            raise ValueError(
                f"The retain loss is {retain_loss:.4g} before the first update, above `retain_bound` "
                f"({self.bound:g}). Set the bound above it: it limits how much may be lost."
            )
        else:
            self.above = f"The retain loss after step {step} is {retain_loss:.4g}"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._end(control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.evaluated is not None:
            self.measured(self.evaluated, state.global_step)
            self.evaluated = None
            self._end(control)

    def _end(self, control: Any) -> None:
        if self.above is None:
            return
        control.should_training_stop = True
        if self.restores:
            with torch.no_grad():
                for parameter, value in zip(self._trained(), self.good, strict=True):
                    parameter.copy_(value)
        weights = f"the weights after step {self.good_step}, the last within it, are back" if self.restores else (
            "the weights stay as they are now (`on_bound='restore'` would go back)"
        )  # fmt: skip
        logger.warning(f"{self.above}, above `retain_bound` ({self.bound:g}): the run ends here, and {weights}.")
        self.above = None

    def _keep(self, step: int) -> None:
        self.good_step = step
        if self.restores:
            self.good = [parameter.detach().clone() for parameter in self._trained()]

    def _trained(self) -> list[Tensor]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]
