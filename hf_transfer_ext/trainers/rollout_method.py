"""What a method of on-policy distillation decides: who writes the texts of a batch, and what counts of their loss."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import Parameter
from typing import Any, ClassVar, Literal, NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor

from hf_transfer_ext.registry import keyword_options, unknown_name

#: Who wrote a text: the data set, the student just now, the teacher, the student earlier (from a buffer), or the
#: student and the teacher together (each token is drawn from a mixture of both).
Source = Literal["data", "student", "teacher", "replay", "mixture"]


@dataclass(frozen=True)
class Rollout:
    """One text: its prompt, and what was written after it.

    Args:
        ids: All tokens.
        labels: The written tokens at their places, and -100 elsewhere.
        source: Who wrote it.
        log_probs: Of each written token under the student, at the sampling temperature, in nats; None if not noted.
        teacher_log_probs: The same under the teacher, at temperature 1; None if not noted.
        ended: Whether a stop token or stop string ended it, and not its length; False for texts of the data.
        route: Place of the teacher that its prompt's row names (`teachers_by: column`); None where rows name none.
    """

    ids: list[int]
    labels: list[int]
    source: Source
    log_probs: list[float] | None = None
    teacher_log_probs: list[float] | None = None
    ended: bool = False
    route: int | None = None

    @property
    def written(self) -> list[int]:
        return [label for label in self.labels if label != -100]


class RolloutTokens(NamedTuple):
    """The labeled tokens of a batch, as one list, in reading order.

    by_student: Whether the student wrote the token, alone or together with the teacher.
    row: Its text, counted from 0.
    log_probs: Under the student when it was drawn; NaN where that is not known.
    teacher_log_probs: Under the teacher when it was drawn; NaN where that is not known.
    """

    by_student: Bool[Tensor, " tokens"]
    row: Tensor
    log_probs: Float[Tensor, " tokens"]
    teacher_log_probs: Float[Tensor, " tokens"]


class RolloutMethod:
    """A method of on-policy distillation; its options are the keyword arguments of its `__init__`.

    The divergence, its temperature and the weights are those of the config. A method chooses the sources of each
    batch, and may change how much each token counts.
    """

    #: `on_policy_share` where the config leaves it out.
    default_share: ClassVar[float]
    #: `loss` where the config leaves it out.
    default_loss: ClassVar[str] = "forward_kl"
    #: Whether the teacher is asked for the log-probability of each written token, and for nothing else.
    sampled_tokens: ClassVar[bool] = False
    #: Whether the log-probabilities of written tokens are noted while they are drawn; sampling cannot be truncated
    #: then.
    notes_log_probs: ClassVar[bool] = False
    #: Whether `after_evaluation` decides something by the cross entropy of held-out texts.
    reads_evaluations: ClassVar[bool] = False
    #: The teacher's share of each next-token distribution, for the source "mixture".
    teacher_mix: float = 0.0

    def check(self, args: Any) -> None:
        """Refuse a config that the method cannot follow.

        Raises:
            ValueError: With the setting and what to do.
        """

    def needs_completions(self, args: Any) -> bool:
        """Whether the data have to hold completions, and not prompts alone."""
        return args.on_policy_share < 1 and not args.teacher_writes

    def student_writes_all(self, args: Any) -> bool:
        """Whether no batch has a text of the data or the teacher: cross entropy and `teacher_writes` do nothing."""
        return args.on_policy_share == 1

    def sources(self, draw: float, args: Any, progress: float) -> tuple[Source, ...]:
        """Who writes the texts of one batch; each source answers the same prompts.

        Args:
            draw: Random number in [0, 1), the same on all processes.
            args: The trainer's config.
            progress: Share of the training steps that are done, in [0, 1].
        """
        raise NotImplementedError

    def terms(self, tokens: RolloutTokens, args: Any) -> dict[str, Any]:
        """Arguments of `fused_divergence` beside those of the config: `kd_factors`, `ce_factors`, options.

        By default cross entropy leaves out what the student wrote: it would learn its own samples.
        """
        return {"ce_factors": (~tokens.by_student).float()} if args.ce_weight else {}

    def evaluated_on(self, args: Any, has_completions: bool) -> tuple[Source, ...]:
        """Who writes the texts of an evaluation batch: by default the data, or the student after prompts alone.

        A method whose training batches always have the same sources is evaluated on those.
        """
        return ("data",) if has_completions else ("student",)

    def objective(self, tokens: RolloutTokens, args: Any) -> dict[str, Any]:
        """As `terms`, in evaluation: without what is there for its gradient alone."""
        return self.terms(tokens, args)

    def trust(self) -> dict[str, Any]:
        """Arguments of `teachers.sampled.drawn_rows`, for methods with `sampled_tokens`."""
        return {}

    def replayed(self, count: int, seed: int) -> list[Rollout]:
        """Texts that the student wrote earlier, for the source "replay"."""
        raise NotImplementedError

    def note(self, written: list[Rollout]) -> None:
        """Called with the texts that the student just wrote for a training step."""

    def after_evaluation(self, cross_entropy: float) -> dict[str, float]:
        """Called after each evaluation on the trainer's own sets, if `reads_evaluations`.

        Args:
            cross_entropy: On the completions of the data, in nats per token; of several sets, the mean of theirs.

        Returns:
            What is to be logged with the metrics.
        """
        return {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold, as JSON."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""


def require_writer(args: Any, method: RolloutMethod, teacher: str) -> None:
    """Refuse a method or setting that lets the teacher write, for one that cannot.

    Args:
        teacher: What it is, in words.

    Raises:
        ValueError: With what to do.
    """
    if not args.teacher_writes and method.teacher_mix == 0:
        return
    instead = "set `teacher_writes` to False" if args.teacher_writes else "choose gkd or sampled_reverse_kl"
    how = "lets the teacher write" if args.teacher_writes else "lets the teacher write each token with the student"
    raise ValueError(
        f"{args.on_policy} {how}, which {teacher} cannot do. Give one model or adapter as the teacher, or {instead}."
    )


def method_options(method: type[RolloutMethod]) -> dict[str, Any]:
    """The options of a method with their defaults."""
    return keyword_options(method)


def method_from(method: type[RolloutMethod], options: dict[str, Any]) -> RolloutMethod:
    """The method with these options.

    Raises:
        ValueError: It does not have one of them, or a value is out of its range.
    """
    known = method_options(method)
    for option in options:
        if option not in known:
            raise ValueError(unknown_name(f"option of {method.__name__}", option, known or ["(it has none)"]))
    return method(**options)


def check_method(method: Any) -> None:
    """Refuse what could not be used as a method of on-policy distillation.

    Raises:
        ValueError: It is not a `RolloutMethod`, an option has no default, or it names no source.
    """
    name = getattr(method, "__name__", repr(method))
    if not (isinstance(method, type) and issubclass(method, RolloutMethod)):
        raise ValueError(f"{name!r} has to be a subclass of RolloutMethod.")
    if not hasattr(method, "default_share"):
        raise ValueError(f"{name!r} does not state its `default_share`.")
    if "Source: " not in (method.__doc__ or ""):
        raise ValueError(f'The docstring of {name} names no source. Write "Source: authors, year, link".')
    for option, default in method_options(method).items():
        if default is Parameter.empty:
            raise ValueError(f"`{option}` of {name} has no default.")
