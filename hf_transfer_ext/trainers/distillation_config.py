"""The settings of `DistillationTrainer`: which loss, which teacher, and how the teacher is loaded."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy
from trl import SFTConfig

from hf_transfer_ext.losses.distillation import DISTILLATION_LOSSES
from hf_transfer_ext.losses.slopes import Form, own_options, require_form
from hf_transfer_ext.losses.spans import (
    SPAN_LOSSES,
    SpanPair,
    has_projections,
    needs_likelihoods_alone,
    takes_vocabularies,
)
from hf_transfer_ext.losses.spans.dskd import SpaceSide
from hf_transfer_ext.models.heads import LMHead
from hf_transfer_ext.registry import keyword_options, unknown_name
from hf_transfer_ext.settings import from_json
from hf_transfer_ext.teachers.cache import planned_spec
from hf_transfer_ext.teachers.several import not_cached_as_one
from hf_transfer_ext.trainers.inherited import refuse_without_effect
from hf_transfer_ext.trainers.logs import require_reporters
from hf_transfer_ext.trainers.named_hidden_losses import default_hidden_weight, named_hidden_losses, refuse_side
from hf_transfer_ext.trainers.named_teachers import COMBINATIONS, check_server_options, named_teachers
from hf_transfer_ext.trainers.number_checks import check_numbers, check_option_numbers
from hf_transfer_ext.trainers.on_policy_options import OnPolicyOptions
from hf_transfer_ext.trainers.task_config import check_task
from hf_transfer_ext.trainers.tasks import CAUSAL_LM
from hf_transfer_ext.trainers.trl_names import answers_trl_names

#: Fields of `DistillationSettings` whose value may be a mapping as JSON, as a command line gives it.
MAPPINGS = (
    "task_options",
    "loss_options",
    "teacher_model_init_kwargs",
    "teacher_cache_options",
    "hidden_options",
    "teacher_server_options",
    "on_policy_options",
    "generation_options",
    "rollout_engine_options",
)


@dataclass
class DistillationSettings(OnPolicyOptions):
    """The fields that a distillation adds to those of its trainer: a teacher and a loss.

    Args:
        task: What the models do: "causal_lm" of `DistillationTrainer`, or a name of `TASKS`, which
            `TaskDistillationTrainer` trains: sequence_classification, token_classification, ...
        task_options: The task's own options (`hf-transfer-ext methods TASK`).
        loss: A name of `DISTILLATION_LOSSES`: forward_kl, reverse_kl, generalized_jsd, ...; with a teacher of another
            tokenizer, one of `SPAN_LOSSES`: uld, gold, alm, dskd. These are summed over the spans of text that are
            groups of tokens on both sides, and divided by the labeled tokens, as every other loss. Left out, it is
            that of the `on_policy` method (reverse_kl of sampled_reverse_kl and minillm, skew_kl of distillm_2), else
            forward_kl.
        loss_options: The divergence's own options, such as `{"beta": 0.3}` of generalized_jsd.
        distill_temperature: Divides both models' logits in the divergence, > 0. It is not a sampling temperature, and
            the loss is not multiplied by its square: put that into `kd_weight` to follow Hinton et al.
        kd_weight: Factor of the divergence from the teacher, >= 0.
        ce_weight: Factor of the cross entropy with the labels, >= 0. Both factors are taken as they are.
        teacher_model_name_or_path: A local folder or Hub id, of a model or of an adapter on a base model, whose
            tokenizer is taken where the adapter has none; not needed where the trainer is given a teacher.
        teacher_revision: Hub revision of the teacher.
        teacher_dtype: "auto", "float32", "bfloat16", ...
        teacher_model_init_kwargs: Further arguments of `from_pretrained` for the teacher, such as
            `{"attn_implementation": "sdpa"}`. These three say how to load a teacher; a loaded one refuses them.
        teacher_adapter: Name of an adapter on the student's own PEFT model that is the teacher, or "base" for its base
            with adapters off; no second model then.
        fused: Project to the vocabulary a chunk of tokens at a time, and never build full logits. Heads that are
            adapted or quantized use full logits in any case.
        float32_logits: Compute the logits of heads in bfloat16 and float16 in float32, on a CPU for up to three
            quarters more time. Off, they are rounded as the model itself rounds them: near the teacher 4 to 17 % of
            the gradient is then rounding, instead of .3 %. Full logits (`fused: false`, adapted heads) are what the
            model makes of them.
        disable_dropout: Set the student's own dropout to 0; an adapter of `peft_config` keeps its own.
        drop_unlabelled: Drop samples in which no token is labelled (a prompt that fills `max_length`, say) instead of
            refusing them.
        stop_on_nan: Stop with an error at the first loss that is NaN or infinite; the last checkpoint stays.
        teacher_cache: Folder of stored teacher outputs (`teachers.cache`). With a teacher, rows that are missing in it
            are computed once and added, so that later epochs need no teacher forward; without, it is the teacher, and
            may be on the Hub: `hf://datasets/OWNER/NAME[@REVISION]`. With `teachers` that are models and adapters, by
            weight or by confidence, their mixture is stored as one teacher. With `loss: alm` it holds the likelihoods
            of texts in the teacher's own tokens.
        teacher_cache_options: Arguments of `CacheSpec` (kind, top, samples, tau) for a new cache.
        teacher_server: Address of an OpenAI-compatible server that gives log-probabilities of prompts (vLLM); the key
            is read from the environment variable TEACHER_API_KEY. With `teacher_cache`, each text is asked for once.
        teacher_server_model: The model's name on it.
        teacher_server_options: Arguments of `ServerTeacher` (top, timeout, retries, pause, parallel, check_tokenizer).
        teacher_tokenizer: Folder or Hub id of the teacher's tokenizer, for `loss: alm` from a server whose model name
            is not one, or from a cache alone.
        teachers: Several teachers, each a mapping with `model`, `adapter`, `cache` or `server` and perhaps `name`,
            `weight`, ... (`trainers.named_teachers.NamedTeacher`).
        teachers_by: "weight": the mixture of their probabilities by fixed weights. "confidence": a mixture by their
            entropy at each token. "column": a column of the data names one for each row, and any forms go together.
            "learned": a mixture by a small gate that is trained on the labels along (`teachers.learned`). A mixture
            that has a cache or a server in it needs `loss: forward_kl`. With a span loss, "weight" and "column" alone:
            each teacher reads the texts in tokens of its own, and the loss is the weighted sum of theirs.
        teacher_column: That column: names of teachers, or their places from 0.
        teacher_sharpness: Of "confidence", in nats, > 0: a small one takes the surest teacher alone.
        hidden_loss: A name of `HIDDEN_LOSSES` (hidden_mse, hidden_cosine, attention_relation, ...): a loss between
            layers of student and teacher, beside the others. Or several at once, as a list of names and of mappings
            with `name`, `weight`, `layer_map`, `embeddings`, `options` and `side`
            (`trainers.named_hidden_losses`). The teacher has to be a model or an adapter, and to read the student's
            tokens. Language models and decoders compare the positions that predict a labeled token; encoders and
            vision-language models all tokens that both models read, with a mean over those of a text for each of its
            items (the text, its words, its masked tokens, the tokens of its target or answer).
        hidden_options: The options of one loss, such as `{"heads": 8}` of attention_relation.
        hidden_weight: Factor of that loss, or of the sum of several, > 0. Each is a mean over its mapped layers. Left
            out, it is 0.1 for minilm and attention_relation, which else outweigh the loss beside them, and 1 for the
            others and for a list, whose entries have these weights of their own.
        layer_map: Which layer of the student learns from which of the teacher: "uniform", "last", "skip", or pairs of
            layers that count from 0, `[[0, 1], [-1, -1]]` (`losses.layer_map`).
        hidden_embeddings: Compare the embeddings, too, in losses that read hidden states.
    """

    task: str = CAUSAL_LM
    task_options: dict[str, Any] | str | None = field(default_factory=dict)
    loss: str = None  # type: ignore[assignment]  # filled in by __post_init__
    loss_options: dict[str, Any] | str | None = field(default_factory=dict)
    distill_temperature: float = 1.0
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    teacher_model_name_or_path: str | None = None
    teacher_revision: str | None = None
    teacher_dtype: str = "auto"
    teacher_model_init_kwargs: dict[str, Any] | str | None = None
    teacher_adapter: str | None = None
    fused: bool = True
    float32_logits: bool = True
    disable_dropout: bool = False
    drop_unlabelled: bool = False
    stop_on_nan: bool = True
    teacher_cache: str | None = None
    teacher_cache_options: dict[str, Any] | str | None = field(default_factory=dict)
    teacher_server: str | None = None
    teacher_server_model: str | None = None
    teacher_server_options: dict[str, Any] | str | None = field(default_factory=dict)
    teacher_tokenizer: str | None = None
    teachers: list[Any] | str | None = None
    teachers_by: str = "weight"
    teacher_column: str = "teacher"
    teacher_sharpness: float = 0.5
    hidden_loss: list[Any] | str | None = None
    hidden_options: dict[str, Any] | str | None = field(default_factory=dict)
    hidden_weight: float | None = None
    layer_map: list[Any] | str | None = "uniform"
    hidden_embeddings: bool = False


@answers_trl_names
@dataclass
class DistillationConfig(DistillationSettings, SFTConfig):
    """`SFTConfig` with a teacher and a loss; `OnPolicyOptions` let the student write the texts.

    What it inherits is listed in `trainers/inherited.py`: obeyed, refused, or without meaning here. Scripts for TRL's
    distillation trainers find their names and defaults in `hf_transfer_ext.trl`.

    `bf16` left alone is on where the hardware computes in bfloat16; on a CPU without such instructions it is off, as
    emulating them is several times slower than float32.
    """

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, *MAPPINGS]  # noqa: RUF012

    def __post_init__(self) -> None:
        check_numbers(self)
        choose_precision(self)
        if self.loss_type in (None, "chunked_nll"):  # TRL before 1.15 has two ways to compute its own cross entropy
            self.loss_type = "nll"
        super().__post_init__()
        self.teachers = from_json(self.teachers)
        self.layer_map = "uniform" if self.layer_map is None else from_json(self.layer_map)
        self.loss = self.loss or self.default_loss()
        if self.hidden_weight is None:
            self.hidden_weight = default_hidden_weight(self.hidden_loss)
        check_option_numbers(self)
        require_reporters(self.report_to)
        self.loss_options: dict[str, Any] = dict(self.loss_options or {})  # type: ignore[arg-type]
        self.task_options: dict[str, Any] = dict(self.task_options or {})  # type: ignore[arg-type]
        if self.task != CAUSAL_LM:
            check_task(self)
        else:
            check_loss(self.loss, self.loss_options)
            if self.task_options:
                raise ValueError(f"`task_options` are given, but the task {CAUSAL_LM} has none. Leave them out.")
        if not self.distill_temperature > 0:
            raise ValueError(f"`distill_temperature` must be > 0, got {self.distill_temperature}.")
        self._check_hidden_loss()
        nothing = self.kd_weight + self.ce_weight == 0 and self.hidden_loss is None
        if self.kd_weight < 0 or self.ce_weight < 0 or nothing:
            raise ValueError(
                f"`kd_weight` and `ce_weight` must be >= 0 and not both 0, got {self.kd_weight} and {self.ce_weight}."
            )
        self._check_teachers()
        self.teacher_cache_options: dict[str, Any] = dict(self.teacher_cache_options or {})  # type: ignore[arg-type]
        if self.teacher_cache is None and self.teacher_cache_options:
            raise ValueError("`teacher_cache_options` are given, but no `teacher_cache`. Name its folder.")
        if not self.float32_logits and (self.is_span_loss or not self.fused):
            other = f"`loss: {self.loss}`, which reads float32" if self.is_span_loss else "`fused=False`"
            raise ValueError(f"`float32_logits` is off, which has no effect with {other}. Leave one of them out.")
        if self.teacher_tokenizer is not None and not (
            self.is_span_loss and (self.teacher_server or self.teacher_cache)
        ):
            raise ValueError(
                "`teacher_tokenizer` is for a span loss with `teacher_server` or `teacher_cache`, which have no "
                "tokenizer beside them. Leave it out."
            )
        if self.is_span_loss:
            self._check_span_loss()
        elif self.task == CAUSAL_LM:
            for teacher, form in self.teacher_forms.items():
                require_form(DISTILLATION_LOSSES[self.loss], form, teacher)
        self.check_on_policy()
        refuse_without_effect(self)

    def _check_teachers(self) -> None:
        self.teacher_server_options: dict[str, Any] = dict(self.teacher_server_options or {})  # type: ignore[arg-type]
        if self.teachers is not None and not isinstance(self.teachers, list):
            raise ValueError(f"`teachers` has to be a list of mappings, got {self.teachers!r}.")
        ways = ("teacher_model_name_or_path", "teacher_adapter", "teacher_server", "teachers")
        named = [f"`{way}`" for way in ways if getattr(self, way)]
        if len(named) > 1:
            raise ValueError(f"Name one teacher: got {' and '.join(named)}. Several go into `teachers`.")
        if bool(self.teacher_server) != bool(self.teacher_server_model):
            raise ValueError("A teacher on a server needs both, `teacher_server` and `teacher_server_model`.")
        if self.teacher_server_options and not self.teacher_server:
            raise ValueError("`teacher_server_options` are given, but no `teacher_server`. Name its address.")
        check_server_options(self.teacher_server_options)
        on_server = self.teacher_server or any(
            isinstance(one, dict) and one.get("server") for one in self.teachers or ()
        )
        if on_server and self.distill_temperature != 1:
            raise ValueError(
                f"`distill_temperature` is {self.distill_temperature}, but a server lists probabilities at "
                "temperature 1, and what it does not list cannot be changed afterwards. Set it to 1."
            )
        if self.teacher_server and self.teacher_cache_options:
            raise ValueError(
                "`teacher_cache_options` have no effect with `teacher_server`: its likeliest tokens are kept."
            )
        if self.teachers_by not in COMBINATIONS:
            raise ValueError(unknown_name("way to combine teachers", self.teachers_by, COMBINATIONS))
        if not self.teacher_sharpness > 0:
            raise ValueError(f"`teacher_sharpness` must be > 0, got {self.teacher_sharpness}.")
        defaults = {"teachers_by": "weight", "teacher_column": "teacher", "teacher_sharpness": 0.5}
        stated = [name for name, default in defaults.items() if getattr(self, name) != default]
        if self.teachers is None:
            if stated:
                raise ValueError(f"`{stated[0]}` is given, but no `teachers`. List them.")
            return
        found = named_teachers(self.teachers, self.teachers_by)
        readers = [one.name for one in found if one.tokenizer is not None]
        if readers and not self.is_span_loss:
            raise ValueError(
                f"The teacher {readers[0]!r} has a `tokenizer`, but `loss: {self.loss}` compares tokens, and reads "
                "them as the student does. Leave it out, or choose a span loss."
            )
        for name, way in (("teacher_column", "column"), ("teacher_sharpness", "confidence")):
            if name in stated and self.teachers_by != way:
                raise ValueError(f"`{name}` is given, but `teachers_by` is {self.teachers_by!r}. Set it to {way!r}.")
        if self.teachers_by == "column" and self.packing:
            raise ValueError(
                "`packing` puts several rows into one, which has no single teacher. Switch one of both off."
            )
        if self.teachers_by == "learned" and (self.on_policy or self.on_policy_share or self.teacher_writes):
            raise ValueError(
                "`teachers_by: learned` trains its gate on the tokens of the text, but with `on_policy` the student "
                "writes the text, and the gate would learn which teacher is most like the student. Combine the "
                "teachers by weight or by confidence, or leave `on_policy` out."
            )
        is_dense = all(one.form(self.distill_temperature) == "dense" for one in found)
        if self.teacher_cache is not None and not (is_dense and self.teachers_by in ("weight", "confidence")):
            raise ValueError(
                not_cached_as_one(f"`teachers_by: {self.teachers_by}`" + ("" if is_dense else ", a cache or a server"))
            )
        drawn = [one.name for one in found if not one.lists_likeliest(self.distill_temperature)]
        if drawn and self.teachers_by in ("confidence", "learned"):
            raise ValueError(
                f"`teachers_by: {self.teachers_by}` reads how sure each teacher is from its likeliest tokens, but the "
                f"cache {drawn[0]!r} is of kind 'samples', random draws alone. Make it with `kind: top` or "
                "`top_and_samples`, or combine the teachers by weight."
            )

    def _check_hidden_loss(self) -> None:
        self.hidden_options: dict[str, Any] = dict(self.hidden_options or {})  # type: ignore[arg-type]
        losses = named_hidden_losses(self)
        if not losses:
            return
        if self.task == CAUSAL_LM:
            refuse_side(losses, CAUSAL_LM)
        if self.teachers or self.teacher_server:
            raise ValueError(
                "`hidden_loss` reads the layers of one teacher, a model or an adapter, but "
                f"{'several are' if self.teachers else 'a server is'} named. Leave one of them out."
            )
        if self.teacher_cache is not None:
            raise ValueError(
                "`hidden_loss` and `teacher_cache` are both set, but a cache holds the teacher's predictions and not "
                "its hidden states. Leave one of them out."
            )
        if self.torch_compile:
            raise ValueError("`hidden_loss` reads layers by hooks, which `torch_compile` does not see. Switch it off.")

    def _check_span_loss(self) -> None:
        if has_projections(SPAN_LOSSES[self.loss]) and not self.fused:
            raise ValueError(
                f"`fused` is False, but {self.loss} compares hidden states, and full logits would not show them. "
                "Leave `fused` out."
            )
        if has_projections(SPAN_LOSSES[self.loss]) and self.torch_compile:
            raise ValueError(f"{self.loss} reads layers by hooks, which `torch_compile` does not see. Switch it off.")
        entries = [] if self.teachers is None else named_teachers(self.teachers, self.teachers_by)
        possible = [name for name in SPAN_LOSSES if needs_likelihoods_alone(SPAN_LOSSES[name])]
        served = ["`teacher_server`"] if self.teacher_server else []
        served += [f"the teacher {one.name!r}, a server," for one in entries if one.server is not None]
        if served and self.loss not in possible:
            raise ValueError(
                f"`loss: {self.loss}` compares whole distributions with a teacher model, but {served[0]} lists "
                f"a few tokens alone. From a server of another tokenizer, take {' or '.join(possible)}."
            )
        if self.teachers is not None and self.teachers_by not in ("weight", "column"):
            raise ValueError(
                f"`loss: {self.loss}` lets each teacher read the text in tokens of its own, which does not go with "
                f"`teachers_by: {self.teachers_by}`: its weights are those of tokens that all teachers predict. "
                "Combine them by weight or by column, or choose a divergence."
            )
        cached = [f"the cache {one.name!r} among `teachers`" for one in entries if one.cache is not None]
        cached += ["`teacher_cache`"] if self.teacher_cache else []
        if cached and self.loss not in possible:
            raise ValueError(
                f"`loss: {self.loss}` compares whole distributions with a teacher model, which does not go with "
                f"{cached[0]}: a cache would hold the whole vocabulary for each token. Leave it out, or choose "
                f"{' or '.join(possible)}, which needs the likelihoods of texts alone."
            )
        if self.teacher_cache and self.teachers:
            raise ValueError(not_cached_as_one("teachers with tokens of their own"))
        options = self.teacher_cache_options
        if options and options != {"kind": "likelihoods"}:
            raise ValueError(
                f"`teacher_cache_options` are {options}, but {self.loss} reads likelihoods of texts alone, and its "
                "cache is of kind likelihoods. Leave them out."
            )
        others = [f"`{name}`" for name in ("teacher_adapter", "hidden_loss") if getattr(self, name)]
        if others:
            raise ValueError(
                f"`loss: {self.loss}` lets a teacher model read the text in tokens of its own, which does not go "
                f"with {others[0]}: its rows, or layers, are those of the student's tokens. Leave it out, "
                "or choose a divergence. An adapter on another model is named by its folder, as a model is."
            )

    @property
    def is_span_loss(self) -> bool:
        """Whether the loss compares spans of text, with a teacher of another tokenizer."""
        return self.loss in SPAN_LOSSES

    @property
    def is_taught(self) -> bool:
        """Whether a teacher takes part; without, it is plain fine-tuning."""
        return self.kd_weight > 0 or self.hidden_loss is not None

    @property
    def teacher_forms(self) -> dict[str, Form]:
        """Each teacher that the config names, as messages call it -> the form of its rows, as the loss reads them."""
        if self.teacher_cache is not None:
            options: Any = self.teacher_cache_options
            spec = planned_spec(self.teacher_cache, self.distill_temperature, options)
            return {"this teacher": "sparse" if self.teacher_server else spec.form}
        if self.teachers:
            found = named_teachers(self.teachers, self.teachers_by)
            forms = {f"the teacher {one.name!r}": one.form(self.distill_temperature) for one in found}
            mixed: dict[str, Form] = {"this mixture": "mixture"}
            is_sum = self.teachers_by != "column" and set(forms.values()) != {"dense"}
            return {**forms, **mixed} if is_sum else forms
        if self.teacher_server:
            return {"this teacher": "sparse"}
        return {"this teacher": "dense"} if self.teacher_adapter or self.teacher_model_name_or_path else {}


def choose_precision(args: TrainingArguments) -> None:
    """Where `bf16` is left alone on a machine without an accelerator: bfloat16 only if its CPU computes in it."""
    if args.bf16 is None and not args.fp16 and not torch.accelerator.is_available():
        args.use_cpu, args.bf16 = True, cpu_computes_in_bf16()


def cpu_computes_in_bf16() -> bool:
    """Whether this processor has bfloat16 instructions (AVX-512 BF16 or AMX)."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def check_loss(name: str, options: dict[str, Any]) -> None:
    """Refuse an unknown divergence, unknown options, and values out of the divergence's range."""
    spans = name in SPAN_LOSSES
    if not spans and name not in DISTILLATION_LOSSES:
        raise ValueError(unknown_name(DISTILLATION_LOSSES.kind, name, [*DISTILLATION_LOSSES, *SPAN_LOSSES]))
    divergence: Any = SPAN_LOSSES[name] if spans else DISTILLATION_LOSSES[name]
    known = list(keyword_options(divergence)) if spans else own_options(divergence)
    for option in options:
        if option not in known:
            raise ValueError(unknown_name(f"option of {name}", option, known or ["(it has none)"]))
    if has_projections(divergence):
        row, token, count = torch.zeros(1, 1), torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.long)
        side = SpaceSide(row, LMHead(torch.zeros(2, 1)), row, row, token, count)
        names = {"query": torch.zeros(2, 2), "to_student": row, "to_teacher": row}
        divergence(side, side, token, token, token, names, **options)
    elif spans:
        whole, each = torch.zeros(1, 2).log_softmax(-1), torch.zeros(1, dtype=torch.long)
        matched = [each, each] if takes_vocabularies(divergence) else []
        divergence(SpanPair(whole, whole, whole[:, 0], whole[:, 0]), *matched, **options)
    else:
        divergence(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), **options)  # ranges are the divergence's own to check


def between_stages(args: DistillationConfig) -> DistillationConfig:
    """A copy for a stage before the run itself: it neither resumes, nor saves checkpoints, nor publishes."""
    plain = copy.copy(args)
    plain.resume_from_checkpoint, plain.push_to_hub = None, False
    plain.save_strategy = SaveStrategy.NO
    return plain


def without_teacher(args: DistillationConfig) -> DistillationConfig:
    """The same training on cross entropy alone: a teacher's own fine-tuning, or a student's twin to compare with."""
    plain = between_stages(args)
    plain.kd_weight, plain.ce_weight = 0.0, 1.0
    plain.teacher_model_name_or_path = plain.teacher_adapter = plain.teacher_cache = None
    plain.teacher_cache_options, plain.teacher_tokenizer = {}, None
    plain.hidden_loss = plain.teacher_server = plain.teachers = plain.on_policy = None
    forget_loading(plain)
    return plain


#: Settings that say how a teacher is loaded -> their value where they say nothing.
TEACHER_LOADING: dict[str, Any] = {
    "teacher_revision": None,
    "teacher_dtype": "auto",
    "teacher_model_init_kwargs": None,
}


def forget_loading(args: DistillationConfig) -> None:
    """Reset what says how to load the teacher, once that is done or there is none."""
    for name, nothing in TEACHER_LOADING.items():
        setattr(args, name, nothing)
