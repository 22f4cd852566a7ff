"""Several teachers at once: a weighted mixture, one for each row of the data, or the one that is surest.

A mixture whose weights are learned is in `teachers/learned.py`.

Any `Teacher` takes part: models, adapters of one base, the base with adapters off, caches. What each is good for
decides how they are combined.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_transfer_ext.losses.rows import DenseBlock, DenseRows, SampledRows, SampledTokens, SparseRows, TopTokens
from hf_transfer_ext.losses.slopes import Form
from hf_transfer_ext.registry import unknown_name
from hf_transfer_ext.teachers.signal import Teacher, TeacherSignal
from hf_transfer_ext.tensors import Mask


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
        if not weights.numel() or bool((weights >= 0).all() & ((weights.sum(1) - 1).abs() < 1e-4).all()):
            self.members, self.weights, self.temperature = list(members), weights.float(), temperature
            self.vocab_size = min(member.vocab_size for member in members)
            return
        raise ValueError(f"The weights of a mixture have to be >= 0 and sum to 1, got {weights[0].tolist()} ...")

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


class Several:
    """What all combinations share: names, and one form."""

    def __init__(self, teachers: Mapping[str, Teacher]) -> None:
        if not teachers:
            raise ValueError("Several teachers are needed, got none.")
        self.teachers = dict(teachers)
        forms = {name: teacher.form for name, teacher in self.teachers.items()}
        if len(set(forms.values())) > 1:
            shown = ", ".join(f"{name} {form}" for name, form in forms.items())
            raise ValueError(
                f"Teachers that are combined need rows of one form, got {shown}. Put all of them behind caches of one "
                "kind, or none."
            )
        self.form: Form = next(iter(forms.values()))

    def _need_dense(self) -> None:
        if self.form != "dense":
            raise ValueError(
                f"{type(self).__name__} needs the whole distribution of each teacher, got {self.form} rows: what one "
                "does not list, another one may. Use the models themselves, or `RoutedTeachers`; the mixture can then "
                "be cached as one teacher."
            )

    def _signals(self, student: nn.Module, inputs: dict[str, Any], mask: Mask) -> list[Any]:
        found = []
        for name, teacher in self.teachers.items():
            signal = teacher.signal(student, inputs, mask)
            _refuse_own_targets(name, signal)
            found.append(signal.rows)
        return found


def _refuse_own_targets(name: str, signal: TeacherSignal) -> None:
    if signal.targets is not None:
        raise ValueError(
            f"The teacher {name!r} speaks of tokens of its own (another tokenizer), which cannot be combined with "
            "others."
        )


class MixedTeachers(Several):
    """The weighted mixture of the teachers' probabilities, the same at each token.

    Args:
        teachers: Name -> teacher, with dense rows.
        weights: Name -> share, > 0; divided by their sum. None: equal ones.
        temperature: The `distill_temperature` of the training.

    When to use it: teachers of the same task, whose mistakes differ: an ensemble is better calibrated than each.
    """

    def __init__(
        self, teachers: Mapping[str, Teacher], weights: Mapping[str, float] | None = None, *, temperature: float = 1.0
    ) -> None:
        super().__init__(teachers)
        self._need_dense()
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
        rows = self._signals(student, inputs, mask)
        shares = torch.tensor(self.shares).expand(len(rows[0]), -1)
        return TeacherSignal(MixtureRows(rows, shares, temperature=self.temperature))


class ConfidentTeachers(Several):
    r"""A mixture in which each token's weights follow the teachers' confidence there:

    .. math:: w_i \propto \exp(-H(p_i) / \tau)

    with the entropy H in nats: a small tau takes the surest teacher alone, a large one gives equal weights.

    Args:
        teachers: Name -> teacher, with dense rows.
        sharpness: tau in nats, > 0.
        temperature: The `distill_temperature` of the training.

    When to use it: teachers of different domains, where no column of the data says which one knows a row. A teacher
    that is sure and wrong is not found out.

    Source: this package's own.
    """

    def __init__(self, teachers: Mapping[str, Teacher], *, sharpness: float = 0.5, temperature: float = 1.0) -> None:
        super().__init__(teachers)
        self._need_dense()
        if not sharpness > 0 or not temperature > 0:
            raise ValueError(f"`sharpness` and `temperature` have to be > 0, got {sharpness} and {temperature}.")
        self.sharpness, self.temperature = sharpness, temperature

    def signal(self, student: nn.Module, inputs: dict[str, Any], mask: Mask) -> TeacherSignal:
        """The mixture at the student's labeled tokens; see `Teacher.signal`."""
        rows = self._signals(student, inputs, mask)
        entropies = torch.stack([_entropies(one) for one in rows], 1)
        weights = (-entropies / self.sharpness).softmax(1)
        return TeacherSignal(MixtureRows(rows, weights, temperature=self.temperature))


def _entropies(rows: DenseRows, few: int = 64) -> Float[Tensor, " tokens"]:
    """Entropy at temperature 1 of each row, in nats, a few rows at a time."""
    read, found = rows.reader(), [torch.zeros(0)]
    for start in range(0, len(rows), few):
        block: Any = read(slice(start, min(start + few, len(rows))))
        log_p = rows.finish(block.float()).log_softmax(-1)
        found.append(-torch.where(log_p > -torch.inf, log_p.exp() * log_p, 0.0).sum(-1).cpu())
    return torch.cat(found)


class RoutedTeachers(Several):
    """One teacher for each row of the batch, by a column of the data. The others do not run for it.

    Args:
        teachers: Name -> teacher; all with rows of one form.
        column: Name of the batch's tensor `(batch,)` that says which: the place of a teacher in `teachers`, from 0.
            The data collator has to keep it (`remove_unused_columns=False`); the student does not see it.

    When to use it: experts of known domains (code, medicine, one language each), and a data set that says which is
    which.
    """

    def __init__(self, teachers: Mapping[str, Teacher], *, column: str = "teacher") -> None:
        super().__init__(teachers)
        self.column = column

    def signal(self, student: nn.Module, inputs: dict[str, Any], mask: Mask) -> TeacherSignal:
        """The chosen teacher's rows at the student's labeled tokens; see `Teacher.signal`.

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
        names = list(self.teachers)
        if routes.numel() and not 0 <= int(routes.min()) <= int(routes.max()) < len(names):
            raise ValueError(
                f"The column {self.column!r} names teacher {int(routes.max())}, but there are {len(names)}: "
                f"{', '.join(names)}, counted from 0."
            )
        rows_of, parts = [], []
        for i, (name, teacher) in enumerate(self.teachers.items()):
            chosen = (routes == i).to(mask.device)
            if not bool((mask & chosen[:, None]).any()):
                continue
            own = {
                key: value[chosen.to(value.device)]
                if isinstance(value, Tensor) and value.dim() and len(value) == len(mask)
                else value
                for key, value in inputs.items()
            }
            signal = teacher.signal(student, own, mask[chosen])
            _refuse_own_targets(name, signal)
            parts.append(signal.rows)
            rows_of.append((mask & chosen[:, None])[mask].nonzero()[:, 0])
        if not parts:
            return TeacherSignal(next(iter(self.teachers.values())).signal(student, inputs, mask).rows)
        order = torch.cat(rows_of).argsort()
        return TeacherSignal(_arranged(parts, order))


class _ArrangedRows(DenseRows):
    """Dense rows of several members, one behind the other, read in another order."""

    def __init__(self, members: Sequence[DenseRows], order: Tensor) -> None:
        self.members, self.order = list(members), order.cpu()
        self.vocab_size = min(member.vocab_size for member in members)

    def __len__(self) -> int:
        return len(self.order)

    def __call__(self, part: slice) -> DenseBlock:
        wanted, blocks, places, start = self.order[part], [], [], 0
        for member in self.members:
            own = ((wanted >= start) & (wanted < start + len(member))).nonzero()[:, 0]
            if len(own):
                # Rows of a member stay in order, so those of a part lie within one slice.
                first, last = int(wanted[own[0]]) - start, int(wanted[own[-1]]) - start
                block: Any = member(slice(first, last + 1))
                blocks.append(member.finish(block.float())[:, : self.vocab_size])
                places.append(own)
            start += len(member)
        joined = torch.cat([block.to(blocks[0].device) for block in blocks])
        return joined[torch.cat(places).argsort().to(joined.device)]


def _arranged(parts: Sequence[Any], order: Tensor) -> DenseRows | SparseRows | SampledRows:
    """Rows of several teachers, brought into the order of the batch."""
    if isinstance(parts[0], DenseRows):
        return _ArrangedRows(parts, order)
    temperatures = {part.temperature for part in parts}
    if len(temperatures) > 1:
        raise ValueError(f"The teachers' caches have different temperatures: {sorted(temperatures)}. Use one.")
    order = order.to(parts[0].top.ids.device if isinstance(parts[0], SparseRows) else parts[0].listed.ids.device)
    if isinstance(parts[0], SparseRows):
        widths = {part.top.ids.shape[1] for part in parts}
        if len(widths) > 1:
            raise ValueError(
                f"The teachers' caches list different numbers of tokens: {sorted(widths)}. Use one `top`."
            )
        top = TopTokens(
            torch.cat([part.top.ids for part in parts])[order],
            torch.cat([part.top.log_probs for part in parts])[order],
            torch.cat([part.top.tail for part in parts])[order],
        )
        return SparseRows(top, temperature=parts[0].temperature)
    width = max(part.listed.ids.shape[1] for part in parts)

    def filled(name: str, rest: float) -> Tensor:
        tensors = [getattr(part.listed, name) for part in parts]
        return torch.cat([nn.functional.pad(one, (0, width - one.shape[1]), value=rest) for one in tensors])[order]

    listed = SampledTokens(filled("ids", 0), filled("log_probs", -math.inf), filled("factors", 0.0))
    return SampledRows(listed, temperature=parts[0].temperature)


def _single(teachers: Mapping[str, Any]) -> dict[str, Any]:
    """The teachers within combined and cached ones."""
    found: dict[str, Any] = {}
    for name, teacher in teachers.items():
        if isinstance(teacher, Several):
            found |= _single(teacher.teachers)
        else:
            found[name] = getattr(teacher, "teacher", None) or teacher
    return found


def frozen_bytes(teachers: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of memory that each teacher's own frozen weights take; adapters of the student's base, and caches, take 0.

    Weights that several share are counted for the first one alone. Combined teachers count each for itself, and one
    that fills a cache counts as long as it is there.
    """
    seen: set[int] = set()
    found: dict[str, int] = {}
    for name, teacher in _single(teachers).items():
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
