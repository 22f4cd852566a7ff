"""States and a mask for the losses inside the network."""

import torch

MASK = torch.tensor([[True, True, True], [True, True, False]])


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
