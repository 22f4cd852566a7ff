"""A teacher that runs beside the student: another model, or another adapter on the student's own base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from jaxtyping import Float
from torch import Tensor, nn

from hf_transfer_ext.models.heads import (
    LMHead,
    causal_lm_of,
    head_is_understood,
    head_module,
    head_replaced,
    logit_scale_and_softcap,
)

#: Model inputs that a teacher must see as the student does: packed batches tell their documents apart by these.
SHARED_INPUTS = (
    "input_ids", "attention_mask", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
    "seq_idx", "token_type_ids",
)  # fmt: skip


@dataclass
class TeacherSignal:
    """What a teacher says of a batch: hidden states and the head that reads them, or logits where no head can be had.

    Args:
        hidden: `(batch, length, teacher_hidden)`, or None.
        head: The head for `hidden`, or None.
        logits: `(batch, length, vocab)` where `hidden` is None.
    """

    hidden: Float[Tensor, "batch length teacher_hidden"] | None = None
    head: LMHead | None = None
    logits: Float[Tensor, "batch length vocab"] | None = None


class LiveTeacher:
    """Runs a frozen causal language model, in eval mode and without gradients, under whatever wraps the student.

    Args:
        model: The teacher; it is frozen, and placed or sharded as the student is.
        accelerator: The trainer's.
        fused: False to give logits in any case; else hidden states, where the head is one that a loss can apply.
    """

    _fused: bool | None  # None until the first batch has shown it

    def __init__(self, model: nn.Module, accelerator: Accelerator, *, fused: bool = True) -> None:
        model.requires_grad_(False)
        self.sharded = shards_parameters(accelerator)
        self.model = prepare_frozen(model, accelerator)
        self._fused = None if fused else False
        self._head: LMHead | None = None

    def model_for(self, student: nn.Module) -> nn.Module:
        """The wrapped module to call; `student` is the wrapped student, for teachers that live on it."""
        return self.model

    @contextmanager
    def speaking(self, student: nn.Module) -> Iterator[nn.Module]:
        """The teacher's module, in eval mode and without gradients."""
        self.model.eval()
        with torch.no_grad():
            yield self.model

    def signal(self, student: nn.Module, inputs: dict[str, Any]) -> TeacherSignal:
        """The teacher's view of a batch of the student's inputs."""
        with self.speaking(student) as model:
            shared = {name: inputs[name] for name in SHARED_INPUTS if name in inputs}
            head = head_module(model)
            if self._fused is None:
                self._fused = head_is_understood(model, inputs["input_ids"])
            if not self._fused:
                return TeacherSignal(logits=model(**shared, use_cache=False).logits)
            hidden = self._hidden_states(model, head, shared)
            return TeacherSignal(hidden=hidden, head=self._head)

    def _hidden_states(self, model: nn.Module, head: nn.Module, inputs: dict[str, Any]) -> Tensor:
        kept: list[Tensor] = []

        def keep(hidden: Tensor) -> Tensor:
            kept.append(hidden)
            if self._head is None:
                self._head = self._describe(model, head)
            return hidden[..., :1]  # a stand-in for logits that nobody reads

        with head_replaced(head, keep):
            model(**inputs, use_cache=False)
        return kept[-1]

    def _describe(self, model: nn.Module, head: Any) -> LMHead:
        """The head as it is inside its own forward, where sharded weights are whole; these are copied, once."""
        weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
        if self.sharded:
            weight, bias = weight.clone(), None if bias is None else bias.clone()
        return LMHead(weight, bias, *logit_scale_and_softcap(causal_lm_of(model).config))


class AdapterTeacher(LiveTeacher):
    """A teacher that is an adapter on the student's own base: the adapter is switched, no second model is held.

    Args:
        student: A `PeftModel` that holds both adapters, unwrapped.
        adapter: The teacher's adapter name.
    """

    def __init__(self, student: Any, adapter: str, accelerator: Accelerator, *, fused: bool = True) -> None:
        names = list(getattr(student, "peft_config", {}))
        if not names:
            raise ValueError(
                f"A teacher adapter needs a PEFT student that carries it, got {type(student).__name__}. Load the "
                "teacher's adapter beside the student's with `model.load_adapter(path, adapter_name=...)`."
            )
        if adapter not in names:
            raise ValueError(f"The student has no adapter {adapter!r}. It has: {', '.join(names)}.")
        active = list(student.active_adapters)
        if adapter in active:
            raise ValueError(
                f"Adapter {adapter!r} is the teacher and the active adapter of the student at once. Add a second "
                "adapter for the student and make it the active one with `model.set_adapter(...)`."
            )
        self.sharded = shards_parameters(accelerator)
        self.peft: Any = student
        self.adapter = adapter
        self._fused = None if fused else False
        self._head = None
        for name, parameter in student.named_parameters():
            if f".{adapter}." in name:
                parameter.requires_grad_(False)

    @contextmanager
    def speaking(self, student: nn.Module) -> Iterator[nn.Module]:
        training, trained = self.peft.training, list(self.peft.active_adapters)
        asked = {name: p.requires_grad for name, p in self.peft.named_parameters()}
        self.peft.eval()
        self.peft.base_model.set_adapter(self.adapter)
        try:
            with torch.no_grad():
                yield student
        finally:
            self.peft.base_model.set_adapter(trained)
            for name, parameter in self.peft.named_parameters():
                parameter.requires_grad_(asked[name])
            self.peft.train(training)


def shards_parameters(accelerator: Accelerator) -> bool:
    """Whether parameters are whole only inside their module's forward (FSDP, ZeRO-3)."""
    if accelerator.distributed_type == DistributedType.FSDP:
        return True
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return accelerator.state.deepspeed_plugin.zero_stage == 3
    return False


def prepare_frozen(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Place a frozen model as the trained one is placed: sharded under FSDP and ZeRO-3, else whole on the device."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from trl.models.utils import prepare_deepspeed

        return prepare_deepspeed(model, accelerator)
    if accelerator.distributed_type == DistributedType.FSDP:
        from trl.models.utils import prepare_fsdp

        return prepare_fsdp(model, accelerator)  # type: ignore[return-value]
    if getattr(model, "is_quantized", False) or getattr(model, "hf_device_map", None) is not None:
        return model.eval()  # placed when it was loaded
    return model.to(accelerator.device).eval()
