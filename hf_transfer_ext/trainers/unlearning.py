"""Unlearning as a `Trainer`: `gamma * forget + alpha * retain`, each averaged over its own tokens of a whole step."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments

from hf_transfer_ext.data.forget_retain import REFUSALS, ForgetRetainPairs, forget_retain_collator
from hf_transfer_ext.data.question_answer import EncodedAnswer, QuestionAnswerFormat
from hf_transfer_ext.losses.needs import asked_quantities, check_options, over
from hf_transfer_ext.losses.unlearning import METHODS, RETAIN_LOSSES, UNLEARNING_LOSSES
from hf_transfer_ext.models.heads import run_to_head, vocabulary_size
from hf_transfer_ext.models.plumbing import active_adapter, is_sharded, output_head, pad_token_id
from hf_transfer_ext.models.scoring import LOGITS_AT_ONCE, Scorer
from hf_transfer_ext.registry import unknown_name
from hf_transfer_ext.teachers.live import prepare_frozen
from hf_transfer_ext.tensors import next_token_targets, predicting_rows
from hf_transfer_ext.trainers.normalization import TokenLossNormalization

logger = logging.getLogger(__name__)

#: Under this rate a LoRA forgets little in a few epochs; published comparisons find it behind full fine-tuning in
#: every row at equal settings.
LORA_LEARNING_RATE = 1e-4

#: What a loss may be averaged over, in the order in which a step's counts are kept.
FORGET_COUNTS = ("sequences", "tokens", "later tokens")


@dataclass
class UnlearningConfig(TrainingArguments):
    """`TrainingArguments` with what is forgotten, what holds the rest, and their weights.

    Args:
        method: A published combination of `METHODS`: npo, simnpo, grad_diff, idk_dpo, rmu, ... It fills in what is
            left at None below.
        forget_loss: A name of `UNLEARNING_LOSSES`.
        retain_loss: A name of `RETAIN_LOSSES`, or "none" to train on the forget set alone.
        gamma: Factor of the forget loss, >= 0.
        alpha: Factor of the retain loss, >= 0.
        forget_options: The forget loss's own options, such as `{"beta": 0.05}` of npo.
        retain_options: The retain loss's own options.
        reference_adapter: Under PEFT, the adapter that is the reference; "base" is the model without any, which is
            right where the knowledge to be forgotten sits in the base's own weights.
        hidden_layer: Layer whose output the losses on hidden states read, from 1 to the number of layers.
        refusal: The text that jensun pulls towards, repeated along each answer.
        stop_on_nan: Stop with an error at the first loss that is NaN or infinite; the last checkpoint stays.
    """

    method: str = "npo"
    forget_loss: str | None = None
    retain_loss: str | None = None
    gamma: float | None = None
    alpha: float | None = None
    forget_options: dict[str, Any] | str | None = field(default_factory=dict)
    retain_options: dict[str, Any] | str | None = field(default_factory=dict)
    reference_adapter: str = "base"
    hidden_layer: int | None = None
    refusal: str = " No idea"
    stop_on_nan: bool = True
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Has to stay False: samples are nested, and the model takes none of them."}
    )

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "forget_options", "retain_options"]  # noqa: RUF012

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in METHODS:
            raise ValueError(unknown_name("unlearning method", self.method, METHODS))
        preset = METHODS[self.method]
        same_forget = self.forget_loss in (None, preset.forget)
        self.forget_loss = self.forget_loss or preset.forget
        self.retain_loss = self.retain_loss or preset.retain or "none"
        self.gamma = preset.gamma if self.gamma is None else self.gamma
        self.alpha = preset.alpha if self.alpha is None else self.alpha
        self.forget_options: dict[str, Any] = {
            **(preset.options if same_forget else {}),
            **dict(self.forget_options or {}),  # type: ignore[arg-type]
        }
        self.retain_options: dict[str, Any] = dict(self.retain_options or {})  # type: ignore[arg-type]
        check_options(UNLEARNING_LOSSES[self.forget_loss], self.forget_options)
        if self.retain_loss != "none":
            check_options(RETAIN_LOSSES[self.retain_loss], self.retain_options)
        if self.gamma < 0 or self.alpha < 0 or self.gamma + self.alpha == 0:
            raise ValueError(f"`gamma` and `alpha` must be >= 0 and not both 0, got {self.gamma} and {self.alpha}.")
        if "hidden" in self.asked() and (self.hidden_layer is None or self.hidden_layer < 1):
            raise ValueError(
                f"{self.forget_loss} with {self.retain_loss} reads hidden states: set `hidden_layer` to a layer, "
                f"counted from 1; got {self.hidden_layer}. Common is a quarter to a half of the model's depth."
            )
        if self.remove_unused_columns:
            raise ValueError("`remove_unused_columns` has to be False: forget/retain samples are nested.")
        if self.label_smoothing_factor:
            raise ValueError("`label_smoothing_factor` is not used by unlearning losses; leave it at 0.")
        if self.gradient_checkpointing and self.gradient_checkpointing_kwargs is None:
            # The reentrant form cannot take two forward passes for one backward under DDP.
            self.gradient_checkpointing_kwargs = {"use_reentrant": False}
            if hasattr(self, "activation_checkpointing_kwargs"):  # the name that newer versions read
                self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs

    def asked(self) -> set[str]:
        """Quantities that the forget and the retain loss ask for."""
        forget = asked_quantities(UNLEARNING_LOSSES[self.forget_loss or ""])
        retain = set() if self.retain_loss == "none" else asked_quantities(RETAIN_LOSSES[self.retain_loss or ""])
        return forget | retain


class UnlearningTrainer(TokenLossNormalization, Trainer):
    """Minimise `gamma * forget + alpha * retain`, on pairs of a sample to forget and one to retain.

    One optimizer step gives the same update however its batch is split into micro-batches and processes: the forget
    loss is divided by the sequences (or tokens) to forget of the whole step, the retain loss by its own tokens.

    Args:
        model: Causal language model, or a `PeftModel`.
        args: `UnlearningConfig`.
        forget_dataset: Examples with a question and an answer, or a text.
        retain_dataset: The same; may be None where the method has no retain loss.
        train_dataset: `ForgetRetainPairs`, instead of the two above.
        processing_class: The tokenizer.
        reference_model: Reference for the losses that ask for one, where `model` is no `PeftModel`. Without it, losses
            that need the reference's log-probabilities alone get them computed once, before training.
        template: How a question becomes a prompt.
        columns: Schema name -> the data's own column name.
        alternatives: What may be answered instead, for losses with an alternative; a column "alternative" goes first.
        kwargs: Everything else that `Trainer` takes.

    Logs `forget_loss`, `retain_loss` and `forget_nll` (nats per token of the forget answers) beside `loss`.
    """

    _tag_names = ("unlearning", "hf_transfer_ext")
    nan_advice = "Lower the learning rate or gamma, or choose a bounded forget loss (npo, simnpo, jensun)."

    def __init__(
        self,
        model: Any,
        args: UnlearningConfig,
        *,
        forget_dataset: Sequence[Mapping[str, Any]] | Any = None,
        retain_dataset: Sequence[Mapping[str, Any]] | Any = None,
        train_dataset: ForgetRetainPairs | None = None,
        processing_class: PreTrainedTokenizerBase,
        reference_model: Any = None,
        template: QuestionAnswerFormat | None = None,
        columns: Mapping[str, str] | None = None,
        alternatives: Sequence[str] = REFUSALS,
        **kwargs: Any,
    ) -> None:
        self.forget_loss = UNLEARNING_LOSSES[args.forget_loss or ""]
        self.retain_loss = None if args.retain_loss == "none" else RETAIN_LOSSES[args.retain_loss or ""]
        self.asked_of_forget = asked_quantities(self.forget_loss)
        self.asked_of_retain = asked_quantities(self.retain_loss) if self.retain_loss else set()
        with_alternatives = any("alternative" in name for name in self.asked_of_forget)
        if train_dataset is None:
            if forget_dataset is None:
                raise ValueError("There is nothing to forget: give `forget_dataset`, or pairs as `train_dataset`.")
            train_dataset = ForgetRetainPairs(
                forget_dataset,
                retain_dataset if self.retain_loss else None,
                processing_class,
                template=template,
                columns=columns,
                alternatives=alternatives if with_alternatives else None,
                seed=args.data_seed if args.data_seed is not None else args.seed,
            )
        if self.retain_loss and train_dataset.retain is None:
            raise ValueError(
                f"{args.retain_loss} needs a retain set: give `retain_dataset`, or set `retain_loss` to 'none'."
            )
        if with_alternatives and train_dataset.alternatives is None:
            raise ValueError(f"{args.forget_loss} needs pairs with alternatives: give `alternatives` to them.")
        self.is_peft = hasattr(model, "peft_config")
        self.check_layer(model, args)
        if self.is_peft:
            if args.reference_adapter != "base" and args.reference_adapter not in model.peft_config:
                raise ValueError(unknown_name("adapter", args.reference_adapter, [*model.peft_config, "base"]))
            if args.gradient_checkpointing:
                # A frozen embedding gives activations without gradient; checkpointed layers would then train nothing.
                model.enable_input_require_grads()
            if args.learning_rate < LORA_LEARNING_RATE:
                logger.warning(
                    f"learning_rate={args.learning_rate:g} is low for an adapter, which forgets less than full "
                    f"fine-tuning at equal settings; try {LORA_LEARNING_RATE:g} to 1e-3 and measure."
                )
        self._pad_id = pad_token_id(processing_class)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            data_collator=kwargs.pop("data_collator", forget_retain_collator(self._pad_id)),
            **kwargs,
        )
        self.can_return_loss = True
        self.add_callback(_EpochOfPairs(train_dataset))
        self._sums: dict[str, Tensor] = {}
        self._sharded = is_sharded(accelerator=self.accelerator)
        self._refusal_ids = processing_class(args.refusal, add_special_tokens=False)["input_ids"]
        self._control: Tensor | None = None
        self.reference_model: Any = None
        self._reference_log_probs: dict[tuple[int, ...], list[float]] | None = None
        wanted = self.asked_of_forget | self.asked_of_retain
        if any(name.startswith("reference") for name in wanted):
            self._prepare_reference(wanted, reference_model, train_dataset)

    @staticmethod
    def check_layer(model: Any, args: UnlearningConfig) -> None:
        """Refuse a layer that the model does not have."""
        layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
        if args.hidden_layer is not None and layers is not None and args.hidden_layer > layers:
            raise ValueError(f"`hidden_layer` is {args.hidden_layer}, but the model has {layers} layers.")

    def _prepare_reference(self, wanted: set[str], reference_model: Any, pairs: ForgetRetainPairs) -> None:
        """Under PEFT the adapter is switched off; else a given model, else log-probabilities computed now."""
        if reference_model is not None:
            reference_model.requires_grad_(False)
            self.reference_model = prepare_frozen(reference_model, self.accelerator)
        elif not self.is_peft:
            whole = sorted(name for name in wanted if name in ("reference_logits", "reference_hidden"))
            if whole:
                raise ValueError(
                    f"{self.args.forget_loss} with {self.args.retain_loss} asks for {', '.join(whole)}, which are too "
                    "large to keep. Train an adapter (its base is the reference), or give `reference_model`."
                )
            if self._sharded:
                raise ValueError("Sharded full fine-tuning needs `reference_model` for this method.")
            texts = [*pairs.forget, *(text for texts in pairs.alternatives or [] for text in texts)]
            if "reference_log_probs" in self.asked_of_retain:
                texts += pairs.retain or []
            self._reference_log_probs = self._log_probs_of(texts)

    def _log_probs_of(self, texts: Sequence[EncodedAnswer]) -> dict[tuple[int, ...], list[float]]:
        """Per-token log-probabilities of the model as it was given; processes share the work."""
        model: Any = self.model
        scorer = Scorer(model.eval(), pad_id=self._pad_id)
        mine = texts[self.args.process_index :: self.args.world_size]
        size = max(1, self.args.per_device_eval_batch_size)
        found = []
        for at in range(0, len(mine), size):
            scores = scorer.score(mine[at : at + size], frozenset({"token_log_probs"}))
            found += [
                ((text.answer_start, *text.input_ids), score.log_probs.tolist())
                for text, score in zip(mine[at : at + size], scores, strict=True)
            ]
        if self.args.world_size > 1:
            from accelerate.utils import gather_object

            found = gather_object(found)
        return dict(found)

    @contextmanager
    def _reference(self, model: nn.Module) -> Iterator[nn.Module]:
        """The reference, in eval mode and without gradients."""
        if self.reference_model is not None:
            with torch.no_grad():
                yield self.reference_model
            return
        own = self.accelerator.unwrap_model(model)
        training = own.training
        own.eval()
        try:
            with torch.no_grad(), active_adapter(own, self.args.reference_adapter):
                yield model
        finally:
            own.train(training)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        counts = num_items_in_batch if isinstance(num_items_in_batch, Tensor) else None
        asked = self._quantities(model, inputs, self.asked_of_forget, "forget")
        labels = inputs["forget"]["labels"]
        kept = {name: asked[name] for name in self.asked_of_forget}
        values = self.forget_loss(**kept, **self.args.forget_options)
        kind = over(self.forget_loss)
        mask = torch.ones_like(values, dtype=torch.bool)
        if kind == "later tokens":
            mask = _later(labels)
        count = counts[FORGET_COUNTS.index(kind)] if counts is not None else None
        forget = self.normalize(values, mask, count)
        loss = self.args.gamma * forget + asked["anchor"]
        self._note("forget_loss", values.detach()[mask].sum(), mask.sum())
        self._note("forget_nll", -asked["log_probs"].detach().sum(), asked["lengths"].sum())
        if self.retain_loss is not None:
            asked = self._quantities(model, inputs, self.asked_of_retain, "retain")
            values = self.retain_loss(
                **{name: asked[name] for name in self.asked_of_retain}, **self.args.retain_options
            )
            mask = torch.ones_like(values, dtype=torch.bool)
            retain = self.normalize(values, mask, counts[len(FORGET_COUNTS)] if counts is not None else None)
            loss = loss + self.args.alpha * retain + asked["anchor"]
            self._note("retain_loss", values.detach().sum(), mask.sum())
        return (loss, {}) if return_outputs else loss

    def _quantities(self, model: nn.Module, inputs: dict[str, Any], asked: set[str], part: str) -> dict[str, Tensor]:
        """Everything that a loss asks for about one part of a batch, from as few forward passes as can be."""
        batch = inputs[part]
        found = self._forward(model, batch, asked)
        if "control" in asked:
            found["control"] = self._direction(found["hidden"])
        if "refusal_targets" in asked:
            places = torch.cat([torch.arange(int(n), device=self.args.device) for n in found["lengths"]])
            refusal = torch.tensor(self._refusal_ids, device=self.args.device)
            found["refusal_targets"] = refusal[places % len(refusal)]
        reference = {name.removeprefix("reference_") for name in asked if name.startswith("reference_")}
        about_alternative = {name for name in reference if name.startswith("alternative")}
        if reference - about_alternative:
            for name, value in self._from_reference(model, batch, reference - about_alternative).items():
                found[f"reference_{name}"] = value
        if any("alternative" in name for name in asked):
            other = self._forward(model, inputs["alternative"], {"nll"})
            found["alternative_nll"], found["alternative_lengths"] = other["nll"], other["lengths"]
            found["anchor"] = found["anchor"] + other["anchor"]
        if about_alternative:
            nll = self._from_reference(model, inputs["alternative"], {"nll"})["nll"]
            found["reference_alternative_nll"] = nll
        return found

    def _from_reference(self, model: nn.Module, batch: dict[str, Tensor], asked: set[str]) -> dict[str, Tensor]:
        if self._reference_log_probs is not None:
            return self._from_memory(batch, self._reference_log_probs)
        with self._reference(model) as reference:
            return self._forward(reference, batch, asked)

    def _from_memory(self, batch: dict[str, Tensor], known: dict[tuple[int, ...], list[float]]) -> dict[str, Tensor]:
        rows = []
        for ids, attended, labels in zip(
            batch["input_ids"].tolist(), batch["attention_mask"].tolist(), batch["labels"].tolist(), strict=True
        ):
            length = sum(attended)
            answer = sum(label != -100 for label in labels)
            rows.append(known[(length - answer, *ids[:length])])
        log_probs = torch.tensor([value for row in rows for value in row], device=self.args.device)
        return {"log_probs": log_probs, "nll": torch.tensor([-sum(r) for r in rows], device=self.args.device)}

    def _forward(self, model: nn.Module, batch: dict[str, Tensor], asked: set[str]) -> dict[str, Tensor]:
        """One forward pass through all wrappers, in which the head reads the answers' rows alone."""
        targets, mask = next_token_targets(batch["labels"])
        length = batch["labels"].shape[1]
        found: dict[str, Tensor] = {}

        def read(hidden: Tensor) -> None:
            rows = predicting_rows(hidden, mask)
            if "logits" in asked:
                found["logits"] = output_head(model)(rows)
                found["log_probs"] = _picked(found["logits"], targets[mask])
            else:
                found["log_probs"] = self._chunked_log_probs(model, rows, targets[mask])

        outputs = run_to_head(
            model,
            read,
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            use_cache=False,
            output_hidden_states="hidden" in asked,
        )
        if "hidden" in asked:
            layer = outputs.hidden_states[self.args.hidden_layer]
            found["hidden"] = layer[:, -length:][:, 1:][mask].float()
        lengths = mask.sum(-1)
        sequence = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        zeros = found["log_probs"].new_zeros(len(lengths))
        found["nll"] = zeros.index_add(0, sequence, -found["log_probs"])
        found["lengths"] = lengths.to(found["nll"].dtype)
        found["targets"] = targets[mask]
        found["anchor"] = 0.0 * outputs.logits.sum()
        return found

    def _chunked_log_probs(
        self, model: nn.Module, rows: Float[Tensor, "tokens hidden"], targets: Int[Tensor, " tokens"]
    ) -> Float[Tensor, " tokens"]:
        """Log-probabilities with the logits of a chunk of tokens at a time, made anew in the backward pass."""
        project = output_head(model)

        def of(chunk: Tensor, wanted: Tensor) -> Tensor:
            return _picked(project(chunk), wanted)

        step = max(1, LOGITS_AT_ONCE // vocabulary_size(model))
        if self._sharded or not torch.is_grad_enabled():
            # Sharded weights are whole only now, so nothing can be made anew later.
            parts = [of(rows[i : i + step], targets[i : i + step]) for i in range(0, len(rows), step)]
        else:
            parts = [
                checkpoint(of, rows[i : i + step], targets[i : i + step], use_reentrant=False)
                for i in range(0, len(rows), step)
            ]
        return torch.cat(parts)

    def _direction(self, hidden: Tensor) -> Tensor:
        """rmu's direction: uniform in [0, 1)^d, of length 1, the same for a seed on every process."""
        if self._control is None:
            generator = torch.Generator().manual_seed(self.args.seed)
            drawn = torch.rand(hidden.shape[-1], generator=generator)
            self._control = drawn / drawn.norm()
        return self._control.to(hidden)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:  # type: ignore
        """Sequences, tokens and later tokens to forget, and tokens to retain, of a step on all processes."""
        if not batch_samples:
            return None
        counts = sum((self._counts(batch) for batch in batch_samples), torch.zeros(len(FORGET_COUNTS) + 1))
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counts = self.accelerator.gather(counts[None].to(device)).sum(0)
        return counts.clamp(min=1).to(device)

    @staticmethod
    def _counts(batch: dict[str, Any]) -> Float[Tensor, " counts"]:
        _, mask = next_token_targets(batch["forget"]["labels"])
        tokens = int(mask.sum())
        kept = int(next_token_targets(batch["retain"]["labels"])[1].sum()) if "retain" in batch else 0
        return torch.tensor([len(mask), tokens, tokens - len(mask), kept], dtype=torch.float32)

    def _note(self, name: str, total: Tensor, count: Tensor) -> None:
        model: Any = self.model
        mode = "" if model.training else "eval_"
        pair = torch.stack([total.double(), count.double()])
        self._sums[mode + name] = self._sums.get(mode + name, torch.zeros_like(pair)) + pair

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the parts of the loss, as means over everything since the last log on all processes."""
        evaluating = any(key.startswith("eval_") for key in logs)
        if evaluating or "loss" in logs:
            for name in sorted(n for n in self._sums if n.startswith("eval_") == evaluating):
                total, count = self.accelerator.gather(self._sums.pop(name)[None].float()).sum(0).tolist()
                logs[name] = total / max(count, 1.0)
        super().log(logs, start_time)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None


class _EpochOfPairs(TrainerCallback):
    """Tells the pairs which epoch it is, so that retain samples go on where the last epoch ended."""

    def __init__(self, pairs: Any) -> None:
        self.pairs = pairs

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if hasattr(self.pairs, "set_epoch"):
            self.pairs.set_epoch(int((state.epoch or 0.0) + 1e-6))


def _picked(logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    return torch.log_softmax(logits, -1).gather(-1, targets[:, None])[:, 0]


def _later(labels: Int[Tensor, "batch length"]) -> Bool[Tensor, " tokens"]:
    """True for every answer token but the first of its sequence, in the order of the flattened rows."""
    _, mask = next_token_targets(labels)
    return (mask.cumsum(-1) > 1)[mask]
