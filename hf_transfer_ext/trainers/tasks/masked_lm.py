from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar
from zlib import crc32

import torch
from torch import Tensor

from hf_transfer_ext.tensors import IGNORE_INDEX
from hf_transfer_ext.trainers.token_losses import TokenTask

#: The texts of a batch before they are masked.
WHOLE = "whole_ids"


class masked_lm(TokenTask):
    r"""Masked language models (BERT, RoBERTa, ModernBERT): a divergence at each masked token, inside the head.

    .. math:: L = \text{kd\_weight} \, D(p_T, q_S) + \text{ce\_weight} \, CE(y, q_S)

    as a mean over the masked tokens.

    Rows have `text`. Of each text's tokens a share of `mask_probability` (in `task_options`) is predicted: of these
    80 % are replaced by the mask token, 10 % by a random one, and 10 % stay. Masks are drawn anew in each step, from
    `seed`, the step and the text, so that neither the split of a batch nor resuming a run changes them.
    In evaluation a text always has the same one. Both models read the same masked text.

    When to use it: a smaller encoder to fine-tune for several tasks afterwards; for one task alone, distill that one.

    Source: DistilBERT, Sanh et al. 2019, https://arxiv.org/abs/1910.01108; masks: BERT, Devlin et al. 2019,
    https://arxiv.org/abs/1810.04805
    """

    options: ClassVar[Mapping[str, Any]] = {"mask_probability": 0.15}

    def __init__(self, args: Any, student: Any, teacher: Any, tokenizer: Any, teacher_tokenizer: Any = None) -> None:
        super().__init__(args, student, teacher, tokenizer, teacher_tokenizer)
        if tokenizer.mask_token_id is None:
            raise ValueError(f"{type(tokenizer).__name__} has no mask token, which the task masked_lm needs.")

    @classmethod
    def check(cls, args: Any) -> None:
        super().check(args)
        probability = args.task_options.get("mask_probability", cls.options["mask_probability"])
        if not 0 < probability <= 1:
            raise ValueError(f"`mask_probability` of masked_lm must lie in (0, 1], got {probability}.")

    def row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        if not isinstance(row["text"], str):
            raise ValueError(f"Column 'text' has to hold text, got {str(row['text'])[:80]!r}.")
        return self.encoded(row["text"])

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = self.padded(rows)
        return self._masked({**batch, WHOLE: batch["input_ids"]}, None)

    def drawn(self, batch: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        return self._masked(batch, step)

    def _masked(self, batch: Mapping[str, Tensor], step: int | None) -> dict[str, Tensor]:
        """A batch with masks that depend on each text and the step; without a step, drawn anew if it is training."""
        whole = batch[WHOLE].cpu()
        ids, labels = whole.clone(), torch.full_like(whole, IGNORE_INDEX)
        special = torch.isin(whole, torch.tensor(self.tokenizer.all_special_ids))
        for place, read in enumerate(batch["attention_mask"].cpu().bool()):  # padding has no part in what is drawn
            text = whole[place][read]
            generator = None
            if step is not None or self.evaluates:
                parts = text.tolist() if step is None else [self.args.seed, step, *text.tolist()]
                generator = torch.Generator().manual_seed(crc32(repr(parts).encode()))
            draw = torch.rand(3, len(text), generator=generator)
            chosen = (draw[0] < self.settings["mask_probability"]) & ~special[place][read]
            labels[place, read] = torch.where(chosen, text, IGNORE_INDEX)
            random = (draw[2] * len(self.tokenizer)).long()
            masked = torch.where(draw[1] < 0.8, self.tokenizer.mask_token_id, random)
            ids[place, read] = torch.where(chosen & (draw[1] < 0.9), masked, text)
        device = batch[WHOLE].device
        return {**batch, "input_ids": ids.to(device), "labels": labels.to(device)}

    def batches(self, model: Any, rows: Any, batch_size: int) -> Iterator[dict[str, Tensor]]:
        self.evaluates, before = True, self.evaluates
        try:
            yield from super().batches(model, rows, batch_size)
        finally:
            self.evaluates = before
