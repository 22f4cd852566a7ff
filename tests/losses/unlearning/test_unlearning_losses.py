"""What every unlearning and retain loss keeps; a new one in the registries joins by itself."""

import pytest
import torch

from hf_transfer_ext.losses.needs import NEEDS, UNITS, averaged_over, check_options, needs_of, options_of, unit_of
from hf_transfer_ext.losses.unlearning import RETAIN_LOSSES, UNLEARNING_LOSSES

LOSSES = [loss for registry in (UNLEARNING_LOSSES, RETAIN_LOSSES) for _, loss in registry.items()]


def arguments(loss, rows: int) -> dict[str, torch.Tensor]:
    """What a loss asks for, of as many tokens (or sequences)."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"tokens": rows, "sequences": rows, "vocab": 11, "hidden": 4}
    return {need.name: need.example(sizes, generator) for need in needs_of(loss)}


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_it_asks_by_name_says_what_it_is_averaged_over_and_where_it_comes_from(loss):
    assert needs_of(loss) and unit_of(loss) in UNITS
    assert "Source: " in loss.__doc__ and "https://" in loss.__doc__
    with pytest.raises(ValueError, match=r"Unknown option of .* 'betta'"):
        check_options(loss, {"betta": 1.0})
    check_options(loss, options_of(loss))


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_the_value_of_one_does_not_depend_on_its_neighbours(loss):
    whole = arguments(loss, 6)
    part = {name: value[2:5] if NEEDS[name].axes[0] in UNITS else value for name, value in whole.items()}
    torch.testing.assert_close(loss(**whole)[2:5], loss(**part), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_its_gradient_reaches_the_model_and_never_the_reference(loss):
    asked = arguments(loss, 4)
    for value in asked.values():
        if value.is_floating_point():
            value.requires_grad_(True)
    values = loss(**asked)
    assert values.shape == (4,) and values.isfinite().all()
    values.sum().backward()
    own = [need.name for need in needs_of(loss) if need.differentiable]
    assert own and all(asked[name].grad.isfinite().all() and asked[name].grad.abs().sum() > 0 for name in own)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("npo", {"beta": 0.0}, "`beta` must be > 0, got 0"),
        ("simnpo", {"beta": -1.0}, "must be > 0, got -1"),
        ("dpo", {"beta": 0.0}, "must be > 0"),
        ("tnpo", {"beta": 0.0}, "must be > 0"),
        ("undial", {"beta": -1.0}, "must be >= 0"),
        ("wga", {"beta": -1.0}, "must be >= 0"),
        ("satimp", {"beta2": -1.0}, "`beta2` must be >= 0"),
    ],
)
def test_an_option_out_of_its_range_is_refused_before_training(name, options, message):
    with pytest.raises(ValueError, match=message):
        check_options(UNLEARNING_LOSSES[name], options)


def renamed(loss, name):
    loss.__name__ = name
    return loss


def test_a_registry_refuses_a_loss_that_the_trainer_could_not_call():
    @averaged_over("tokens")
    def gradients(log_probs, gradient_norm):
        return log_probs * gradient_norm

    with pytest.raises(ValueError, match=r"asks for 'gradient_norm', which the trainer cannot .* log_probs \("):
        UNLEARNING_LOSSES.register(gradients)

    with pytest.raises(ValueError, match=r"'unmarked' has to be marked .* 'tokens', 'later tokens'; got None"):
        UNLEARNING_LOSSES.register(renamed(lambda log_probs: log_probs, "unmarked"))

    with pytest.raises(ValueError, match="depends on the trained model"):
        UNLEARNING_LOSSES.register(averaged_over("tokens")(renamed(lambda reference_log_probs: None, "fixed")))

    with pytest.raises(ValueError, match="keyword-only and have a default"):
        UNLEARNING_LOSSES.register(averaged_over("tokens")(renamed(lambda log_probs, beta=1.0: None, "positional")))

    with pytest.raises(ValueError, match="asks for 'alternative_nll', which the trainer cannot provide here"):
        RETAIN_LOSSES.register(averaged_over("sequences")(renamed(lambda alternative_nll: None, "other")))
    assert (
        not {"gradients", "unmarked", "fixed", "positional"} & set(UNLEARNING_LOSSES) and "other" not in RETAIN_LOSSES
    )
