"""A teacher that runs beside the student: another model, or another adapter on the student's own base."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from hf_transfer_ext.losses.rows import HeadRows, LogitRows
from hf_transfer_ext.losses.slopes import Form
from hf_transfer_ext.models.heads import LMHead, causal_lm_of, head_module, head_of, run_to_head
from hf_transfer_ext.models.plumbing import (
    BASE,
    active_adapter,
    check_adapter,
    evaluation_mode,
    head_is_understood,
    is_sharded,
    no_cache,
)
from hf_transfer_ext.teachers.signal import TeacherSignal
from hf_transfer_ext.tensors import Mask, predicting_rows

#: What the student is called with that says how it is to run, and not what it reads.
HOW_TO_RUN = (
    "labels", "shift_labels", "use_cache", "output_router_logits", "return_dict", "num_items_in_batch",
)  # fmt: skip
#: Text of a batch told in another way, which a model may do without: a mask made of these reaches all layers.
OPTIONAL_INPUTS = (
    "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "token_type_ids",
    "mm_token_type_ids",
)  # fmt: skip


class LiveTeacher:
    """Runs a frozen causal language model, in eval mode and without gradients, under whatever wraps the student.

    Args:
        model: The teacher; it is frozen, and placed or sharded as the student is.
        accelerator: The trainer's.
        fused: False to give logits in any case; else hidden states, where the head is one that a loss can apply.
        select: Which rows of hidden states or logits a mask selects; by default those that predict the masked tokens.

    When to use it: the default: the teacher fits beside the student, and every setting goes with it.
    """

    form: Form = "dense"

    def __init__(
        self,
        model: nn.Module,
        accelerator: Accelerator,
        *,
        fused: bool = True,
        select: Callable[[Tensor, Mask], Tensor] = predicting_rows,
    ) -> None:
        self._select = select
        model.requires_grad_(False)
        self.model = prepare_frozen(model, accelerator)
        self._remember(accelerator, fused)

    def _remember(self, accelerator: Accelerator, fused: bool) -> None:
        self.sharded = is_sharded(accelerator=accelerator)
        self._fused = None if fused else False  # None until the first batch has shown it
        self._head: LMHead | None = None

    @property
    def network(self) -> nn.Module:
        """The module that runs as the teacher; an adapter's is the student's."""
        return self.model

    @contextmanager
    def running(self, student: nn.Module) -> Iterator[nn.Module]:
        """The teacher's module, in eval mode and without gradients.

        Args:
            student: The wrapped student, for teachers that live on it.
        """
        self.model.eval()
        with torch.no_grad():
            yield self.model

    def signal(self, student: nn.Module, inputs: dict[str, Any], mask: Mask) -> TeacherSignal:
        """The teacher's distribution at the student's labeled tokens; see `Teacher.signal`."""
        with self.running(student) as model:
            shared = inputs_for(model, student, inputs) | no_cache(model)
            if self._fused is None:
                self._fused = head_is_understood(model)
            if not self._fused:
                return TeacherSignal(LogitRows(self._select(model(**shared).logits, mask)))
            found: list[HeadRows] = []

            def read(hidden: Tensor) -> None:
                found.append(HeadRows(self._select(hidden, mask), self._head_inside(model)))

            run_to_head(model, read, **shared)
            return TeacherSignal(found[-1])

    def _head_inside(self, model: nn.Module) -> LMHead:
        """The head as it is inside its own forward, where its weights are whole and on the device."""
        if self._head is not None:
            return self._head
        head = head_of(model).detach()
        if self.sharded:
            head = head.clone()  # its weights are taken away again: copied, once
        if not is_offloaded(head_module(model)):  # else it lives for this batch alone
            self._head = head
        return head


class AdapterTeacher(LiveTeacher):
    """A teacher on the student's own base: another adapter, or the base with adapters off. No second model is held.

    Args:
        student: A `PeftModel` that holds the student's adapter and the teacher's, unwrapped.
        adapter: The teacher's adapter name, or "base".
        select: As in `LiveTeacher`.

    When to use it: the teacher is a fine-tune of the student's own base, or that base itself, which a student is not
    to drift away from; there is no memory for a second model.
    """

    def __init__(
        self,
        student: Any,
        adapter: str,
        accelerator: Accelerator,
        *,
        fused: bool = True,
        select: Callable[[Tensor, Mask], Tensor] = predicting_rows,
    ) -> None:
        self._select = select
        check_adapter(student, adapter)
        active = list(student.active_adapters)
        if adapter in active:
            raise ValueError(
                f"Adapter {adapter!r} is the teacher and the active adapter of the student at once. Add a second "
                "adapter for the student and make it the active one with `model.set_adapter(...)`."
            )
        self.peft: Any = student
        self.adapter = adapter
        self._remember(accelerator, fused)
        if adapter == BASE:
            return
        if student.peft_config[adapter].is_prompt_learning:
            student.prompt_encoder[adapter].requires_grad_(False)
        else:
            student.set_requires_grad(adapter, requires_grad=False)

    @property
    def network(self) -> nn.Module:
        return self.peft

    @contextmanager
    def running(self, student: nn.Module) -> Iterator[nn.Module]:
        with torch.no_grad(), evaluation_mode(self.peft), active_adapter(self.peft, self.adapter):
            yield student


def inputs_for(teacher: nn.Module, student: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """What the teacher is called with: everything that the student reads.

    Raises:
        ValueError: The student reads something (images, say) that the teacher does not take.
    """
    causal = causal_lm_of(teacher)
    parameters = inspect.signature(type(causal).forward).parameters
    read_by_student = inspect.signature(type(causal_lm_of(student)).forward).parameters
    takes_more = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    shared, unread = {}, []
    for name, value in inputs.items():
        if name in HOW_TO_RUN:
            continue
        if name in read_by_student and name not in parameters and name not in OPTIONAL_INPUTS:
            unread.append(name)
        elif name in parameters or takes_more:
            shared[name] = value
    if unread:
        raise ValueError(
            f"The student reads {', '.join(unread)}, which the teacher {type(causal).__name__} does not take. Distil "
            "from a teacher that reads the same inputs, or leave these columns out of the data."
        )
    return shared


def is_offloaded(head: nn.Module) -> bool:
    """Whether a head's weights are on the device only while it runs (`device_map` with CPU or disk offload)."""
    return any(parameter.is_meta for parameter in head.parameters()) or bool(
        getattr(getattr(head, "_hf_hook", None), "offload", False)
    )


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
