"""TRL's distillation trainers by name: a script for them runs here with its import changed, and means the same.

`from trl import DistillationConfig, DistillationTrainer`, `from trl.experimental.gkd import GKDConfig, GKDTrainer` and
`from trl.experimental.gold import GOLDConfig, GOLDTrainer` become `from hf_transfer_ext.trl import ...`. Names and
defaults of the configurations are those of the installed TRL; our own settings (`teachers`, `hidden_loss`, ...)
stand beside them. `docs/coming-from.md` lists what becomes of each setting.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from trl import DistillationConfig as TRLDistillationConfig
from trl import SFTTrainer
from trl.trainer.utils import RepeatSampler

from hf_transfer_ext.hub.record import RunRecord
from hf_transfer_ext.models.loading import load_tokenizer
from hf_transfer_ext.trainers.distillation import DistillationTrainer as OurTrainer
from hf_transfer_ext.trainers.distillation_config import MAPPINGS, DistillationSettings, choose_precision
from hf_transfer_ext.trainers.distillation_config import DistillationConfig as OurConfig
from hf_transfer_ext.trainers.trl_names import converted, translated

with warnings.catch_warnings():  # that the modules are experimental: their configurations alone are used
    warnings.simplefilter("ignore")
    from trl.experimental.gkd import GKDConfig as TRLGKDConfig
    from trl.experimental.gold import GOLDConfig as TRLGOLDConfig

logger = logging.getLogger(__name__)

__all__ = ["DistillationConfig", "DistillationTrainer", "GKDConfig", "GKDTrainer", "GOLDConfig", "GOLDTrainer"]

#: Settings of TRL that the trainers below follow themselves.
_FOLLOWED = ("chat_template_kwargs", "teacher_tokenizer_name_or_path", "num_generations")


@dataclass
class _OurSettings(DistillationSettings):
    """Our settings beside TRL's: those that are None follow from TRL's."""

    loss: str | None = None  # type: ignore[assignment]
    distill_temperature: float | None = None  # type: ignore[assignment]
    sampling_temperature: float | None = None  # type: ignore[assignment]
    max_new_tokens: int | None = None  # type: ignore[assignment]


@dataclass
class DistillationConfig(_OurSettings, TRLDistillationConfig):
    """TRL's `DistillationConfig` with our settings beside its own.

    The student writes all texts (`max_completion_length`), the loss is reverse KL (`beta=1`), the learning rate 1e-6.
    """

    _VALID_DICT_FIELDS = [*TRLDistillationConfig._VALID_DICT_FIELDS, *MAPPINGS]  # noqa: RUF012

    def __post_init__(self) -> None:
        choose_precision(self)
        super().__post_init__()
        _refuse(self)


@dataclass
class GKDConfig(_OurSettings, TRLGKDConfig):  # type: ignore[misc]
    """TRL's `GKDConfig` with our settings beside its own.

    The student writes half of the batches (`lmbda`), the loss is the Jensen-Shannon divergence (`beta=0.5`), and
    `temperature` is that of sampling alone.
    """

    disable_dropout: bool = TRLGKDConfig.disable_dropout
    max_new_tokens: int = TRLGKDConfig.max_new_tokens

    _VALID_DICT_FIELDS = [*TRLGKDConfig._VALID_DICT_FIELDS, *MAPPINGS]  # noqa: RUF012

    def __post_init__(self) -> None:
        choose_precision(self)
        super().__post_init__()
        _refuse(self)


@dataclass
class GOLDConfig(_OurSettings, TRLGOLDConfig):  # type: ignore[misc]
    """TRL's `GOLDConfig` with our settings beside its own.

    As `GKDConfig`, with a learning rate of 1e-7 and nucleus sampling (`top_p=0.95`); `use_uld_loss` compares spans of
    text with a teacher of another tokenizer: `loss` is then `uld`, and `gold` with `uld_use_hybrid_loss`.
    """

    disable_dropout: bool = TRLGOLDConfig.disable_dropout

    _VALID_DICT_FIELDS = [*TRLGOLDConfig._VALID_DICT_FIELDS, *MAPPINGS]  # noqa: RUF012

    def __post_init__(self) -> None:
        choose_precision(self)
        super().__post_init__()
        _refuse(self)


def _refuse(args: TrainingArguments) -> None:
    """Refuse what a trainer could not follow before a model is loaded; the trainer reads the settings again."""
    translated(_without(args, *_FOLLOWED), OurConfig)


def _without(args: Any, *names: str) -> Any:
    """A copy in which these settings are None, where it has them."""
    plain = copy.copy(args)
    for name in names:
        if hasattr(plain, name):
            setattr(plain, name, None)
    return plain


def _configuration(args: Any, theirs: type, ours: type, model: Any) -> Any:
    """`args`, or the default configuration, in a folder named after the model as TRL has it.

    Raises:
        TypeError: It is a configuration of something else.
    """
    if args is None:
        name = str(model if isinstance(model, (str, Path)) else model.config.name_or_path).split("/")[-1]
        return ours(f"{name}-{ours.__name__.removesuffix('Config')}")
    if not isinstance(args, theirs):
        raise TypeError(
            f"`args` has to be a {ours.__name__} of `hf_transfer_ext.trl` or of TRL, got {type(args).__module__}."
            f"{type(args).__name__}. Trainers and configurations of `hf_transfer_ext` itself have their own defaults."
        )
    return args


class DistillationTrainer(OurTrainer):
    """TRL's stable `DistillationTrainer`: the student writes after the prompts, and matches the teacher there.

    Args:
        teacher_model: A model, a path or a Hub id; None where the config names it.
        args: `DistillationConfig` of this module or of TRL.
        train_dataset: With a column `prompt`; other columns are not read.
        ours: Further arguments of `hf_transfer_ext.DistillationTrainer`.
    """

    def __init__(
        self,
        model: Any,
        teacher_model: Any = None,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: Any = None,
        **ours: Any,
    ) -> None:
        args = _configuration(args, TRLDistillationConfig, DistillationConfig, model)
        template = getattr(args, "chat_template_kwargs", None)
        args = converted(_without(args, *_FOLLOWED), OurConfig)
        columns = ["prompt"] if args.on_policy_share == 1 else ["prompt", "completion"]
        super().__init__(
            model,
            teacher_model,
            args,
            _read(train_dataset, columns, template),
            processing_class,
            eval_dataset=_read(eval_dataset, columns, template),
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=tools,
            **ours,
        )

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, *rest: Any, **kwargs: Any) -> Any:
        default: Any = TRLDistillationConfig.max_completion_length
        if self._context is not None and args.max_new_tokens == default and self._context < 2 * default:
            args.max_new_tokens = max(1, self._context // 2)
            logger.warning(
                "`max_completion_length` is %d by default; the models take %d tokens, half of which is used.",
                default, self._context,
            )  # fmt: skip
        return super()._prepare_dataset(dataset, processing_class, args, *rest, **kwargs)


def _read(dataset: Any, columns: list[str], template: dict[str, Any] | None) -> Any:
    """These columns of the rows, with the arguments of the chat template for each row.

    Raises:
        ValueError: One is missing, or the rows hold images.
    """
    if isinstance(dataset, Mapping):
        return {name: _read(one, columns, template) for name, one in dataset.items()}
    if dataset is None:
        return None
    found = dataset.column_names or list(next(iter(dataset), ()))
    if not set(columns) <= set(found):
        raise ValueError(
            f"TRL's DistillationTrainer writes after the column `prompt`. Needed: {', '.join(columns)}; the rows have "
            f"{', '.join(found)}. Rename columns, or train with GKDTrainer, which takes `messages`."
        )
    images = [name for name in ("image", "images") if name in found]
    if images:
        raise ValueError(f"The rows have a column {images[0]!r}, but texts are written after prompts of text here.")
    dataset = dataset.select_columns(columns)
    return dataset.map(lambda row: {"chat_template_kwargs": template}) if template else dataset


class _CutsData(SFTTrainer):
    """Rows of the data are cut to `data_length`; what is written comes on top of it, within the models' context."""

    data_length: int | None = None
    _context: int | None

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, *rest: Any, **kwargs: Any) -> Any:
        room = None if self._context is None else self._context - args.max_new_tokens
        cut = copy.copy(args)
        cut.max_length = min((limit for limit in (self.data_length, room) if limit is not None), default=None)
        return super()._prepare_dataset(dataset, processing_class, cut, *rest, **kwargs)


class _ReadsAnswers(OurTrainer, _CutsData):  # type: ignore[misc]
    """A trainer on rows with answers; its record says to which length they were cut.

    The arguments are those of TRL's GKDTrainer, by name and by position; its GOLDTrainer has all but the last one.
    """

    #: The configuration of TRL, and the one of this module.
    _kinds: tuple[type, type]

    def __init__(
        self,
        model: Any = None,
        teacher_model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Any = None,
        peft_config: Any = None,
        formatting_func: Any = None,
        **ours: Any,
    ) -> None:
        _refuse_arguments(data_collator=data_collator, formatting_func=formatting_func)
        given = _configuration(args, *self._kinds, model)
        args = converted(_without(given, *_FOLLOWED), OurConfig)
        self.data_length, args.max_length = args.max_length, None
        self._follow(given, args, teacher_model, ours)
        super().__init__(
            model,
            teacher_model,
            args,
            train_dataset,
            processing_class,
            eval_dataset=eval_dataset,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            peft_config=peft_config,
            **ours,
        )

    def _follow(self, given: Any, args: Any, teacher_model: Any, ours: dict[str, Any]) -> None:
        """Read the settings of `given` that `args`, the same in our words, does not have.

        Args:
            ours: Further arguments of our trainer, to which some of them are added.
        """

    def describe(self, record: RunRecord) -> None:
        super().describe(record)
        record.config["data_length"] = self.data_length


class GKDTrainer(_ReadsAnswers):
    """TRL's `GKDTrainer`: the student writes a share of the batches, after the conversations up to their last answer.

    Args:
        teacher_model: A model, a path or a Hub id; None where the config names it.
        args: `GKDConfig` of this module or of TRL.
        train_dataset: With a column `messages`, or `prompt` and `completion`.
        ours: Further arguments of `hf_transfer_ext.DistillationTrainer`.
    """

    _kinds = TRLGKDConfig, GKDConfig


class GOLDTrainer(_ReadsAnswers):
    """TRL's `GOLDTrainer`: as `GKDTrainer`, with `use_uld_loss` for a teacher of another tokenizer.

    With `num_generations` n, an optimizer step has n texts for each of its prompts, in the order of TRL's trainer; an
    epoch ends before a step that could not be filled.

    Args:
        teacher_model: A model, a path or a Hub id; None where the config names it.
        args: `GOLDConfig` of this module or of TRL.
        train_dataset: With a column `messages`, or `prompt` and `completion`.
        ours: Further arguments of `hf_transfer_ext.DistillationTrainer`.
    """

    _kinds = TRLGOLDConfig, GOLDConfig
    _num_generations = 1

    def _follow(self, given: Any, args: Any, teacher_model: Any, ours: dict[str, Any]) -> None:
        self._num_generations = given.num_generations
        name = given.teacher_tokenizer_name_or_path
        if name is not None and ours.get("teacher_processing_class") is None:
            of_teacher = name in (teacher_model, args.teacher_model_name_or_path)
            revision = (args.teacher_model_init_kwargs or {}).get("revision", args.teacher_revision)
            ours["teacher_processing_class"] = load_tokenizer(
                name, revision=revision if of_teacher else None, trust_remote_code=args.trust_remote_code
            )

    def start_rollouts(self) -> None:
        super().start_rollouts()
        if self._num_generations > 1:
            self._require_whole_steps()

    @property
    def _prompts_of_a_step(self) -> int:
        texts = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        return texts * self.accelerator.num_processes // self._num_generations

    def _require_whole_steps(self) -> None:
        """Refuse data from which no optimizer step can be made of `num_generations` texts for each prompt."""
        way, copies = self.args.train_sampling_strategy, self._num_generations
        if way not in ("random", "sequential"):
            raise ValueError(
                f"`num_generations` is {copies}, and the texts of a prompt stay together, but "
                f"`train_sampling_strategy` is {str(way)!r}. Set it to 'random' or 'sequential'."
            )
        if not isinstance(self.train_dataset, Sized):
            raise ValueError(
                f"`num_generations` is {copies}, but the data are streamed, and prompts are repeated by their place. "
                "Load the data, or repeat the prompts in the stream."
            )
        if len(self.train_dataset) < self._prompts_of_a_step:
            raise ValueError(
                f"An optimizer step has {copies} texts for each of {self._prompts_of_a_step} prompts "
                f"(`num_generations` {copies}), but the data have {len(self.train_dataset)}. Lower "
                "`per_device_train_batch_size` or `gradient_accumulation_steps`."
            )

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self._num_generations == 1:
            return super()._get_train_sampler(train_dataset)
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        return _RepeatedPrompts(
            dataset,
            mini_repeat_count=self._num_generations,
            batch_size=self._prompts_of_a_step,
            shuffle=self.args.train_sampling_strategy == "random",
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
        )

    def describe(self, record: RunRecord) -> None:
        super().describe(record)
        record.config["num_generations"] = self._num_generations


class _RepeatedPrompts(RepeatSampler):
    """TRL's order of prompts, in which a resumed run goes on."""

    seed: int

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass over the data the one of this epoch: TRL draws the passes one after another."""
        if self.shuffle:
            self.generator.manual_seed(self.seed)
            for _ in range(epoch):
                torch.randperm(self.num_samples, generator=self.generator)


def _refuse_arguments(**given: Any) -> None:
    """Refuse arguments of TRL's trainers that read rows as they stand, before they are tokenized."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"`{name}` is given, but rows are tokenized before they are collated here, and no collator or format "
                "of the script's own reads them. Leave it out; change the rows with `Dataset.map` beforehand."
            )
