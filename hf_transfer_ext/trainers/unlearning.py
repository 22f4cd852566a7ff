"""Unlearning as a `Trainer`: `gamma * forget + alpha * retain`, each averaged over its own tokens of a whole step."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

import torch
from accelerate.utils import broadcast_object_list
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from hf_transfer_ext.data.forget_retain import REFUSALS, ForgetRetainPairs, forget_retain_collator, with_labels
from hf_transfer_ext.data.question_answer import EncodedAnswer, QuestionAnswerFormat
from hf_transfer_ext.data.unlearning.alternatives import (
    Write,
    answers_of_nearest,
    answers_of_others,
    misleading_rationales,
    reasoned_refusals,
    written_answers,
)
from hf_transfer_ext.losses.needs import (
    NEEDS,
    UNITS,
    ForwardPass,
    Kept,
    Need,
    OfModel,
    check_options,
    needs_of,
    unit_of,
)
from hf_transfer_ext.losses.unlearning import RETAIN_LOSSES, UNLEARNING_LOSSES
from hf_transfer_ext.losses.unlearning.methods import METHODS
from hf_transfer_ext.losses.unlearning_method import ALTERNATIVES, Method, Part, method_from_options
from hf_transfer_ext.models.generation import GenerationSettings, generate
from hf_transfer_ext.models.heads import causal_lm_of, head_module, run_to_head, vocabulary_size
from hf_transfer_ext.models.loading import context_length, load_model, load_tokenizer
from hf_transfer_ext.models.plumbing import active_adapter, evaluation_mode, is_sharded, output_head, pad_token_id
from hf_transfer_ext.models.scoring import LOGITS_AT_ONCE, Scorer
from hf_transfer_ext.progress import steps
from hf_transfer_ext.registry import unknown_name
from hf_transfer_ext.teachers.live import prepare_frozen
from hf_transfer_ext.tensors import next_token_targets, predicting_rows
from hf_transfer_ext.trainers.inherited import REFUSED_BY_UNLEARNING, refuse_split_sequences, refuse_without_effect
from hf_transfer_ext.trainers.logs import require_reporters
from hf_transfer_ext.trainers.measured import MeasuresInTraining
from hf_transfer_ext.trainers.method_steps import MethodSteps
from hf_transfer_ext.trainers.normalization import TokenLossNormalization, require_trainable
from hf_transfer_ext.trainers.retain_bound import RetainBound

logger = logging.getLogger(__name__)

#: Arguments of `Trainer` that would do nothing here -> what to do instead.
WITHOUT_EFFECT = {
    "compute_loss_func": "name losses with `forget_loss` and `retain_loss`, or register one of your own.",
    "compute_metrics": "evaluation keeps no logits. Give an `UnlearningCurve` (evals) in `callbacks`.",
    "preprocess_logits_for_metrics": "evaluation keeps no logits. Give an `UnlearningCurve` in `callbacks`.",
}
#: Below this learning rate a LoRA forgets little in a few epochs; in published comparisons it forgets less than full
#: fine-tuning in every row at equal settings.
LORA_LEARNING_RATE = 1e-4

#: Part -> where its alternative answers are in a batch.
ALTERNATIVE_OF: dict[Part, str] = {"forget": "alternative", "retain": "retain_alternative"}

#: A step's counts are one vector: this is where the number of units (see `UNITS`) of a part is.
COUNTS = {pair: place for place, pair in enumerate((part, unit) for part in get_args(Part) for unit in UNITS)}


@dataclass
class UnlearningConfig(TrainingArguments):
    """`TrainingArguments` with an unlearning method: its losses, their weights and options.

    Args:
        method: A published method of `METHODS`: npo, simnpo, grad_diff, idk_dpo, rmu, pdu, npo_sam, ... It fills in
            what is left at None below.
        method_options: The method's own options, such as `{"rho": 0.05}` of npo_sam.
        forget_loss: A name of `UNLEARNING_LOSSES`.
        retain_loss: A name of `RETAIN_LOSSES`, or "none" to train on the forget set alone.
        gamma: Weight of the forget loss, >= 0.
        alpha: Weight of the retain loss, >= 0.
        forget_options: The forget loss's own options, such as `{"beta": 0.05}` of npo.
        retain_options: The retain loss's own options.
        reference_adapter: Under PEFT, the adapter that is the reference; "base" is the model without any adapter,
            which is right where the base's own weights hold the knowledge to forget.
        reinforced_adapter: Under PEFT, an adapter that was trained further on the forget set, for whp.
        alternatives: Where the alternative answers of losses that ask for them come from: a name of `ALTERNATIVES`
            ("refusals", "data", "sampled", ...); None is the method's own choice.
        alternatives_cache: File in which answers that the model writes ("sampled") are kept from run to run; it then
            holds them in plain text.
        max_new_tokens: Longest such answer, in tokens.
        hidden_layer: Layer whose output the losses on hidden states read, from 1 to the number of layers.
        refusal: The text that jensun pulls towards, repeated along each answer.
        allow_overlap: Train although rows are in both the forget and the retain set.
        retain_bound: The retain loss that is allowed, in the loss's own unit (nats per token for retain_nll). Where a
            run evaluates losses while it trains (`eval_strategy` and an evaluation set), the bound is on
            `eval_retain_loss`; else on the retain loss of each training step, at the weights before its update. None
            for no bound.
        on_bound: What ends the run above the bound: "stop" keeps the weights as they are then, "restore" goes back to
            the last ones that were within it (a copy of the trained weights in memory).
        stop_on_nan: Stop with an error at the first loss that is NaN or infinite; the last checkpoint stays.
    """

    method: str = "npo"
    method_options: dict[str, Any] | str | None = field(default_factory=dict)
    forget_loss: str | None = None
    retain_loss: str | None = None
    gamma: float | None = None
    alpha: float | None = None
    forget_options: dict[str, Any] | str | None = field(default_factory=dict)
    retain_options: dict[str, Any] | str | None = field(default_factory=dict)
    reference_adapter: str = "base"
    reinforced_adapter: str | None = None
    alternatives: str | None = None
    alternatives_cache: str | None = None
    max_new_tokens: int = 64
    hidden_layer: int | None = None
    refusal: str = " No idea"
    allow_overlap: bool = False
    retain_bound: float | None = None
    on_bound: str = "stop"
    stop_on_nan: bool = True
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Has to stay False: samples are nested, and the model takes none of them."}
    )

    _VALID_DICT_FIELDS = [  # noqa: RUF012
        *TrainingArguments._VALID_DICT_FIELDS, "method_options", "forget_options", "retain_options",
    ]  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        require_reporters(self.report_to)
        method = METHODS[self.method]
        self.method_options: dict[str, Any] = dict(self.method_options or {})  # type: ignore[arg-type]
        self.published_method()
        same_forget = self.forget_loss in (None, method.forget)
        self.forget_loss = self.forget_loss or method.forget
        self.retain_loss = self.retain_loss or method.retain or "none"
        self._fill_in_weights(method)
        self._fill_in_alternatives(method)
        self.forget_options: dict[str, Any] = {
            **(method.forget_options if same_forget else {}),
            **dict(self.forget_options or {}),  # type: ignore[arg-type]
        }
        self.retain_options: dict[str, Any] = dict(self.retain_options or {})  # type: ignore[arg-type]
        check_options(UNLEARNING_LOSSES[self.forget_loss], self.forget_options)
        if self.retain_loss != "none":
            check_options(RETAIN_LOSSES[self.retain_loss], self.retain_options)
        elif method.requires_retain:
            raise ValueError(f"{self.method!r} needs a retain loss; `retain_loss` is 'none'.")
        self.published_method().check(self)
        reads_hidden = any(need.keeps == "hidden" for need in self.needs())
        if reads_hidden and (self.hidden_layer is None or self.hidden_layer < 1):
            raise ValueError(
                f"{self.forget_loss} with {self.retain_loss} reads hidden states: set `hidden_layer` to a layer, "
                f"counted from 1; got {self.hidden_layer}. Common is a quarter to a half of the model's depth."
            )
        self._check_bound()
        reads_reinforced = any(need.of_model == "reinforced" for need in self.needs())
        if reads_reinforced != (self.reinforced_adapter is not None):
            raise ValueError(
                f"{self.forget_loss} reads a model that was trained further on the forget set: load such an adapter "
                "onto the model and name it by `reinforced_adapter`."
                if reads_reinforced
                else f"{self.forget_loss} with {self.retain_loss} reads no reinforced model, so "
                f"reinforced_adapter={self.reinforced_adapter!r} would have no effect. Leave it out."
            )
        refuse_without_effect(self, REFUSED_BY_UNLEARNING)
        if self.gradient_checkpointing and self.gradient_checkpointing_kwargs is None:
            # The reentrant form cannot take two forward passes for one backward under DDP.
            self.gradient_checkpointing_kwargs = {"use_reentrant": False}
            if hasattr(self, "activation_checkpointing_kwargs"):  # the name that newer versions read
                self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs

    def _fill_in_weights(self, method: type[Method]) -> None:
        for name in ("gamma", "alpha"):
            default = getattr(method, name)
            value = getattr(self, name)
            if name in method.sets and value not in (None, default):
                raise ValueError(
                    f"{self.method!r} sets `{name}` itself during training, so {name}={value} would have no effect. "
                    "Leave it out; the method's own options are in `method_options`."
                )
            setattr(self, name, default if value is None else value)
        gamma, alpha = self.gamma or 0.0, self.alpha or 0.0
        if not (gamma >= 0 and alpha >= 0 and gamma + alpha > 0):
            raise ValueError(f"`gamma` and `alpha` must be >= 0 and not both 0, got {gamma} and {alpha}.")

    def _check_bound(self) -> None:
        if self.on_bound not in ("stop", "restore"):
            raise ValueError(f"`on_bound` has to be 'stop' or 'restore', got {self.on_bound!r}.")
        if self.retain_bound is None:
            return
        if not math.isfinite(self.retain_bound):
            raise ValueError(f"`retain_bound` must be a finite number, got {self.retain_bound}.")
        if self.retain_loss == "none":
            raise ValueError("`retain_bound` bounds the retain loss, and `retain_loss` is 'none'.")
        if self.on_bound == "restore" and self.load_best_model_at_end:
            raise ValueError(
                "`on_bound='restore'` and `load_best_model_at_end` both choose the weights that stay. Set one of them."
            )

    def _fill_in_alternatives(self, method: type[Method]) -> None:
        asked_for = any(need.of_alternative for need in self.needs())
        if self.alternatives is not None and not asked_for:
            raise ValueError(
                f"{self.forget_loss} with {self.retain_loss} reads no alternative answers, so "
                f"alternatives={self.alternatives!r} would have no effect. Leave it out, or choose a method that does "
                "(idk, idk_dpo, altpo)."
            )
        if self.alternatives not in (None, *ALTERNATIVES):
            raise ValueError(unknown_name("source of alternatives", str(self.alternatives), ALTERNATIVES))
        if asked_for:
            self.alternatives = self.alternatives or method.alternatives
        if self.alternatives_cache is not None and self.alternatives not in ("sampled", "misleading rationales"):
            raise ValueError("`alternatives_cache` keeps sampled answers: set `alternatives` to 'sampled' too.")
        if self.max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be >= 1, got {self.max_new_tokens}.")

    def published_method(self) -> Method:
        """The method with its options."""
        return method_from_options(METHODS[self.method], dict(self.method_options or {}))  # type: ignore[arg-type]

    def needs(self, part: Part | None = None) -> list[Need]:
        """What the forget loss, the retain loss or (None) both ask for."""
        forget = needs_of(UNLEARNING_LOSSES[self.forget_loss or ""])
        retain = [] if self.retain_loss == "none" else needs_of(RETAIN_LOSSES[self.retain_loss or ""])
        return {"forget": forget, "retain": retain, None: forget + retain}[part]


class UnlearningTrainer(TokenLossNormalization, MeasuresInTraining, MethodSteps):  # type: ignore[misc]
    """Minimize `gamma * forget + alpha * retain`, on pairs of a sample to forget and one to retain.

    One optimizer step gives the same update however its batch is split into micro-batches and processes: the forget
    loss is divided by the sequences (or tokens) to forget of the whole step, the retain loss by its own.

    Args:
        model: Causal language model, a `PeftModel`, or the path or Hub id of one (loaded in float32).
        args: `UnlearningConfig`.
        forget_dataset: Rows with a question and an answer, prompt and completion, chat messages, or a text; see
            `ForgetRetainPairs`.
        retain_dataset: The same; may be None where the method has no retain loss.
        train_dataset: `ForgetRetainPairs`, instead of the two above.
        processing_class: The tokenizer; loaded from the model's path or Hub id where it is left out.
        reference_model: Reference for the losses that ask for one, where `model` is not a `PeftModel`. Without it,
            losses that need only the reference's log-probabilities get them computed once, before training, for the
            rows of the training and evaluation sets.
        peft_config: A PEFT configuration, such as `LoraConfig`, or a mapping of its fields (those of a LoRA, if it
            names no `peft_type`): an adapter is added to `model` and trained.
        template: How a question becomes a prompt.
        columns: Schema name -> the data's own column name.
        alternatives: Texts that may be answered instead, where `alternatives` of the config is "refusals"; a column
            "alternative" of a row goes first. By default built-in refusals.
        kwargs: Everything else that `Trainer` takes. An `UnlearningCurve` (`evals.unlearning_curve`) among `callbacks`
            measures forgetting and utility at each evaluation, for which `eval_dataset` may then be left out.

    Logs `forget_loss`, `retain_loss` and `forget_nll` (nats per token of the forget answers) beside `loss`, and what
    the method learns.

    Raises:
        ValueError: Nothing would be trained, rows are too long for the model or in both sets, or model, data and
            method do not fit together in another way; before the first step.
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
        processing_class: PreTrainedTokenizerBase | None = None,
        reference_model: Any = None,
        peft_config: Any = None,
        template: QuestionAnswerFormat | None = None,
        columns: Mapping[str, str] | None = None,
        alternatives: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        for name, instead in WITHOUT_EFFECT.items():
            if kwargs.get(name) is not None:
                raise ValueError(f"`{name}` cannot be used here: {instead}")
        self.method = args.published_method()
        self.losses: dict[Part, Any] = {"forget": UNLEARNING_LOSSES[args.forget_loss or ""]}
        if args.retain_loss != "none":
            self.losses["retain"] = RETAIN_LOSSES[args.retain_loss or ""]
        self.loss_options: dict[Part, Any] = {"forget": args.forget_options, "retain": args.retain_options}
        if processing_class is None:
            processing_class = load_tokenizer(model if isinstance(model, (str, Path)) else model.config.name_or_path)
        if isinstance(model, (str, Path)):
            model = load_model(model, dtype="float32")
        if peft_config is not None:
            model = _with_adapter(model, peft_config, args)
        self.is_peft = hasattr(model, "peft_config")
        _check_trainable(model, reference_model)
        self.check_layer(model, args)
        if self.is_peft:
            self._prepare_peft(model, args)
        elif args.reinforced_adapter is not None:
            raise ValueError(
                f"`reinforced_adapter` is {args.reinforced_adapter!r}, but the model has no adapters. Load it, and "
                "train another adapter beside it."
            )
        if train_dataset is None:
            train_dataset = self._pairs(
                args, model, forget_dataset, retain_dataset, processing_class, template, columns, alternatives
            )
        self._check_pairs(args, model, train_dataset, kwargs.get("eval_dataset"))
        self._pad_id = pad_token_id(processing_class)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            data_collator=kwargs.pop("data_collator", forget_retain_collator(self._pad_id)),
            **kwargs,
        )
        refuse_split_sequences(self.accelerator.parallelism_config)  # a launcher may set it, too
        self.can_return_loss = True
        self.add_callback(_EpochOfPairs(train_dataset))
        self.retain_bound = None
        if args.retain_bound is not None:
            self.retain_bound = RetainBound(args.retain_bound, args.on_bound, self.model)
            self.add_callback(self.retain_bound)
            if args.on_bound == "restore" and (self._is_sharded() or self.is_deepspeed_enabled):
                raise ValueError(
                    "`on_bound='restore'` copies the trained weights, which FSDP and DeepSpeed hold elsewhere. Set "
                    "`on_bound` to 'stop', or train on one process or with plain data parallelism (DDP)."
                )
        self._sums: dict[str, Tensor] = {}
        self._step_sums: dict[Part, Tensor] = {}
        self._sharded = self._is_sharded()
        self._refusal_ids = processing_class(args.refusal, add_special_tokens=False)["input_ids"]
        self.reference_model: Any = None
        self._reference_log_probs: dict[tuple[int, ...], list[float]] | None = None
        if any(need.of_reference for need in args.needs()):
            self._prepare_reference(reference_model, [train_dataset, *_evaluation_pairs(kwargs.get("eval_dataset"))])

    # ---- What fits together ----

    def _is_sharded(self) -> bool:
        return is_sharded(accelerator=self.accelerator)

    @staticmethod
    def check_layer(model: Any, args: UnlearningConfig) -> None:
        """Refuse a layer that the model does not have."""
        layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
        if args.hidden_layer is not None and layers is not None and args.hidden_layer > layers:
            raise ValueError(f"`hidden_layer` is {args.hidden_layer}, but the model has {layers} layers.")

    @staticmethod
    def _prepare_peft(model: Any, args: UnlearningConfig) -> None:
        if args.reference_adapter != "base" and args.reference_adapter not in model.peft_config:
            raise ValueError(unknown_name("adapter", args.reference_adapter, [*model.peft_config, "base"]))
        if args.reinforced_adapter is not None:
            if args.reinforced_adapter not in model.peft_config:
                raise ValueError(unknown_name("adapter", args.reinforced_adapter, list(model.peft_config)))
            if args.reinforced_adapter in model.active_adapters:
                raise ValueError(
                    f"`reinforced_adapter` {args.reinforced_adapter!r} is the adapter that is trained. Load the "
                    "reinforced one under a name of its own, and make the other one active (`set_adapter`)."
                )
        if args.gradient_checkpointing:
            # A frozen embedding gives activations without gradient; checkpointed layers would then train nothing.
            model.enable_input_require_grads()
        if args.learning_rate < LORA_LEARNING_RATE:
            logger.warning(
                f"learning_rate={args.learning_rate:g} is low for an adapter, which forgets less than full "
                f"fine-tuning at equal settings; try {LORA_LEARNING_RATE:g} to 1e-3 and measure."
            )

    def _pairs(
        self,
        args: UnlearningConfig,
        model: Any,
        forget: Any,
        retain: Any,
        processing_class: PreTrainedTokenizerBase,
        template: QuestionAnswerFormat | None,
        columns: Mapping[str, str] | None,
        alternatives: Sequence[str] | None,
    ) -> ForgetRetainPairs:
        if forget is None:
            raise ValueError("There is nothing to forget: give `forget_dataset`, or pairs as `train_dataset`.")
        source = args.alternatives
        if alternatives is not None and source not in ("refusals", "reasoned refusals"):
            raise ValueError(
                "`alternatives` are texts that fit every question, but "
                + (
                    f"with {args.forget_loss} and {args.retain_loss} nothing reads them. Leave them out."
                    if source is None
                    else f"the alternatives of this run are {source!r}: {ALTERNATIVES[source]}. Leave them out, or "
                    "set `alternatives` of the config to 'refusals'."
                )
            )
        texts = REFUSALS if alternatives is None else alternatives
        if type(self.method).has_own_rows():
            own, given = forget, retain or []
            forget, retain = self._written(
                args,
                model,
                processing_class,
                template,
                lambda write: self.method.rows(own, given, columns or {}, write),
            )
        if self._reads_alternatives(args, "forget"):
            forget = self._with_alternatives(args, source, model, processing_class, template, columns, forget, retain,
                                             texts)  # fmt: skip
        copies = self.method.copies(forget, retain or [], columns or {}) or None
        return ForgetRetainPairs(
            forget,
            retain if "retain" in self.losses else None,
            processing_class,
            template=template,
            columns=columns,
            alternatives=(texts if source == "refusals" else ()) if self._reads_alternatives(args, "forget") else None,
            retain_alternatives=texts if self._reads_alternatives(args, "retain") else None,
            copies=copies,
            allow_overlap=args.allow_overlap,
            seed=args.data_seed if args.data_seed is not None else args.seed,
        )

    @staticmethod
    def _with_alternatives(
        args: UnlearningConfig,
        source: str | None,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        template: QuestionAnswerFormat | None,
        columns: Mapping[str, str] | None,
        forget: Any,
        retain: Any,
        texts: Sequence[str],
    ) -> Any:
        """The rows to forget, with alternatives of their own where the source makes some for each row."""
        if source in ("sampled", "misleading rationales"):
            cache = args.alternatives_cache if args.process_index == 0 else None
            make = written_answers if source == "sampled" else misleading_rationales
            own: dict[str, Any] = {"columns": columns, "seed": args.seed, "cache": cache}
            return UnlearningTrainer._written(
                args, model, tokenizer, template, lambda write: make(forget, write, **own)
            )
        if source == "nearest answers":
            if retain is None:
                raise ValueError("'nearest answers' are those of the retain set: give `retain_dataset`.")
            return answers_of_nearest(forget, retain, columns=columns)
        if source == "reasoned refusals":
            return reasoned_refusals(forget, texts, columns=columns)
        if source in ("forget answers", "retain answers"):
            pool = forget if source == "forget answers" else retain
            if pool is None:
                raise ValueError(f"{args.method!r} draws its alternatives from the retain set: give `retain_dataset`.")
            return answers_of_others(forget, pool, columns=columns, seed=args.seed)
        return forget

    @staticmethod
    def _written(
        args: UnlearningConfig,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        template: QuestionAnswerFormat | None,
        make: Callable[[Write], Any],
    ) -> Any:
        """What `make` makes with the model as it is now; the same on all processes."""
        if not getattr(model, "hf_device_map", None):
            model.to(args.device)
        found = make(_writer(model, tokenizer, template or QuestionAnswerFormat(), args))
        return broadcast_object_list([found])[0] if args.world_size > 1 else found

    @staticmethod
    def _reads_alternatives(args: UnlearningConfig, part: Part) -> bool:
        return any(need.of_alternative for need in args.needs(part))

    def _check_pairs(self, args: UnlearningConfig, model: Any, train: ForgetRetainPairs, evaluation: Any) -> None:
        if "retain" in self.losses and train.retain is None:
            raise ValueError(
                f"{args.retain_loss} needs a retain set: give `retain_dataset`, or set `retain_loss` to 'none'."
            )
        if self._reads_alternatives(args, "forget") and train.alternatives is None:
            raise ValueError(f"{args.forget_loss} needs pairs with alternatives: give `alternatives` to them.")
        if self._reads_alternatives(args, "retain") and train.retain_alternatives is None:
            raise ValueError(f"{args.retain_loss} needs pairs with alternatives: give `retain_alternatives` to them.")
        of_row = [need.name for need in args.needs() if need.of_row]
        if of_row and evaluation is not None:
            raise ValueError(
                f"{args.forget_loss} with {args.retain_loss} reads {', '.join(of_row)}, computed for each row of the "
                "training sets; an evaluation set has none. Leave `eval_dataset` out, and evaluate after the training."
            )
        context = context_length(causal_lm_of(model).config)
        for pairs in (train, *_evaluation_pairs(evaluation)):
            for name, index, answer in pairs.all_answers():
                if context is not None and len(answer.input_ids) > context:
                    raise ValueError(
                        f"Sample {index} of the {name} set has {len(answer.input_ids)} tokens, but the model was "
                        f"built for {context}. Split or shorten it, or set `max_length={context}` of the template "
                        "(`QuestionAnswerFormat`), which cuts off its end."
                    )

    # ---- The reference ----

    def _prepare_reference(self, reference_model: Any, pairs: Sequence[ForgetRetainPairs]) -> None:
        """Under PEFT the adapter is switched off; else a given model, else log-probabilities computed now."""
        if reference_model is not None:
            reference_model.requires_grad_(False)
            self.reference_model = prepare_frozen(reference_model, self.accelerator)
        elif not self.is_peft:
            large = sorted({n.name for n in self.args.needs() if n.of_reference and n.keeps != "log_probs"})
            if large:
                raise ValueError(
                    f"{self.args.forget_loss} with {self.args.retain_loss} asks for {', '.join(large)}, which are too "
                    "large to keep. Train an adapter (its base is the reference), or give `reference_model`."
                )
            if self._sharded:
                raise ValueError("Sharded full fine-tuning needs `reference_model` for this method.")
            self._reference_log_probs = self._log_probs_of([a for p in pairs for a in self._referred_to(p)])

    def _referred_to(self, pairs: ForgetRetainPairs) -> Iterator[EncodedAnswer]:
        """The answers about which some loss asks the reference."""
        parts = {
            "forget": any(n.of_reference and not n.of_alternative for n in self.args.needs("forget")),
            "alternative": any(n.of_reference and n.of_alternative for n in self.args.needs("forget")),
            "retain": any(n.of_reference and not n.of_alternative for n in self.args.needs("retain")),
            "retain_alternative": any(n.of_reference and n.of_alternative for n in self.args.needs("retain")),
        }
        for part, _, answer in pairs.all_answers():
            if parts[part]:
                yield answer

    def _log_probs_of(self, texts: Sequence[EncodedAnswer]) -> dict[tuple[int, ...], list[float]]:
        """Per-token log-probabilities of the model as it was given; processes share the work."""
        model: Any = self.model
        scorer = Scorer(model.eval(), pad_id=self._pad_id)
        texts = list({(text.answer_start, *text.input_ids): text for text in texts}.values())
        mine = texts[self.args.process_index :: self.args.world_size]
        size = max(1, self.args.per_device_eval_batch_size)
        found = []
        batches, shown = range(0, len(mine), size), not self.args.disable_tqdm
        for at in steps(batches, "log-probabilities of the reference", "batch", show=shown):
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
    def _frozen(self, model: nn.Module, which: OfModel) -> Iterator[nn.Module]:
        """The reference or the reinforced model, in eval mode and without gradients."""
        if which == "reference" and self.reference_model is not None:
            with torch.no_grad():
                yield self.reference_model
            return
        adapter = self.args.reference_adapter if which == "reference" else self.args.reinforced_adapter
        own = self.accelerator.unwrap_model(model)
        training = own.training
        own.eval()
        self.in_reference = True
        try:
            with torch.no_grad(), active_adapter(own, adapter):
                yield model
        finally:
            self.in_reference = False
            own.train(training)

    # ---- The loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        weights: dict[Part, float] = dict(zip(get_args(Part), self.weights(), strict=True))
        parts = [weights[part] * self.loss_of(model, inputs, part, num_items_in_batch) for part in self.losses]
        loss = torch.stack(parts).sum()
        return (loss, {}) if return_outputs else loss

    def loss_of(self, model: nn.Module, inputs: dict[str, Any], part: Part, num_items_in_batch: Any) -> Tensor:
        if part not in self.losses:  # a method's own step asks for both
            return torch.zeros((), device=self.args.device)
        loss, needs = self.losses[part], self.args.needs(part)
        passes, anchor = self._forward_passes(model, inputs, part, needs)
        values = loss(**{need.name: need.read(passes[need.source]) for need in needs}, **self.loss_options[part])
        unit = unit_of(loss)
        mask = torch.ones_like(values, dtype=torch.bool)
        if unit == "later tokens":
            mask = _later(inputs[part]["labels"])
        count = num_items_in_batch[COUNTS[part, unit]] if isinstance(num_items_in_batch, Tensor) else None
        self._note(f"{part}_loss", values.detach()[mask].sum(), mask.sum())
        if part == "forget":
            answers = passes[False, "trained"]
            self._note("forget_nll", -answers.log_probs.detach().sum(), answers.lengths.sum())
        if self.noting and model.training and self.measures_steps:
            pair = torch.stack([values.detach()[mask].double().sum(), mask.sum().double()])
            self._step_sums[part] = self._step_sums.get(part, torch.zeros_like(pair)) + pair
        return self.normalize(values, mask, count) + anchor

    def passes_over(self, model: nn.Module, part: Part, at_once: int) -> Iterator[ForwardPass]:
        pairs: Any = self.train_dataset
        if getattr(pairs, part) is None:
            raise ValueError(f"{self.args.method!r} reads the {part} set: give `{part}_dataset`.")
        needs = [NEEDS["log_probs"], *([NEEDS["hidden"]] if self.args.hidden_layer is not None else [])]
        samples: list[dict[str, Any]] = [{part: pairs.sample(part, i)} for i in range(len(getattr(pairs, part)))]
        for at in range(0, len(samples), at_once):
            batch: Any = self._prepare_inputs(forget_retain_collator(self._pad_id)(samples[at : at + at_once]))
            with self.compute_loss_context_manager():
                yield self._forward(model, batch[part], needs, part)[0]

    def copies_of_rows(self, model: nn.Module) -> Iterator[tuple[EncodedAnswer, list[tuple[list[int], int, Tensor]]]]:
        pairs: Any = self.train_dataset
        if pairs.copies is None:
            raise ValueError(f"{self.args.method!r} makes copies of rows: give `forget_dataset` instead of pairs.")
        for answer, copies in zip(pairs.forget, pairs.copies, strict=True):
            found = []
            for copy in copies:
                sample: dict[str, Any] = {"forget": with_labels(copy, 0)}
                batch: Any = self._prepare_inputs(forget_retain_collator(self._pad_id)([sample]))
                with torch.no_grad(), self.compute_loss_context_manager():
                    one = self._forward(model, batch["forget"], [NEEDS["logits"]], "forget")[0]
                found.append((copy.input_ids, copy.answer_start, one.kept("logits")))
            yield answer, found

    def recall_of(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        found, anchor = self._forward(model, inputs["forget"], [NEEDS["log_probs"]], "forget")
        count = num_items_in_batch[COUNTS["forget", "tokens"]]
        return self.normalize(-found.log_probs, torch.ones_like(found.log_probs, dtype=torch.bool), count) + anchor

    def no_gradient_advice(self) -> str:
        options = f"{self.args.forget_loss} with {self.args.retain_loss}"
        if self.args.hidden_layer is not None:
            return (
                f"{options} reads layer {self.args.hidden_layer}, and what is trained lies above it: raise "
                "`hidden_layer`, or let the adapter reach the layers below (`layers_to_transform`)."
            )
        return f"The losses are {options}. {super().no_gradient_advice()}"

    @property
    def measures_steps(self) -> bool:
        return super().measures_steps or self._bounds_steps

    @property
    def _bounds_steps(self) -> bool:
        evaluates = self.args.eval_strategy != IntervalStrategy.NO and self.evaluates_losses
        return self.retain_bound is not None and not evaluates

    def after_batches(self, losses: dict[Part, float]) -> None:
        super().after_batches(losses)
        if self.retain_bound is not None and self._bounds_steps:
            self.retain_bound.measured(losses["retain"], self.state.global_step)

    def mean_losses(self) -> dict[Part, float]:
        sums, self._step_sums = self._step_sums, {}
        gathered = {part: self.accelerator.gather(pair[None].float()).sum(0).tolist() for part, pair in sums.items()}
        return {part: total / max(count, 1.0) for part, (total, count) in gathered.items()}

    def _forward_passes(
        self, model: nn.Module, inputs: dict[str, Any], part: Part, needs: Sequence[Need]
    ) -> tuple[dict[tuple[bool, OfModel], ForwardPass], Tensor]:
        """The forward passes that the needs are read from, by their source, and a zero that every wrapper can see.

        The model's own pass over the answers is always among them.
        """
        passes: dict[tuple[bool, OfModel], ForwardPass] = {}
        sources: set[tuple[bool, OfModel]] = {(False, "trained"), *(need.source for need in needs)}
        anchor = torch.zeros((), device=self.args.device)
        for of_alternative, of_model in sorted(sources):
            wanted = [need for need in needs if need.source == (of_alternative, of_model)]
            batch = inputs[ALTERNATIVE_OF[part] if of_alternative else part]
            if of_model == "trained":
                found, own = self._forward(model, batch, wanted, part)
                anchor = anchor + own
            elif of_model == "reference" and self._reference_log_probs is not None:
                found = self._from_memory(batch, self._reference_log_probs)
            else:
                with self._frozen(model, of_model) as frozen:
                    found, _ = self._forward(frozen, batch, wanted, part)
            passes[of_alternative, of_model] = found
        return passes, anchor

    def _from_memory(self, batch: dict[str, Tensor], known: dict[tuple[int, ...], list[float]]) -> ForwardPass:
        targets, mask = next_token_targets(batch["labels"])
        rows = []
        for ids, attended, answer in zip(
            batch["input_ids"].tolist(), batch["attention_mask"].tolist(), mask.sum(-1).tolist(), strict=True
        ):
            length = sum(attended)
            row = known.get((length - answer, *ids[:length]))
            if row is None:
                text = self.processing_class.decode(ids[:length])  # type: ignore[union-attr]
                raise ValueError(
                    "The reference's log-probabilities were computed before training, for the rows of the training "
                    f"and evaluation sets; this row is in none of them: {text[:200]!r}. Give its set as "
                    "`eval_dataset` when you make the trainer, or give `reference_model`."
                )
            rows.append(row)
        log_probs = torch.tensor([value for row in rows for value in row], device=self.args.device)
        return ForwardPass(log_probs, targets[mask], mask.sum(-1))

    def _forward(
        self, model: nn.Module, batch: dict[str, Tensor], needs: Sequence[Need], part: Part
    ) -> tuple[ForwardPass, Tensor]:
        """One forward pass through all wrappers, in which the head reads only the answers' rows."""
        targets, mask = next_token_targets(batch["labels"])
        length = batch["labels"].shape[1]
        keeps: set[Kept] = {need.keeps for need in needs}
        through_head = any(need.differentiable and need.keeps != "hidden" for need in needs)
        logits: list[Tensor] = []
        log_probs: list[Tensor] = []

        def read(hidden: Tensor) -> Tensor | None:
            rows = predicting_rows(hidden, mask)
            with torch.set_grad_enabled(torch.is_grad_enabled() and through_head):
                if "logits" in keeps:
                    logits.append(output_head(model)(rows))
                    log_probs.append(_picked(logits[0], targets[mask]))
                else:
                    log_probs.append(self._chunked_log_probs(model, rows, targets[mask]))
            if isinstance(model, DistributedDataParallel):
                # DDP looks for unused parameters from the output, and must see that the head is used.
                trained = [p for p in head_module(model).parameters() if p.requires_grad]
                return hidden[..., :1] + sum(0.0 * p.flatten()[:1].sum() for p in trained)
            return None

        outputs = run_to_head(
            model,
            read,
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            use_cache=False,
            output_hidden_states="hidden" in keeps,
        )
        hidden = None
        if "hidden" in keeps:
            layer = outputs.hidden_states[self.args.hidden_layer]
            hidden = layer[:, -length:][:, 1:][mask].float()
        found = ForwardPass(
            log_probs[0],
            targets[mask],
            mask.sum(-1),
            logits[0] if logits else None,
            hidden,
            self._refusal_ids,
            self.args.seed,
            part,
            batch.get("index"),
            self.prepared,
        )
        return found, 0.0 * outputs.logits.sum()

    def _chunked_log_probs(
        self, model: nn.Module, rows: Float[Tensor, "tokens hidden"], targets: Int[Tensor, " tokens"]
    ) -> Float[Tensor, " tokens"]:
        """Log-probabilities with the logits of a chunk of tokens at a time, recomputed in the backward pass."""
        project = output_head(model)

        def of(chunk: Tensor, wanted: Tensor) -> Tensor:
            return _picked(project(chunk), wanted)

        step = max(1, LOGITS_AT_ONCE // vocabulary_size(model))
        if self._sharded or not torch.is_grad_enabled():
            # Sharded weights are whole only during this forward pass, so nothing can be recomputed later.
            parts = [of(rows[i : i + step], targets[i : i + step]) for i in range(0, len(rows), step)]
        else:
            parts = [
                checkpoint(of, rows[i : i + step], targets[i : i + step], use_reentrant=False)
                for i in range(0, len(rows), step)
            ]
        return torch.cat(parts)

    # ---- Counts and logs ----

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:  # type: ignore
        """What each part may be averaged over (`COUNTS`), summed over a step on all processes."""
        if not batch_samples:
            return None
        counts = sum((self._counts(batch) for batch in batch_samples), torch.zeros(len(COUNTS)))
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counts = self.accelerator.gather(counts[None].to(device)).sum(0)
        return counts.clamp(min=1).to(device)

    @staticmethod
    def _counts(batch: dict[str, Any]) -> Float[Tensor, " counts"]:
        counts = torch.zeros(len(COUNTS))
        for part in get_args(Part):
            if part in batch:
                _, mask = next_token_targets(batch[part]["labels"])
                found = {
                    "sequences": len(mask),
                    "tokens": int(mask.sum()),
                    "later tokens": int(mask.sum()) - len(mask),
                }
                for unit, count in found.items():
                    counts[COUNTS[part, unit]] = count
        return counts

    def _note(self, name: str, total: Tensor, count: Tensor) -> None:
        if not self.noting:
            return
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
        if evaluating and self.retain_bound is not None and "eval_retain_loss" in logs:
            self.retain_bound.evaluated = logs["eval_retain_loss"]
        if "loss" in logs:
            logs.update(self.learned)
        super().log(logs, start_time)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None


class _EpochOfPairs(TrainerCallback):
    """Tells the pairs which epoch it is, so that retain samples continue where the last epoch ended."""

    def __init__(self, pairs: Any) -> None:
        self.pairs = pairs

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if hasattr(self.pairs, "set_epoch"):
            self.pairs.set_epoch(int((state.epoch or 0.0) + 1e-6))


def _with_adapter(model: Any, peft_config: Any, args: UnlearningConfig) -> Any:
    """Add the adapter of `peft_config` to a model without one."""
    from peft import get_peft_model, prepare_model_for_kbit_training

    peft_config = _peft_config(peft_config)
    if hasattr(model, "peft_config"):
        raise ValueError(
            "`peft_config` (`lora_rank` in the recipe) adds an adapter to a plain model, and this model has one "
            "already. Leave it out, or merge the model's own adapter into its base first."
        )
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=args.gradient_checkpointing,
            gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
        )
    return get_peft_model(model, peft_config)


def _peft_config(given: Any) -> Any:
    """A PEFT configuration, or a mapping of its fields; without `peft_type` it is that of a LoRA.

    Raises:
        ValueError, TypeError: An unknown type or field, or neither a configuration nor a mapping.
    """
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig

    if isinstance(given, PeftConfig):
        return given
    if not isinstance(given, Mapping):
        raise TypeError(
            f"`peft_config` has to be a PEFT configuration or a mapping of its fields, got {given!r:.200}."
        )
    own = {"peft_type": "LORA", **given}
    kinds = {str(kind.value): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    kind = kinds.get(str(own.pop("peft_type")).rpartition(".")[2].upper())
    if kind is None:
        raise ValueError(unknown_name("`peft_type`", given["peft_type"], kinds))
    known = [one.name for one in fields(kind) if one.init]
    for name in own:
        if name not in known:
            raise ValueError(unknown_name(f"field of {kind.__name__}", name, known))
    return kind(**own)


def _writer(model: Any, tokenizer: Any, template: QuestionAnswerFormat, args: UnlearningConfig) -> Write:
    """The model as it is before training, as a function that answers questions."""

    def write(questions: Sequence[str], temperature: float, seed: int) -> list[str]:
        settings = GenerationSettings(args.max_new_tokens, temperature=temperature, seed=seed)
        prompts = [template.prompt_ids(tokenizer, question) for question in questions]
        size = max(1, args.per_device_eval_batch_size)
        batches = steps(
            range(0, len(prompts), size), "writing alternative answers", "batch", show=not args.disable_tqdm
        )
        with evaluation_mode(model):
            return [
                text for at in batches for text in generate(model, tokenizer, prompts[at : at + size], settings)[0]
            ]

    return write


def _check_trainable(model: Any, reference_model: Any) -> None:
    """Refuse a model without a parameter to train, and one that is its own reference."""
    require_trainable(model)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    if reference_model is not None and any(id(p) in trained for p in reference_model.parameters()):
        raise ValueError(
            "`reference_model` shares trained parameters with `model`, so it would not stay as it is. Give a copy of "
            "the model, or leave `reference_model` out."
        )


def _evaluation_pairs(dataset: Any) -> list[ForgetRetainPairs]:
    sets = list(dataset.values()) if isinstance(dataset, Mapping) else [dataset]
    return [pairs for pairs in sets if isinstance(pairs, ForgetRetainPairs)]


def _picked(logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    return torch.log_softmax(logits, -1).gather(-1, targets[:, None])[:, 0]


def _later(labels: Int[Tensor, "batch length"]) -> Bool[Tensor, " tokens"]:
    """True for every answer token but the first of its sequence, in the order of the flattened rows."""
    _, mask = next_token_targets(labels)
    return (mask.cumsum(-1) > 1)[mask]
