"""What every unlearning and retain loss keeps; a new one in the registries joins by itself."""

import pytest
import torch

from hf_transfer_ext.losses.needs import QUANTITIES, asked_quantities, check_options, options_of, over
from hf_transfer_ext.losses.unlearning import METHODS, RETAIN_LOSSES, UNLEARNING_LOSSES

LOSSES = [loss for registry in (UNLEARNING_LOSSES, RETAIN_LOSSES) for _, loss in registry.items()]


def quantities(rows: int, vocabulary: int = 11, hidden: int = 4) -> dict[str, torch.Tensor]:
    """Every quantity a loss can ask for, of as many tokens (or sequences)."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    made = {
        "log_probs": -draw(rows).abs(),
        "reference_log_probs": -draw(rows).abs(),
        "logits": draw(rows, vocabulary),
        "reference_logits": draw(rows, vocabulary),
        "targets": torch.randint(vocabulary, (rows,), generator=generator),
        "refusal_targets": torch.randint(vocabulary, (rows,), generator=generator),
        "hidden": draw(rows, hidden),
        "reference_hidden": draw(rows, hidden),
        "control": draw(hidden).abs(),
        "nll": draw(rows).abs() * 9,
        "reference_nll": draw(rows).abs() * 9,
        "lengths": torch.randint(1, 9, (rows,), generator=generator).double(),
        "alternative_nll": draw(rows).abs() * 9,
        "alternative_lengths": torch.randint(1, 9, (rows,), generator=generator).double(),
        "reference_alternative_nll": draw(rows).abs() * 9,
    }
    assert set(made) == set(QUANTITIES)
    return made


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_it_asks_by_name_says_what_it_is_averaged_over_and_where_it_comes_from(loss):
    assert asked_quantities(loss)
    assert over(loss) in ("tokens", "later tokens", "sequences")
    assert "Source: " in loss.__doc__ and "https://" in loss.__doc__
    with pytest.raises(ValueError, match=r"Unknown option of .* 'betta'"):
        check_options(loss, {"betta": 1.0})
    check_options(loss, options_of(loss))


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_the_value_of_one_does_not_depend_on_its_neighbours(loss):
    whole = {name: value for name, value in quantities(6).items() if name in asked_quantities(loss)}
    part = {name: value if name == "control" else value[2:5] for name, value in whole.items()}
    torch.testing.assert_close(loss(**whole)[2:5], loss(**part), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_its_gradient_reaches_the_model_and_never_the_reference(loss):
    asked = {name: value for name, value in quantities(4).items() if name in asked_quantities(loss)}
    for value in asked.values():
        if value.is_floating_point():
            value.requires_grad_(True)
    values = loss(**asked)
    assert values.shape == (4,) and values.isfinite().all()
    values.sum().backward()
    own = [n for n in asked if n in ("log_probs", "logits", "hidden", "nll", "alternative_nll")]
    assert own and all(asked[name].grad.isfinite().all() and asked[name].grad.abs().sum() > 0 for name in own)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_names_losses_that_exist_with_options_that_they_have(name):
    method = METHODS[name]
    check_options(UNLEARNING_LOSSES[method.forget], method.options)
    if method.retain is not None:
        RETAIN_LOSSES[method.retain]


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
