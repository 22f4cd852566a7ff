from __future__ import annotations

from hf_transfer_ext.losses.unlearning_method import Method


class altpo(Method):
    r"""Preference of plausible other answers over the answer to forget.

    .. math:: -\frac{2}{\beta} \ln \sigma\big(\beta
        [(\ell_{ref}^{a} - \ell_\theta^{a}) - (\ell_{ref}^f - \ell_\theta^f)]\big) + \text{NLL}_r

    Each forget row brings its alternatives `a` in a column "alternative": one text, or a list of which one is drawn in
    each epoch. With `alternatives: sampled` the model writes five for each question before training, as the authors
    have it; they prompt it for a wrong but plausible answer, here it answers the plain question, hotter where it
    repeats what it knows. With refusals instead it is `idk_dpo`.

    When to use it: where answers should stay fluent and on topic, and no refusal should give the forgetting away.

    Source: Mekala et al., "Alternate preference optimization for unlearning factual knowledge in large language
    models", 2024, https://arxiv.org/abs/2409.13474
    """

    forget = "dpo"
    retain = "retain_nll"
    alternatives = "data"
