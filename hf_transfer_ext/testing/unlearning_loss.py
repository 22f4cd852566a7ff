"""The contract of an unlearning or retain loss, as a check that code outside the package can call on its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_transfer_ext.losses.needs import (
    NEEDS,
    UNITS,
    check_loss,
    needs_of,
    options_of,
    unit_of,
)

#: Answer lengths of the example batch: single tokens, several, and two of the same length.
LENGTHS = (3, 1, 4, 3)


def check_unlearning_loss(loss: Callable, *, seed: int = 0) -> None:
    """Check that a loss keeps what the trainer relies on; needs no model, and takes milliseconds.

    - Its arguments are needs that the trainer can provide (`losses.needs.NEEDS`) or options with defaults, and it is
      marked with `averaged_over`.
    - Its docstring names its source (`Source: ...`).
    - It gives one finite value for each unit, and computes in float64 what it computes in float32.
    - The value of one answer depends neither on the order of the answers nor on the others in the batch.
    - A finite gradient reaches the trained model, also from extreme inputs, and is not zero everywhere.
    - It accepts an empty batch, changes none of its arguments, and gives the same value for the same arguments.
    - It refuses NaN for each of its number options with a `ValueError`: options are checked, not just used.

    Args:
        loss: The loss, decorated with `averaged_over`.
        seed: Of the random example batch.

    Raises:
        AssertionError: The first promise that the loss breaks, with what was found.

    Example:
        >>> @averaged_over("tokens")
        ... def my_loss(log_probs):
        ...     "Bounded ascent. Source: this work."
        ...     return log_probs.exp()
        >>> check_unlearning_loss(my_loss)
    """
    name = getattr(loss, "__name__", repr(loss))
    try:
        check_loss(loss)
    except ValueError as error:
        raise AssertionError(str(error)) from error
    _promise("Source:" in (inspect.getdoc(loss) or ""), name, "its docstring has to name its source: `Source: ...`")

    arguments = _batch(loss, LENGTHS, seed)
    _check_values(loss, name, arguments)
    _check_independence(loss, name, arguments)
    _check_gradient(loss, name, arguments)
    _check_empty(loss, name, seed)
    _check_options(loss, name, arguments)


def _promise(kept: bool, name: str, what: str) -> None:
    if not kept:
        raise AssertionError(f"The loss {name!r} breaks its contract: {what}.")


def _batch(loss: Callable, lengths: Sequence[int], seed: int) -> dict[str, Tensor]:
    """Example arguments in float64 for answers of these lengths."""
    sizes = {"tokens": sum(lengths), "sequences": len(lengths), "vocab": 11, "hidden": 5}
    sizes |= {"clusters": 3, "shortlist": 3}
    generator = torch.Generator().manual_seed(seed)
    arguments = {need.name: need.example(sizes, generator) for need in needs_of(loss)}
    if "lengths" in arguments:
        arguments["lengths"] = torch.tensor(lengths, dtype=torch.float64)
    return arguments


def _rows(axis: str, order: Sequence[int]) -> list[int]:
    """Places of the answers in `order` (indices into `LENGTHS`) along an axis of tokens or sequences."""
    if axis == "sequences":
        return list(order)
    starts = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
    return [starts[i] + k for i in order for k in range(LENGTHS[i])]


def _chosen(loss: Callable, arguments: dict[str, Tensor], order: Sequence[int]) -> dict[str, Tensor]:
    axes = {need.name: need.axes[0] for need in needs_of(loss)}
    return {
        name: value[_rows(axes[name], order)] if axes[name] in UNITS else value for name, value in arguments.items()
    }


def _in_float32(arguments: dict[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
    """The arguments in float32, larger by a factor; ids, counts and shares have to stay what they are."""
    scales = {name: 1.0 if NEEDS[name].values in ("count", "share") else scale for name in arguments}
    return {
        name: (value * scales[name]).float() if value.is_floating_point() else value
        for name, value in arguments.items()
    }


def _check_values(loss: Callable, name: str, arguments: dict[str, Tensor]) -> None:
    before = {key: value.clone() for key, value in arguments.items()}
    values = loss(**arguments)
    unit = unit_of(loss)
    count = len(LENGTHS) if unit == "sequences" else sum(LENGTHS)
    shape = tuple(getattr(values, "shape", ()))
    _promise(
        isinstance(values, Tensor) and shape == (count,),
        name,
        f"it is averaged over {unit}, so {len(LENGTHS)} answers of {sum(LENGTHS)} tokens have to give the shape "
        f"({count},); got {shape}",
    )
    changed = [key for key, value in arguments.items() if not torch.equal(value, before[key])]
    _promise(not changed, name, f"it changes its argument {changed and changed[0]!r} in place")
    _promise(bool(values.isfinite().all()), name, f"its values have to be finite, got {values.tolist()}")
    _promise(torch.equal(values, loss(**arguments)), name, "it gives other values for the same arguments")
    _promise(
        values.dtype == torch.float64,
        name,
        f"with float64 arguments it has to compute in float64, got {values.dtype}",
    )
    short = loss(**_in_float32(arguments))
    _promise(
        torch.allclose(short.double(), values, rtol=1e-4, atol=1e-4),
        name,
        f"in float32 it gives {short.tolist()} and in float64 {values.tolist()}",
    )
    wide = loss(**_in_float32(arguments, 100.0))
    _promise(
        bool(wide.isfinite().all()),
        name,
        f"with arguments a hundred times as large its values in float32 are {wide.tolist()}: use log_softmax, "
        "logsigmoid, softplus or logaddexp instead of logarithms of exponentials",
    )


def _check_independence(loss: Callable, name: str, arguments: dict[str, Tensor]) -> None:
    values = loss(**arguments)
    unit = UNITS[unit_of(loss)]
    for order, what in (
        ([2, 0, 3, 1], "in another order its answers get other values"),
        ([2, 0], "the value of an answer depends on the other answers in the batch"),
    ):
        found = loss(**_chosen(loss, arguments, order))
        _promise(torch.allclose(found, values[_rows(unit, order)], rtol=1e-9, atol=1e-9), name, what)


def _check_gradient(loss: Callable, name: str, arguments: dict[str, Tensor]) -> None:
    differentiable = [need.name for need in needs_of(loss) if need.differentiable]
    for scale, which in ((1.0, "random"), (100.0, "extreme")):
        inputs = _in_float32(arguments, scale)
        for key in differentiable:
            inputs[key].requires_grad_(True)
        total = loss(**inputs).sum()
        _promise(
            total.requires_grad,
            name,
            f"no gradient reaches {', '.join(differentiable)}: is everything detached?",
        )
        total.backward()
        found = {key: inputs[key].grad for key in differentiable}
        gradients = {key: gradient for key, gradient in found.items() if gradient is not None}
        for key, gradient in gradients.items():
            _promise(bool(gradient.isfinite().all()), name, f"the gradient of {key} is not finite on {which} input")
        if scale == 1.0:
            moves = any(bool(gradient.abs().sum() > 0) for gradient in gradients.values())
            _promise(moves, name, f"its gradient is zero for all of {', '.join(differentiable)}: it trains nothing")


def _check_empty(loss: Callable, name: str, seed: int) -> None:
    arguments = _batch(loss, (), seed)
    try:
        values = loss(**arguments)
    except (RuntimeError, IndexError, ValueError, ZeroDivisionError) as error:
        raise AssertionError(
            f"The loss {name!r} breaks its contract: an empty batch gives an error: {error}"
        ) from error
    _promise(tuple(values.shape) == (0,), name, f"an empty batch has to give no values, got shape {values.shape}")


def _check_options(loss: Callable, name: str, arguments: dict[str, Tensor]) -> None:
    for option, default in options_of(loss).items():
        if not _is_number(default):
            continue
        try:
            loss(**arguments, **{option: float("nan")})
        except ValueError:
            continue
        _promise(
            False,
            name,
            f"it accepts {option}=nan: check the range of options, by `require_at_least` or `require_finite` of "
            "`hf_transfer_ext.losses.needs`, and raise a ValueError",
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
