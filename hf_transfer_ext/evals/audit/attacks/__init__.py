"""Attacks that try to recover forgotten knowledge, from cheap to expensive."""

from __future__ import annotations

from hf_transfer_ext.evals.audit.attack import Attack, check_attack
from hf_transfer_ext.evals.audit.attacks.adapter_removal import adapter_removal
from hf_transfer_ext.evals.audit.attacks.bitsandbytes_quantization import bitsandbytes_quantization
from hf_transfer_ext.evals.audit.attacks.cross_lingual import cross_lingual
from hf_transfer_ext.evals.audit.attacks.first_token_branching import first_token_branching
from hf_transfer_ext.evals.audit.attacks.hidden_probe import hidden_probe
from hf_transfer_ext.evals.audit.attacks.in_context import in_context
from hf_transfer_ext.evals.audit.attacks.logit_lens import logit_lens
from hf_transfer_ext.evals.audit.attacks.multiple_choice import multiple_choice
from hf_transfer_ext.evals.audit.attacks.paraphrased_question import paraphrased_question
from hf_transfer_ext.evals.audit.attacks.plain_generation import plain_generation
from hf_transfer_ext.evals.audit.attacks.plain_question import plain_question
from hf_transfer_ext.evals.audit.attacks.prefix_injection import prefix_injection
from hf_transfer_ext.evals.audit.attacks.prompt_removal import prompt_removal
from hf_transfer_ext.evals.audit.attacks.quantization import quantization
from hf_transfer_ext.evals.audit.attacks.relearn_few import relearn_few
from hf_transfer_ext.evals.audit.attacks.relearn_forget import relearn_forget
from hf_transfer_ext.evals.audit.attacks.relearn_unrelated import relearn_unrelated
from hf_transfer_ext.evals.audit.attacks.role_play import role_play
from hf_transfer_ext.evals.audit.attacks.sampling import sampling
from hf_transfer_ext.evals.audit.attacks.surrogate_inversion import surrogate_inversion
from hf_transfer_ext.registry import Registry

ATTACKS: Registry[Attack] = Registry(
    "attack",
    [
        plain_question,
        plain_generation,
        paraphrased_question,
        cross_lingual,
        role_play,
        multiple_choice,
        in_context,
        prefix_injection,
        first_token_branching,
        sampling,
        surrogate_inversion,
        adapter_removal,
        prompt_removal,
        quantization,
        bitsandbytes_quantization,
        logit_lens,
        hidden_probe,
        relearn_forget,
        relearn_few,
        relearn_unrelated,
    ],
    check=check_attack,
)
