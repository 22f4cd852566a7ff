"""What an unlearning loss may ask for, in one place.

A loss is a pure function; the names of its arguments say what it needs, and each name is one of `NEEDS`. A need knows
what it means, its shape, and how to read it from a forward pass. Everything else follows from these objects: what the
trainer computes, what a config refuses, and the example values that tests call losses with.

To add a need, add one line to `NEEDS`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hf_transfer_ext.losses.autoencoder import rebuilt_by
from hf_transfer_ext.registry import unknown_name

Tokens = Float[Tensor, " tokens"]
TokenIds = Int[Tensor, " tokens"]
TokenRows = Float[Tensor, "tokens vocab"]
HiddenRows = Float[Tensor, "tokens hidden"]
Sequences = Float[Tensor, " sequences"]

#: What a forward pass has to keep: log-probabilities are always there, the other two are large.
Kept = Literal["log_probs", "logits", "hidden"]

#: The model that is trained, the one that it started from, and one that was trained further on the forget set.
OfModel = Literal["trained", "reference", "reinforced"]


@dataclass
class ForwardPass:
    """What one forward pass of one model over a batch of answers leaves for the losses.

    Tokens are the answers' tokens only, of all sequences of the batch one after the other.

    Args:
        log_probs: Log-probability of each token, in nats.
        targets: Id of each token.
        lengths: Number of tokens of each answer, >= 1.
        logits: Logits at each token, where a loss asks for them.
        hidden: Hidden state of one layer at each token, where a loss asks for it.
        refusal_ids: Token ids of the refusal that some losses pull towards.
        seed: Of whatever a need draws at random.
        part: "forget" or "retain": the set that the answers are from.
        index: Place of each answer in that set.
        prepared: What the method computed before the first step (`Method.prepare`).
    """

    log_probs: Tokens
    targets: TokenIds
    lengths: Int[Tensor, " sequences"]
    logits: TokenRows | None = None
    hidden: HiddenRows | None = None
    refusal_ids: Sequence[int] = ()
    seed: int = 0
    part: str = "forget"
    index: Int[Tensor, " sequences"] | None = None
    prepared: Mapping[str, Tensor] = field(default_factory=dict)

    def computed_before(self, name: str) -> Tensor:
        """A tensor of `prepared`, which the method has to compute."""
        if name not in self.prepared:
            raise ValueError(
                f"The loss reads {name!r}, which the method has to compute before the first step "
                f"(`Method.prepare`); it computed {', '.join(self.prepared) or 'nothing'}. Choose a method that does."
            )
        return self.prepared[name]

    def kept(self, name: Literal["logits", "hidden"]) -> Tensor:
        """The logits or hidden states, which a need has to declare with `keeps`."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"The forward pass did not keep its {name}. A need that reads them sets keeps={name!r}.")
        return value


@dataclass(frozen=True)
class Need:
    """One thing that a loss may ask for by the name of an argument.

    Args:
        name: The argument.
        meaning: What it holds, with its unit.
        axes: Names of its dimensions, out of tokens, sequences, vocab, hidden, clusters and shortlist.
        values: Which values it can have; example values are drawn accordingly.
        read: Reads it from a forward pass.
        keeps: What this forward pass has to keep.
        differentiable: Whether a gradient flows through it to the trained model.
        of_model: Which model it is about.
        of_alternative: Whether it is about an alternative answer to the same question instead of the answer itself.
        of_row: Whether it was computed for each row of the training sets, so that no other rows can be evaluated.
    """

    name: str
    meaning: str
    axes: tuple[str, ...]
    values: Literal["any", "<= 0", ">= 0", "share", "count", "token id"]
    read: Callable[[ForwardPass], Tensor]
    keeps: Kept = "log_probs"
    differentiable: bool = False
    of_model: OfModel = "trained"
    of_alternative: bool = False
    of_row: bool = False

    @property
    def of_reference(self) -> bool:
        return self.of_model == "reference"

    @property
    def source(self) -> tuple[bool, OfModel]:
        """Which forward pass it is read from: (of the alternative answers, of which model)."""
        return self.of_alternative, self.of_model

    def example(self, sizes: Mapping[str, int], generator: torch.Generator | None = None) -> Tensor:
        """A random value of the right shape and range, in float64 (ids: int64), for checks and tests.

        Counts share out the tokens among the sequences, so that they fit other examples of the same sizes.
        """
        shape = [sizes[axis] for axis in self.axes]
        if self.values == "token id":
            return torch.randint(sizes["vocab"], shape, generator=generator)
        if self.values == "count":
            each, more = divmod(sizes["tokens"], max(1, *shape))
            return torch.tensor([float(each + (i < more)) for i in range(*shape)], dtype=torch.float64).clamp(min=1)
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        if self.values == "share":
            return 0.9 * drawn.softmax(-1)
        return {"any": drawn, "<= 0": -drawn.abs(), ">= 0": 9 * drawn.abs()}[self.values]


def of_reference(need: Need) -> Need:
    """The same under the reference model, which gets no gradient."""
    return replace(
        need,
        name=f"reference_{need.name}",
        meaning=f"{need.meaning}; under the reference",
        differentiable=False,
        of_model="reference",
    )


def of_reinforced(need: Need) -> Need:
    """The same under a model that was trained further on the forget set, which gets no gradient."""
    return replace(
        need,
        name=f"reinforced_{need.name}",
        meaning=f"{need.meaning}; under the model that was trained further on the forget set",
        differentiable=False,
        of_model="reinforced",
    )


def of_alternative(need: Need) -> Need:
    """The same of an alternative answer to the same question."""
    return replace(
        need,
        name=f"alternative_{need.name}",
        meaning=f"{need.meaning}; of an alternative answer",
        of_alternative=True,
    )


def answer_of_tokens(lengths: Int[Tensor, " sequences"] | Sequences) -> Int[Tensor, " tokens"]:
    """Place of the answer that each token belongs to."""
    counts = lengths.long()
    return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)


def answer_sums(values: Tokens, lengths: Int[Tensor, " sequences"] | Sequences) -> Sequences:
    """Sum over each answer's tokens."""
    return values.new_zeros(len(lengths)).index_add(0, answer_of_tokens(lengths), values)


def _nll(found: ForwardPass) -> Sequences:
    return answer_sums(-found.log_probs, found.lengths)


def _refusal_targets(found: ForwardPass) -> TokenIds:
    """The refusal repeated along each answer, from its start."""
    if not found.refusal_ids:
        raise ValueError("The loss pulls towards a refusal, but the refusal has no tokens. Set `refusal` to a text.")
    places = torch.cat([torch.arange(int(n)) for n in found.lengths] or [torch.arange(0)])
    return torch.tensor(found.refusal_ids)[places % len(found.refusal_ids)].to(found.targets.device)


def _control(found: ForwardPass) -> Float[Tensor, " hidden"]:
    hidden = found.kept("hidden")
    return random_direction(hidden.shape[-1], found.seed).to(hidden)


def _target_outputs(found: ForwardPass) -> Sequences:
    if found.index is None:
        raise ValueError("The forward pass does not know which rows its answers are from, so it has no targets.")
    return found.computed_before(f"{found.part}_outputs")[found.index].to(found.log_probs)


def _of_teacher(found: ForwardPass, name: str) -> Tensor:
    """The rows of a tensor that holds one for each token of all answers to forget, one answer after the other."""
    starts = found.computed_before("teacher_starts")
    if found.index is None:
        raise ValueError("The forward pass does not know which rows its answers are from, so it has no teacher.")
    own = [torch.arange(int(s), int(s) + int(n)) for s, n in zip(starts[found.index.to(starts.device)],
                                                               found.lengths, strict=True)]  # fmt: skip
    rows = torch.cat(own or [torch.arange(0)]).to(starts.device)
    return found.computed_before(name)[rows].to(found.log_probs.device)


def teachers_of_rows(distributions: Sequence[Float[Tensor, "_ vocab"]], shortlist: int) -> dict[str, Tensor]:
    """What the needs `teacher_probs` and `teacher_ids` read: the most likely tokens of each row's teacher.

    Args:
        distributions: For each answer to forget, a distribution at each of its tokens; all 0 at one without a teacher.
        shortlist: Tokens that are kept, >= 1.
    """
    starts, ids, probs = [0], [], []
    for own in distributions:
        kept = own.topk(min(shortlist, own.shape[-1] - 1), dim=-1)
        ids.append(kept.indices)
        probs.append(kept.values)
        starts.append(starts[-1] + len(own))
    return {
        "teacher_starts": torch.tensor(starts[:-1]),
        "teacher_ids": torch.cat(ids),
        "teacher_probs": torch.cat(probs),
    }


def _picked_rows(found: ForwardPass) -> Sequences:
    if found.index is None:
        raise ValueError("The forward pass does not know which rows its answers are from, so it has no weights.")
    return found.computed_before("picked")[found.index].to(found.log_probs)


@lru_cache
def random_direction(size: int, seed: int) -> Float[Tensor, " size"]:
    """Uniform in [0, 1)^size, divided by its length; the same for a seed on every process."""
    drawn = torch.rand(size, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm()


_log_probs = Need(
    "log_probs", "log-probability of each token, in nats", ("tokens",), "<= 0",
    lambda found: found.log_probs, differentiable=True,
)  # fmt: skip
_logits = Need(
    "logits", "logits at each token, over the vocabulary", ("tokens", "vocab"), "any",
    lambda found: found.kept("logits"), keeps="logits", differentiable=True,
)  # fmt: skip
_hidden = Need(
    "hidden", "hidden state of one layer at each token", ("tokens", "hidden"), "any",
    lambda found: found.kept("hidden"), keeps="hidden", differentiable=True,
)  # fmt: skip
_targets = Need("targets", "id of each token", ("tokens",), "token id", lambda found: found.targets)
_answer_nll = Need(
    "nll", "negative log-likelihood of each answer, summed over its tokens, in nats", ("sequences",), ">= 0",
    _nll, differentiable=True,
)  # fmt: skip
_lengths = Need(
    "lengths", "number of tokens of each answer", ("sequences",), "count",
    lambda found: found.lengths.to(found.log_probs.dtype),
)  # fmt: skip

#: Everything that a loss may ask for, by the name of its argument.
NEEDS: dict[str, Need] = {
    need.name: need
    for need in (
        _log_probs,
        of_reference(_log_probs),
        _logits,
        of_reference(_logits),
        of_reinforced(_logits),
        _hidden,
        of_reference(_hidden),
        _targets,
        Need(
            "refusal_targets", "id of the refusal's token for each token, the refusal repeated as often as needed",
            ("tokens",), "token id", _refusal_targets,
        ),
        Need(
            "control", "a fixed random direction of length 1 in the space of hidden states", ("hidden",), "any",
            _control, keeps="hidden",
        ),
        Need(
            "rebuilt", "the hidden states as the autoencoder of their set rebuilds them", ("tokens", "hidden"), "any",
            lambda found: rebuilt_by(found.kept("hidden"), found.prepared, found.part), keeps="hidden",
            differentiable=True,
        ),
        Need(
            "cluster_centers", "centers of clusters of hidden states", ("clusters", "hidden"), "any",
            lambda found: found.computed_before("cluster_centers"), keeps="hidden",
        ),
        Need(
            "cluster_tokens", "id of the token that each cluster predicts", ("clusters",), "token id",
            lambda found: found.computed_before("cluster_tokens"), keeps="hidden",
        ),
        Need(
            "whitening", "matrix after which distances of hidden states are Mahalanobis distances",
            ("hidden", "hidden"), "any", lambda found: found.computed_before("whitening"), keeps="hidden",
        ),
        Need(
            "teacher_probs", "probabilities of a teacher's most likely tokens; all 0 at a token without a teacher",
            ("tokens", "shortlist"), "share", lambda found: _of_teacher(found, "teacher_probs"), of_row=True,
        ),
        Need(
            "teacher_ids", "ids of a teacher's most likely tokens", ("tokens", "shortlist"), "token id",
            lambda found: _of_teacher(found, "teacher_ids"), of_row=True,
        ),
        _answer_nll,
        of_reference(_answer_nll),
        _lengths,
        Need(
            "target_outputs", "mean margin that a model without the forget set is predicted to give to each answer",
            ("sequences",), "any", _target_outputs, of_row=True,
        ),
        Need(
            "picked", "weight of each answer among those that the method picked, 0 for the others; 1 on average",
            ("sequences",), ">= 0", _picked_rows, of_row=True,
        ),
        of_alternative(_answer_nll),
        of_alternative(_lengths),
        of_reference(of_alternative(_answer_nll)),
    )
}  # fmt: skip

#: What a loss can be averaged over -> axis of its value. "later tokens" are all but each answer's first.
UNITS = {"sequences": "sequences", "tokens": "tokens", "later tokens": "tokens"}

Loss = TypeVar("Loss", bound=Callable)


def averaged_over(unit: str) -> Callable[[Loss], Loss]:
    """Decorator: the loss is one value for each of these, and the trainer takes their mean over a whole step.

    Args:
        unit: One of `UNITS`: "tokens"; "later tokens" (without each answer's first, which the mean leaves out); or
            "sequences".
    """

    def mark(loss: Loss) -> Loss:
        loss.unit = unit  # type: ignore[attr-defined]
        return loss

    return mark


def unit_of(loss: Callable) -> str:
    """What a loss is averaged over: one of `UNITS`."""
    return loss.unit  # type: ignore[attr-defined]


def needs_of(loss: Callable) -> list[Need]:
    """What a loss asks for, in the order of its arguments."""
    return [NEEDS[name] for name in inspect.signature(loss).parameters if name in NEEDS]


def options_of(loss: Callable) -> dict[str, Any]:
    """A loss's own options with their defaults."""
    parameters = inspect.signature(loss).parameters
    return {name: p.default for name, p in parameters.items() if name not in NEEDS}


def require_at_least(name: str, value: float, lowest: float, *, strictly: bool = False) -> None:
    """Refuse an option out of its range; the losses and methods check their own. NaN is out of every range."""
    if not (value > lowest if strictly else value >= lowest):
        raise ValueError(f"`{name}` must be {'>' if strictly else '>='} {lowest:g}, got {value}.")


def require_finite(name: str, value: float) -> None:
    """Refuse NaN and infinity for an option that may have any sign."""
    if not math.isfinite(value):
        raise ValueError(f"`{name}` must be a finite number, got {value}.")


def check_options(loss: Callable, options: Mapping[str, Any]) -> None:
    """Refuse an option that the loss does not have, and a value that is out of its range."""
    known = options_of(loss)
    for option in options:
        if option not in known:
            raise ValueError(unknown_name(f"option of {loss.__name__}", option, known or ["(it has none)"]))
    loss(**example_arguments(loss), **options)


def example_arguments(
    loss: Callable, sizes: Mapping[str, int] | None = None, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """A value for each thing that a loss asks for; without `sizes`, the smallest ones, the same each time."""
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    sizes = sizes or {"tokens": 1, "sequences": 1, "vocab": 2, "hidden": 2, "clusters": 2, "shortlist": 1}
    return {need.name: need.example(sizes, generator) for need in needs_of(loss)}


def check_loss(loss: Callable) -> None:
    """Refuse a loss that the trainer could not call; registries of losses check this when a loss is registered.

    Raises:
        ValueError: An argument that is neither one of `NEEDS` nor an option with a default; a loss that
            asks for nothing through which a gradient reaches the model; or one that is not marked `averaged_over`.
    """
    name = getattr(loss, "__name__", repr(loss))
    for parameter in inspect.signature(loss).parameters.values():
        if parameter.name in NEEDS:
            continue
        if parameter.kind is not parameter.KEYWORD_ONLY or parameter.default is parameter.empty:
            meanings = "; ".join(f"{need.name} ({need.meaning})" for need in NEEDS.values())
            raise ValueError(
                f"The loss {name!r} asks for {parameter.name!r}, which the trainer cannot provide. "
                f"{unknown_name('argument', parameter.name, NEEDS)} They are: {meanings}. An option of the loss "
                "itself has to be keyword-only and have a default."
            )
    if not any(need.differentiable for need in needs_of(loss)):
        through = ", ".join(need.name for need in NEEDS.values() if need.differentiable)
        raise ValueError(
            f"The loss {name!r} asks for nothing that depends on the trained model, so it would train nothing. It "
            f"has to ask for at least one of {through}."
        )
    if getattr(loss, "unit", None) not in UNITS:
        raise ValueError(
            f"The loss {name!r} has to be marked with what it is averaged over: `@averaged_over(...)` with one of "
            f"{', '.join(map(repr, UNITS))}; got {getattr(loss, 'unit', None)!r}."
        )
