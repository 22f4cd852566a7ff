"""A teacher as rows: its distribution at each token, read a slice of tokens at a time.

Three forms exist. *Dense* rows are logits or log-probabilities over the vocabulary: `HeadRows` computes them from
hidden states, `LogitRows` has them already, and any other source (a mixture of several teachers, say) is a subclass of
`DenseRows` with `__len__`, `vocab_size` and `__call__`. *Sparse* rows, `SparseRows`, are the log-probabilities of some
tokens and the mass of all others. *Sampled* rows, `SampledRows`, are tokens drawn at random, weighted so that the
expected gradient is that of dense rows. `CombinedRows` are those of several teachers, each in its own form. A
divergence declares which forms it accepts (`losses.slopes`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

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


@dataclass(frozen=True)
class MemberBlock:
    """What one of several teachers says about some tokens of a slice.

    Args:
        places: These tokens, counted within the slice, ascending; on the CPU.
        block: Its rows of these tokens, before `finish`.
        weights: What its divergence counts for at each of them.
        finish: What is left to do to dense rows.
    """

    places: Int[Tensor, " own"]
    block: Any
    weights: Float[Tensor, " own"]
    finish: LogitFinish

    def between(self, start: int, stop: int) -> MemberBlock:
        """The tokens of a part of the slice, counted within that part."""
        own = _places_between(self.places, start, stop)
        return MemberBlock(self.places[own] - start, self.block[own], self.weights[own], self.finish)

    def to(self, device: torch.device) -> MemberBlock:
        return replace(self, block=self.block.to(device), weights=self.weights.to(device))


@dataclass(frozen=True)
class CombinedBlock:
    """A slice of `CombinedRows`: `size` tokens, and what each teacher says about its own among them."""

    members: tuple[MemberBlock, ...]
    size: int

    def __getitem__(self, part: slice) -> CombinedBlock:
        start, stop, _ = part.indices(self.size)
        return CombinedBlock(tuple(one.between(start, stop) for one in self.members), stop - start)

    def to(self, device: torch.device) -> CombinedBlock:
        return CombinedBlock(tuple(one.to(device) for one in self.members), self.size)


Block = Tensor | TopTokens | SampledTokens | CombinedBlock


class TeacherRows(ABC):
    """The teacher's distribution at each of `len(rows)` tokens."""

    form: Form
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

    form: Form = "dense"
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

    form: Form = "sparse"

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

    Args:
        listed: The rows.
        temperature: That of the teacher's softmax; the loss has to have the same one.
        top: The first entries of each row that are its likeliest tokens, and always listed; 0 where all are drawn.

    Source: Sparse Logit Sampling, Anshumann et al. 2025, https://arxiv.org/abs/2503.16870
    """

    form: Form = "sampled"

    def __init__(self, listed: SampledTokens, *, temperature: float = 1.0, top: int = 0) -> None:
        self.listed = SampledTokens(listed.ids, listed.log_probs.detach().float(), listed.factors.detach().float())
        self.temperature, self.top = temperature, top

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
            top=top,
        )

    def __len__(self) -> int:
        return self.listed.ids.shape[0]

    def __call__(self, part: slice) -> SampledTokens:
        return self.listed[part]

    @property
    def row_elements(self) -> int:
        return self.listed.ids.shape[1]


class CombinedRows(TeacherRows):
    r"""Several teachers' rows, each in its own form: a token's divergence is a weighted sum of theirs.

    .. math:: D_t = \sum_i w_{ti} \, D(q_t, p_{ti})

    `routed`: each token has one teacher, so that the loss is the sum of their separate losses. Every divergence that
    accepts the forms of all of them accepts such rows.

    `mixed`: every teacher speaks of each token. For a divergence that is linear in p up to a term without q, as
    forward_kl is, the gradient is that of the mixture :math:`\sum_i w_i p_i`; the value is larger by what the teachers
    differ from their mixture, :math:`\sum_i w_i KL(p_i \| \sum_j w_j p_j)`, which no student can change. A sparse
    teacher's tail is one bucket in its own term, so it follows the student's tail, and sampled rows stay unbiased.
    Other divergences need the probability of the mixture itself, which the unlisted tokens of one teacher leave
    unknown: they are refused (the form "mixture" of `losses.slopes`). `MixtureRows` mixes dense rows for all of them.

    Args:
        members: The rows of each teacher.
        places: The tokens that each speaks of, ascending, one for each of its rows.
        weights: What each counts for at these tokens.
        tokens: The number of all tokens.
        form: "mixture" where weights matter to the divergence, else a form of the members.
    """

    def __init__(
        self,
        members: Sequence[TeacherRows],
        places: Sequence[Int[Tensor, " _own"]],
        weights: Sequence[Float[Tensor, " _own"]],
        *,
        tokens: int,
        form: Form,
    ) -> None:
        self.members, self.places = list(members), [one.cpu() for one in places]
        self.weights, self.tokens, self.form = [one.detach().float() for one in weights], tokens, form
        lengths = [[len(one) for one in several] for several in (self.members, self.places, self.weights)]
        if not lengths[0] == lengths[1] == lengths[2]:
            raise ValueError(f"Each teacher needs one place and one weight for each of its rows, got {lengths}.")

    @staticmethod
    def routed(members: Sequence[TeacherRows], places: Sequence[Int[Tensor, " _own"]]) -> CombinedRows:
        """Rows of different tokens, which together are all of them.

        Raises:
            ValueError: A token has no teacher, or several.
        """
        tokens = sum(len(one) for one in places)
        joined = torch.cat([torch.zeros(0, dtype=torch.long), *(one.cpu() for one in places)])
        if not joined.sort().values.equal(torch.arange(tokens)):
            raise ValueError(f"Each of {tokens} tokens needs one teacher, got the places {joined.tolist()[:20]} ...")
        ones = [torch.ones(len(one)) for one in places]
        form: Form = members[0].form if members else "dense"
        return CombinedRows(members, places, ones, tokens=tokens, form=form)

    @staticmethod
    def mixed(members: Sequence[TeacherRows], weights: Float[Tensor, "tokens members"]) -> CombinedRows:
        """Rows of the same tokens.

        Args:
            weights: Share of each member at each token; each row sums to 1.
        """
        check_shares(weights)
        places = [torch.arange(len(weights))] * len(members)
        return CombinedRows(members, places, weights.unbind(1), tokens=len(weights), form="mixture")

    def __len__(self) -> int:
        return self.tokens

    def __call__(self, part: slice) -> CombinedBlock:
        return self._read(part, [member.__call__ for member in self.members])

    def reader(self) -> Callable[[slice], CombinedBlock]:
        readers = [member.reader() for member in self.members]
        return lambda part: self._read(part, readers)

    def _read(self, part: slice, readers: Sequence[Callable[[slice], Block]]) -> CombinedBlock:
        start, stop, _ = part.indices(self.tokens)
        found = []
        for member, read, places, weights in zip(self.members, readers, self.places, self.weights, strict=True):
            own = _places_between(places, start, stop)
            if own.start < own.stop:
                found.append(MemberBlock(places[own] - start, read(own), weights[own], member.finish))
        return CombinedBlock(tuple(found), stop - start)

    @property
    def row_elements(self) -> int:
        """On average over the tokens, each of which may have rows of several members."""
        return -(-sum(len(member) * member.row_elements for member in self.members) // max(self.tokens, 1))


def _places_between(places: Tensor, start: int, stop: int) -> slice:
    """Which of some ascending places lie in [start, stop)."""
    first, last = torch.searchsorted(places, torch.tensor([start, stop])).tolist()
    return slice(first, last)


def check_shares(weights: Float[Tensor, "tokens members"]) -> None:
    """Refuse weights of a mixture that are not probabilities.

    Raises:
        ValueError: One is negative, or those of a token do not sum to 1.
    """
    if weights.numel() and not bool((weights >= 0).all() & ((weights.sum(1) - 1).abs() < 1e-4).all()):
        raise ValueError(f"The weights of a mixture have to be >= 0 and sum to 1, got {weights[0].tolist()} ...")


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
