"""Several teachers at once: a weighted mixture, a mixture by confidence, or one teacher for each row of the data.

A mixture whose weights are learned is in `teachers/learned.py`.

Any `Teacher` takes part: models, adapters of one base, the base with adapters off, caches, servers. A mixture of
models and adapters is one distribution over the vocabulary, which every divergence accepts and a cache can store. With
a cache or a server among them it is a weighted sum of each teacher's own divergence, which has the gradient of the
mixture for forward_kl alone (`losses.rows.CombinedRows`); other divergences are refused.

Teachers with tokenizers of their own (`SpanTeacher`) are combined by weight or by a column as well: each teaches the
spans of its own tokens (`taught_spans`).
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from hf_transfer_ext.losses.rows import (
    CombinedRows,
    DenseBlock,
    DenseRows,
    SampledRows,
    SparseRows,
    TeacherRows,
    check_shares,
)
from hf_transfer_ext.losses.slopes import Form, weighted
from hf_transfer_ext.models.heads import causal_lm_of, head_rows
from hf_transfer_ext.registry import unknown_name
from hf_transfer_ext.teachers.cache import (
    FORMAT,
    CachedTeacher,
    TeacherCache,
    planned_spec,
    refuse_hub_folder,
    tokenizer_digest,
    weights_digest,
)
from hf_transfer_ext.teachers.live import LiveTeacher
from hf_transfer_ext.teachers.signal import Teacher, TeacherSignal
from hf_transfer_ext.teachers.spans import SpanSignal, SpanTeacher
from hf_transfer_ext.tensors import Mask

#: Tokens whose distributions are read at once.
FEW = 64
#: Least probability of "any other token": below it, what is left of a sum is rounding.
LEAST_REST = 1e-6


class MixtureRows(DenseRows):
    r"""A mixture of distributions as rows:

    .. math:: \log p(v) = \log \sum_i w_i \, p_i(v), \qquad p_i = \mathrm{softmax}(z_i / T)

    Args:
        members: Dense rows of the same tokens.
        weights: Share of each member at each token; each row sums to 1.
        temperature: Of the loss. What is given are logits whose softmax at this temperature is the mixture.
    """

    def __init__(
        self, members: Sequence[DenseRows], weights: Float[Tensor, "tokens members"], *, temperature: float = 1.0
    ) -> None:
        check_shares(weights)
        self.members, self.weights, self.temperature = list(members), weights.float(), temperature
        self.vocab_size = min(member.vocab_size for member in members)

    def __len__(self) -> int:
        return len(self.members[0])

    def __call__(self, part: slice) -> DenseBlock:
        return self._mixed(part, [member.__call__ for member in self.members])

    def reader(self) -> Callable[[slice], DenseBlock]:
        readers = [member.reader() for member in self.members]
        return lambda part: self._mixed(part, readers)

    def _mixed(self, part: slice, readers: Sequence[Callable[[slice], Any]]) -> DenseBlock:
        total: Tensor | None = None
        for member, read, log_weight in zip(self.members, readers, self.weights[part].log().unbind(1), strict=True):
            logits = member.finish(read(part).float())[:, : self.vocab_size]
            own = (logits / self.temperature).log_softmax(-1) + log_weight.to(logits.device)[:, None]
            total = own if total is None else torch.logaddexp(total, own.to(total.device))
        assert total is not None
        return total.mul_(self.temperature)


class Several(ABC):
    """What all combinations share: the teachers' names, and the forms of their rows."""

    def __init__(self, teachers: Mapping[str, Teacher | SpanTeacher]) -> None:
        if not teachers:
            raise ValueError("Several teachers are needed, got none.")
        self.teachers: dict[str, Any] = dict(teachers)

    @property
    def forms(self) -> tuple[Form, ...]:
        """All forms that a divergence has to accept: those of the teachers, and "mixture" where not all are dense."""
        found = {form for teacher in self.teachers.values() for form in teacher_forms(teacher)}
        if found != {"dense"}:
            found.add("mixture")
        return tuple(form for form in get_args(Form) if form in found)

    @property
    def form(self) -> Form:
        """The form that the fewest divergences accept, "dense" where all rows are."""
        return self.forms[-1]

    @property
    def sharded(self) -> bool:
        """Whether a teacher is split across processes, which have to run it together."""
        return any(getattr(teacher, "sharded", False) for teacher in self.teachers.values())

    @abstractmethod
    def signal(self, student: nn.Module, inputs: dict[str, Any], mask: Mask) -> TeacherSignal:
        """The teachers' view of a batch; see `Teacher.signal`."""

    def _rows(self, student: nn.Module, inputs: dict[str, Any], mask: Mask) -> list[TeacherRows]:
        """The rows of each teacher at the labeled tokens."""
        return [_own_rows(name, one.signal(student, inputs, mask)) for name, one in self.teachers.items()]


def teacher_forms(teacher: Any) -> tuple[Form, ...]:
    """The forms of a teacher's rows: several, where teachers are combined."""
    return teacher.forms if isinstance(teacher, Several) else (teacher.form,)


def _own_rows(name: str, signal: TeacherSignal) -> TeacherRows:
    if signal.targets is not None:
        raise ValueError(
            f"The teacher {name!r} gives rows for tokens of its own (another tokenizer), which cannot be combined "
            "with those of others."
        )
    return signal.rows


def mixed_signal(rows: Sequence[Any], weights: Float[Tensor, "tokens members"], temperature: float) -> TeacherSignal:
    """A mixture of rows of the same tokens: one distribution where all are dense, else a sum of divergences."""
    if all(isinstance(one, DenseRows) for one in rows):
        return TeacherSignal(MixtureRows(rows, weights, temperature=temperature))
    return TeacherSignal(CombinedRows.mixed(rows, weights))


class MixedTeachers(Several):
    """The weighted mixture of the teachers' probabilities, the same at each token.

    Args:
        teachers: Name -> teacher. With a cache or a server among them the divergence has to be forward_kl, whose
            gradient is the weighted sum of each teacher's own: nothing is assumed of the tokens that one does not
            list. A list of all tokens gives the gradient of the model itself. With teachers of other tokenizers it is
            the weighted sum of each teacher's span loss.
        weights: Name -> share, > 0; divided by their sum. None: equal ones.
        temperature: The `distill_temperature` of the training.

    When to use it: teachers of the same task, whose mistakes differ: an ensemble is better calibrated than each.
    """

    def __init__(
        self,
        teachers: Mapping[str, Teacher | SpanTeacher],
        weights: Mapping[str, float] | None = None,
        *,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(teachers)
        weights = weights if weights is not None else dict.fromkeys(teachers, 1.0)
        for name in weights:
            if name not in self.teachers:
                raise ValueError(unknown_name("teacher", name, self.teachers))
        lacking = [name for name in self.teachers if not 0 < weights.get(name, 0.0) < math.inf]
        if lacking or not temperature > 0:
            raise ValueError(
                f"Each teacher needs a weight > 0, and `temperature` has to be > 0; got {dict(weights)} and "
                f"{temperature}. Leave out the teachers that are not to count."
            )
        total = sum(weights.values())
        self.shares, self.temperature = [weights[name] / total for name in self.teachers], temperature

    def signal(self, student: nn.Module, inputs: dict[str, Any], mask: Mask) -> TeacherSignal:
        """The mixture at the student's labeled tokens; see `Teacher.signal`."""
        rows = self._rows(student, inputs, mask)
        shares = torch.tensor(self.shares).expand(len(rows[0]), -1)
        return mixed_signal(rows, shares, self.temperature)


class ConfidentTeachers(Several):
    r"""A mixture in which each token's weights follow the teachers' confidence there:

    .. math:: w_i \propto \exp(-H(p_i) / \tau)

    with the entropy H in nats: a small tau takes the most confident teacher alone, a large one gives equal weights.

    Args:
        teachers: Name -> teacher. With a cache or a server among them the entropies are those of the k likeliest
            tokens and one bucket for all others, k being the shortest list, for every teacher alike: lists of
            different lengths, and whole distributions, are compared fairly. The divergence has to be forward_kl then
            (`MixedTeachers`). A cache of kind "samples" does not know its likeliest tokens, and is refused.
        sharpness: tau in nats, > 0.
        temperature: The `distill_temperature` of the training. Entropies of whole distributions are taken at
            temperature 1, those of lists at this one.

    When to use it: teachers of different domains, where no column of the data says which one knows a row. A teacher
    that is confident and wrong is not detected.

    Source: this package's own.
    """

    def __init__(self, teachers: Mapping[str, Teacher], *, sharpness: float = 0.5, temperature: float = 1.0) -> None:
        super().__init__(teachers)
        if not sharpness > 0 or not temperature > 0:
            raise ValueError(f"`sharpness` and `temperature` have to be > 0, got {sharpness} and {temperature}.")
        self.sharpness, self.temperature = sharpness, temperature

    def signal(self, student: nn.Module, inputs: dict[str, Any], mask: Mask) -> TeacherSignal:
        """The mixture at the student's labeled tokens; see `Teacher.signal`."""
        rows = self._rows(student, inputs, mask)
        entropies = views_of(self.teachers, rows, inputs["input_ids"][:, 1:][mask], self.temperature)[..., 0]
        return mixed_signal(rows, (-entropies / self.sharpness).softmax(1), self.temperature)


def views_of(
    names: Sequence[str] | Mapping[str, Any], rows: Sequence[Any], labels: Int[Tensor, " tokens"], temperature: float
) -> Float[Tensor, "tokens members 3"]:
    """How sure each teacher is at each token, and how likely it finds the label, measured alike for all of them.

    Of dense rows alone, at temperature 1: the entropy in nats, the log of the largest probability, and the
    log-probability of the label. Where some teachers list only some tokens, all are viewed at the temperature of the
    loss and through the lists: the entropy is that of the k likeliest tokens and one bucket for all others, with k the
    length of the shortest list; the label stands for itself where every list has it, and else for "a token that not
    every list has", whose probability each teacher knows, too. So no probability is assumed that a list lacks.

    Args:
        names: The teachers' names, in the order of `rows`.
        temperature: Of the loss, which lists were made at.

    Raises:
        ValueError: A teacher does not list its likeliest tokens.
    """
    lists = [None if isinstance(one, DenseRows) else _lists(name, one) for name, one in zip(names, rows, strict=True)]
    readers = [one.reader() for one in rows]
    found = [torch.zeros(0, len(rows), 3)]
    for start in range(0, len(labels), FEW):
        part = slice(start, min(start + FEW, len(labels)))
        shown: list[Any] = []  # the ids of a list, or None, and log-probabilities
        for one, read, listed in zip(rows, readers, lists, strict=True):
            if listed is not None:
                shown.append((listed[0][part], listed[1][part]))
                continue
            logits = one.finish(read(part).float())
            through = temperature if any(lists) else 1.0
            shown.append((None, (logits / through).log_softmax(-1)))
        own = labels[part].cpu()
        views = _through_lists(shown, own) if any(lists) else [_whole_view(log_p, own) for _, log_p in shown]
        found.append(torch.stack(views, 1))
    return torch.cat(found)


def _lists(name: str, rows: Any) -> tuple[Tensor, Tensor]:
    """The likeliest tokens of each row with their log-probabilities, on the CPU."""
    if isinstance(rows, SparseRows):
        return rows.top.ids.cpu(), rows.top.log_probs.cpu()
    if isinstance(rows, SampledRows) and rows.top:
        return rows.listed.ids[:, : rows.top].cpu(), rows.listed.log_probs[:, : rows.top].cpu()
    raise ValueError(
        f"The teacher {name!r} does not list its likeliest tokens ({type(rows).__name__}), from which its confidence "
        "is read. Make its cache with `kind: top` or `top_and_samples`, or combine the teachers by weight."
    )


def _whole_view(log_p: Tensor, labels: Tensor) -> Float[Tensor, "rows 3"]:
    entropy = -weighted(log_p.exp(), log_p).sum(-1)
    likelihood = log_p.gather(1, labels[:, None].to(log_p.device))[:, 0]
    return torch.stack([entropy, log_p.amax(-1), likelihood], 1).cpu()


def _through_lists(shown: Sequence[tuple[Tensor | None, Tensor]], labels: Tensor) -> list[Float[Tensor, "rows 3"]]:
    """What `views_of` says of each teacher where some of them have lists."""
    lists = [ids for ids, _ in shown if ids is not None]
    first, size = lists[0], min(ids.shape[1] for ids in lists)
    in_all = torch.ones_like(first, dtype=torch.bool)
    for ids in lists[1:]:
        in_all &= (first[:, :, None] == ids[:, None, :]).any(2)
    is_label = (first == labels[:, None]) & in_all
    found = []
    for own, log_p in shown:
        likeliest = log_p.topk(min(size, log_p.shape[1])).values.cpu()
        rest = (1 - likeliest.exp().sum(1)).clamp(min=0)
        entropy = -weighted(likeliest.exp(), likeliest).sum(1) - weighted(rest, rest.log())
        if own is None:
            at_first = log_p.gather(1, first.to(log_p.device)).cpu()
        else:
            same = first[:, :, None] == own[:, None, :]
            at_first = torch.where(same, log_p[:, None, :], -torch.inf).amax(2)
        outside = 1 - torch.where(in_all, at_first.exp(), 0.0).sum(1)
        of_label = torch.where(is_label, at_first, -torch.inf).amax(1)
        likelihood = torch.where(is_label.any(1), of_label, outside.clamp(min=LEAST_REST).log())
        found.append(torch.stack([entropy, likeliest[:, 0], likelihood], 1))
    return found


class RoutedTeachers(Several):
    """One teacher for each row of the batch, by a column of the data. The others do not run for it.

    Each row's tokens get the divergence of their own teacher's form, and the loss is the sum of these: models, caches
    of every kind and servers mix freely, as long as the divergence accepts the form of each.

    Args:
        teachers: Name -> teacher.
        column: Name of the batch's tensor `(batch,)` that says which: the place of a teacher in `teachers`, from 0.
            The data collator has to keep it (`remove_unused_columns=False`); the student does not see it.

    When to use it: experts of known domains (code, medicine, one language each), and a data set that says which is
    which.
    """

    def __init__(self, teachers: Mapping[str, Teacher | SpanTeacher], *, column: str = "teacher") -> None:
        super().__init__(teachers)
        self.column = column

    @property
    def forms(self) -> tuple[Form, ...]:
        """All forms that a divergence has to accept: those of the teachers."""
        found = {form for teacher in self.teachers.values() for form in teacher_forms(teacher)}
        return tuple(form for form in get_args(Form) if form in found)

    def signal(self, student: nn.Module, inputs: dict[str, Any], mask: Mask) -> TeacherSignal:
        """The chosen teacher's rows at the student's labeled tokens; see `Teacher.signal`.

        Raises: as `chosen`.
        """
        members, places = [], []
        for name, teacher, rows in self.chosen(inputs, mask):
            own = {
                key: value[rows.to(value.device)]
                if isinstance(value, Tensor) and value.dim() and len(value) == len(mask)
                else value
                for key, value in inputs.items()
            }
            members.append(_own_rows(name, teacher.signal(student, own, mask[rows])))
            places.append((mask & rows[:, None])[mask].nonzero()[:, 0])
        return TeacherSignal(CombinedRows.routed(members, places))

    def chosen(self, inputs: dict[str, Any], mask: Mask) -> Iterator[tuple[str, Any, Bool[Tensor, " batch"]]]:
        """Each teacher that a row with labeled tokens names, and the rows that name it.

        Takes the column out of `inputs`.

        Raises:
            ValueError: The batch lacks the column, or it names a teacher that does not exist.
        """
        routes = inputs.pop(self.column, None)
        if not isinstance(routes, Tensor) or routes.shape != mask.shape[:1]:
            raise ValueError(
                f"Routing needs the column {self.column!r} of shape ({len(mask)},) in the batch, got "
                f"{getattr(routes, 'shape', None)}. Keep it with `remove_unused_columns=False` and a collator that "
                "passes it on."
            )
        unknown = [route for route in routes.tolist() if not 0 <= route < len(self.teachers)]
        if unknown:
            raise ValueError(no_such_place(unknown[0], self.column, list(self.teachers)))
        rows = [(routes == place).to(mask.device) for place in range(len(self.teachers))]
        for (name, teacher), own in zip(self.teachers.items(), rows, strict=True):
            if bool(mask[own].any()):
                yield name, teacher, own


@dataclass(frozen=True)
class TaughtSpans:
    """What one teacher with a tokenizer of its own says about a batch.

    Args:
        name: The teacher's.
        share: Factor of its loss, > 0.
    """

    name: str
    teacher: SpanTeacher
    share: float
    signal: SpanSignal


def taught_spans(
    teacher: SpanTeacher | MixedTeachers | RoutedTeachers, student: nn.Module, inputs: dict[str, Any], mask: Mask
) -> list[TaughtSpans]:
    """The labeled spans of a batch, of each teacher in its own tokens.

    Mixed teachers all teach every text, by their shares; of routed ones each teaches its own rows, and the others do
    not run for them.

    Args:
        student, inputs, mask: As in `Teacher.signal`.

    Raises:
        ValueError: The student reads more than text, or a row names no teacher.
    """
    if isinstance(teacher, SpanTeacher):
        return [TaughtSpans("teacher", teacher, 1.0, teacher.spans(student, inputs, mask))]
    if isinstance(teacher, RoutedTeachers):
        return [
            TaughtSpans(name, one, 1.0, one.spans(student, inputs, mask & rows[:, None]))
            for name, one, rows in teacher.chosen(inputs, mask)
        ]
    members = zip(teacher.teachers.items(), teacher.shares, strict=True)
    return [TaughtSpans(name, one, share, one.spans(student, inputs, mask)) for (name, one), share in members]


def no_such_place(value: int, column: str, names: Sequence[str]) -> str:
    """Why a number does not name a teacher."""
    return (
        f"The column {column!r} names teacher {value}, but there are {len(names)}: {', '.join(names)}, counted from 0."
    )


def open_combined_cache(
    folder: str,
    teacher: Several,
    tokenizer: PreTrainedTokenizerBase,
    *,
    temperature: float,
    options: Mapping[str, Any] | None = None,
) -> CachedTeacher:
    """A mixture behind one cache: its rows are computed once, and from the second epoch on no teacher runs.

    The cache is known by the weights of all teachers and by how they are mixed. Complete, it is a teacher of its own,
    without them.

    Args:
        folder: A cache of this mixture, or the folder where one is made.
        teacher: A mixture by weight or by confidence of models and adapters.
        tokenizer: The student's.
        temperature: Of the loss.
        options: Arguments of `CacheSpec`; left out: those of the cache in the folder, or the defaults.

    Raises:
        ValueError: Such teachers cannot be stored as one, or the folder is a cache of something else.
    """
    refuse_hub_folder(folder)
    live = {name: one for name, one in teacher.teachers.items() if isinstance(one, LiveTeacher)}
    how = _how_mixed(teacher)
    if how is None or len(live) < len(teacher.teachers):
        others = [type(one).__name__ for name, one in teacher.teachers.items() if name not in live]
        raise ValueError(not_cached_as_one(type(teacher).__name__ if how is None else f"a {others[0]} among them"))
    spec = planned_spec(folder, temperature, options)
    sizes = [head_rows(causal_lm_of(one.network)) for one in live.values()]
    spec.check_vocabulary(min(sizes))
    models = {id(one.network): one.network for one in live.values()}
    digests = {key: weights_digest(model) for key, model in models.items()}
    members = [[digests[id(one.network)], getattr(one, "adapter", None)] for one in live.values()]
    mixture = json.dumps([members, how], sort_keys=True).encode()
    fingerprint = {
        "format": FORMAT, "teacher": f"mixture of {', '.join(live)}", "revision": None,
        "weights": hashlib.blake2b(mixture, digest_size=16).hexdigest(),
        "tokenizer": tokenizer_digest(tokenizer), "vocab_size": min(sizes), **asdict(spec),
    }  # fmt: skip
    return CachedTeacher(TeacherCache(folder, fingerprint), teacher)


def _how_mixed(teacher: Several) -> dict[str, Any] | None:
    """What a mixture depends on beside its teachers, or None where its rows are not always the same."""
    if isinstance(teacher, MixedTeachers):
        return {"shares": teacher.shares, "temperature": teacher.temperature}
    if isinstance(teacher, ConfidentTeachers):
        return {"sharpness": teacher.sharpness, "temperature": teacher.temperature}
    return None


def not_cached_as_one(got: str) -> str:
    """Why some combined teachers are not stored as one cache, and what to do.

    Learned weights change from step to step, routed rows belong to several teachers, and lists and draws of different
    teachers have no list in common.
    """
    return (
        "`teacher_cache` stores several teachers as one where they are models and adapters, mixed by weight or by "
        f"confidence; got {got}. Leave `teacher_cache` out. To store each teacher on its own, run `cache-teacher` for "
        "each model or server, and name the folders in `teachers`: {cache: FOLDER}."
    )


def single_teachers(teachers: Mapping[str, Any]) -> dict[str, Any]:
    """The teachers within combined and cached ones."""
    found: dict[str, Any] = {}
    for name, teacher in teachers.items():
        within = getattr(teacher, "teacher", None) or teacher  # of one that fills a cache
        found |= single_teachers(within.teachers) if isinstance(within, Several) else {name: within}
    return found


def frozen_bytes(teachers: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of memory that each teacher's own frozen weights take; adapters of the student's base, and caches, take 0.

    Weights that several share are counted for the first one alone. Combined teachers count each for itself, and one
    that fills a cache counts as long as it is there.
    """
    seen: set[int] = set()
    found: dict[str, int] = {}
    for name, teacher in single_teachers(teachers).items():
        model, total = getattr(teacher, "model", None), 0
        for parameter in model.parameters() if isinstance(model, nn.Module) else ():
            own = parameter.to_local() if isinstance(parameter, DTensor) else parameter  # this process's shard
            storage = own.untyped_storage()
            if not parameter.is_meta and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                total += storage.nbytes()
        found[name] = total
    return found


def shown_bytes(found: Mapping[str, int]) -> str:
    """`frozen_bytes` in words: each teacher that takes memory, and the sum."""
    parts = [f"{name} {total / 1e9:.3g} GB" for name, total in found.items() if total]
    whole = f"{sum(found.values()) / 1e9:.3g} GB"
    return "none of their own" if not parts else parts[0] if len(parts) == 1 else f"{whole} ({', '.join(parts)})"
