from __future__ import annotations

from hf_transfer_ext.losses.unlearning_method import Method


class unstar(Method):
    r"""UnSTAR: fine-tuning on anti-samples, wrong answers with a rationale that leads to them.

    .. math:: \ell_\theta(\text{rationale} \mathbin{+} \text{wrong answer} \mid x^{\pi}) / n + \text{NLL}_r

    Each question, and its paraphrase where the row has one (`paraphrased_question`), gets wrong answers: those of the
    column "perturbed_answer", or else answers that the model samples. The model itself then writes why each of them
    would be right (`data.unlearning.alternatives.misleading_rationales`). A row's own column "alternative" goes first.

    Deviations: all anti-samples are written once, before training; the authors write new ones in each round, and end
    when the last paraphrases are no longer answered. Here the run has its epochs, and an audit asks the paraphrases.
    Whether a wrong answer is plausible is not checked.

    When to use it: for models that reason before they answer, and where a refusal would give the forgetting away.
    Facts of the same person that shall stay belong into the retain set.

    Source: Sinha et al., "UnSTAR: unlearning with self-taught anti-sample reasoning for LLMs", 2024,
    https://arxiv.org/abs/2410.17050
    """

    forget = "idk"
    retain = "retain_nll"
    alternatives = "misleading rationales"
