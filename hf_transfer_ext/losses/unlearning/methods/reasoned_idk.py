from __future__ import annotations

from hf_transfer_ext.losses.unlearning_method import Method


class reasoned_idk(Method):
    r"""Reasoned IDK: preference of a coherent but inconclusive chain of thought over the reasoning to forget.

    .. math:: -\frac{2}{\beta} \ln \sigma\big(\beta
        [(\ell_{ref}^{r} - \ell_\theta^{r}) - (\ell_{ref}^f - \ell_\theta^f)]\big) + \text{NLL}_r

    The alternative `r` thinks about the question and ends without an answer, between the marks `<think>` and
    `</think>`. It is written from built-in texts around each question
    (`data.unlearning.alternatives.reasoned_refusals`); a row's own column "alternative" goes first. The answers to
    forget are whole outputs: chain of thought and answer.

    Deviation: the authors have a large model write the chains; give such texts as the column "alternative".

    When to use it: for reasoning models, whose chain of thought still holds what the final answer refuses to say.

    Source: Yoon et al., "R-TOFU: unlearning in large reasoning models", 2025, https://arxiv.org/abs/2505.15214
    """

    forget = "dpo"
    retain = "retain_nll"
    alternatives = "reasoned refusals"
