r"""The rule by which every divergence gets its gradient without autograd, and what a divergence states for it.

For D(q, p) with student probabilities :math:`q = \mathrm{softmax}(z / T)`, whatever D is,

.. math:: \frac{\partial D}{\partial z_v} = \frac{1}{T} \Big( s_v - q_v \sum_w s_w \Big),
          \qquad s_v = q_v \frac{\partial D}{\partial q_v}.

A divergence therefore states its value and its *slope* s, once, for any number of rows. `@fused_by(slope)` on the
formula ties the two together. A formula without a slope works all the same: autograd then differentiates it, a few
rows at a time.

A divergence also declares which forms of a teacher it accepts: "dense" rows over the vocabulary; "sparse" ones, some
tokens and one bucket for all the others; and "sampled" ones, some tokens drawn at random (`losses.rows`). Any sum over
outcomes of a function of (q, p) accepts all three: a bucket is an outcome, and a sum can be estimated from some of its
terms. One that ranks single tokens accepts dense rows alone. A fourth form, "mixture", is a weighted sum of several
teachers' divergences: it has the gradient of their mixture where D is linear in p up to a term without q, as that of
forward_kl is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cached_property
from typing import Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.registry import keyword_options

Rows = Float[Tensor, "rows vocab"]
PerRow = Float[Tensor, " rows"]
#: (student's outcomes, teacher's outcomes, **options) -> (D for each row, s)
Slope = Callable[..., tuple[PerRow, Rows]]
Formula = TypeVar("Formula", bound=Callable)
#: "dense": logits or log-probabilities over the vocabulary. "sparse": some tokens, and the mass of all the others.
#: "sampled": tokens drawn at random, each weighted so that a sum over them estimates the sum over the vocabulary.
#: "mixture": several teachers' rows of these forms, mixed by weights (`losses.rows.CombinedRows`).
#: "likelihood": the probabilities of a text's own tokens alone, which no divergence accepts.
Form = Literal["dense", "sparse", "sampled", "mixture", "likelihood"]
#: The forms that a divergence can accept.
ALL_FORMS: tuple[Form, ...] = ("dense", "sparse", "sampled", "mixture")
#: The forms that a sum over the vocabulary accepts.
SUM_FORMS: tuple[Form, ...] = ("dense", "sparse", "sampled")


class Outcomes:
    """What a few rows give to each outcome; several readers share both tensors, so neither is to be overwritten.

    Args:
        log: Natural logarithms of probability.
        normalized: Whether each row sums to 1. Its softmax is then its exponential, which a CPU computes in two
            thirds of the time.
    """

    def __init__(self, log: Float[Tensor, "rows outcomes"], *, normalized: bool = False) -> None:
        self.log, self._normalized = log, normalized

    @cached_property
    def probs(self) -> Float[Tensor, "rows outcomes"]:
        """exp(log), computed once."""
        return self.log.softmax(-1) if self._normalized else self.log.exp()


SLOPES: dict[Callable, Slope] = {}
_FORMS: dict[Callable, tuple[Form, ...]] = {}


def fused_by(slope: Slope, *, forms: tuple[Form, ...] = ("dense",)) -> Callable[[Formula], Formula]:
    """Decorator of a divergence on logits: `slope` gives the same value, and s as defined above.

    Args:
        slope: Of both sides' `Outcomes`; s in a tensor of its own, which is overwritten.
        forms: The forms of a teacher that the divergence accepts. "sparse" and "sampled" say that the divergence is a
            sum over tokens of a function of (q, p) alone; "mixture", that it is linear in p up to a term without q.
    """

    def tie(formula: Formula) -> Formula:
        SLOPES[formula] = slope
        return accepts(*forms)(formula)

    return tie


def accepts(*forms: Form) -> Callable[[Formula], Formula]:
    """Decorator of a divergence without a slope: the forms of a teacher that it accepts; dense ones without it."""
    unknown = [form for form in forms if form not in ALL_FORMS]
    if unknown or not forms:
        raise ValueError(f"A divergence accepts one or more of {', '.join(ALL_FORMS)}, got {list(forms)}.")

    def note(formula: Formula) -> Formula:
        if "sampled" in forms and formula not in SLOPES:
            raise ValueError(
                f"{getattr(formula, '__name__', formula)!r} accepts sampled rows, which needs its slope: state it "
                "with `@fused_by(slope, forms=...)`."
            )
        _FORMS[formula] = forms
        return formula

    return note


def forms_of(divergence: Callable) -> tuple[Form, ...]:
    """The forms of a teacher that a divergence accepts."""
    return _FORMS.get(divergence, ("dense",))


def require_form(divergence: Callable, form: Form, teacher: str = "this teacher") -> None:
    """Refuse a teacher whose rows the divergence cannot read.

    Args:
        teacher: What a message calls it.

    Raises:
        ValueError: The divergence does not accept this form.
    """
    forms = forms_of(divergence)
    name = getattr(divergence, "__name__", repr(divergence))
    if form == "mixture" and form not in forms:
        raise ValueError(
            f"{name} needs the probability of each token in the mixture of several teachers, but a cache or a server "
            "among them lists only some tokens, and what one does not list is unknown. Choose forward_kl, whose "
            "gradient is the weighted sum of each teacher's own; or mix models and adapters alone; or give each row "
            "of the data one teacher (`teachers_by: column`)."
        )
    if form == "likelihood":
        raise ValueError(
            f"{name} needs {' or '.join(forms)} teacher rows, but {teacher} tells the likelihoods of the tokens of a "
            "text alone. Choose a span loss that reads likelihoods (alm), or a cache of another kind."
        )
    if form not in forms:
        raise ValueError(
            f"{name} needs {' or '.join(forms)} teacher rows, but {teacher} gives {form} ones. Choose a divergence "
            f"that accepts {form} rows, or a teacher of the other form."
        )


def weighted(probabilities: Float[Tensor, "*shape"], values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`probabilities * values` with 0 * (anything, -inf and NaN too) = 0, as in every sum of p log p."""
    return torch.where(probabilities > 0, probabilities * values, 0.0)


def weighted_rows(probabilities: Rows, values: Rows) -> Rows:
    """`weighted` in a slope, where no gradient flows.

    On a CPU the plain product comes first, which is two passes instead of four; rows that it cannot do are done again.
    """
    if not probabilities.is_cuda:  # on a GPU the question would wait for it
        found = probabilities * values
        if bool(found.sum().isfinite()):
            return found
    return weighted(probabilities, values)


def weighted_sum(probabilities: Rows, values: Rows) -> PerRow:
    """`weighted_rows(probabilities, values).sum(-1)`."""
    if not probabilities.is_cuda:
        found = torch.linalg.vecdot(probabilities, values)
        if bool(found.isfinite().all()):
            return found
    return weighted(probabilities, values).sum(-1)


def mixture(share: float, p: Float[Tensor, "*shape"], q: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`share * p + (1 - share) * q`, at least the smallest normal number of the dtype.

    Where p and q are so small that the product with a share would be 0, the logarithm of the mixture stays finite.
    What is added is less than 1e-37 of probability in float32, far below what a sum over a vocabulary can hold.
    """
    return torch.clamp(share * p + (1 - share) * q, min=torch.finfo(p.dtype).tiny)


def logit_gradient(student: Outcomes, slope: Rows, temperature: float) -> Rows:
    """dD/dz from the slope, by the rule above. Overwrites and returns `slope`."""
    slope.addcmul_(student.probs, slope.sum(-1, keepdim=True), value=-1.0)
    return slope if temperature == 1 else slope.div_(temperature)


def own_options(divergence: Callable) -> list[str]:
    """The names of a divergence's own options (`beta`, `skew`, ...)."""
    return [name for name in keyword_options(divergence) if name != "temperature"]


def check_signature(divergence: Callable) -> None:
    """Refuse a function that could not be called as a divergence, before anything is trained with it.

    Raises:
        ValueError: The signature is another one, an option has no default, or the docstring names no source.
    """
    name = getattr(divergence, "__name__", repr(divergence))
    wanted = f"{name}(student_logits, teacher_logits, *, temperature=1.0, **own options with defaults)"
    parameters = inspect.signature(divergence).parameters
    positional = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    if positional != ["student_logits", "teacher_logits"]:
        raise ValueError(f"A divergence is {wanted}, got {name}({', '.join(map(str, parameters.values()))}).")
    if "temperature" not in parameters or parameters["temperature"].default != 1.0:
        raise ValueError(f"A divergence is {wanted}: `temperature` of {name} is missing, or its default is not 1.0.")
    for option in own_options(divergence):
        if parameters[option].default is inspect.Parameter.empty:
            raise ValueError(f"A divergence is {wanted}: `{option}` of {name} has no default.")
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values()):
        raise ValueError(f"A divergence is {wanted}: {name} takes any arguments, which hides typos.")
    if "Source: " not in (inspect.getdoc(divergence) or ""):
        raise ValueError(f'The docstring of {name} names no source. Write "Source: authors, year, link".')
