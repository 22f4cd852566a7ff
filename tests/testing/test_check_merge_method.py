"""The contract check passes for a sound method of outside code, and catches methods that break a promise."""

from __future__ import annotations

import pytest
import torch
from merging.method_cases import OPTIONS

from hf_transfer_ext.merging import MERGE_METHODS
from hf_transfer_ext.merging.arithmetic import kernels
from hf_transfer_ext.merging.method import Extra, Promises, for_each, merge_method
from hf_transfer_ext.merging.types import Coefficient, PerModelCoefficient
from hf_transfer_ext.testing import check_merge_method


def sound(base, models, *, weight: PerModelCoefficient, lambda_: Coefficient = 1.0):
    """theta_0 + lambda sum_i w_i t_i.

    Args:
        weight: w_i.
        lambda_: Strength.

    Source: this test
    """
    return base + lambda_ * sum(w * (model - base) for w, model in zip(for_each(weight, models), models, strict=True))


def variant(body, *, doc=sound.__doc__, **declared):
    """A method with the signature of `sound` and another body."""

    def broken(base, models, *, weight: PerModelCoefficient, lambda_: Coefficient = 1.0):
        return body(base, models, weight, lambda_)

    broken.__doc__ = doc
    return merge_method(**declared)(broken)


def plus(base, models, weight, lambda_):
    return sound(base, models, weight=weight, lambda_=lambda_)


@pytest.mark.parametrize("name", MERGE_METHODS)
@pytest.mark.parametrize("count", [1, 2])
def test_every_registered_method_with_fewer_models(name, count):
    check_merge_method(MERGE_METHODS[name], options=OPTIONS[name], count=count)


def test_a_sound_method_of_other_code():
    check_merge_method(merge_method(promises=Promises(alone={"weight": 1.0}))(sound))


def test_extra_tensors():
    def scaled(base, models, *, importance):
        """Source: this test

        importance: Read beside the weights.
        """
        return sum(one * model for one, model in zip(importance, models, strict=True)) / sum(importance)

    check_merge_method(merge_method(base="none", extra={"importance": Extra()}, promises=Promises(equal={}))(scaled))


def in_place(base, models, weight, lambda_):
    return models[0].mul_(1.5)


def global_norm(base, models, weight, lambda_):
    changed = plus(base, models, weight, lambda_) - base
    return base + changed / (1 + changed.norm())


def first_counts_double(base, models, weight, lambda_):
    return plus(base, models, weight, lambda_) + (models[0] - base)


def by_numbers(base, models, weight, lambda_):
    return plus(base, models, [float(w) for w in for_each(weight, models)], lambda_)


def wrong_slope(base, models, weight, lambda_):
    return base + (plus(base, models, weight, lambda_) - base) * (2.0 if torch.is_tensor(lambda_) else 1.0)


BROKEN = {
    "has no `Source:`": variant(plus, doc="A method."),
    "does not describe .*lambda_": variant(plus, doc="weight: w. Source: this test"),
    "overwrites its inputs": variant(in_place),
    r"fails on models of shape \[6, 10\]": variant(lambda *arguments: plus(*arguments).reshape(-1)[:1]),
    "NaN or infinity": variant(lambda *arguments: plus(*arguments) / 0),
    r"gives torch\.float64": variant(lambda *arguments: plus(*arguments).double()),
    "another result when it is called again": variant(lambda *arguments: plus(*arguments) + torch.rand(())),
    "changes a model alone": variant(plus, promises=Promises(alone={"weight": 0.5})),
    "changes models equal to the base": variant(lambda *arguments: plus(*arguments) + 1),
    "depends on the order": variant(first_counts_double),
    "pieces .*declare a larger unit": variant(global_norm),
    "fast form that gives something else": variant(plus, fast=lambda base, models, **options: base.float()),
    "fast form that declines": variant(plus, fast=lambda base, models, **options: None),
    "drops the gradient of `weight`": variant(by_numbers),
    "finite differences give": variant(wrong_slope),
    "drops the gradients of the models": variant(lambda b, m, w, s: plus(b, [x.detach() for x in m], w, s)),
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_promises_are_named(message):
    if "fast form" in message and kernels.LIBRARY is None:
        pytest.skip("the kernels are not built")
    with pytest.raises(AssertionError, match=message):
        check_merge_method(BROKEN[message])


def test_what_is_not_a_merge_method():
    with pytest.raises(AssertionError, match=r"`sound` is not a merge method: decorate .*@merge_method"):
        check_merge_method(sound)


def test_options_that_it_needs():
    def shrink(base, models, *, by: float):
        """Source: this test. by: Factor."""
        return base + by * (models[0] - base)

    method = merge_method(count=(1, 1))(shrink)
    with pytest.raises(TypeError, match="needs a value for 'by'"):
        check_merge_method(method)
    with pytest.raises(TypeError, match="has no option 'bye'"):
        check_merge_method(method, options={"bye": 1.0})
    check_merge_method(method, options={"by": 0.5})
