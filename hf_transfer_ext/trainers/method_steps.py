"""Steps of an unlearning method inside the `Trainer`: scheduled and learned weights, and steps of a method's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from hf_transfer_ext.losses.unlearning_method import Gradient, Method, Part, Progress


class LearnedValues(TrainerCallback, ExportableState):
    """Holds what a method learns beside the weights, and restores it with a checkpoint (`trainer_state.json`)."""

    def __init__(self, start: dict[str, float]) -> None:
        self.initial = dict(start)
        self.values = dict(start)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stored = state.stateful_callbacks.get(type(self).__name__) if state.global_step > 0 else None
        if state.global_step > 0 and not stored:
            raise ValueError(
                f"The checkpoint at step {state.global_step} does not have the learned values "
                f"{', '.join(self.initial)}: it was written with another method. Start anew, or use that method."
            )
        self.values = dict(stored["attributes"]["values"] if stored else self.initial)

    def state(self) -> dict[str, Any]:
        return {"args": {"start": self.initial}, "attributes": {"values": self.values}}


class MethodSteps(Trainer):
    """A `Trainer` whose loss is `gamma * forget + alpha * retain`, weighted and minimized as a `Method` says.

    Subclasses define `loss_of`, which gives one part of the loss, and `mean_losses`.
    """

    method: Method
    args: Any  # with `gamma` and `alpha`
    #: Whether the parts of the loss are added to the means that are logged: once per batch, not at moved weights.
    noting = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._batches: list[Any] = []
        if self.method.start():
            self.add_callback(LearnedValues(self.method.start()))
        if type(self.method).has_own_step():
            self._refuse_own_step()

    def loss_of(self, model: nn.Module, inputs: dict[str, Any], part: Part, num_items_in_batch: Any) -> Tensor:
        """This batch's share of the step's mean loss of one part, not weighted."""
        raise NotImplementedError

    def mean_losses(self) -> dict[Part, float]:
        """Mean losses of the step that just ended, over all its batches and processes; each call starts anew."""
        raise NotImplementedError

    def require_gradient(self) -> None:
        """Raise where no trained parameter takes part in the losses seen so far."""
        raise NotImplementedError

    @property
    def learned(self) -> dict[str, float]:
        """What the method has learned so far, by name."""
        holders = [c for c in self.callback_handler.callbacks if isinstance(c, LearnedValues)]
        return holders[0].values if holders else {}

    def progress(self) -> Progress:
        return Progress(self.state.global_step / max(1, self.state.max_steps), self.state.epoch or 0.0)

    def weights(self) -> tuple[float, float]:
        """gamma and alpha of the current step."""
        return self.method.weights(self.args.gamma, self.args.alpha, self.progress(), self.learned)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        if type(self.method).has_own_step():
            loss = self._own_step(model, inputs, num_items_in_batch)
        else:
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients and self.learned:
            self.learned.update(self.method.learn(self.learned, self.mean_losses(), self.progress()))
        return loss

    def _own_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        """Keep the micro-batches of a step until its last one; then let the method make the gradient of them all."""
        self._batches.append(self._prepare_inputs(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        batches, self._batches = self._batches, []
        model.train()
        optimizer: Any = self.optimizer
        if callable(getattr(optimizer, "train", None)):  # schedule-free optimizers
            optimizer.train()
        step = _Step(self, model, batches, num_items_in_batch)
        gradient = self.method.gradient(step)
        self.require_gradient()
        for parameter, value in zip(step.parameters, gradient, strict=True):
            parameter.grad = value.to(parameter.dtype)
        return step.loss()

    def _refuse_own_step(self) -> None:
        name = type(self.method).__name__
        if self.accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
            raise ValueError(
                f"{name!r} combines gradients in a step of its own, which needs whole gradients and weights on each "
                f"process; {self.accelerator.distributed_type.value} holds them itself. Train on one process or with "
                "plain data parallelism (DDP), or choose a method without a step of its own."
            )
        if self.args.fp16:
            raise ValueError(
                f"{name!r} combines gradients in a step of its own, and under fp16 they are scaled. Use bf16 or "
                "float32."
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{name!r} has a step of its own, which `DataParallel` does not support. Launch one process per GPU "
                "(`accelerate launch` or `torchrun`)."
            )


class _Step:
    """One optimizer step for a method: see `method.Step`."""

    def __init__(self, trainer: MethodSteps, model: nn.Module, batches: list[Any], num_items_in_batch: Any) -> None:
        self.trainer, self.model, self.batches, self.count = trainer, model, batches, num_items_in_batch
        self.gamma, self.alpha = trainer.weights()
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.losses: dict[Part, Tensor] = {}

    def gradient(self, part: Part) -> Gradient:
        accelerator = self.trainer.accelerator
        self._clear()
        self.trainer.noting = part not in self.losses
        total = torch.zeros((), device=self.trainer.args.device)
        try:
            # Processes are averaged below, once: DDP itself would allow only one backward pass per forward pass.
            with accelerator.no_sync(self.model):
                for inputs in self.batches:
                    with self.trainer.compute_loss_context_manager():
                        loss = self.trainer.loss_of(self.model, inputs, part, self.count)
                    if loss.requires_grad:
                        accelerator.backward(loss)
                    total += loss.detach()
        finally:
            self.trainer.noting = True
        self.losses.setdefault(part, total)
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        self._clear()
        if accelerator.num_processes > 1:
            found = [accelerator.reduce(gradient, "mean") for gradient in found]
        return found

    @contextmanager
    def moved(self, by: Gradient) -> Iterator[None]:
        before = [p.detach().clone() for p in self.parameters]
        try:
            with torch.no_grad():
                for parameter, change in zip(self.parameters, by, strict=True):
                    parameter.add_(change)
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.parameters, before, strict=True):
                    parameter.copy_(value)

    def loss(self) -> Tensor:
        """gamma * forget + alpha * retain, each as first computed, at the weights before the step."""
        weights: dict[Part, float] = {"forget": self.gamma, "retain": self.alpha}
        return torch.stack([weights[part] * loss for part, loss in self.losses.items()]).sum()

    def _clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
