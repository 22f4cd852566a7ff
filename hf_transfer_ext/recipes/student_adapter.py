"""A student of which only a LoRA is trained, on weights in 4 bits or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft import LoraConfig

from hf_transfer_ext.recipe import setting
from hf_transfer_ext.trainers.taught import lora_config


@dataclass
class AdapterArguments:
    """Whether a LoRA is trained instead of all weights of the student."""

    student_lora_rank: int = setting(0, "student", "> 0: train a LoRA of this rank on it instead of all weights.")
    student_four_bit: bool = setting(False, "student", "Load it in 4 bits for that (QLoRA, through bitsandbytes).")
    student_revision: str | None = setting(None, "student", "Hub revision.")

    def adapter(self) -> LoraConfig | None:
        """The LoRA of `student_lora_rank`, on the revision of its base; None if all weights are trained."""
        if self.student_lora_rank == 0:
            return None
        config = lora_config(self.student_lora_rank)
        config.revision = self.student_revision
        return config


def refuse_adapter(job: AdapterArguments | Any, *, twin: bool) -> None:
    """Refuse settings of the LoRA that cannot be obeyed.

    Args:
        twin: Whether a copy of the student is trained without the teacher, too.

    Raises:
        ValueError: A negative rank, 4 bits without a LoRA, or 4 bits and a twin.
    """
    if job.student_lora_rank < 0:
        raise ValueError(f"`student_lora_rank` must be >= 0, got {job.student_lora_rank}.")
    if job.student_four_bit and job.student_lora_rank == 0:
        raise ValueError(
            "`student_four_bit` packs the weights of the student, which cannot be trained then. Set "
            "`student_lora_rank` to train a LoRA on them, or leave `student_four_bit` off."
        )
    if job.student_four_bit and twin:
        raise ValueError(
            "`compare_with_ce` merges the LoRA of the twin into its weights, and `student_four_bit` packs them. Leave "
            "one of the two off."
        )
