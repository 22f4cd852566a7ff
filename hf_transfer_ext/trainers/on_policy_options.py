"""The settings of on-policy distillation, as a part of `DistillationConfig`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hf_transfer_ext.trainers.generation_options import checked_options, distorting
from hf_transfer_ext.trainers.on_policy import ON_POLICY_METHODS
from hf_transfer_ext.trainers.rollout_method import RolloutMethod, method_from, require_writer
from hf_transfer_ext.trainers.vllm_writer import check_engine


@dataclass
class OnPolicyOptions:
    """Training texts that are written during training.

    Args:
        on_policy: A name of `ON_POLICY_METHODS` (gkd, ...); None trains on the data as they are.
        on_policy_options: The method's own options.
        on_policy_share: Share of the batches that the student writes, in [0, 1]; None for the method's default. At 1,
            `ce_weight` and `teacher_writes` would have no effect where the student writes alone, and are refused.
        teacher_writes: Where the student does not write, the teacher does, instead of the data set.
        max_new_tokens: Most tokens that are written after a prompt.
        sampling_temperature: Divides the writer's logits when tokens are drawn, > 0. The divergence has its own,
            `distill_temperature`.
        generation_options: Further options of transformers' `GenerationConfig` (top_p, repetition_penalty, ...).
            Without them tokens are drawn from the whole softmax, whatever the model's own config says.
            `eos_token_id` replaces the stop tokens of the model and its tokenizer, `stop_strings` end a text as well;
            what ends a text is its last label.
        rollout_engine: What the student writes with: "transformers", or "vllm" where that is installed. Its engine
            runs beside the training in each process (leave it room with `gpu_memory_utilization`), and is given all
            weights after each step. The teacher always writes with transformers.
        rollout_engine_options: Further arguments of `vllm.LLM`.
        log_rollouts: Texts of each step that go to `rollouts.jsonl` in `output_dir`. A resumed run goes on with that
            file; a new one renames an older file to `rollouts.1.jsonl` first.
    """

    on_policy: str | None = None
    on_policy_options: dict[str, Any] | str | None = field(default_factory=dict)
    on_policy_share: float | None = None
    teacher_writes: bool = False
    max_new_tokens: int = 128
    sampling_temperature: float = 1.0
    generation_options: dict[str, Any] | str | None = field(default_factory=dict)
    rollout_engine: str = "transformers"
    rollout_engine_options: dict[str, Any] | str | None = field(default_factory=dict)
    log_rollouts: int = 0

    def check_on_policy(self) -> None:
        """Fill in what follows from the method, and refuse what cannot be followed; called when all else is set."""
        config: Any = self
        self.on_policy_options: dict[str, Any] = dict(self.on_policy_options or {})  # type: ignore[arg-type]
        self.generation_options: dict[str, Any] = dict(self.generation_options or {})  # type: ignore[arg-type]
        self.rollout_engine_options: dict[str, Any] = dict(self.rollout_engine_options or {})  # type: ignore[arg-type]
        if self.on_policy is None and not self.on_policy_share and not self.teacher_writes:
            self._refuse_without_method()
            return
        if self.on_policy is None:
            self.on_policy = "gkd"
            self.on_policy_share = self.on_policy_share or 0.0
        method = self.rollout_method()
        if self.on_policy_share is None:
            self.on_policy_share = method.default_share
        if not 0 <= self.on_policy_share <= 1:
            raise ValueError(f"`on_policy_share` has to lie in [0, 1], got {self.on_policy_share}.")
        if self.max_new_tokens < 1 or self.log_rollouts < 0 or not self.sampling_temperature > 0:
            raise ValueError(
                "`max_new_tokens` has to be >= 1, `log_rollouts` >= 0 and `sampling_temperature` > 0, got "
                f"{self.max_new_tokens}, {self.log_rollouts} and {self.sampling_temperature}."
            )
        self.generation_options = checked_options(self.generation_options, self.max_new_tokens)
        changing = distorting(self.generation_options)
        if method.notes_log_probs and changing:
            raise ValueError(
                f"`generation_options` has {changing[0]!r}, but {self.on_policy} needs the probability with which "
                "each token was drawn: it has to be drawn from the whole softmax. Leave the option out."
            )
        if config.packing or config.padding_free:
            raise ValueError(
                "`packing` and `padding_free` join texts, but on-policy distillation writes one text after each "
                "prompt. Set both to False."
            )
        if not config.is_taught:
            raise ValueError("`kd_weight` is 0, so nobody teaches, and on-policy distillation has nothing to learn.")
        if config.is_span_loss and self.on_policy not in ("gkd", "distillm"):
            raise ValueError(
                f"`loss` is {config.loss!r}, which compares spans of text, but {self.on_policy} compares tokens. "
                "Choose gkd or distillm, or a divergence of tokens."
            )
        if config.loss == "dskd" and config.loss_options.get("alignment") != "exact":
            raise ValueError(
                "`loss: dskd` with `alignment: attention` trains its projections on the tokens of the text, but here "
                "the student writes the text, and the teacher would learn to repeat the student. Set "
                '`loss_options` to {"alignment": "exact"}, which takes the teacher\'s own tokens.'
            )
        if config.teachers is not None and config.teachers_by == "column" and method.sampled_tokens:
            raise ValueError(
                f"`teachers_by` is column, but {self.on_policy} asks one teacher for the probability of each written "
                "token. Choose gkd or distillm, or combine the teachers by weight or by confidence."
            )
        if config.teacher_cache is not None:
            raise ValueError(
                "`teacher_cache` stores a teacher's outputs for texts that come again, but on-policy distillation "
                "writes new ones in each step. Leave `teacher_cache` or `on_policy` out."
            )
        if self.max_new_tokens >= (config.max_length or self.max_new_tokens + 1):
            raise ValueError(
                f"`max_new_tokens` ({self.max_new_tokens}) leaves no room for a prompt within `max_length` "
                f"({config.max_length})."
            )
        if config.teacher_server or config.teachers:
            require_writer(self, method, "a server" if config.teacher_server else "several teachers")
        check_engine(self, method)
        method.check(self)
        self._refuse_without_effect(method)

    def default_loss(self) -> str:
        """`loss` where the config leaves it out."""
        return "forward_kl" if self.on_policy is None else ON_POLICY_METHODS[self.on_policy].default_loss

    def rollout_method(self) -> RolloutMethod:
        """The method with its options."""
        return method_from(ON_POLICY_METHODS[str(self.on_policy)], self.on_policy_options)  # type: ignore[arg-type]

    def _refuse_without_effect(self, method: RolloutMethod) -> None:
        config: Any = self
        if not method.student_writes_all(self):
            return
        instead = "or choose a method and an `on_policy_share` that leave texts to the data or the teacher"
        if config.ce_weight > 0:
            raise ValueError(
                f"`ce_weight` is {config.ce_weight:g}, but with {self.on_policy} and `on_policy_share` 1 the student "
                f"writes every text, and cross entropy leaves out what it wrote itself. Set it to 0, {instead}."
            )
        if self.teacher_writes:
            raise ValueError(
                f"`teacher_writes` is set, but with {self.on_policy} and `on_policy_share` 1 the student writes every "
                f"text. Leave it out, {instead}."
            )

    def _refuse_without_method(self) -> None:
        plain = OnPolicyOptions()
        for name in ("on_policy_options", "max_new_tokens", "sampling_temperature", "generation_options",
                     "rollout_engine", "rollout_engine_options", "log_rollouts"):  # fmt: skip
            if getattr(self, name) != getattr(plain, name):
                raise ValueError(
                    f"`{name}` is {getattr(self, name)!r}, but no text is written during training. Choose a method "
                    f"with `on_policy` ({', '.join(ON_POLICY_METHODS)}), or leave `{name}` out."
                )
