from __future__ import annotations

from hf_transfer_ext.losses.unlearning_method import Method


class random_labels(Method):
    r"""Fine-tuning on wrong answers: each question gets the answers to other questions of the forget set.

    .. math:: \ell_\theta(y^{\pi}) / n^{\pi} + \text{NLL}_r

    Five wrong answers are drawn for each row, and one of them in each epoch. A row's own column "alternative" goes
    first.

    When to use it: for answers out of a fixed set (classes, multiple choice), or as the simple baseline. How far the
    forgetting generalizes differs from task to task; the authors find the knowledge still readable by linear probes.

    Source: Zhang et al., "Unforgettable generalization in language models", 2024, https://arxiv.org/abs/2409.02228
    """

    forget = "idk"
    retain = "retain_nll"
    alternatives = "forget answers"
