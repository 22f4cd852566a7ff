import pytest
import torch

from hf_transfer_ext.losses.autoencoder import fitted, rebuilt_by


def states(count=400, seed=0, hidden=16):
    """States on two lines of their own, far from 0, and a little noise."""
    draw = torch.Generator().manual_seed(seed)
    lines = torch.randn(2, hidden, generator=torch.Generator().manual_seed(100 + seed))
    return 30 * torch.randn(count, 2, generator=draw) @ lines + torch.randn(count, hidden, generator=draw)


def errors(x, weights, name):
    return (x - rebuilt_by(x, weights, name)).square().sum(-1) / x.square().sum(-1).mean()


def test_it_rebuilds_its_own_set_and_not_another_one():
    weights = fitted(states(), "forget", steps=400)
    assert errors(states(), weights, "forget").mean() < 0.15
    assert errors(states(seed=1), weights, "forget").mean() > 0.6


def test_rebuilding_equals_the_definition_by_loops():
    x = states(3).double()
    weights = fitted(states(), "retain", sizes=(6, 5, 2), steps=2)
    own = {name: tensor.double() for name, tensor in weights.items()}

    def linear(values, layer):
        matrix, bias = own[f"retain_{layer}"], own[f"retain_{layer}_bias"]
        return [sum(matrix[i, j] * v for j, v in enumerate(values)) + bias[i] for i in range(len(bias))]

    def gelu(values):
        return [v * 0.5 * (1 + torch.erf(v / 2**0.5)) for v in values]

    scale = own["retain_scale"]
    for row, found in zip(x, rebuilt_by(x, weights, "retain"), strict=True):
        code = linear(gelu(linear(gelu(linear(list(row / scale), "in")), "down")), "code")
        out = linear(gelu(linear(gelu(linear(code, "up")), "out_wide")), "out")
        torch.testing.assert_close(torch.stack(out) * scale, found)


def test_the_same_seed_gives_the_same_weights_and_the_scale_does_not_matter():
    first, again = (fitted(states(), "forget", steps=3) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    larger = fitted(8 * states(), "forget", steps=3)
    torch.testing.assert_close(rebuilt_by(8 * states(), larger, "forget"), 8 * rebuilt_by(states(), first, "forget"))


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="no hidden states of the forget set"):
        fitted(torch.zeros(0, 4), "forget")
    with pytest.raises(ValueError, match="No autoencoder was fitted to the retain set"):
        rebuilt_by(torch.zeros(1, 4), {}, "retain")
