from __future__ import annotations

from hf_transfer_ext.losses.unlearning_method import Method


class simnpo(Method):
    r"""SimNPO: negative preference without a reference, by the mean loss per token.

    .. math:: 0.125 \cdot -\frac{2}{\beta} \ln \sigma\big(\beta (\ell_\theta / n - \delta)\big) + \text{NLL}_r

    When to use it: where answers differ much in length, or where a reference costs too much.

    Source: Fan et al., "Simplicity prevails: rethinking negative preference optimization for LLM unlearning", 2024,
    https://arxiv.org/abs/2410.07163
    """

    forget = "simnpo"
    retain = "retain_nll"
    gamma = 0.125
