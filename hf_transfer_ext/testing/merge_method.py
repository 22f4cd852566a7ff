"""The contract of a merge method, as a check that other code can run on its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_transfer_ext.merging.arithmetic import kernels
from hf_transfer_ext.merging.arithmetic.noise import Noise
from hf_transfer_ext.merging.method import MergeMethod, Piece, Whole, in_float
from hf_transfer_ext.merging.types import Values

#: Shapes of the tensors that a method is tried on: a matrix, a vector, and a stack of matrices.
SHAPES = ((6, 10), (33,), (2, 3, 5))

#: Sizes at which the fast form is held against the torch of the method: around the blocks of the kernels.
FAST_SIZES = (1, 15, 512, 513, 5000)


def check_merge_method(method: object, *, options: Mapping[str, Any] | None = None, count: int = 3) -> None:
    """Hold a merge method to its contract, on small random tensors.

    What is checked: the declaration and the docstring; shape, dtype and finite results; inputs that stay as they are;
    the identities that the method promises (`method.Promises`): a model alone, equal models, unchanged models, any
    order; pieces that give what the whole tensor gives; the fast form against the torch of the method; gradients with
    respect to coefficients, against finite differences, and to the models.

    Args:
        options: Options of the method by their Python names; a list holds one value for each of `count` models.
            Options without a default are needed here, except `weight`.
        count: Number of models, where the method takes that many.

    Raises:
        AssertionError: A promise is broken; the message names it.
        TypeError: An option without a default is missing.
    """
    if not isinstance(method, MergeMethod):
        name = getattr(method, "__name__", repr(method))
        raise AssertionError(f"`{name}` is not a merge method: decorate the function with `@merge_method(...)`.")
    least, most = method.count
    count = max(least, min(count, most or count))
    case = _Case(method, _options(method, options or {}, count), count)
    _check_docstring(method)
    for shape in SHAPES:
        _check_result(case, shape)
        _check_identities(case, shape)
        _check_pieces(case, shape)
    _check_fast_form(case)
    _check_coefficient_gradients(case)
    _check_model_gradients(case)


@dataclass(frozen=True)
class _Inputs:
    """Arguments of one call."""

    base: Tensor | None
    models: list[Tensor]
    extra: dict[str, list[Tensor]] = field(default_factory=dict)

    def all(self) -> list[Tensor]:
        extra = [one for tensors in self.extra.values() for one in tensors]
        return [*self.models, *extra, *([] if self.base is None else [self.base])]


@dataclass(frozen=True)
class _Case:
    """A method with options for a number of models."""

    method: MergeMethod
    options: dict[str, Any]
    count: int

    @property
    def name(self) -> str:
        return self.method.__name__

    def inputs(self, shape: tuple[int, ...], count: int | None = None, dtype: torch.dtype = torch.float32) -> _Inputs:
        """A base (where the method needs one), models around it, and what the method reads beside them."""
        generator = torch.Generator().manual_seed(0)
        base = torch.randn(shape, generator=generator, dtype=torch.float64)
        models = [
            base + 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
            for _ in range(count or self.count)
        ]
        extra: dict[str, list[Tensor]] = {}
        for key, declared in self.method.extra.items():
            if declared.shape == "weight":
                extra[key] = [torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1 for _ in models]
            else:
                rows = [
                    torch.randn(2 * shape[-1], shape[-1], generator=generator, dtype=torch.float64) for _ in models
                ]
                extra[key] = [one.T @ one for one in rows]
        return _Inputs(
            base.to(dtype) if self.method.base == "required" else None,
            [model.to(dtype) for model in models],
            {key: [one.to(dtype) for one in tensors] for key, tensors in extra.items()},
        )

    def merge(self, inputs: _Inputs, **options: Any) -> Tensor:
        return self.method(inputs.base, inputs.models, **inputs.extra, **{**self.options, **options})


def _options(method: MergeMethod, given: Mapping[str, Any], count: int) -> dict[str, Any]:
    known = {option.name: option for option in method.options.values()}
    unknown = [name for name in given if name not in known]
    if unknown:
        raise TypeError(f"`{method.__name__}` has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}.")
    options = dict(given)
    if "weight" in known and "weight" not in options:
        options["weight"] = [0.5, 0.3, 0.7]
    missing = [name for name, option in known.items() if option.required and name not in options]
    if missing:
        raise TypeError(f"`{method.__name__}` needs a value for {missing[0]!r}: pass it in `options`.")
    return {
        name: list(value)[:count] if isinstance(value, (list, tuple)) else value for name, value in options.items()
    }


def _check_docstring(method: MergeMethod) -> None:
    text = method.__doc__ or ""
    _require("Source:" in text, method.__name__, "has no `Source:` in its docstring: say where it comes from")
    undocumented = [option.name for option in method.options.values() if f"{option.name}:" not in text]
    undocumented += [name for name in method.extra if f"{name}:" not in text]
    _require(not undocumented, method.__name__, f"does not describe {undocumented} under `Args:` in its docstring")


def _check_result(case: _Case, shape: tuple[int, ...]) -> None:
    inputs = case.inputs(shape)
    before = [tensor.clone() for tensor in inputs.all()]
    try:
        merged = case.merge(inputs)
    except (RuntimeError, IndexError) as error:
        raise AssertionError(f"Merge method `{case.name}` fails on models of shape {list(shape)}: {error}") from error
    _require(merged.dtype == torch.float32, case.name, f"gives {merged.dtype} for models in torch.float32")
    _require(bool(torch.isfinite(merged).all()), case.name, "gives NaN or infinity for finite models")
    unchanged = all(torch.equal(one, other) for one, other in zip(before, inputs.all(), strict=True))
    _require(unchanged, case.name, "overwrites its inputs: the stream and the next pass read them again")
    _require(torch.equal(merged, case.merge(inputs)), case.name, "gives another result when it is called again")


def _check_identities(case: _Case, shape: tuple[int, ...]) -> None:
    promises, inputs = case.method.promises, case.inputs(shape)
    if promises.alone is not None and case.method.count[0] <= 1:
        single = case.inputs(shape, count=1)
        merged = case.method(single.base, single.models, **single.extra, **promises.alone)
        _require(_near(merged, single.models[0]), case.name, f"changes a model alone, with {dict(promises.alone)}")
    model = inputs.models[0] if inputs.base is None else inputs.base
    if promises.equal is not None or inputs.base is not None:
        what = "models that are all equal" if inputs.base is None else "models equal to the base"
        equal = _Inputs(inputs.base, [model.clone() for _ in inputs.models], inputs.extra)
        merged = case.merge(equal, **(promises.equal or {}))
        _require(_near(merged, model), case.name, f"changes {what}")
    if promises.any_order and case.count > 1:
        order = [*range(1, case.count), 0]
        options = {
            name: [value[i] for i in order] if isinstance(value, list) else value
            for name, value in case.options.items()
        }
        extra = {key: [tensors[i] for i in order] for key, tensors in inputs.extra.items()}
        merged = case.merge(_Inputs(inputs.base, [inputs.models[i] for i in order], extra), **options)
        _require(
            _near(merged, case.merge(inputs)),
            case.name,
            "depends on the order of the models; declare `Promises(any_order=False)` where that is meant",
        )


@dataclass(frozen=True)
class _Cut:
    """A tensor of all models, in pieces of what the method's unit allows."""

    whole: Whole
    step: int

    @property
    def numel(self) -> int:
        return self.whole.numel

    @property
    def count(self) -> int:
        return self.whole.count

    def placed(self) -> Iterator[Piece]:
        length = len(self.whole.models[0])
        width = self.numel // length
        for start in range(0, length, self.step):
            own = slice(start, start + self.step)
            extra = {key: one and [tensor[own] for tensor in one] for key, one in self.whole.extra.items()}
            base = None if self.whole.base is None else self.whole.base[own]
            yield Piece(start * width, base, [model[own] for model in self.whole.models], extra)

    def __iter__(self) -> Iterator[tuple[Tensor | None, list[Tensor]]]:
        for piece in self.placed():
            yield piece.base, piece.models

    def sample(self) -> Iterator[tuple[Tensor | None, list[Tensor]]]:
        yield from self


def _check_pieces(case: _Case, shape: tuple[int, ...]) -> None:
    """Pieces of 7 elements, or of 2 rows; a matrix is not cut."""
    if case.method.unit == "matrix":
        return
    inputs, columns = case.inputs(shape), shape[-1] if case.method.unit == "row" else 1
    cut = [tensor.reshape(-1, columns) if columns > 1 else tensor.reshape(-1) for tensor in inputs.models]
    base = None if inputs.base is None else inputs.base.reshape(cut[0].shape)
    extra = {key: [one.reshape(cut[0].shape) for one in tensors] for key, tensors in inputs.extra.items()}
    pieces = _Cut(Whole(base, cut, extra), 7 if columns == 1 else 2)
    noise = Noise(1, "tensor")
    parts = [kernels.tensor_of(one) for _, one in case.method.over(pieces, noise=noise, **case.options)]
    merged = torch.cat([one.reshape(-1) for one in parts])
    whole = case.merge(inputs, **({"noise": noise} if case.method.takes_noise else {}))
    _require(
        _near(merged.reshape(shape), whole),
        case.name,
        f'gives for pieces (unit="{case.method.unit}") what it does not give for the whole tensor: declare a larger '
        "unit, `statistics` for what holds for the whole tensor, or take random numbers from `noise`",
    )


def _check_fast_form(case: _Case) -> None:
    method = case.method
    if method.fast is None or kernels.LIBRARY is None:
        return
    for size in FAST_SIZES:
        for dtype in kernels.DTYPES:
            inputs = case.inputs((3, size) if method.unit == "row" else (size,), dtype=dtype.torch)
            base = None if inputs.base is None else in_float(inputs.base)
            options = _all_options(case, inputs.base, inputs.models)
            slow = method.function(base, [in_float(model) for model in inputs.models], **options)
            arrays = [kernels.array_of(model) for model in inputs.models]
            base_array = None if inputs.base is None else kernels.array_of(inputs.base)
            for kind, start, models in (("tensors", inputs.base, inputs.models), ("arrays", base_array, arrays)):
                fast = method.fast(start, models, **_all_options(case, start, models))
                where = f"for {kind} of {size} elements in {dtype}"
                _require(fast is not None, case.name, f"has a fast form that declines {where}")
                if fast is not None:
                    given = str(fast.dtype).removeprefix("torch.")
                    _require(given == "float32", case.name, f"has a fast form that gives {given}, {where}")
                    near = _near(kernels.tensor_of(fast), slow, 2e-6)
                    _require(near, case.name, f"has a fast form that gives something else, {where}")


def _all_options(case: _Case, base: Values | None, models: Sequence[Values]) -> dict[str, Any]:
    """The options of a case, with statistics of these models and with noise."""
    options = {**case.method.defaults, **case.options}
    if case.method.statistics is not None:
        options |= case.method.statistics(Whole(base, list(models)), **options)
    if case.method.takes_noise:
        options["noise"] = Noise(1, "tensor", 77)
    return options


def _check_coefficient_gradients(case: _Case) -> None:
    """Against central differences of a random linear function of the result, in float64."""
    inputs = case.inputs((6, 10), dtype=torch.float64)
    direction = torch.randn((6, 10), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for option in case.method.options.values():
        if not option.differentiable:
            continue
        value = case.options.get(option.name, option.default)
        single = not isinstance(value, list)
        numbers = [float(one) for one in ([value] if single else value)]

        def projected(values: Sequence[Any], name: str = option.name, single: bool = single) -> Tensor:
            merged = case.merge(inputs, **{name: values[0] if single else list(values)})
            return (merged * direction).sum()

        tensors = [torch.tensor(one, dtype=torch.float64, requires_grad=True) for one in numbers]
        found = projected(tensors)
        unused = [None] * len(tensors)
        slopes = torch.autograd.grad(found, tensors, allow_unused=True) if found.requires_grad else unused
        for i, slope in enumerate(slopes):
            up, down = ([one + (step if j == i else 0.0) for j, one in enumerate(numbers)] for step in (1e-6, -1e-6))
            expected = float(projected(up) - projected(down)) / 2e-6
            dropped = slope is None and abs(expected) > 1e-4
            _require(not dropped, case.name, f"drops the gradient of `{option.name}`, which is {expected:.6g}")
            got = 0.0 if slope is None else float(slope)
            _require(
                abs(got - expected) <= 1e-4 * max(1.0, abs(expected)),
                case.name,
                f"has the gradient {got:.6g} for `{option.name}`[{i}], but finite differences give {expected:.6g}",
            )


def _check_model_gradients(case: _Case) -> None:
    inputs = case.inputs((6, 10))
    for model in inputs.models:
        model.requires_grad_()
    merged = case.merge(inputs)
    _require(merged.requires_grad, case.name, "drops the gradients of the models")
    merged.square().sum().backward()
    finite = all(model.grad is not None and bool(torch.isfinite(model.grad).all()) for model in inputs.models)
    _require(finite, case.name, "gives a model no gradient, or one that is not finite")


def _near(one: Tensor, other: Tensor, tolerance: float = 2e-5) -> bool:
    """Equal to the rounding of float32, where sums take another order."""
    scale = max(1.0, float(other.abs().max()))
    return float((one.double() - other.double()).abs().max()) <= tolerance * scale


def _require(holds: bool, name: str, broken: str) -> None:
    if not holds:
        raise AssertionError(f"Merge method `{name}` {broken}.")
