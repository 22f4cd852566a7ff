"""The fast forms that methods declare give what the torch of the methods gives, on awkward tensors of both dtypes."""

from __future__ import annotations

import pytest
import torch
from merging.method_cases import OPTIONS

from hf_transfer_ext.merging import MERGE_METHODS
from hf_transfer_ext.merging.arithmetic import kernels
from hf_transfer_ext.merging.arithmetic.noise import Noise

pytestmark = pytest.mark.skipif(kernels.LIBRARY is None, reason="the kernels are not built")

SIZES = [1, 15, 512, 513, 5000]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WITH_FAST_FORM = [name for name, method in MERGE_METHODS.items() if method.fast is not None]

#: Options in which a method does something else than with `OPTIONS`.
MORE = {
    "linear": [{"normalize": False}],
    "slerp": [{"t": 0.0}],
    "task_arithmetic": [{"normalize": True}, {"weight": 0.0, "normalize": True}],
    "ties": [{"normalize": False, "lambda_": 0.7}, {"rescale": True}, {"density": [1.0, 0.0, 0.001]}],
    "breadcrumbs": [{"normalize": True}, {"rescale": True}, {"density": 0.0}],
    "breadcrumbs_ties": [{"normalize": True}, {"gamma": 0.0, "density": 0.9}],
    "dare_linear": [{"density": [0.0, 1.0, 0.3]}, {"rescale": False, "normalize": True}],
    "dare_ties": [{"density": [0.0, 1.0, 0.3]}, {"rescale": False, "normalize": True}],
    "della": [{"density": [0.0, 1.0, 0.5]}, {"rescale": False, "normalize": False, "lambda_": 2.0}],
    "della_linear": [{"density": [0.0, 1.0, 0.5]}, {"rescale": False, "normalize": True}],
    "sce": [{"select_topk": 1.0}, {"select_topk": 0.0}],
}
CASES = [(name, more) for name in WITH_FAST_FORM for more in ({}, *MORE.get(name, []))]


def some(shape, dtype, count):
    """A base and models near it; some changes are exactly 0, and a row has none."""
    generator = torch.Generator().manual_seed(shape[-1])
    base = torch.randn(shape, generator=generator).mul_(0.02).to(dtype)
    models = []
    for _ in range(count):
        change = torch.randn(shape, generator=generator).mul_(0.001)
        change[-1] = 0.0 if change.dim() > 1 else change[-1]
        models.append((base.float() + change * (change.abs() > 2e-4)).to(dtype))
    return base, models


def both_forms(monkeypatch, name, base, models, options):
    """The method's result by its fast form, and by its torch."""
    method, called = MERGE_METHODS[name], []

    def spied(*tensors, fast=method.fast, **options):
        called.append(1)
        return fast(*tensors, **options)

    monkeypatch.setattr(method, "fast", spied)
    fast = method(base, models, **options)
    assert called
    monkeypatch.setattr(method, "fast", None)
    return fast, method(base, models, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("name", "more"), CASES)
def test_equal_to_the_torch_of_the_method(name, more, size, dtype, monkeypatch):
    method = MERGE_METHODS[name]
    shape = (3, size) if method.unit == "row" else (size,)
    base, models = some(shape, dtype, method.count[1] or 3)
    options = OPTIONS[name] | more
    if method.takes_noise:
        options["noise"] = Noise(3, "some.weight", 1000)
    fast, slow = both_forms(monkeypatch, name, base, models, options)
    assert fast.dtype == slow.dtype == torch.float32
    assert torch.allclose(fast, slow, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("columns", [1, 2, 63, 300, 896, 4864, 9000])
def test_long_rows_are_ranked_alike(columns, monkeypatch):
    base, models = some((3, columns), torch.bfloat16, 1)
    options = {"weight": 1.0, "density": 0.4, "epsilon": 0.3, "noise": Noise(1, "w", 77)}
    fast, slow = both_forms(monkeypatch, "della_linear", base, models, options)
    assert torch.equal(fast, slow)


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_random_words_that_end_in_the_piece_are_left_to_torch(name, monkeypatch):
    """After 2**32 elements another sequence begins, so the numbers of a piece there lie in two."""
    base, models = some((4, 25), torch.float32, 3)
    noise = Noise(0, "w", (1 << 32) - 30)
    fast, slow = both_forms(monkeypatch, name, base, models, OPTIONS[name] | {"noise": noise})
    assert noise.counter(100) is None and noise.counter(30) == (1 << 32) - 30
    assert torch.equal(fast, slow)


@pytest.mark.parametrize("name", WITH_FAST_FORM)
def test_not_used_where_something_wants_a_gradient(name, monkeypatch):
    method = MERGE_METHODS[name]
    base, models = some((4, 25), torch.float32, method.count[1] or 3)

    def refuse(*tensors, **options):
        raise AssertionError("the fast form has no gradients")

    monkeypatch.setattr(method, "fast", refuse)
    wanting = [models[0].clone().requires_grad_(), *models[1:]]
    assert method(base, wanting, **OPTIONS[name]).requires_grad
    if "lambda" in method.options:
        strength = torch.tensor(0.5, requires_grad=True)
        assert method(base, models, **OPTIONS[name] | {"lambda_": strength}).requires_grad
