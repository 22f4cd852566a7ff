"""A step whose answers are given: for `Method.prepare`."""

import torch

from hf_transfer_ext.losses.needs import ForwardPass
from hf_transfer_ext.losses.unlearning_method import Progress


class Answers:
    """Passes of one answer each, from functions of the set and of the parameters.

    Args:
        parts: Set -> list of functions that give a `ForwardPass`.
    """

    gamma = alpha = 1.0
    layers = 2
    progress, prepared = Progress(0.0, 0.0), {}

    def __init__(self, parts, parameters=(), copied=()):
        self.parts, self.parameters, self.copied = parts, list(parameters), copied

    def copies(self):
        yield from self.copied

    def answers(self, part, *, at_once=1, layer=0, change=None):
        for make in self.parts[part]:
            yield make()

    def gradient(self, part, around=None):
        raise NotImplementedError

    def recall(self):
        raise NotImplementedError

    def moved(self, by):
        raise NotImplementedError

    def rounded(self, bits, block):
        raise NotImplementedError


def hidden_pass(hidden, targets):
    """An answer with these hidden states, whose tokens are predicted from them."""
    count = len(targets)
    return ForwardPass(
        torch.zeros(count), torch.tensor(targets), torch.tensor([count]), hidden=torch.as_tensor(hidden).float()
    )
