import math

import pytest
import torch

from hf_transfer_ext.losses.unlearning import jensun, retain_jsd


def test_it_equals_the_definition():
    torch.manual_seed(0)
    logits, reference = torch.randn(2, 3, 5, dtype=torch.float64)
    expected = []
    for z, r in zip(logits.tolist(), reference.tolist(), strict=True):
        p = [math.exp(x) / sum(map(math.exp, z)) for x in z]
        q = [math.exp(x) / sum(map(math.exp, r)) for x in r]
        m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        expected.append(
            sum(0.5 * a * math.log(a / c) + 0.5 * b * math.log(b / c) for a, b, c in zip(p, q, m, strict=True))
        )
    assert retain_jsd(logits, reference).tolist() == pytest.approx(expected, rel=1e-10)


def test_identities():
    logits, other = torch.randn(2, 3, 5, dtype=torch.float64)
    assert retain_jsd(logits, logits).tolist() == pytest.approx([0.0] * 3, abs=1e-12)
    torch.testing.assert_close(retain_jsd(logits, other), retain_jsd(other, logits))
    certain = torch.zeros(1, 5, dtype=torch.float64)
    certain[0, 2] = 500.0
    torch.testing.assert_close(retain_jsd(logits[:1], certain), jensun(logits[:1], torch.tensor([2])))
