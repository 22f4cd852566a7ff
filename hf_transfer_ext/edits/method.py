"""What an edit is: a function of an opened model, and of data, that says what its tensors become. Nothing is trained.

An edit method is a function `method(subject, **options) -> Edited`. The subject gives it what it declared to need: the
fine-tune whose direction is taken back, rows to forget, rows to retain. It answers with one job of the merge stream
for each tensor that changes; all other tensors are copied byte for byte when the result is written. So a tensor is in
memory only while it is edited, unless the method itself reads activations.

A method keeps two promises. With an option `strength` (or a share) of 0 it changes nothing, and the result has the
bytes of the input. And it never changes a tensor that it does not return.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hf_transfer_ext.merging.method import Interval, merge_method
from hf_transfer_ext.merging.planning.layout import TensorJob
from hf_transfer_ext.registry import keyword_options, unknown_name
from hf_transfer_ext.weights.opened import InputTensor

if TYPE_CHECKING:
    from hf_transfer_ext.edits.subject import Subject

#: What a method may need beside the model itself -> how `apply_edit` gets it.
NEEDS = {
    "tuned": "the fine-tune, or adapter, that learned what is to be forgotten (`tuned`)",
    "forget": "rows to forget (`forget`)",
    "retain": "rows to retain (`retain`)",
}


@dataclass
class Edited:
    """What an edit does to a model.

    Args:
        jobs: Tensor name -> the job that writes it. Names that the model lacks are added (the head of a tied model).
        files: Name -> tensors of a further safetensors file, kept beside the model on this machine.
        found: What the method chose (vectors, counts), for the report and the record; plain JSON values.
    """

    jobs: dict[str, TensorJob] = field(default_factory=dict)
    files: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)


class SharedRequests(ABC):
    """Forget requests by a method whose changes do not add up: what all of them share, and what each one removes.

    The result of the requests that stand is calculated from both, so that a revoked one leaves nothing behind. Tensors
    are kept in the folder of the requests and are never part of a result.
    """

    @abstractmethod
    def begin(self, subject: Subject, **options: Any) -> dict[str, Tensor]:
        """What all requests share, calculated for the first one from its data to forget and to retain."""

    @abstractmethod
    def note(
        self, subject: Subject, shared: Mapping[str, Tensor], others: Sequence[Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """What a request removes.

        Args:
            others: What the requests that stand remove.

        Raises:
            ValueError: It cannot be removed together with the others.
        """

    @abstractmethod
    def together(
        self, subject: Subject, shared: Mapping[str, Tensor], noted: Sequence[Mapping[str, Tensor]]
    ) -> Edited:
        """The edit after requests that removed `noted`; it has no data of its own."""


class EditMethod:
    """An edit method: callable as the function it wraps, with what it needs.

    Args:
        needs: Names out of `NEEDS`.
        optional: Further ones that it uses where they are given.
        ranges: Option -> the numbers that it may be.
        private: Options that hold data to forget; records get their digest instead.
        lora: Whether the change can also be written as a LoRA.
        requests: How `edits.requests` keeps requests whose changes, each calculated from the same model, do not add
            up; None where they do.
    """

    def __init__(
        self,
        function: Callable[..., Edited],
        *,
        needs: tuple[str, ...] = (),
        optional: tuple[str, ...] = (),
        ranges: Mapping[str, Interval] | None = None,
        private: tuple[str, ...] = (),
        lora: bool = True,
        requests: SharedRequests | None = None,
    ) -> None:
        functools.update_wrapper(self, function)
        self.__name__: str = function.__name__
        self.function, self.needs, self.optional = function, needs, optional
        self.ranges, self.private, self.lora = dict(ranges or {}), private, lora
        self.requests = requests
        self.options = keyword_options(function)
        for need in (*needs, *optional):
            if need not in NEEDS:
                raise ValueError(unknown_name("need of an edit method", need, NEEDS))
        for name in (*self.ranges, *private):
            if name not in self.options:
                raise ValueError(f"`{self.__name__}` declares {name!r}, which is not one of its options.")

    def check(self, options: Mapping[str, Any], given: Mapping[str, bool]) -> None:
        """Refuse options that the method lacks or that are out of range, and what is missing or would not be read.

        Args:
            given: For each of `NEEDS`, whether it was given.
        """
        for name, value in options.items():
            if name not in self.options:
                known = self.options or ["(it has none)"]
                raise ValueError(unknown_name(f"option of {self.__name__}", name, known))
            if name in self.ranges and (isinstance(value, bool) or value not in self.ranges[name]):
                raise ValueError(
                    f"Option {name!r} of `{self.__name__}` has to be {self.ranges[name]}, got {value!r:.100}."
                )
        required = [name for name, default in self.options.items() if default is inspect.Parameter.empty]
        for name in required:
            if options.get(name) is None:
                raise ValueError(f"`{self.__name__}` needs the option {name!r}.")
        for need, is_there in given.items():
            if need in self.needs and not is_there:
                raise ValueError(f"`{self.__name__}` needs {NEEDS[need]}.")
            if is_there and need not in (*self.needs, *self.optional):
                raise ValueError(f"`{self.__name__}` does not read {NEEDS[need]}. Leave it out.")

    def public(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options for a record: `private` ones by their digest."""
        return {
            name: f"sha256 {hashlib.sha256(repr(value).encode()).hexdigest()}" if name in self.private else value
            for name, value in options.items()
        }

    def __call__(self, subject: Subject, **options: Any) -> Edited:
        return self.function(subject, **options)


def edit_method(**declared: Any) -> Callable[[Callable[..., Edited]], EditMethod]:
    """Declare what a method needs; the arguments are those of `EditMethod`."""
    return lambda function: EditMethod(function, **declared)


@merge_method(unit="matrix", base="none", count=(1, 1))
def applied(base: Tensor | None, models: list[Tensor], *, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A tensor as a function makes it from the stored one; the merge method behind `job_of`.

    Args:
        function: float32 tensor -> float32 tensor of the same shape.

    Source: this package's own.
    """
    return function(models[0])


def job_of(name: str, tensor: InputTensor, function: Callable[[Tensor], Tensor]) -> TensorJob:
    """The job that writes `function(tensor)` under a name, in the tensor's own dtype. It reads the tensor as a whole.

    Args:
        function: Gets the tensor in float32 and returns one of the same shape; it may change the one that it gets.
    """
    return TensorJob(name, tensor.shape, tensor.dtype, applied, None, (tensor,), {"function": function})
