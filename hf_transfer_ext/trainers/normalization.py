"""The one place where a per-token loss becomes the number that is minimized."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import DistributedType
from jaxtyping import Bool, Float
from torch import Tensor

from hf_transfer_ext.launch import require_processes
from hf_transfer_ext.models.plumbing import is_sharded
from hf_transfer_ext.tensors import masked_sum
from hf_transfer_ext.trainers.inherited import refuse_compiled_shares
from hf_transfer_ext.trainers.logs import LogsSpeed
from hf_transfer_ext.trainers.results import SavesResults, refuse_published_states


class TokenLossNormalization(LogsSpeed, SavesResults):
    """Mixin for `Trainer` subclasses whose loss is a sum over tokens: one optimizer step, one mean, however split.

    The Trainer counts the labeled tokens of all micro-batches and all ranks of a step (`num_items_in_batch`);
    dividing the sum by that count makes four micro-batches of one equal one batch of four, and two processes one.
    """

    #: Tells the Trainer (transformers >= 5.19) that the loss is a share of the whole step already.
    loss_is_scaled_for_ga: bool | None = True
    #: What helps against a loss that is not finite.
    nan_advice = "Lower the learning rate, and check the data for empty or corrupt samples."
    get_tp_size: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        require_processes(self.accelerator.num_processes)
        refuse_compiled_shares(self.args, self.accelerator)
        refuse_published_states(self.args)
        self.model_accepts_loss_kwargs = True  # the Trainer then counts num_items_in_batch, whatever the model takes
        # Our losses shift the labels: the first token of a row is predicted by nothing, whatever transformers believes
        # of this model's class.
        self._loss_shifts_labels = True
        self._learns: bool | None = None  # None until the first optimizer step shows it
        self._loss_so_far = 0.0
        require_trainable(self.model)  # type: ignore[attr-defined]

    def token_weight(self, mask: Bool[Tensor, "*shape"], num_items_in_batch: Any = None) -> Float[Tensor, ""]:
        """Weight of one token's loss: 1 / tokens of the step, or of this batch where no count is given.

        The count covers all devices while DDP and FSDP average gradients over them: `num_processes` undoes that.
        """
        if num_items_in_batch is None:
            return 1.0 / mask.sum().clamp(min=1).float()
        devices = (
            self.accelerator.num_processes // self.get_tp_size() if self.args.average_tokens_across_devices else 1
        )
        count = torch.as_tensor(num_items_in_batch, device=mask.device).clamp(min=1)  # a step may have no token
        return mask.new_ones((), dtype=torch.float32) * devices / count

    def normalize(
        self, loss: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], num_items_in_batch: Any = None
    ) -> Float[Tensor, ""]:
        """Sum of the kept per-token losses times `token_weight`: this process's share of the step's mean."""
        return masked_sum(loss, mask) * self.token_weight(mask, num_items_in_batch)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch; with `stop_on_nan`, a loss that is NaN or infinite ends the run with an error."""
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if self.args.stop_on_nan and not torch.isfinite(loss).all():
            raise FloatingPointError(
                f"The loss is {loss.item()} at step {self.state.global_step}. {self.nan_advice} "
                "Checkpoints written so far are complete."
            )
        if self._learns is None:
            self._check_first_step(loss)
        return loss

    def _check_first_step(self, loss: Tensor) -> None:
        """Refuse a run whose loss moves no weight: it would look alive to its end and return what it started from."""
        if is_sharded(accelerator=self.accelerator) or self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            self._learns = True  # gradients lie elsewhere
            return
        self._loss_so_far += abs(loss.item())
        gradients = [p.grad for p in self.model.parameters() if p.requires_grad]  # type: ignore[attr-defined]
        self._learns = any(grad is not None and bool(grad.any()) for grad in gradients) or None
        if self._learns is None and self.accelerator.sync_gradients and self._loss_so_far > 0:
            raise ValueError(
                f"After the first step, with a loss of {self._loss_so_far:.4g}, the gradient of all {len(gradients)} "
                f"trainable tensors is 0: this run would change nothing. {self.no_gradient_advice()}"
            )

    def no_gradient_advice(self) -> str:
        """What helps where no gradient reaches what is trained."""
        return (
            "The loss does not depend on what is trained; train weights that it reads (layers below the one that it "
            "looks at, an adapter that is active)."
        )


def require_trainable(model: Any) -> None:
    """Refuse a model in which nothing is trainable.

    Raises:
        ValueError: No parameter requires a gradient.
    """
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    advice = "Unfreeze what is to be trained with `requires_grad_(True)`, or train an adapter with `peft_config`."
    if hasattr(model, "peft_config"):
        advice = (
            "Its adapter was loaded for inference: load it with `PeftModel.from_pretrained(base, path, "
            "is_trainable=True)`."
        )
    raise ValueError(f"Nothing in the {type(model).__name__} is trainable: this run would change nothing. {advice}")
