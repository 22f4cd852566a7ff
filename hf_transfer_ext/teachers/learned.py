"""Several teachers whose weights at each token are learned from the data while the student trains."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_transfer_ext.teachers.several import Several, mixed_signal, views_of
from hf_transfer_ext.teachers.signal import Teacher, TeacherSignal
from hf_transfer_ext.tensors import Mask

#: The gate and the state of its optimizer in a checkpoint.
GATE_FILE = "teacher_gate.safetensors"


class LearnedTeachers(Several):
    r"""A mixture in which a small gate, trained with the student, weights each token by the teachers' confidence.

    .. math:: w = \mathrm{softmax}(A f + b), \quad f = (H(p_1), \log \max p_1, \dots, H(p_n), \log \max p_n)

    A and b start at 0, which is the mean of all teachers, and follow the gradient of the label's negative
    log-likelihood :math:`-\log \sum_i w_i p_i(y)` by Adam, once for each micro-batch that trains the student. The
    weights of a batch come from the batches before it: its own labels do not show in them.

    Args:
        teachers: Name -> teacher. With a cache or a server among them, entropies and likelihoods are those that the
            lists show of every teacher alike: of the k likeliest tokens and one bucket, with k the shortest list, and
            of the label, or of "a token that not every list has" (`several.views_of`). The divergence has to be
            forward_kl then. A cache of kind "samples" does not know its likeliest tokens, and is refused.
        rate: Learning rate of the gate, > 0.
        temperature: The `distill_temperature` of the training.

    When to use it: teachers of different domains, or of different quality, where no column of the data says which one
    knows a row and the texts are data; unlike by confidence, a teacher that is confident and wrong loses its weight.
    On texts that the student writes, the gate would favor the teacher that is most like the student: `on_policy` is
    refused.

    Deviation from the paper: its aggregator is a transformer over the teachers' features, trained through the
    student's own update (meta-learning); here it is linear in two numbers of each teacher, and trained on labels.

    Source: Meta-DMoE, Zhong et al. 2022, https://arxiv.org/abs/2210.03885
    """

    def __init__(self, teachers: Mapping[str, Teacher], *, rate: float = 1e-2, temperature: float = 1.0) -> None:
        super().__init__(teachers)
        if not rate > 0 or not temperature > 0:
            raise ValueError(f"`rate` and `temperature` have to be > 0, got {rate} and {temperature}.")
        self.temperature = temperature
        self.gate = nn.Linear(2 * len(self.teachers), len(self.teachers))
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)
        self._optimizer = torch.optim.Adam(self.gate.parameters(), lr=rate)

    def signal(self, student: nn.Module, inputs: dict[str, Any], mask: Mask) -> TeacherSignal:
        """The mixture at the student's labeled tokens; see `Teacher.signal`. In training the gate takes a step."""
        rows = self._rows(student, inputs, mask)
        views = views_of(self.teachers, rows, inputs["input_ids"][:, 1:][mask], self.temperature)
        features = views[..., :2].flatten(1)
        with torch.no_grad():
            weights = self.gate(features).softmax(-1)
        if student.training and torch.is_grad_enabled():
            self._learn(features, views[..., 2], mask.device)
        return mixed_signal(rows, weights, self.temperature)

    def _learn(self, features: Tensor, log_likelihoods: Tensor, device: torch.device) -> None:
        self._optimizer.zero_grad()
        mixed = (self.gate(features).log_softmax(-1) + log_likelihoods).logsumexp(-1)
        (-mixed.sum() / max(len(mixed), 1)).backward()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for parameter in self.gate.parameters():
                assert parameter.grad is not None
                total = parameter.grad.to(device)  # where the processes can reach each other
                torch.distributed.all_reduce(total)
                parameter.grad.copy_(total / torch.distributed.get_world_size())
        self._optimizer.step()

    def save(self, folder: str | Path) -> None:
        """Write the gate to a checkpoint, atomically."""
        aside = Path(folder) / f".{GATE_FILE}.partial"
        save_file({name: value.detach().clone().contiguous() for name, value in self._state().items()}, aside)
        os.replace(aside, Path(folder) / GATE_FILE)

    @torch.no_grad()
    def load(self, folder: str | Path) -> None:
        """Read the gate that `save` wrote.

        Raises:
            FileNotFoundError: The checkpoint has none.
            ValueError: It is for another number of teachers.
        """
        path = Path(folder) / GATE_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"The checkpoint {str(folder)!r} has no {GATE_FILE}: it was not written with `teachers_by: learned`. "
                "Resume with the settings that it was written with, or start over."
            )
        saved = load_file(path)
        if saved["weight"].shape != self.gate.weight.shape:
            raise ValueError(
                f"The gate in {str(path)!r} is for {len(saved['bias'])} teachers, needed are {len(self.gate.bias)}."
            )
        for name, parameter in self.gate.named_parameters():
            parameter.copy_(saved[name])
            state = {key.split(".")[1]: value for key, value in saved.items() if key.startswith(f"{name}.")}
            if state:
                self._optimizer.state[parameter] = state

    def _state(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = dict(self.gate.named_parameters())
        for name, parameter in self.gate.named_parameters():
            found |= {f"{name}.{key}": value for key, value in self._optimizer.state.get(parameter, {}).items()}
        return found
