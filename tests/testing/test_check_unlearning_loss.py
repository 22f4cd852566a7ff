"""Every registered loss passes the contract check, and each promise of it catches a loss that breaks it."""

import pytest
import torch

from hf_transfer_ext.losses.needs import averaged_over
from hf_transfer_ext.losses.unlearning import RETAIN_LOSSES, UNLEARNING_LOSSES
from hf_transfer_ext.testing import check_unlearning_loss

REGISTERED = [loss for registry in (UNLEARNING_LOSSES, RETAIN_LOSSES) for _, loss in registry.items()]


@pytest.mark.parametrize("loss", REGISTERED, ids=lambda loss: loss.__name__)
def test_registered_losses_keep_the_contract(loss):
    check_unlearning_loss(loss)


@averaged_over("tokens")
def bounded_ascent(log_probs, *, power=1.0):
    """Probability of each token, to a power. Source: this test."""
    if not power > 0:
        raise ValueError(f"`power` must be > 0, got {power}.")
    return (power * log_probs).exp()


def test_a_loss_of_somebody_elses_passes():
    check_unlearning_loss(bounded_ascent)
    check_unlearning_loss(bounded_ascent, seed=3)


def sourced(loss):
    loss.__doc__ = "Source: this test."
    return loss


@averaged_over("tokens")
@sourced
def unknown_argument(log_probs, entropy):
    return log_probs


@sourced
def unmarked(log_probs):
    return log_probs


@averaged_over("tokens")
def without_source(log_probs):
    """Says nothing of where it comes from."""
    return log_probs


@averaged_over("sequences")
@sourced
def wrong_unit(log_probs):
    return log_probs


@averaged_over("tokens")
@sourced
def averaged_already(log_probs):
    return log_probs.mean()


@averaged_over("tokens")
@sourced
def not_finite(log_probs):
    return (1 + log_probs.clamp(min=0)).log() / log_probs.clamp(min=0)


@averaged_over("tokens")
@sourced
def overflows(log_probs, reference_log_probs):
    return torch.log(1 + torch.exp(reference_log_probs - log_probs))


@averaged_over("tokens")
@sourced
def always_float32(log_probs):
    return log_probs.float()


@averaged_over("tokens")
@sourced
def loses_precision(log_probs):
    return (log_probs + 1e7) - 1e7


@averaged_over("tokens")
@sourced
def in_place(log_probs):
    return log_probs.mul_(2.0)


@averaged_over("tokens")
@sourced
def random(log_probs):
    return log_probs * torch.rand(())


@averaged_over("tokens")
@sourced
def by_position(log_probs):
    return log_probs * torch.arange(len(log_probs)).to(log_probs)


@averaged_over("sequences")
@sourced
def by_the_batch(nll):
    return nll / nll.sum().clamp(min=1e-9)


@averaged_over("tokens")
@sourced
def detached(log_probs):
    return log_probs.detach()


@averaged_over("tokens")
@sourced
def without_effect(log_probs):
    return 0.0 * log_probs


@averaged_over("tokens")
@sourced
def gradient_of_a_root(logits):
    probability = torch.softmax(logits, -1)[:, 0]
    return torch.sqrt(probability)


@averaged_over("tokens")
@sourced
def needs_one(log_probs):
    return log_probs - 0.0 * log_probs[0]


@averaged_over("tokens")
@sourced
def unchecked(log_probs, *, beta=1.0):
    return beta * log_probs


@pytest.mark.parametrize(
    "loss, message",
    [
        (unknown_argument, "asks for 'entropy', which the trainer cannot provide"),
        (unmarked, "has to be marked"),
        (without_source, "name its source"),
        (wrong_unit, r"averaged over sequences, so 4 answers of 11 tokens have to give the shape \(4,\); got \(11,\)"),
        (averaged_already, r"the shape \(11,\); got \(\)"),
        (not_finite, "values have to be finite"),
        (overflows, "a hundred times as large"),
        (always_float32, "has to compute in float64"),
        (loses_precision, "in float32 it gives"),
        (in_place, "changes its argument 'log_probs' in place"),
        (random, "other values for the same arguments"),
        (by_position, "in another order"),
        (by_the_batch, "depends on the other answers"),
        (detached, "is everything detached"),
        (without_effect, "trains nothing"),
        (gradient_of_a_root, "gradient of logits is not finite on extreme input"),
        (needs_one, "an empty batch gives an error"),
        (unchecked, "accepts beta=nan"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_broken_loss_is_caught(loss, message):
    with pytest.raises(AssertionError, match=message):
        check_unlearning_loss(loss)
