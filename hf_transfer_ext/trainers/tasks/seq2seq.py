from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from hf_transfer_ext.losses.layer_reading import AT_HEADS, OF_ATTENTION, Reading
from hf_transfer_ext.models.heads import causal_lm_of
from hf_transfer_ext.tensors import IGNORE_INDEX
from hf_transfer_ext.trainers.distillation_task import NO_TALK
from hf_transfer_ext.trainers.token_losses import TokenTask


class seq2seq(TokenTask):
    r"""Encoder-decoders (T5, BART, Marian): a divergence at each token of the target, inside the decoder's head.

    .. math:: L = \text{kd\_weight} \, D(p_T, q_S) + \text{ce\_weight} \, CE(y, q_S)

    as a mean over the target tokens. `hidden_loss` compares the layers of the decoders at these tokens, or, with
    `side: encoder`, those of the encoders at all tokens of the source:
    `[hidden_mse, {name: hidden_mse, side: encoder}]` compares both. Attention is compared in encoders alone.

    Rows have `source` and `target`. Both models read the student's tokens, and start their decoders with one token.
    `task_options`: `prefix`, put in front of every source ("summarize: "); `max_target_length`, by default
    `max_length`.

    When to use it: translation, summarization and rewriting by a smaller model. For sequence-level distillation, let
    the teacher write the targets beforehand (Kim and Rush 2016).

    Source: word-level distillation of Kim and Rush 2016, section 3.1, https://arxiv.org/abs/1606.07947
    """

    needs: ClassVar[tuple[str, ...]] = ("source", "target")
    has_answers: ClassVar[bool] = True
    unread: ClassVar[Mapping[Reading, str]] = {
        **TokenTask.unread,
        **dict.fromkeys(OF_ATTENTION, "a layer of its decoder has two attentions, to the target and to the source"),
    }
    unread_in_encoder: ClassVar[Mapping[Reading, str] | None] = {
        **dict.fromkeys(AT_HEADS, "the head reads the decoder, and not the encoder. Leave `side` out"),
        "messages": NO_TALK,
    }
    options: ClassVar[Mapping[str, Any]] = {"prefix": "", "max_target_length": None}

    def __init__(self, args: Any, student: Any, teacher: Any, tokenizer: Any, teacher_tokenizer: Any = None) -> None:
        super().__init__(args, student, teacher, tokenizer, teacher_tokenizer)
        self._decoder = causal_lm_of(student)
        starts = [_start_of(one) for one in (student, teacher) if one is not None]
        if len(set(starts)) > 1:
            raise ValueError(
                f"The student's decoder starts with the token {starts[0]}, the teacher's with {starts[1]}. Set "
                "`decoder_start_token_id` of the student's config to that of the teacher."
            )

    @classmethod
    def check(cls, args: Any) -> None:
        super().check(args)
        longest = args.task_options.get("max_target_length")
        if longest is not None and longest < 1:
            raise ValueError(f"`max_target_length` of seq2seq must be >= 1, got {longest}.")

    def row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        for name in self.needs:
            if not isinstance(row[name], str):
                raise ValueError(f"Column {name!r} has to hold text, got {str(row[name])[:80]!r}.")
        found = self.encoded(self.settings["prefix"] + row["source"])
        longest = self.settings["max_target_length"]
        more = {} if longest is None else {"truncation": True, "max_length": longest}
        labels = self.encoded(text_target=row["target"], **more)["input_ids"]
        if not labels:
            raise ValueError(f"The target of a row has no token: {row['target']!r}.")
        return {**found, "labels": labels}

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(row["labels"]) for row in rows)
        labels = torch.tensor([list(row["labels"]) + [IGNORE_INDEX] * (longest - len(row["labels"])) for row in rows])
        return {**self.padded(rows), "labels": labels, "decoder_input_ids": self._shifted(labels)}

    def _shifted(self, labels: Tensor) -> Tensor:
        """What the decoder reads: the target behind its start token, as the model itself shifts it."""
        if hasattr(self._decoder, "prepare_decoder_input_ids_from_labels"):
            return self._decoder.prepare_decoder_input_ids_from_labels(labels=labels)
        shifted = labels.roll(1, dims=1)
        shifted[:, 0] = _start_of(self._decoder)
        return shifted.masked_fill(shifted == IGNORE_INDEX, self._decoder.config.pad_token_id or 0)

    def tokens_read(self, batch: Mapping[str, Tensor]) -> Bool[Tensor, "texts length"]:
        """Of the decoder, whose layers are compared."""
        return self.items(batch)

    def input_names(self, reader: Any) -> Sequence[str]:
        return [*reader.model_input_names, "decoder_input_ids"]


def _start_of(model: Any) -> Any:
    """The token that a model's decoder starts with."""
    config = causal_lm_of(model).config
    if not getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"`task` is seq2seq, but {type(causal_lm_of(model)).__name__} is not an encoder-decoder. Leave `task` out "
            "for language models."
        )
    return config.decoder_start_token_id
