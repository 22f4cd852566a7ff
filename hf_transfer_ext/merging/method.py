"""What a merge method is: arithmetic on tensors, with a note of what the stream has to give it.

A method is a pure function `method(base, models, **options) -> tensor` on float32 tensors of one shape. Called with
whole tensors it is its own definition. The stream calls it with pieces, so it declares what a piece must be:

- `unit="element"`: any run of elements; `"row"`: whole rows (last dimension); `"matrix"`: the tensor as it is.
- `statistics`: a function `(pieces, **options) -> dict` that reads the tensor once or more and returns numbers that
  hold for all of it (a threshold, a Gram matrix); they arrive in the method as keyword arguments. `pieces` can be
  iterated over again and again, and gives `(base, models)` for one piece after the other.
- `stored`: pieces may come as they lie in the files, in bfloat16 too: all functions that the method hands them to take
  them (`kernels`), and none overwrites them.
- a keyword argument `noise`: random numbers by position, so that a mask does not depend on the pieces.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

#: One number for all models, or one for each in the order of `models`. In YAML such an option stands with a model.
PerModel: TypeAlias = float | Sequence[float]

#: What a piece is: any run of elements, whole rows, or the tensor as it is.
Unit: TypeAlias = Literal["element", "row", "matrix"]

BaseModel: TypeAlias = Literal["none", "member", "optional", "required"]

#: Options that mergekit knows and that change nothing: masks take no memory here, and task arithmetic trims nothing.
WITHOUT_EFFECT = ("int8_mask", "task_arithmetic.density", "task_arithmetic.rescale")


@dataclass(frozen=True)
class Interval:
    """The values that an option may take, bounds included unless said otherwise."""

    low: float = float("-inf")
    high: float = float("inf")
    open_low: bool = False

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, (int, float)):
            return False
        return self.low <= value <= self.high and not (self.open_low and value == self.low)

    def __str__(self) -> str:
        if self.high == float("inf"):
            return f"{'above' if self.open_low else 'at least'} {self.low:g}"
        return f"between {self.low:g}{' (excluded)' if self.open_low else ''} and {self.high:g}"


#: One word has one meaning in all methods, and therefore one range.
RANGES: dict[str, Interval] = {
    "density": Interval(0, 1),
    "gamma": Interval(0, 1),
    "epsilon": Interval(0, 1),
    "select_topk": Interval(0, 1),
    "common_space_fraction": Interval(0, 1),
    "max_iter": Interval(0),
    "tol": Interval(0),
    "iterations": Interval(0),
    "learning_rate": Interval(0, open_low=True),
}


@runtime_checkable
class Pieces(Protocol):
    """One tensor of all models, piece by piece; every iteration starts again. Pieces are overwritten by the next."""

    @property
    def numel(self) -> int: ...
    @property
    def count(self) -> int:
        """Number of models."""
        ...

    def __iter__(self) -> Iterator[tuple[Tensor | None, list[Tensor]]]: ...
    def sample(self) -> Iterator[tuple[Tensor | None, list[Tensor]]]:
        """Short runs (whole rows for `unit="row"`) from all over the tensor; all of a small tensor."""
        ...


@dataclass(frozen=True)
class Whole:
    """The pieces of a tensor that is held as a whole: itself."""

    base: Tensor | None
    models: list[Tensor]

    @property
    def numel(self) -> int:
        return self.models[0].numel()

    @property
    def count(self) -> int:
        return len(self.models)

    def __iter__(self) -> Iterator[tuple[Tensor | None, list[Tensor]]]:
        yield self.base, self.models

    def sample(self) -> Iterator[tuple[Tensor | None, list[Tensor]]]:
        yield self.base, self.models


@dataclass(frozen=True)
class Option:
    """An option of a method as its signature tells it."""

    name: str
    per_model: bool
    required: bool
    default: Any


class MergeMethod:
    """A merge method: callable as the function it wraps, with what the stream has to know about it.

    Args:
        base: "required": changes against a base model; "optional": with or without one; "none": a base model only
            lends its configuration; "member": a base model is one more of the models.
        count: Least and greatest number of models beside the base.
        statistics, stored: See the top of this file.
        check: Called with the options before any work; raises `ValueError` where they contradict each other.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        *,
        unit: Unit,
        base: BaseModel,
        count: tuple[int, int | None],
        statistics: Callable[..., dict[str, Any]] | None,
        stored: bool,
        check: Callable[..., None] | None,
    ) -> None:
        functools.update_wrapper(self, function)
        self.__name__: str = function.__name__
        self.function, self.unit, self.base, self.count = function, unit, base, count
        self.statistics, self.stored, self.check = statistics, stored, check
        given = getattr(statistics, "gives", ())
        parameters = inspect.signature(function).parameters
        self.takes_noise = "noise" in parameters
        #: YAML name -> option
        self.options: dict[str, Option] = {
            _yaml_name(name): _option(name, parameter)
            for name, parameter in parameters.items()
            if name not in ("base", "models", "noise", *given)
        }

    def __call__(self, base: Tensor | None, models: Sequence[Tensor], **options: Any) -> Tensor:
        if self.check is not None:
            self.check(**options)
        base = base if self.base in ("optional", "required") else None
        shape = models[0].shape
        if self.unit == "row":
            columns = shape[-1] if shape else 1
            base = base if base is None else base.reshape(-1, columns)
            models = [model.reshape(-1, columns) for model in models]
        if self.statistics is not None:
            defaults = {option.name: option.default for option in self.options.values() if not option.required}
            options |= self.statistics(Whole(base, list(models)), **{**defaults, **options})
        return self.function(base, models, **options).reshape(shape)


def merge_method(
    *,
    unit: Unit = "element",
    base: BaseModel = "required",
    count: tuple[int, int | None] = (1, None),
    statistics: Callable[..., dict[str, Any]] | None = None,
    stored: bool = False,
    check: Callable[..., None] | None = None,
) -> Callable[[Callable[..., Tensor]], MergeMethod]:
    """Declare what a method needs; the arguments are those of `MergeMethod`."""

    def declare(function: Callable[..., Tensor]) -> MergeMethod:
        return MergeMethod(
            function, unit=unit, base=base, count=count, statistics=statistics, stored=stored, check=check
        )

    return declare


def gives(*names: str) -> Callable[[Callable[..., dict[str, Any]]], Any]:
    """Declare the keys of the dictionary that a statistics function returns."""

    def declare(statistics: Any) -> Any:
        statistics.gives = names
        return statistics

    return declare


def _yaml_name(name: str) -> str:
    """`lambda_` is called `lambda` in YAML, which Python keeps for itself."""
    return name.rstrip("_")


def _option(name: str, parameter: inspect.Parameter) -> Option:
    required = parameter.default is inspect.Parameter.empty
    return Option(name, "PerModel" in str(parameter.annotation), required, None if required else parameter.default)


def for_each(value: PerModel, models: Sequence[Any] | int) -> list[float]:
    """One value for each model, or for each of that many.

    Raises:
        ValueError: There are not as many values as models.
    """
    count = models if isinstance(models, int) else len(models)
    if not isinstance(value, Sequence):
        return [float(value)] * count
    if len(value) != count:
        raise ValueError(f"One value for each model is needed: got {len(value)} values for {count} models.")
    return [float(one) for one in value]
