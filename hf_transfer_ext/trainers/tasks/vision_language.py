from __future__ import annotations

import copy
import inspect
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn.functional import pad

from hf_transfer_ext.data.images import undecoded
from hf_transfer_ext.losses.layer_reading import Reading as Layers
from hf_transfer_ext.models.heads import causal_lm_of
from hf_transfer_ext.models.loading import load_processor, require_processor
from hf_transfer_ext.teachers.live import OPTIONAL_INPUTS
from hf_transfer_ext.tensors import next_token_targets, predicting_rows
from hf_transfer_ext.trainers.distillation_task import TEACHER, content_of, tokens_but_padding
from hf_transfer_ext.trainers.hidden_loss import ComparedTokens, tokens_of_texts
from hf_transfer_ext.trainers.image_rows import (
    IMAGES,
    Reading,
    batch_of,
    images_of,
    messages_of,
    reading_of,
    rows_of,
    shared_places,
)
from hf_transfer_ext.trainers.token_losses import TokenTask

logger = logging.getLogger(__name__)

#: Fields of configurations that hold ids of tokens of images.
_IMAGE_TOKENS = re.compile(r"(image|video|vision|boi|eoi)(_\w+)?_token_(id|index)")


class vision_language(TokenTask):
    r"""Answer about images (LLaVA, SmolVLM, Qwen-VL, Gemma 3): a divergence at each token of the answers.

    .. math:: L = \text{kd\_weight} \, D(p_T, q_S) + \text{ce\_weight} \, CE(y, q_S)

    as a mean over the tokens of the answers. Prompts and images are read and not learned.

    Rows have `images` or `image` (PIL images, stored bytes, or paths relative to `image_folder`), and `messages`, or
    `prompt` and `completion`. Messages may have parts `{"type": "image"}` where the images are, which may hold them;
    otherwise images come first. A `prompt` that is a text is one message of the user. Of `messages`, all answers of
    the assistant are learned; images have to come before the first one.

    Both models see the images, each through its own processor: an image may have another size, and another number of
    tokens, for the teacher, and the prompts another chat template. The tokens of the answers have to be the same.
    `max_length` counts the tokens of images. It cuts answers; rows whose prompt does not fit are refused.

    `hidden_loss` compares the layers of both language models at the tokens that both read: answers, prompts, and
    images that are as many tokens, in as many parts, for both. Other images, and what one chat template has alone, are
    left out, with a warning. Attention to tokens that are left out, or that come later (within an image of Gemma 3,
    within a prompt of PaliGemma), is not compared.

    `task_options`: `image_folder`, which recipes set to the folder of the data; `freeze_vision`, to leave the vision
    tower as it is. A LoRA on "all-linear" layers is put on the language model alone.

    When to use it: questions about images, documents or charts, by a smaller model.

    Source: word-level distillation of Kim and Rush 2016, section 3.1, https://arxiv.org/abs/1606.07947
    """

    needs: ClassVar[tuple[str, ...]] = ()
    may_have: ClassVar[tuple[str, ...]] = (*IMAGES, "messages", "prompt", "completion")
    keeps: ClassVar[tuple[str, ...]] = (*IMAGES, "messages", "prompt", "completion")
    needs_teachers_reader: ClassVar[bool] = True
    has_answers: ClassVar[bool] = True
    options: ClassVar[Mapping[str, Any]] = {"image_folder": None, "freeze_vision": False}
    select: ClassVar[Any] = staticmethod(predicting_rows)
    unread: ClassVar[Mapping[Layers, str]] = {
        "messages": "the teacher answers at each of the student's tokens, and an image may be other tokens for it"
    }

    def __init__(self, args: Any, student: Any, teacher: Any, tokenizer: Any, teacher_tokenizer: Any = None) -> None:
        super().__init__(args, student, teacher, tokenizer)
        self.teacher_tokenizer = teacher_tokenizer
        if teacher is not None and teacher_tokenizer is not None:
            self.reads_apart = content_of(tokenizer) != content_of(teacher_tokenizer)
        models = [one for one in (student, teacher) if one is not None]
        self.image_tokens = frozenset[int]().union(*(image_tokens_of(one) for one in models))
        self.vision = vision_tower(student)[0]
        self._warned_of_left_out = False

    @classmethod
    def load_reader(cls, name: Any, **how: Any) -> Any:
        return load_processor(name, **how)

    @classmethod
    def check_reader(cls, role: str, reader: Any) -> None:
        try:
            require_processor(reader)
        except ValueError as error:
            raise ValueError(f"The {role} of the task vision_language: {error}") from error

    @classmethod
    def check(cls, args: Any) -> None:
        super().check(args)
        freezes = args.task_options.get("freeze_vision", False)
        if not isinstance(freezes, bool):
            raise ValueError(f"`freeze_vision` of vision_language has to be true or false, got {freezes!r}.")

    @classmethod
    def trainable(cls, args: Any, student: Any, adapter: Any = None) -> Any:
        name, tower = vision_tower(student)
        freezes = args.task_options.get("freeze_vision", False)
        if freezes and not hasattr(student, "peft_config"):
            tower.requires_grad_(False)
        if adapter is not None and str(adapter.target_modules).lower() == "all-linear":
            adapter = copy.copy(adapter)
            adapter.target_modules = linear_layers_of_language(student)
        found = super().trainable(args, student, adapter)
        sizes = [(one.numel(), one.requires_grad) for one in tower.parameters()]
        total, trained = sum(size for size, _ in sizes), sum(size for size, learns in sizes if learns)
        if freezes and trained:
            raise ValueError(
                f"`freeze_vision` is on, but the adapter has {trained} weights in the vision tower {name!r}. Leave "
                "its layers out of `target_modules`, or switch `freeze_vision` off."
            )
        logger.info("Of the %d parameters of the vision tower %r, %d are trained.", total, name, trained)
        return found

    def facts(self) -> dict[str, Any]:
        return {"frozen": self.vision} if self.settings["freeze_vision"] else {}

    # ---- Rows and batches ----

    def prepared(self, dataset: Any) -> Any:
        dataset = undecoded(dataset)
        first = next(iter(dataset))
        has_text = "messages" in first or {"prompt", "completion"} <= set(first)
        if not has_text or not any(name in first for name in (*IMAGES, "messages")):
            raise ValueError(
                "The task vision_language needs a column `images` (or `image`), and `messages`, or `prompt` and "
                f"`completion`, but the rows have {', '.join(first)}. Rename yours: "
                "`dataset.rename_column(yours, 'images')`, or `columns` of the recipe."
            )
        return super().prepared(dataset)

    def row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        images = images_of(row, self.settings["image_folder"])
        messages = messages_of(row, len(images))
        readers = {"": self.tokenizer} | ({TEACHER: self.teacher_tokenizer} if self.reads_apart else {})
        sides = {side: reading_of(one, messages, images, self.image_tokens) for side, one in readers.items()}
        answers = [one.answers() for one in sides.values()]
        if answers[0] != answers[-1]:
            raise ValueError(
                f"its answers are {len(answers[0])} tokens for the student and {len(answers[-1])} different ones for "
                "the teacher, so that they cannot be compared token by token. Chat templates that end an answer in "
                "different ways do that: give both processors the same one."
            )
        count = min(one.fitting(self.args.max_length) for one in sides.values())
        if not count:
            lengths = [f"{one.text_length} for the {'teacher' if side else 'student'}" for side, one in sides.items()]
            raise ValueError(
                f"up to its first answer it has these tokens, images included: {', '.join(lengths)}. `max_length` "
                f"is {self.args.max_length}, which would cut them and leave nothing to learn. Raise it, or lower the "
                "size of images in the processor."
            )
        found = {side: one.cut(count) for side, one in sides.items()}
        length = found[""].text_length + len(found[""].tail)
        columns = {side + name: value for side, one in found.items() for name, value in one._asdict().items()}
        return {**columns, "length": length}

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        images = [images_of(row, self.settings["image_folder"]) for row in rows]
        batch: dict[str, Tensor] = {}
        for side in ("", TEACHER) if self.reads_apart else ("",):
            reader = self.teacher_tokenizer if side else self.tokenizer
            readings = [Reading(*(row[side + name] for name in Reading._fields)) for row in rows]
            made = batch_of(reader, readings, images, self.args.pad_to_multiple_of)
            batch |= {side + name: values for name, values in made.items()}
        return batch

    def inputs(self, model: nn.Module, batch: Mapping[str, Tensor], *, of_teacher: bool = False) -> dict[str, Tensor]:
        """What a model is called with: all that its processor made of texts and images.

        Raises:
            ValueError: The model does not take a part of it.
        """
        apart = of_teacher and self.reads_apart
        found = {name.removeprefix(TEACHER): v for name, v in batch.items() if name.startswith(TEACHER) == apart}
        found.pop("labels")
        kind = type(causal_lm_of(model))
        takes = inspect.signature(kind.forward).parameters
        unread = [name for name in found if name not in takes and name not in OPTIONAL_INPUTS]
        if unread or not any(value.is_floating_point() for value in found.values()):
            missed = f"does not take {', '.join(unread)}" if unread else "is given no pixels"
            raise ValueError(
                f"{kind.__name__} {missed}, so it would not see all of the image. Use the processor that belongs to "
                "this model."
            )
        return {name: value for name, value in found.items() if name in takes}

    def items(self, batch: Mapping[str, Tensor]) -> Bool[Tensor, "batch seq"]:
        return next_token_targets(batch["labels"])[1]

    def teacher_mask(self, batch: Mapping[str, Tensor]) -> Bool[Tensor, "batch seq"]:
        return next_token_targets(batch[(TEACHER if self.reads_apart else "") + "labels"])[1]

    def compared_tokens(self, batch: Mapping[str, Tensor]) -> ComparedTokens:
        labels, labeled = next_token_targets(batch["labels"])
        items, own, theirs = self.items_of_texts(batch), tokens_but_padding(batch), None
        if self.reads_apart:
            own, other = self._shared_tokens(batch)
            theirs = tokens_of_texts(batch, other, items, pad(self.teacher_mask(batch), (0, 1)))
        return tokens_of_texts(batch, own, items, pad(labeled, (0, 1)), labels[labeled], theirs)

    def _shared_tokens(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """True at the tokens that both models read, in the batch of the student and in that of the teacher."""
        rows, others = rows_of(batch), rows_of(batch, TEACHER)
        masks = [torch.zeros_like(batch[side + "input_ids"], dtype=torch.bool) for side in ("", TEACHER)]
        for number, (row, other) in enumerate(zip(rows, others, strict=True)):
            for mask, places in zip(masks, shared_places(row, other, self.image_tokens), strict=True):
                mask[number, places] = True
        self._warn_of_left_out(rows, others, masks)
        return masks[0], masks[1]

    def _warn_of_left_out(self, *read: Sequence[Any]) -> None:
        """Say once how many tokens of each model are not compared, and how many of them stand for images."""
        rows, others, masks = read
        counts = []
        for side, mask in zip((rows, others), masks, strict=True):
            left_out = [
                token for row, kept in zip(side, mask.tolist(), strict=True)
                for token, one in zip(row.ids, kept, strict=False) if not one
            ]  # fmt: skip
            images = sum(token in self.image_tokens for token in left_out)
            counts.append((len(left_out), sum(len(row.ids) for row in side), images))
        if not self._warned_of_left_out and any(left_out for left_out, _, _ in counts):
            self._warned_of_left_out = True
            told = "; ".join(
                f"{left_out} of {total} tokens of the {role} ({images} of them of images)"
                for role, (left_out, total, images) in zip(("student", "teacher"), counts, strict=True)
            )
            logger.warning(
                "`hidden_loss` leaves out what only one of the models reads. In the first such batch: %s. Images are "
                "compared where both processors make as many tokens of them, and prompts where the chat templates "
                "agree.",
                told,
            )

    def targets(self, batch: Mapping[str, Tensor]) -> Tensor:
        return next_token_targets(batch["labels"])[0]


def vision_tower(model: Any) -> tuple[str, nn.Module]:
    """Name and module of the part of a model that reads images.

    Raises:
        ValueError: It has none.
    """
    causal = causal_lm_of(model)
    tower = causal.get_encoder(modality="image") if hasattr(causal, "get_encoder") else causal
    name = next((name for name, module in causal.named_modules() if module is tower), "")
    if not name or not image_tokens_of(causal):
        raise ValueError(
            f"`task` is vision_language, but {type(causal).__name__} has no vision tower, or no token that stands for "
            "images. Use a model of AutoModelForImageTextToText."
        )
    return name, tower


def image_tokens_of(model: Any) -> set[int]:
    """Ids of the tokens that stand for images, or mark them, in a model's config."""
    config = causal_lm_of(model).config.to_dict()
    return {value for key, value in config.items() if _IMAGE_TOKENS.fullmatch(key) and isinstance(value, int)}


def linear_layers_of_language(model: Any) -> str:
    """The linear layers of the language model alone, as a pattern for `target_modules` of PEFT.

    Raises:
        ValueError: It cannot be told from the rest of the model.
    """
    causal = causal_lm_of(model)
    decoder = causal.get_decoder()
    name = next((name for name, module in causal.named_modules() if module is decoder), "")
    layers = sorted({n.rsplit(".", 1)[-1] for n, m in decoder.named_modules() if isinstance(m, nn.Linear)})
    if not name or not layers:
        raise ValueError(
            f"The language model in {type(causal).__name__} is not found, so that a LoRA cannot be put on it alone. "
            "Name its layers in `target_modules`."
        )
    return rf"{re.escape(name)}\..*\.({'|'.join(map(re.escape, layers))})"
