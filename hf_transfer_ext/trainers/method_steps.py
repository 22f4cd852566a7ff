"""Steps of an unlearning method inside the `Trainer`: scheduled and learned weights, and steps of a method's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from hf_transfer_ext.data.question_answer import EncodedAnswer
from hf_transfer_ext.losses.needs import ForwardPass
from hf_transfer_ext.losses.unlearning_method import Gradient, Method, Part, Progress
from hf_transfer_ext.models.plumbing import evaluation_mode
from hf_transfer_ext.models.views import decoder_layers, hidden_states_changed, rounded_weights

#: File of a checkpoint with what a method computed before its first step (`Method.prepare`).
PREPARED = "method.safetensors"


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
    #: Whether the reference or another frozen model computes now, perhaps by the very weights of the trained one.
    in_reference = False
    #: Whether the parts of the loss are added to the means that are logged: once per batch, not at moved weights.
    noting = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._batches: list[Any] = []
        self._prepared: dict[str, Tensor] | None = None
        self._resumes_from: Path | None = None
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

    def recall_of(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        """This batch's share of the step's mean negative log-likelihood of the answers to forget."""
        raise NotImplementedError

    def passes_over(self, model: nn.Module, part: Part, at_once: int) -> Iterator[ForwardPass]:
        """Forward passes over the answers of a whole set, for `method.Step.answers`."""
        raise NotImplementedError

    def copies_of_rows(self, model: nn.Module) -> Iterator[tuple[EncodedAnswer, list[tuple[list[int], int, Tensor]]]]:
        """What the model says of the method's copies of rows, for `method.Step.copies`."""
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
        self.prepare_method(model)
        if type(self.method).has_own_step():
            loss = self._own_step(model, inputs, num_items_in_batch)
        else:
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients and self.measures_steps:
            self.after_batches(self.mean_losses())
        return loss

    @property
    def measures_steps(self) -> bool:
        """Whether something reads the mean losses of each step."""
        return bool(self.learned)

    def after_batches(self, losses: dict[Part, float]) -> None:
        """Called with the mean losses of a step, before its update."""
        if self.learned:
            self.learned.update(self.method.learn(self.learned, losses, self.progress()))

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
        step = _Step(self, model, batches, num_items_in_batch, self.prepared)
        gradient = self.method.gradient(step)
        for parameter, value in zip(step.parameters, gradient, strict=True):
            parameter.grad = value.to(parameter.dtype)
        return step.loss()

    # ---- What a method computes once ----

    @property
    def prepared(self) -> dict[str, Tensor]:
        """What the method computed once; empty before the first step."""
        return self._prepared or {}

    def prepare_method(self, model: nn.Module) -> None:
        """Compute what the method computes once: now, or as the checkpoint has it."""
        if self._prepared is None and type(self.method).prepare is Method.prepare:
            self._prepared = {}
        if self._prepared is None:
            device, file = self.args.device, self._resumes_from and self._resumes_from / PREPARED
            if file and file.is_file():
                self._prepared = {name: tensor.to(device) for name, tensor in load_file(file).items()}
            elif file:
                raise ValueError(
                    f"{str(self._resumes_from)!r} has no {PREPARED}, which holds what "
                    f"{type(self.method).__name__!r} computed before its first step: it was written with another "
                    "method. Start anew, or use that method."
                )
            else:
                with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                    batches = [self._prepare_inputs(batch) for batch in self.get_train_dataloader()]
                count = self._get_num_items_in_batch(batches, device)
                self._prepared = dict(self.method.prepare(_Step(self, model, batches, count, {})))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._prepared = self._resumes_from = None
        return super().train(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._resumes_from = Path(resume_from_checkpoint)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self._prepared and self.args.should_save and folder.is_dir():
            save_file({name: tensor.contiguous() for name, tensor in self._prepared.items()}, folder / PREPARED)

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


class _Batch:
    """One micro-batch for a method: see `method.Batch`."""

    def __init__(self, step: _Step, inputs: dict[str, Any]) -> None:
        self.step, self.inputs = step, inputs

    def recall(self) -> Tensor:
        step = self.step
        with step.trainer.compute_loss_context_manager():
            return step.trainer.recall_of(step.model, self.inputs, step.count)

    @contextmanager
    def hidden_states_changed(self, layer: int, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        trainer = self.step.trainer
        own = trainer.accelerator.unwrap_model(self.step.model)
        with hidden_states_changed(own, layer, lambda hidden: hidden if trainer.in_reference else change(hidden)):
            yield


class _Step:
    """One optimizer step for a method: see `method.Step`."""

    def __init__(
        self, trainer: MethodSteps, model: nn.Module, batches: list[Any], count: Any, prepared: dict[str, Tensor]
    ) -> None:
        self.trainer, self.model, self.batches, self.count = trainer, model, batches, count
        self.gamma, self.alpha = trainer.weights()
        self.progress, self.prepared = trainer.progress(), prepared
        self.parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        self.losses: dict[Part, Tensor] = {}

    @property
    def layers(self) -> int:
        return len(decoder_layers(self.model))

    def gradient(self, part: Part, around: Callable[[Any], AbstractContextManager] | None = None) -> Gradient:
        self.trainer.noting = part not in self.losses
        try:
            found, total = self._gradient(
                lambda inputs: self.trainer.loss_of(self.model, inputs, part, self.count), around
            )
        finally:
            self.trainer.noting = True
        self.losses.setdefault(part, total)
        return found

    def answers(
        self, part: Part, *, at_once: int = 1, layer: int = 0, change: Callable[[Tensor], Tensor] | None = None
    ) -> Iterator[ForwardPass]:
        own = self.trainer.accelerator.unwrap_model(self.model)
        changed = nullcontext() if change is None else hidden_states_changed(own, layer, change)
        with evaluation_mode(own), changed:
            yield from self.trainer.passes_over(own, part, at_once)

    def copies(self) -> Iterator[tuple[EncodedAnswer, list[tuple[list[int], int, Tensor]]]]:
        own = self.trainer.accelerator.unwrap_model(self.model)
        with evaluation_mode(own):
            yield from self.trainer.copies_of_rows(own)

    def recall(self) -> Gradient:
        return self._gradient(lambda inputs: self.trainer.recall_of(self.model, inputs, self.count), None)[0]

    def _gradient(
        self, loss_of: Callable[[Any], Tensor], around: Callable[[Any], AbstractContextManager] | None
    ) -> tuple[Gradient, Tensor]:
        """(gradient, loss) over all batches and processes of the step."""
        accelerator = self.trainer.accelerator
        self._clear()
        total = torch.zeros((), device=self.trainer.args.device)
        # Processes are averaged below, once: DDP itself would allow only one backward pass per forward pass.
        with accelerator.no_sync(self.model):
            for inputs in self.batches:
                with around(_Batch(self, inputs)) if around else nullcontext():
                    with self.trainer.compute_loss_context_manager():
                        loss = loss_of(inputs)
                    if loss.requires_grad:
                        accelerator.backward(loss)
                total += loss.detach()
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        self._clear()
        if accelerator.num_processes > 1:
            found = [accelerator.reduce(gradient, "mean") for gradient in found]
        return found, total

    @contextmanager
    def rounded(self, bits: int, block: int) -> Iterator[None]:
        own = self.trainer.accelerator.unwrap_model(self.model)
        with rounded_weights(own, bits, block, active=lambda: not self.trainer.in_reference):
            yield

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
        """gamma * forget + alpha * retain, each as first computed."""
        weights: dict[Part, float] = {"forget": self.gamma, "retain": self.alpha}
        return torch.stack([weights[part] * loss for part, loss in self.losses.items()]).sum()

    def _clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
