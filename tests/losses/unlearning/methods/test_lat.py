"""The attack on a loss that is linear in the hidden states; a whole step: tests/trainers/test_method_steps.py."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from hf_transfer_ext.losses.unlearning.methods import METHODS


class Linear:
    """A batch of one row with two tokens; the answers' loss is the sum of slope * hidden, in float64."""

    hidden = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]])
    slope = torch.tensor([[[0.0, 5.0], [0.0, 0.0]]])

    def __init__(self):
        self.change = lambda hidden: hidden
        self.recalls = []

    @contextmanager
    def hidden_states_changed(self, layer, change):
        assert layer == 1
        before, self.change = self.change, change
        yield
        self.change = before

    def recall(self):
        loss = (self.slope * self.change(self.hidden)).sum()
        self.recalls.append(loss.item())
        return loss


def test_by_hand():
    # The first token's hidden state is 5 long, so its change is at most 1 long and goes against the slope, first by
    # 2 * .2 * 5 / 4 = .5. The loss of the second token does not depend on its hidden state.
    batch = Linear()
    with METHODS["lat"](radius=0.2, attack_steps=4).attacked(batch, 1):
        found = batch.change(batch.hidden)
    torch.testing.assert_close(found, torch.tensor([[[3.0, 3.0], [0.0, 2.0]]]))
    assert batch.recalls == pytest.approx([20.0, 17.5, 15.0, 15.0])
    assert torch.equal(batch.change(batch.hidden), batch.hidden)  # the attack ends with the block


def test_without_a_radius_nothing_changes():
    batch = Linear()
    with METHODS["lat"](radius=0.0).attacked(batch, 1):
        assert torch.equal(batch.change(batch.hidden), batch.hidden)


def test_options_and_losses_that_do_not_fit_are_refused():
    for option in ("layer", "radius"):
        with pytest.raises(ValueError, match=f"`{option}` must be >= 0, got -1"):
            METHODS["lat"](**{option: -1})
    with pytest.raises(ValueError, match="`attack_steps` must be >= 1, got 0"):
        METHODS["lat"](attack_steps=0)
    with pytest.raises(ValueError, match="Choose a forget loss without alternatives"):
        METHODS["lat"]().check(SimpleNamespace(forget_loss="dpo"))
    with pytest.raises(ValueError, match="has to attack a layer below it: set its `layer` from 1 to 1; got 2"):
        METHODS["lat"](layer=2).check(SimpleNamespace(forget_loss="rmu", hidden_layer=2))
    METHODS["lat"](layer=1).check(SimpleNamespace(forget_loss="rmu", hidden_layer=2))
