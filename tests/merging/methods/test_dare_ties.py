"""dare_ties: the masks of dare_linear, the election of ties."""

from __future__ import annotations

import pytest
import torch
from merging.method_cases import close, elected, tensors

from hf_transfer_ext.merging import MERGE_METHODS
from hf_transfer_ext.merging.arithmetic.noise import Noise

dare_ties = MERGE_METHODS["dare_ties"]


@pytest.mark.parametrize("normalize", [True, False])
def test_definition_given_the_masks(normalize):
    base, models = tensors()
    noise = Noise(3, "x")
    changes = [(m - base).double() * noise.keep(i, base, 0.4) / 0.4 for i, m in enumerate(models)]
    oracle = elected(base, changes, [0.5, 0.3, 0.7], normalize, 0.8)
    options = {"weight": [0.5, 0.3, 0.7], "density": 0.4, "normalize": normalize, "lambda_": 0.8, "noise": noise}
    close(dare_ties(base, models, **options), oracle)


def test_by_hand():
    base, models = torch.zeros(3), [torch.tensor([1.0, -2.0, 3.0]), torch.tensor([-3.0, 1.0, 1.0])]
    assert dare_ties(base, models, weight=1).tolist() == [-3.0, -2.0, 4.0]
