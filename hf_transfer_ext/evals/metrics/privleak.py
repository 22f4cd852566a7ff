from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hf_transfer_ext.evals.metrics.membership_auc import area
from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.measurement.bootstrap import interval_of


def privleak(
    unlearned: Measurement,
    retrained: Measurement,
    *,
    scores: Sequence[np.ndarray] = (),
    resamples: int = 1000,
    seed: int = 0,
) -> Measurement:
    r"""Relative difference between the membership AUC of the forget set and that of a retrained model, in percent.

    .. math:: 100 \cdot \frac{(1 - A) - (1 - A_{ret})}{1 - A_{ret}}

    `A` is `membership_auc` of the forget set (members) against a holdout, where a low score means a member. MUSE uses
    the opposite sign, hence 1 - A. Values near 0 are good; negative means that the forget set still looks trained on,
    positive that it has become less likely than unseen text.

    Args:
        scores: The membership scores behind both AUCs: of the unlearned model on the forget set and on the holdout,
            then of the retrained model on the same. Without them, the result has no interval.

    Raises:
        ValueError: An AUC is outside [0, 1], or that of the retrained model is 1, which would divide by zero.

    Source: MUSE, Shi et al. 2024, section 3.1, https://arxiv.org/abs/2407.06460
    """
    for name, part in (("unlearned", unlearned), ("retrained", retrained)):
        if not 0.0 <= part.value <= 1.0:
            raise ValueError(f"`{name}` must be an area under a ROC curve, got {part.value} {part.unit}.")
    ours, theirs = 1.0 - unlearned.value, 1.0 - retrained.value
    if theirs == 0.0:
        raise ValueError("The retrained model's AUC is 1: it identifies all members, so it was trained on them.")
    interval = None
    if scores:
        forget, holdout, forget_retrained, holdout_retrained = scores

        def leak(ours_in: np.ndarray, theirs_in: np.ndarray, ours_out: np.ndarray, theirs_out: np.ndarray) -> float:
            theirs = 1.0 - area(theirs_in, theirs_out)
            return 100.0 * (1.0 - area(ours_in, ours_out) - theirs) / theirs if theirs else float("inf")

        groups = [[forget, forget_retrained], [holdout, holdout_retrained]]
        interval = interval_of(leak, groups, resamples=resamples, seed=seed)
    value = 100.0 * (ours - theirs) / theirs
    return Measurement("privleak", value, "percent, 0 is best", True, unlearned.examples, interval)
