"""A step of a method on two quadratics, whose gradients are known in closed form."""

from contextlib import contextmanager

import torch

from hf_transfer_ext.losses.unlearning_method import Progress


class Quadratics:
    """L_f = sum a x^2 / 2, L_r = sum b x, and the answers' loss is sum c x; rounding gives integers."""

    gamma, alpha = 0.5, 2.0
    layers = 2

    def __init__(self, share=0.0):
        self.x = torch.tensor([1.0, -2.0], dtype=torch.float64)
        self.a, self.b = torch.tensor([3.0, 1.0]).double(), torch.tensor([1.0, 5.0]).double()
        self.c = torch.tensor([0.5, -7.0]).double()
        self.progress, self.prepared = Progress(share, 0.0), {}

    @property
    def parameters(self):
        return [self.x]

    def gradient(self, part, around=None):
        return [self.a * self.x if part == "forget" else self.b.clone()]

    def recall(self):
        return [self.c]

    def copies(self):
        raise NotImplementedError("A quadratic has no rows.")

    def answers(self, part, *, at_once=1):
        raise NotImplementedError("A quadratic has no answers.")

    @contextmanager
    def moved(self, by):
        before, self.x = self.x, self.x + by[0]
        yield
        self.x = before

    @contextmanager
    def rounded(self, bits, block):
        before, self.x = self.x, self.x.round()
        yield
        self.x = before

    def sum_of(self, forget):
        """gamma * forget + alpha * the retain gradient."""
        return self.gamma * torch.as_tensor(forget).double() + self.alpha * self.b
