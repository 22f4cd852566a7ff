"""The compiled kernels do what the Python beside them defines, on tensors of both dtypes and of awkward sizes."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from merging.tiny_models import family, load
from safetensors.torch import save_file

from hf_transfer_ext.merging import merge
from hf_transfer_ext.merging.arithmetic import kernels
from hf_transfer_ext.merging.arithmetic.changes import changes_of, weighted_sum
from hf_transfer_ext.merging.arithmetic.selection import Distances, order_statistics, smallest_of_largest, values_at
from hf_transfer_ext.merging.arithmetic.variance import energies_and_threshold, variance_of
from hf_transfer_ext.merging.methods import MERGE_METHODS
from hf_transfer_ext.merging.streaming import stream
from hf_transfer_ext.weights.dtypes import BF16, F16

needs_kernels = pytest.mark.skipif(kernels.LIBRARY is None, reason="the kernels are not built")
SIZES = [1, 15, 512, 513, 5000]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_they_are_built_where_there_is_a_compiler():
    assert kernels.LIBRARY is not None or shutil.which("cc") is None


def some(size, dtype=torch.float32, count=3):
    """A base and models near it; some changes are exactly 0, some equal in magnitude."""
    generator = torch.Generator().manual_seed(size)
    base = torch.randn(size, generator=generator).mul_(0.02).to(dtype)
    changes = [torch.randn(size, generator=generator).mul_(0.001) for _ in range(count)]
    return base, [(base.float() + change * (change.abs() > 2e-4)).to(dtype) for change in changes]


def by_torch(monkeypatch, function):
    """What the function gives without the kernels."""
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "LIBRARY", None)
        return function()


def same(one, two):
    assert one.dtype == two.dtype == torch.float32
    assert torch.allclose(one, two, rtol=1e-5, atol=1e-9)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_sums_variances_and_energies(size, dtype, monkeypatch):
    base, models = some(size, dtype)
    same(weighted_sum(models, [0.1, 2.0, -3.0]), by_torch(monkeypatch, lambda: weighted_sum(models, [0.1, 2.0, -3.0])))
    same(variance_of(models), by_torch(monkeypatch, lambda: variance_of(models)))
    found = energies_and_threshold(PiecesOf(base, models), select_topk=0.3)["threshold"]
    assert found in variance_of(models) or (found == float("inf") and size == 1)
    between = 0.99999 * found if found < float("inf") else 1.0  # the paths round variances that are equal differently
    kept = [change.double()[variance_of(models) >= between] for change in changes_of(base, models)]
    assert kernels.energies(base, models, between) == pytest.approx([float(one @ one) for one in kept], rel=1e-5)


class PiecesOf:
    """A base and models in pieces of 300 elements, with a sample of every seventh element."""

    def __init__(self, base, models):
        self.base, self.models, self.numel, self.count = base, models, base.numel(), len(models)

    def __iter__(self):
        for start in range(0, self.numel, 300):
            own = slice(start, start + 300)
            yield self.base[own], [model[own] for model in self.models]

    def sample(self):
        yield self.base[::7], [model[::7] for model in self.models]


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_order_statistics_of_distances(size, dtype):
    base, models = some(size, dtype)
    ranks = sorted({0, size // 100, size // 2, size * 99 // 100, size - 1})
    found = order_statistics(
        PiecesOf(base, models), lambda base, models: [Distances(model, base) for model in models], ranks
    )
    for one, model in zip(found, models, strict=True):
        assert one == (model.float() - base.float()).abs().sort().values[ranks].tolist()


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_first_that_is_not_finite(value, dtype):
    for size in SIZES:
        tensor = torch.ones(size, dtype=dtype)
        assert kernels.first_nonfinite(tensor) == -1
        for place in {0, size // 2, size - 1}:
            tensor = torch.ones(size, dtype=dtype)
            tensor[place] = value
            assert kernels.first_nonfinite(tensor) == place


def test_what_they_do_not_take():
    base, models = some(10)
    assert not kernels.can_take(base.double())
    assert not kernels.can_take(base.int())
    assert not kernels.can_take(base[::2])
    assert not kernels.can_take(base.clone().requires_grad_())
    assert not kernels.can_take(base, base[:5])
    assert not kernels.can_take(*[base] * (kernels.MAX_MODELS + 1))
    assert kernels.can_take(base, None, *models) == (kernels.LIBRARY is not None)


WITH_FAST_FORM = [name for name, method in MERGE_METHODS.items() if method.fast is not None]


@needs_kernels
@pytest.mark.parametrize("method", WITH_FAST_FORM)
def test_models_in_bfloat16(method, tmp_path, monkeypatch):
    """Held in memory, read again for each pass, or by torch alone: the same tensors."""
    base, tuned = family(tmp_path, dtype=torch.bfloat16)
    known = MERGE_METHODS[method]
    own = {name: 0.5 for name in ("weight", "density") if name in known.options}
    config = {
        "merge_method": method,
        "models": [{"model": one, "parameters": own} for one in tuned[: known.count[1]]],
        "parameters": {"t": 0.3} if method == "slerp" else {},
        "dtype": "float32",
        **({} if known.base == "none" else {"base_model": base}),
    }
    monkeypatch.setattr(stream, "STORED_PIECE", 64)
    merge(config, tmp_path / "held", threads=1)
    monkeypatch.setattr(stream, "HELD", 0)
    merge(config, tmp_path / "read again", threads=3)
    monkeypatch.setattr(kernels, "LIBRARY", None)
    merge(config, tmp_path / "torch", threads=1)
    held, again, torch_s = (load(tmp_path / name) for name in ("held", "read again", "torch"))
    for name, tensor in held.items():
        assert torch.equal(tensor, again[name]), name
        assert torch.allclose(tensor, torch_s[name], rtol=1e-5, atol=1e-6), name


@needs_kernels
def test_a_number_that_is_not_finite_is_named(tmp_path, monkeypatch):
    base, tuned = family(tmp_path, dtype=torch.bfloat16)
    tensors = load(tuned[1])
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors[name].view(-1)[200] = float("nan")
    save_file(tensors, f"{tuned[1]}/model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(stream, "STORED_PIECE", 64)  # so that it lies in a later piece
    models = [{"model": one, "parameters": {"weight": 1, "density": 0.5}} for one in tuned]
    config = {"merge_method": "ties", "base_model": base, "models": models, "dtype": "bfloat16"}
    with pytest.raises(ValueError, match=r"q_proj.weight' of model 2 .* first at element 200"):
        merge(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [1, 2, 700, 5000])
@pytest.mark.parametrize("kind", ["different", "equal", "special"])
def test_values_at_places(kind, size):
    random = np.random.default_rng(0)
    numbers = random.standard_normal(size, dtype=np.float32)
    if kind == "equal":
        numbers = (numbers * 2).round()
    if kind == "special":
        special = [0.0, -0.0, 1e-40, -1e-40, np.inf, -np.inf, 3e38, -3e38, 1.0, 1.0]
        numbers[: len(special)] = special[:size]
    assert values_at(numbers, range(size)) == np.sort(numbers).tolist()


def test_distances_that_are_0_can_be_told_apart_from_the_others():
    numbers = torch.tensor([0.0, 0.0, 3.0, 2.0, 1.0])
    pieces = PiecesOf(numbers, [numbers])
    assert smallest_of_largest(pieces, lambda base, models: [Distances(models[0])], 0.7) == 2.0


def patterns():
    """float32 numbers: random bits, all numbers of 16 bits, numbers between two of these, and extremes."""
    random = torch.randint(-(1 << 31), 1 << 31, (200_000,), generator=torch.Generator().manual_seed(0))
    of_16_bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    halves = [of_16_bits.view(torch.float16).float(), of_16_bits.view(torch.bfloat16).float()]
    near = [(one.view(torch.int32) + step).view(torch.float32) for one in halves for step in (-1, 1, 1 << 11, 1 << 12)]
    extremes = torch.tensor([0.0, -0.0, 65504.0, 65519.99, 65520.0, 2.0**-25, 2.0**-24, 3.4e38, float("inf")])
    return torch.cat([random.to(torch.int32).view(torch.float32), *halves, *near, extremes, -extremes])


@needs_kernels
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_conversions_round_as_torch_does(dtype):
    numbers = patterns()
    found = kernels.tensor_of(kernels.convert(numbers.numpy(), dtype))
    expected = numbers.to(dtype.torch)
    assert torch.equal(found.isnan(), expected.isnan())
    kept = ~expected.isnan()
    assert torch.equal(found.view(torch.int16)[kept], expected.view(torch.int16)[kept])
    stored = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype.torch)
    back = kernels.merge_changes(None, [kernels.array_of(stored)], [1.0])
    assert np.array_equal(back, stored.float().numpy(), equal_nan=True)
    assert np.array_equal(kernels.in_float32(kernels.array_of(stored)), stored.float().numpy(), equal_nan=True)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_scalar_products(size, dtype):
    base, models = some(size, dtype)
    rows = torch.stack([base, *models]).double()
    for vectors in ([base, *models], [kernels.array_of(one) for one in (base, *models)]):
        np.testing.assert_allclose(kernels.products(vectors), (rows @ rows.T).numpy(), rtol=1e-12)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_arrays_and_tensors_give_the_same(dtype):
    base, models = some(5000, dtype)
    arrays = [kernels.array_of(one) for one in (base, *models)]
    assert kernels.can_take(*arrays) and not kernels.can_take(arrays[0][::2])
    assert torch.equal(kernels.tensor_of(arrays[0]), base)
    for subtract in (False, True):
        of_tensors = kernels.merge_changes(base, models, [0.5, 0.3, -1.0], subtract=subtract)
        of_arrays = kernels.merge_changes(arrays[0], arrays[1:], [0.5, 0.3, -1.0], subtract=subtract)
        assert isinstance(of_arrays, np.ndarray) and torch.equal(torch.from_numpy(of_arrays), of_tensors)
    assert np.array_equal(kernels.variances(arrays), kernels.variances([base, *models]).numpy())
