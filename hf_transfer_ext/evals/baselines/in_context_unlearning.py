from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.data.unlearning.alternatives import answers_of_others, question_and_answer


def in_context_unlearning(
    forget: Sequence[Mapping[str, Any]],
    retain: Sequence[Mapping[str, Any]],
    template: QuestionAnswerFormat,
    *,
    forgotten: int | None = None,
    correct: int = 6,
    seed: int = 0,
) -> QuestionAnswerFormat:
    """In-context unlearning: a prompt of wrong answers to questions to forget and right ones to others.

    No weight changes, so this is what a prompt alone can do: a baseline for methods that train. Wrong answers are
    those to other questions of the forget set, or of the retain set where the forget set has only one answer.

    Deviations: the authors build a prompt for each point to delete, with its label flipped in a classification task;
    here one prompt serves all questions, and wrong answers stand for flipped labels.

    When to use it: beside every trained method: what it does not beat, a prompt could do.

    Args:
        forgotten: Questions to forget that are in the prompt, the first ones, >= 1; None for all.
        correct: Questions of the retain set that follow with their own answers, drawn by `seed`, >= 0; fewer where the
            set has fewer.

    Raises:
        ValueError: No rows to forget, or rows without a question and an answer.

    Returns:
        The template with these questions and answers as its `examples`.

    Source: Pawelczyk et al., "In-context unlearning: language models as few-shot unlearners", 2023,
    https://arxiv.org/abs/2310.07579
    """
    if forgotten is not None and forgotten < 1:
        raise ValueError(f"`forgotten` must be >= 1, got {forgotten}.")
    if correct < 0:
        raise ValueError(f"`correct` must be >= 0, got {correct}.")
    if not forget:
        raise ValueError("In-context unlearning needs rows to forget, and there are none.")
    said = {question_and_answer(row)[1] for row in forget}
    asked = [{"question": question_and_answer(row)[0], "answer": question_and_answer(row)[1]} for row in forget]
    wrong = answers_of_others(asked[:forgotten], asked if len(said) > 1 else retain, count=1, seed=seed)
    drawn = torch.randperm(len(retain), generator=torch.Generator().manual_seed(seed))[:correct].tolist()
    examples = [(row["question"], row["alternative"][0]) for row in wrong]
    examples += [question_and_answer(retain[place]) for place in drawn]
    return replace(template, examples=(*template.examples, *examples))
