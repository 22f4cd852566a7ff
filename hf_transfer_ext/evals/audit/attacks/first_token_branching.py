from __future__ import annotations

import torch

from hf_transfer_ext.evals.audit.attack import attack
from hf_transfer_ext.evals.audit.subject import AuditData, Subject
from hf_transfer_ext.evals.metric import Values
from hf_transfer_ext.models.plumbing import evaluation_mode


@attack(yardstick="plain_generation")
def first_token_branching(subject: Subject, data: AuditData, *, branches: int = 5) -> Values:
    """Continue greedily from each of the most likely first tokens; the best branch of each question counts.

    A model that was trained to begin with a refusal may still answer after the second or third most likely token.

    Args:
        branches: Number of first tokens to try.

    Source: Wang and Zhou, "Chain-of-thought reasoning without prompting", 2024 (branching at the first token),
    https://arxiv.org/abs/2402.10200
    """
    if branches < 1:
        raise ValueError(f"`branches` must be at least 1, got {branches}.")
    rows, prompts = [], []
    device = next(subject.model.parameters()).device
    for row in data.forget:
        prompt = subject.template.prompt_ids(subject.tokenizer, str(row["question"]))
        ids = torch.tensor([prompt], device=device)
        with evaluation_mode(subject.model), torch.no_grad():
            logits = subject.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -1]
        for token in logits.topk(min(branches, logits.shape[-1])).indices.tolist():
            rows.append(row)
            prompts.append([*prompt, token])
    return subject.recall_after(rows, prompts).reshape(len(data.forget), -1).max(1)
