"""Define merge methods: arithmetic on tensors, with a declaration of what they need from the stream.

A method is a pure function `method(base, models, **options) -> tensor` on tensors of equal shape, in at least float32.
Its file contains the complete algorithm in torch: this is the reference implementation, and the one that is used on
GPUs and for gradients. The stream calls it with pieces of tensors, so it declares:

- `unit`: what a piece is. `"element"`: any run of elements; `"row"`: whole rows (last dimension); `"matrix"`: the
  whole tensor.
- `statistics`: a function `(pieces, **options) -> dict` that reads the tensor one or more times and returns values for
  all of it (a threshold, a Gram matrix), which are passed to the method as keyword arguments. `pieces` can be iterated
  over repeatedly, and yields `(base, models)` for each piece.
- `fast`: the same method in one compiled pass (`arithmetic.fast`), for tensors on the CPU that do not need gradients.
  The stream then passes arrays (`arithmetic.kernels`) to it and to `statistics`, and does not import torch.
- `extra`: additional tensors of each model that are read together with the weights, such as a Fisher diagonal.
- a keyword argument `noise`: random numbers by position, so that a mask does not depend on the pieces.

Coefficients (options annotated as `Coefficient` or `PerModelCoefficient`) may be 0-d tensors that require gradients.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

from hf_transfer_ext.merging.arithmetic import kernels
from hf_transfer_ext.merging.arithmetic.noise import Noise
from hf_transfer_ext.weights.dtypes import is_tensor

if TYPE_CHECKING:
    from torch import Tensor

    from hf_transfer_ext.merging.types import PerModelCoefficient, Values, Weights

#: One number for all models, or one per model in the order of `models`. In YAML, such an option belongs to a model.
PerModel: TypeAlias = float | Sequence[float]

#: What a piece is: any run of elements, whole rows, or the whole tensor.
Unit: TypeAlias = Literal["element", "row", "matrix"]

BaseModel: TypeAlias = Literal["none", "member", "optional", "required"]

#: Options of mergekit that have no effect here: masks take no memory, and task arithmetic does not trim.
WITHOUT_EFFECT = ("int8_mask", "task_arithmetic.density", "task_arithmetic.rescale")


@dataclass(frozen=True)
class Interval:
    """The range of an option, including its bounds unless `open_low` is set."""

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


#: An option has the same meaning in all methods, so it has one range.
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
    "fisher_floor": Interval(0),
    "off_diagonal": Interval(0, 1),
}


@dataclass(frozen=True)
class Extra:
    """An additional tensor of each model, read together with the weight of the same name.

    Args:
        shape: "weight": the shape of the weight, read in the same pieces. "columns": a square matrix with one row and
            one column per column of the weight, read as a whole; only for `unit="matrix"`.
        required: Whether every weight needs one. Otherwise the method gets None for weights for which no model has
            one.
    """

    shape: Literal["weight", "columns"] = "weight"
    required: bool = True


class Piece(NamedTuple):
    """A piece of one tensor, for all models: tensors, or arrays for a method with a fast form (`types.Values`).

    Args:
        start: Index of its first element in the flattened tensor.
        extra: name -> the extra tensors of the models, in their order; None if there are none.
    """

    start: int
    base: Any
    models: list[Any]
    extra: Mapping[str, list[Tensor] | None]


@runtime_checkable
class Pieces(Protocol):
    """One tensor of all models in pieces. Every iteration restarts; the next piece overwrites the previous one.

    Yields the base (or None) and the models: tensors, or arrays for a method with a fast form (`types.Values`).
    """

    @property
    def numel(self) -> int: ...
    @property
    def count(self) -> int:
        """Number of models."""
        ...

    def __iter__(self) -> Iterator[tuple[Any, list[Any]]]: ...
    def sample(self) -> Iterator[tuple[Any, list[Any]]]:
        """Short runs (whole rows for `unit="row"`) from across the tensor; all of a small tensor."""
        ...


class PlacedPieces(Pieces, Protocol):
    """Pieces that also have their start index and the extra tensors."""

    def placed(self) -> Iterator[Piece]: ...


@dataclass(frozen=True)
class Whole:
    """A tensor that is in memory, as its only piece."""

    base: Any
    models: list[Any]
    extra: Mapping[str, list[Tensor] | None] = field(default_factory=dict)

    @property
    def numel(self) -> int:
        return math.prod(self.models[0].shape)

    @property
    def count(self) -> int:
        return len(self.models)

    def placed(self) -> Iterator[Piece]:
        yield Piece(0, self.base, self.models, self.extra)

    def __iter__(self) -> Iterator[tuple[Any, list[Any]]]:
        yield self.base, self.models

    def sample(self) -> Iterator[tuple[Any, list[Any]]]:
        yield self.base, self.models


@dataclass(frozen=True)
class Option:
    """An option of a method, as declared by its signature.

    Args:
        differentiable: Whether the result has a gradient with respect to it.
    """

    name: str
    per_model: bool
    differentiable: bool
    required: bool
    default: Any


@dataclass(frozen=True)
class Promises:
    """Identities that a method satisfies in addition to its definition; tested by `testing.check_merge_method`.

    Args:
        alone: Options with which merging a single model returns it unchanged; None if there are none.
        equal: Options with which merging equal models returns that model; None if there are none. Methods that require
            a base always return it if all models equal it.
        any_order: Permuting the models, with their options, only changes the result by rounding.
    """

    alone: Mapping[str, Any] | None = None
    equal: Mapping[str, Any] | None = None
    any_order: bool = True

    def give_back_equal(self, options: Mapping[str, Any]) -> bool:
        """Whether merging equal models returns that model, with these options."""
        return self.equal is not None and all(options.get(name) == value for name, value in self.equal.items())


class MergeMethod:
    """A merge method: callable like the function it wraps, with its declaration for the stream.

    Args:
        base: "required": merges changes relative to a base model; "optional": with or without one; "none": a base
            model only provides its configuration; "member": a base model is treated as another model.
        count: Minimum and maximum number of models, without the base.
        unit, statistics, fast, extra: See the module docstring.
        check: Called with the options before any work; raises `ValueError` if they contradict each other.
        change_factors: If the result is theta_0 + sum_i c_i t_i: a function from the options to the factors c_i, or to
            None for options with which it is not. Such a method can merge low-rank changes by their factors.
        promises: Identities that the method satisfies.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        *,
        unit: Unit = "element",
        base: BaseModel = "required",
        count: tuple[int, int | None] = (1, None),
        statistics: Callable[..., dict[str, Any]] | None = None,
        fast: Callable[..., Tensor | None] | None = None,
        extra: Mapping[str, Extra] | None = None,
        check: Callable[..., None] | None = None,
        change_factors: Callable[..., list[float] | None] | None = None,
        promises: Promises = Promises(),
    ) -> None:
        functools.update_wrapper(self, function)
        self.__name__: str = function.__name__
        self.function, self.unit, self.base, self.count = function, unit, base, count
        self.statistics, self.fast, self.check, self.extra = statistics, fast, check, dict(extra or {})
        self.change_factors, self.promises = change_factors, promises
        parameters = inspect.signature(function).parameters
        self._check_declaration(parameters)
        self.takes_noise = "noise" in parameters
        provided = getattr(statistics, "gives", ())
        #: YAML name -> option
        self.options: dict[str, Option] = {
            _yaml_name(name): _option(name, parameter)
            for name, parameter in parameters.items()
            if name not in ("base", "models", "noise", *provided, *self.extra)
        }

    @property
    def defaults(self) -> dict[str, Any]:
        """Default values of the options that have one."""
        return {option.name: option.default for option in self.options.values() if not option.required}

    def __call__(self, base: Tensor | None, models: Sequence[Tensor], **options: Any) -> Tensor:
        """Merge whole tensors; gradients flow to the tensors and to coefficients that are tensors."""
        if self.check is not None:
            self.check(**{**self.defaults, **options})
        self._check_gradients(options)
        shape = models[0].shape
        extra = self._extra_of(options, len(models))
        whole = Whole(
            None if base is None or self.base in ("none", "member") else self._as_unit(base),
            [self._as_unit(model) for model in models],
            {
                name: one
                and [self._as_unit(tensor) if self.extra[name].shape == "weight" else tensor for tensor in one]
                for name, one in extra.items()
            },
        )
        ((_, merged),) = self.over(whole, **options)
        return kernels.tensor_of(merged).reshape(shape)

    def over(self, pieces: PlacedPieces, *, noise: Noise = Noise(), **options: Any) -> Iterator[tuple[int, Values]]:  # noqa: B008
        """Yield the merged pieces of one tensor in order, each with the index of its first element.

        They are arrays if the pieces are and the fast form merged them.
        """
        options = {**self.defaults, **options}
        if self.statistics is not None:
            options |= self.statistics(pieces, **options)
        for start, base, models, extra in pieces.placed():
            if self.takes_noise:
                options["noise"] = noise.at(start)
            yield start, self._merged(base, models, {**options, **extra})

    def _merged(self, base: Values | None, models: Sequence[Values], options: dict[str, Any]) -> Values:
        """One merged piece, from the fast form if there is one for these tensors, else from the method itself."""
        if (
            self.fast is not None
            and kernels.can_take(base, *models)
            and not any(map(_wants_gradient, options.values()))
        ):
            merged = self.fast(base, models, **options)
            if merged is not None:
                return merged
        return self.function(None if base is None else in_float(base), [in_float(one) for one in models], **options)

    def _as_unit(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(-1, tensor.shape[-1] if tensor.dim() else 1) if self.unit == "row" else tensor

    def _extra_of(self, options: dict[str, Any], count: int) -> dict[str, list[Tensor] | None]:
        """Remove the extra tensors from the keyword arguments of a call and return them."""
        found: dict[str, list[Tensor] | None] = {}
        for name, declared in self.extra.items():
            tensors = options.pop(name, None)
            if tensors is None and declared.required:
                raise TypeError(f"`{self.__name__}` needs `{name}`: one tensor for each model.")
            if tensors is not None and len(tensors) != count:
                raise ValueError(f"`{name}` needs one tensor for each model: got {len(tensors)} for {count} models.")
            found[name] = tensors if tensors is None else list(tensors)
        return found

    def _check_gradients(self, options: Mapping[str, Any]) -> None:
        smooth = {option.name for option in self.options.values() if option.differentiable}
        plain = {option.name for option in self.options.values()} - smooth
        for name in plain & options.keys():
            if _wants_gradient(options[name]):
                raise TypeError(
                    f"Option {name!r} of `{self.__name__}` has no gradient: the result is not differentiable in it. "
                    f"Pass a number. Options that may require gradients: {', '.join(sorted(smooth)) or 'none'}."
                )

    def _check_declaration(self, parameters: Mapping[str, inspect.Parameter]) -> None:
        name = self.__name__
        if list(parameters)[:2] != ["base", "models"]:
            raise TypeError(f"`{name}` must begin with the arguments (base, models), got ({', '.join(parameters)}).")
        for other, parameter in list(parameters.items())[2:]:
            if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
                raise TypeError(f"Option {other!r} of `{name}` must be keyword-only: put a `*` after `models`.")
        missing = [one for one in (*getattr(self.statistics, "gives", ()), *self.extra) if one not in parameters]
        if missing:
            raise TypeError(f"`{name}` declares {missing[0]!r}, but has no keyword argument with that name.")
        if self.unit != "matrix" and any(extra.shape == "columns" for extra in self.extra.values()):
            raise TypeError(f'`{name}` reads square extra tensors as a whole, so it needs `unit="matrix"`.')


def merge_method(**declared: Any) -> Callable[[Callable[..., Tensor]], MergeMethod]:
    """Declare what a method needs; the arguments are those of `MergeMethod`."""
    return lambda function: MergeMethod(function, **declared)


def check_is_merge_method(function: object) -> None:
    """Check that the registry of merge methods can accept a function.

    Raises:
        ValueError: It is not a `MergeMethod`.
    """
    if not isinstance(function, MergeMethod):
        name = getattr(function, "__name__", repr(function))
        raise ValueError(
            f"{name!r} is not a merge method: put `@merge_method(...)` between `@MERGE_METHODS.register` and the "
            "function, to declare what it needs (see hf_transfer_ext.merging.method)."
        )


def gives(*names: str) -> Callable[[Callable[..., dict[str, Any]]], Any]:
    """Declare the keys of the dictionary that a statistics function returns."""

    def declare(statistics: Any) -> Any:
        statistics.gives = names
        return statistics

    return declare


def in_float(values: Values) -> Weights:
    """A tensor in at least float32: converted if it has fewer bits, unchanged otherwise; an array as a tensor."""
    tensor = kernels.tensor_of(values)
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def for_each(value: PerModelCoefficient, models: Sequence[Any] | int) -> list[Any]:
    """One value per model (given as a list or a count): tensors unchanged, numbers as floats.

    Raises:
        ValueError: The number of values is not the number of models.
    """
    count = models if isinstance(models, int) else len(models)
    if is_tensor(value) and value.dim() == 1:
        value = list(value.unbind())
    if not isinstance(value, Sequence):
        return [value if is_tensor(value) else float(value)] * count
    if len(value) != count:
        raise ValueError(f"One value per model is needed: got {len(value)} values for {count} models.")
    return [one if is_tensor(one) else float(one) for one in value]


def _wants_gradient(value: Any) -> bool:
    if is_tensor(value):
        return bool(value.requires_grad)
    return isinstance(value, (list, tuple)) and any(map(_wants_gradient, value))


def _yaml_name(name: str) -> str:
    """`lambda_` is called `lambda` in YAML, which is a reserved word in Python."""
    return name.rstrip("_")


def _option(name: str, parameter: inspect.Parameter) -> Option:
    required, kind = parameter.default is inspect.Parameter.empty, str(parameter.annotation)
    return Option(name, "PerModel" in kind, "Coefficient" in kind, required, None if required else parameter.default)
