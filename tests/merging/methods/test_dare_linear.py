"""dare_linear: masks of the right share, the same for every piece, rescaled to keep the expectation."""

from __future__ import annotations

import torch
from merging.method_cases import close, per_element, tensors

from hf_transfer_ext.merging import MERGE_METHODS
from hf_transfer_ext.merging.arithmetic.noise import Noise

dare_linear = MERGE_METHODS["dare_linear"]


def test_definition_given_the_masks():
    base, models = tensors()
    noise = Noise(3, "x")
    masks = [noise.keep(i, base, 0.4) for i in range(3)]

    def oracle(start, a, b, c, *keep):
        parts = zip((0.5, 0.3, 0.7), (a, b, c), keep, strict=True)
        return start + sum(w * (value - start) * kept / 0.4 for w, value, kept in parts)

    merged = dare_linear(base, models, weight=[0.5, 0.3, 0.7], density=0.4, noise=noise)
    close(merged, per_element(oracle, base, *models, *masks))


def test_by_hand():
    base, model = torch.zeros(1000), torch.ones(1000)
    merged = dare_linear(base, [model], weight=1, density=0.25)
    assert set(merged.tolist()) == {0.0, 4.0}
    merged = dare_linear(base, [model], weight=1, density=0.25, rescale=False)
    assert set(merged.tolist()) == {0.0, 1.0}


def test_expectation_and_share():
    base, model = torch.zeros(200_000), torch.ones(200_000)
    merged = dare_linear(base, [model], weight=1, density=0.3)
    assert abs(float(merged.mean()) - 1) < 0.015  # 4 standard deviations
    assert abs(float((merged > 0).float().mean()) - 0.3) < 0.005


def test_density_one_is_task_arithmetic_and_zero_the_base():
    base, models = tensors()
    task_arithmetic = MERGE_METHODS["task_arithmetic"]
    assert torch.equal(dare_linear(base, models, weight=0.5), task_arithmetic(base, models, weight=0.5))
    assert torch.equal(dare_linear(base, models, weight=0.5, density=0.0), base)
