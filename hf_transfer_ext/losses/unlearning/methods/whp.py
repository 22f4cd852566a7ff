from __future__ import annotations

from hf_transfer_ext.losses.unlearning_method import Method


class whp(Method):
    r"""Who's Harry Potter: distillation from the reference, minus what a reinforced model has learned beyond it.

    .. math:: -\sum_v \operatorname{softmax}\big(z^{ref} - a \max(0, z^{+} - z^{ref})\big)_v \ln p_v + \text{NLL}_r

    Train an adapter further on the forget set first (`trainers.answers.train_on_answers`), load it beside the one that
    forgets, and name it by `reinforced_adapter`. The base is the reference.

    Deviations: the authors have no retain loss, and also replace names in the text by generic ones.

    When to use it: for a body of text (a book, a domain) rather than single answers: it needs no questions.

    Source: Eldan and Russinovich, "Who's Harry Potter? Approximate unlearning in LLMs", 2023,
    https://arxiv.org/abs/2310.02238
    """

    forget = "whp"
    retain = "retain_nll"
