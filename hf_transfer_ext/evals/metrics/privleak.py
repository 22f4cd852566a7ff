from __future__ import annotations

from hf_transfer_ext.measurement import Measurement


def privleak(unlearned: Measurement, retrained: Measurement) -> Measurement:
    r"""How far the membership AUC of the forget set is from that of a model that never saw it, in percent.

    .. math:: 100 \cdot \frac{(1 - A) - (1 - A_{ret})}{1 - A_{ret}}

    `A` is `membership_auc` of the forget set (members) against a holdout, where a low score means a member. MUSE
    counts the other way round, which is where the 1 - A comes from. Near 0 is good; negative means that the forget
    set still looks trained on, positive that it was pushed under unseen text.

    Raises:
        ValueError: An AUC outside [0, 1], or a retrained model's of 1, which leaves nothing to divide by.

    Source: MUSE, Shi et al. 2024, section 3.1, https://arxiv.org/abs/2407.06460
    """
    for name, part in (("unlearned", unlearned), ("retrained", retrained)):
        if not 0.0 <= part.value <= 1.0:
            raise ValueError(f"`{name}` has to be an area under a ROC curve, got {part.value} {part.unit}.")
    ours, theirs = 1.0 - unlearned.value, 1.0 - retrained.value
    if theirs == 0.0:
        raise ValueError("The retrained model's AUC is 1: it tells all members, so it has been trained on them.")
    return Measurement("privleak", 100.0 * (ours - theirs) / theirs, "percent, 0 is best", True, unlearned.examples)
