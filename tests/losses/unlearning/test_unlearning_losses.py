"""What the registries of unlearning and retain losses promise; `check_unlearning_loss` checks each loss itself."""

import pytest

from hf_transfer_ext.losses.needs import averaged_over, check_options, options_of
from hf_transfer_ext.losses.unlearning import RETAIN_LOSSES, UNLEARNING_LOSSES

LOSSES = [loss for registry in (UNLEARNING_LOSSES, RETAIN_LOSSES) for _, loss in registry.items()]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_its_own_defaults_pass_and_a_typo_does_not(loss):
    check_options(loss, options_of(loss))
    with pytest.raises(ValueError, match=r"Unknown option of .* 'betta'"):
        check_options(loss, {"betta": 1.0})


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
        ("npo", {"beta": float("nan")}, "`beta` must be > 0, got nan"),
        ("simnpo", {"delta": float("inf")}, "`delta` must be a finite number, got inf"),
        ("rmu", {"scale": float("nan")}, "`scale` must be a finite number, got nan"),
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
    with pytest.raises(ValueError, match="asks for 'other_nll', which the trainer cannot provide"):
        RETAIN_LOSSES.register(averaged_over("sequences")(renamed(lambda other_nll: None, "other")))
    assert (
        not {"gradients", "unmarked", "fixed", "positional"} & set(UNLEARNING_LOSSES) and "other" not in RETAIN_LOSSES
    )
