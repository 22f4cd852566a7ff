"""What a merge method declares is checked, and gradients reach coefficients and models."""

from __future__ import annotations

import pytest
import torch
from merging.method_cases import OPTIONS, extra_of, tensors

from hf_transfer_ext.merging import MERGE_METHODS
from hf_transfer_ext.merging.method import Extra, for_each, gives, merge_method

#: Methods whose gradient with respect to the models is not that of the whole result: wudi takes Adam's steps as given.
NOT_EXACT = {"wudi"}


def case_of(name, dtype=torch.float64):
    """A base or None, models and options for a method."""
    method = MERGE_METHODS[name]
    base, models = tensors(method.count[1] or 3)
    extra = {key: [one.to(dtype) for one in values] for key, values in extra_of(method, models).items()}
    base = base.to(dtype) if method.base == "required" else None
    return base, [model.to(dtype) for model in models], OPTIONS[name] | extra


@pytest.mark.parametrize("name", MERGE_METHODS)
def test_gradients_of_the_models(name):
    """Against central differences along a direction for each model, in float64."""
    base, models, options = case_of(name)
    method = MERGE_METHODS[name]
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(models[0].shape, generator=generator, dtype=torch.float64)
    wanting = [model.clone().requires_grad_() for model in models]
    (method(base, wanting, **options) * weights).sum().backward()
    for i, model in enumerate(wanting):
        direction = torch.randn(model.shape, generator=generator, dtype=torch.float64)
        ends = []
        for step in (1e-6, -1e-6):
            moved = [one + (step * direction if j == i else 0.0) for j, one in enumerate(models)]
            ends.append(float((method(base, moved, **options) * weights).sum()))
        expected, found = (ends[0] - ends[1]) / 2e-6, float((model.grad * direction).sum())
        if name not in NOT_EXACT:
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-4), i
        assert torch.isfinite(model.grad).all()


def test_wudi_takes_the_steps_of_adam_as_given():
    """The gradient is that of the sum of changes: one everywhere for the sum of the result."""
    base, models, options = case_of("wudi")
    models[0].requires_grad_()
    MERGE_METHODS["wudi"](base, models, **options).sum().backward()
    assert torch.equal(models[0].grad, torch.ones_like(models[0]))


@pytest.mark.parametrize("name", MERGE_METHODS)
def test_gradients_where_nothing_changed(name):
    """Directions of vectors of length 0 have no slope; what comes is finite, so that training can go on."""
    base, models, options = case_of(name)
    start = models[0] if base is None else base
    wanting = [start.clone().requires_grad_() for _ in models]
    spectral = MERGE_METHODS[name].unit == "matrix" and base is not None and name != "wudi"
    merged = MERGE_METHODS[name](base, wanting, **options)
    if not merged.requires_grad or spectral:  # singular vectors of 0 are arbitrary, and have no slope at all
        return
    merged.sum().backward()
    assert all(one.grad is None or torch.isfinite(one.grad).all() for one in wanting)


@pytest.mark.parametrize("name", ["linear", "task_arithmetic", "ties", "multislerp", "fisher"])
def test_weights_as_one_tensor_can_be_learned(name):
    base, models, options = case_of(name, torch.float32)
    weight = torch.tensor([0.5, 0.3, 0.7], requires_grad=True)
    MERGE_METHODS[name](base, models, **options | {"weight": weight}).square().sum().backward()
    assert weight.grad.abs().min() > 0
    apart = [one.detach().clone().requires_grad_() for one in weight]
    MERGE_METHODS[name](base, models, **options | {"weight": apart}).square().sum().backward()
    assert torch.allclose(weight.grad, torch.stack([one.grad for one in apart]))


def test_options_without_a_gradient_are_refused():
    base, models, _ = case_of("ties")
    density = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(TypeError, match=r"'density' of `ties` has no gradient.*lambda_, weight"):
        MERGE_METHODS["ties"](base, models, weight=1.0, density=[density] * 3)


class TestDeclarations:
    def test_first_arguments(self):
        with pytest.raises(TypeError, match=r"must begin with the arguments \(base, models\), got \(models, base\)"):
            merge_method()(lambda models, base: base)

    def test_options_are_keyword_only(self):
        with pytest.raises(TypeError, match=r"'weight' of .* must be keyword-only"):
            merge_method()(lambda base, models, weight: base)

    def test_statistics_arrive_somewhere(self):
        statistics = gives("threshold")(lambda pieces, **options: {"threshold": 1.0})
        with pytest.raises(TypeError, match="declares 'threshold', but has no keyword argument"):
            merge_method(statistics=statistics)(lambda base, models: base)

    def test_square_extra_tensors_need_whole_matrices(self):
        with pytest.raises(TypeError, match='unit="matrix"'):
            merge_method(extra={"gram": Extra("columns")})(lambda base, models, *, gram: base)

    def test_the_registry_takes_merge_methods_only(self):
        def plain(base, models):
            return base

        with pytest.raises(ValueError, match=r"'plain' is not a merge method: put `@merge_method\(\.\.\.\)` between"):
            MERGE_METHODS.register(plain)
        assert "plain" not in MERGE_METHODS


def test_one_value_for_each_model():
    assert for_each(2, 3) == [2.0] * 3
    weight = torch.tensor(2.0)
    assert for_each([weight, 1], 2)[0] is weight
    with pytest.raises(ValueError, match="got 2 values for 3 models"):
        for_each([1, 2], 3)
