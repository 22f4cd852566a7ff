"""A teacher as rows: its distribution at each token, read a slice of tokens at a time.

Three forms exist. *Dense* rows are logits or log-probabilities over the vocabulary: `HeadRows` computes them from
hidden states, `LogitRows` has them already, and any other source (a mixture of several teachers, say) is a subclass of
`DenseRows` with `__len__`, `vocab_size` and `__call__`. *Sparse* rows, `SparseRows`, are the log-probabilities of some
tokens and the mass of all others. *Sampled* rows, `SampledRows`, are tokens drawn at random, weighted so that the
expected gradient is that of dense rows. A divergence declares which forms it accepts (`losses.slopes`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hf_transfer_ext.losses.slopes import Form
from hf_transfer_ext.models.heads import LMHead, LogitFinish

DenseBlock = Float[Tensor, "rows vocab"]

#: Rows of the head that one product takes. A CPU repacks them for each product: so few stay in its cache meanwhile,
#: which makes a projection, and the head's gradient in bfloat16, a fifth faster.
HEAD_ROWS = {"cpu": 1_024}
HEAD_ROWS_GPU = 32_768


@dataclass(frozen=True)
class TopTokens:
    """Some tokens of each row with their log-probabilities, and the mass of all the others: the *ghost tail*.

    Args:
        ids: Different tokens within a row.
        log_probs: Their natural logarithms of probability; -inf is allowed.
        tail: The mass of all other tokens, in [0, 1].
    """

    ids: Int[Tensor, "rows top"]
    log_probs: Float[Tensor, "rows top"]
    tail: Float[Tensor, " rows"]

    def __getitem__(self, part: slice) -> TopTokens:
        return TopTokens(self.ids[part], self.log_probs[part], self.tail[part])

    def to(self, device: torch.device) -> TopTokens:
        return TopTokens(self.ids.to(device), self.log_probs.to(device), self.tail.to(device))


@dataclass(frozen=True)
class SampledTokens:
    """Some tokens of each row with their log-probabilities and their factors.

    Args:
        ids: Tokens; one may occur several times within a row.
        log_probs: Natural logarithms of the teacher's probability.
        factors: What a token's term counts for: the number of its draws over their expected number, and 1 for a token
            that is always listed. 0 for an entry that only fills up the row.
    """

    ids: Int[Tensor, "rows listed"]
    log_probs: Float[Tensor, "rows listed"]
    factors: Float[Tensor, "rows listed"]

    def __getitem__(self, part: slice) -> SampledTokens:
        return SampledTokens(self.ids[part], self.log_probs[part], self.factors[part])

    def to(self, device: torch.device) -> SampledTokens:
        return SampledTokens(self.ids.to(device), self.log_probs.to(device), self.factors.to(device))


Block = Tensor | TopTokens | SampledTokens


class TeacherRows(ABC):
    """The teacher's distribution at each of `len(rows)` tokens."""

    form: ClassVar[Form]
    #: What is left to do to dense rows, a few at a time and in float32.
    finish: LogitFinish = LogitFinish()

    @abstractmethod
    def __len__(self) -> int:
        """The number of tokens."""

    @abstractmethod
    def __call__(self, part: slice) -> Block:
        """The rows of a slice of tokens. No gradient flows into them."""

    @property
    @abstractmethod
    def row_elements(self) -> int:
        """Elements of one row, by which the chunks of a loss are sized."""

    def reader(self) -> Callable[[slice], Block]:
        """What is called instead of `self` during one pass over all tokens; it may reuse memory between calls."""
        return self


class DenseRows(TeacherRows):
    """Rows over the vocabulary. Calling them gives logits before `finish`; log-probabilities are logits, too.

    Either is divided by the temperature of the loss, and normalized by it.
    """

    form: ClassVar[Form] = "dense"
    vocab_size: int

    @abstractmethod
    def __call__(self, part: slice) -> DenseBlock: ...

    @property
    def row_elements(self) -> int:
        return self.vocab_size


class LogitRows(DenseRows):
    """Logits that exist already, because a head is adapted or quantized, or a model treats them in its own way."""

    def __init__(self, logits: Float[Tensor, "tokens vocab"]) -> None:
        self.logits = logits.detach()
        self.vocab_size = logits.shape[1]

    def __len__(self) -> int:
        return self.logits.shape[0]

    def __call__(self, part: slice) -> DenseBlock:
        return self.logits[part]


class HeadRows(DenseRows):
    """Hidden states and the head that reads them: logits exist for one slice of tokens at a time.

    Args:
        hidden: The teacher's hidden states of the tokens that count; moved to the device of the head.
        head: The teacher's head.
        float32_logits: As in `Projection`.
    """

    def __init__(self, hidden: Float[Tensor, "tokens hidden"], head: LMHead, *, float32_logits: bool = True) -> None:
        self.hidden, self.head, self.float32_logits = hidden.detach(), head.detach(), float32_logits
        self.vocab_size, self.finish = head.vocab_size, head.finish

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def __call__(self, part: slice) -> DenseBlock:
        return Projection(self.hidden[part], self.head, self.float32_logits)(slice(None))

    def reader(self) -> Callable[[slice], Block]:
        return Projection(self.hidden, self.head, self.float32_logits)


class SparseRows(TeacherRows):
    """Some tokens of each row, and the mass of all the others, as a cache of teacher outputs stores them.

    Args:
        top: The rows.
        temperature: That of the teacher's softmax. A tail cannot be sharpened or flattened afterwards: the loss has to
            have the same temperature.

    Raises:
        ValueError: A row does not sum to 1, by more than 1 %.
    """

    form: ClassVar[Form] = "sparse"

    def __init__(self, top: TopTokens, *, temperature: float = 1.0) -> None:
        self.top = replace(top, log_probs=top.log_probs.detach().float(), tail=top.tail.detach().float())
        self.temperature = temperature
        mass = self.top.log_probs.exp().sum(-1) + self.top.tail
        if len(mass) and not bool(((mass - 1).abs() < 0.01).all() & (self.top.tail >= 0).all()):
            worst = mass[(mass - 1).abs().argmax()].item()
            raise ValueError(
                f"Each row of log-probabilities and its tail mass have to sum to 1, got a row of {worst:.4g}. The "
                "tail is the mass of all tokens that are not listed, not its logarithm."
            )

    @staticmethod
    def from_logits(logits: Float[Tensor, "tokens vocab"], top: int, *, temperature: float = 1.0) -> SparseRows:
        """The `top` likeliest tokens of each row of logits, and the mass of the others.

        Raises:
            ValueError: `top` is not between 1 and the size of the vocabulary.
        """
        if not 1 <= top <= logits.shape[1]:
            raise ValueError(f"`top` has to lie between 1 and the {logits.shape[1]} vocabulary entries, got {top}.")
        log_probs = (logits.detach().float() / temperature).log_softmax(-1)
        found = log_probs.topk(top, dim=-1)
        tail = log_probs.scatter(-1, found.indices, -torch.inf).exp().sum(-1)  # 1 - sum would lose a small tail
        return SparseRows(TopTokens(found.indices, found.values, tail), temperature=temperature)

    def __len__(self) -> int:
        return self.top.ids.shape[0]

    def __call__(self, part: slice) -> TopTokens:
        return self.top[part]

    @property
    def row_elements(self) -> int:
        return self.top.ids.shape[1]


class SampledRows(TeacherRows):
    r"""The likeliest tokens of each row, and some others drawn at random: unbiased, in little memory.

    A divergence that is a sum over the vocabulary, :math:`D = \sum_v f(q_v, p_v)`, is estimated by

    .. math:: \hat D = \sum_{v \in top} f(q_v, p_v) + \sum_{v \in drawn} \frac{c_v}{m \pi_v} f(q_v, p_v)

    with m draws from :math:`\pi` over the tokens outside the list, :math:`c_v` of which gave v. Value and gradient are
    right in expectation wherever the teacher's probability is not 0. How much they vary depends on f: little for
    forward_kl, whose terms are proportional to p; much for a divergence that charges the student for tokens that the
    teacher hardly ever gives (reverse_kl), as these are hardly ever drawn.

    When to use it: a cache of teacher outputs whose gradient is not biased towards the head of the distribution.

    Source: Sparse Logit Sampling, Anshumann et al. 2025, https://arxiv.org/abs/2503.16870
    """

    form: ClassVar[Form] = "sampled"

    def __init__(self, listed: SampledTokens, *, temperature: float = 1.0) -> None:
        self.listed = SampledTokens(listed.ids, listed.log_probs.detach().float(), listed.factors.detach().float())
        self.temperature = temperature

    @staticmethod
    def from_logits(
        logits: Float[Tensor, "tokens vocab"],
        top: int,
        samples: int,
        *,
        temperature: float = 1.0,
        tau: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> SampledRows:
        """The `top` likeliest tokens of each row of logits, and `samples` draws from the others.

        Args:
            top: >= 0; with 0 every token is drawn, which is random-sampling KD.
            samples: Number of draws, with replacement, >= 1.
            temperature: That of the teacher's softmax, > 0.
            tau: Tokens are drawn with probability proportional to p**tau; 1 draws from the teacher itself.

        Raises:
            ValueError: A number is out of its range.
        """
        vocab = logits.shape[1]
        if not 0 <= top <= vocab:
            raise ValueError(f"`top` has to lie between 0 and the {vocab} vocabulary entries, got {top}.")
        if samples < 1 or not temperature > 0 or not tau > 0:
            raise ValueError(
                f"`samples` has to be >= 1, `temperature` and `tau` > 0, got {samples}, {temperature} and {tau}."
            )
        log_probs = (logits.detach().float() / temperature).log_softmax(-1)
        first = log_probs.topk(top, dim=-1)
        proposal = (tau * log_probs).scatter(-1, first.indices, -torch.inf)
        # A row without a tail has nothing to draw: its draws are of weight 0.
        empty = ~(proposal > -torch.inf).any(-1, keepdim=True)
        log_pi = proposal.masked_fill(empty, 0.0).log_softmax(-1)
        drawn = torch.multinomial(log_pi.exp(), samples, replacement=True, generator=generator)
        factors = (-log_pi.gather(1, drawn)).exp().div_(samples).masked_fill_(empty, 0.0)
        return SampledRows(
            SampledTokens(
                torch.cat([first.indices, drawn], 1),
                torch.cat([first.values, log_probs.gather(1, drawn)], 1),
                torch.cat([torch.ones_like(first.values), factors], 1),
            ),
            temperature=temperature,
        )

    def __len__(self) -> int:
        return self.listed.ids.shape[0]

    def __call__(self, part: slice) -> SampledTokens:
        return self.listed[part]

    @property
    def row_elements(self) -> int:
        return self.listed.ids.shape[1]


class Projection:
    """Hidden states through a head, a slice of tokens at a time, into one buffer that every call overwrites.

    Factors have the dtype in which the model itself would project: that of autocast for float32 weights, where it is
    on at the moment of construction, else that of the weights.

    Args:
        hidden: `(tokens, hidden)`; moved to the device of the head.
        head: Its weight and bias are read; `head.finish` is left to the caller.
        float32_logits: Logits in float32 whatever the dtype of the factors. Rounded to bfloat16, as the model itself
            rounds them, they leave few digits of the difference between a student and a teacher that are close to
            each other.
    """

    def __init__(self, hidden: Float[Tensor, "tokens hidden"], head: LMHead, float32_logits: bool = True) -> None:
        self.dtype = projection_dtype(head.weight)
        self.logits_dtype = wide_dtype(self.dtype) if float32_logits else self.dtype
        self.weight = head.weight.detach().to(self.dtype)
        self.bias = None if head.bias is None else head.bias.detach().to(self.dtype)
        self.hidden = hidden.detach().to(self.weight.device, self.dtype)
        self._buffer: Tensor | None = None

    def __call__(self, part: slice) -> DenseBlock:
        """Projected logits, before scale and soft cap."""
        hidden = self.hidden[part]
        if self._buffer is None or len(self._buffer) < len(hidden):
            self._buffer = hidden.new_empty(len(hidden), len(self.weight), dtype=self.logits_dtype)
        projected = self._buffer[: len(hidden)]
        wide = projected.dtype != self.dtype
        if wide and not hidden.is_cuda:
            hidden = hidden.to(projected.dtype)
        for rows in head_row_slices(self.weight):
            if wide and hidden.is_cuda:
                projected[:, rows] = wide_product(hidden, self.weight[rows].T)
            else:
                torch.mm(hidden, self.weight[rows].to(hidden.dtype).T, out=projected[:, rows])
        return projected if self.bias is None else projected.add_(self.bias)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for the dtypes of half its size, any other one as it is."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, of factors of half precision in float32."""
    if left.is_cuda and left.dtype.itemsize < 4:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.to(wide_dtype(left.dtype)) @ right.to(wide_dtype(right.dtype))


def projection_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of a product with this weight: that of autocast for float32 weights where it is on, else its own."""
    if torch.is_autocast_enabled(weight.device.type) and weight.dtype == torch.float32:
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


def head_row_slices(head: Tensor) -> Iterator[slice]:
    """Slices that cover the rows of a head."""
    rows = HEAD_ROWS.get(head.device.type, HEAD_ROWS_GPU)
    return (slice(start, start + rows) for start in range(0, head.shape[0], rows))
