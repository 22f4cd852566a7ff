"""Attacks that try to get forgotten knowledge back: `(subject, data, **options)` -> a score of each forget example.

A score is a share in [0, 1]: 0 where nothing of the answer comes, 1 where all of it does.
"""

from __future__ import annotations

from collections.abc import Callable

from hf_transfer_ext.evals.audit.attacks.adapter_removal import adapter_removal
from hf_transfer_ext.evals.audit.attacks.in_context import in_context
from hf_transfer_ext.evals.audit.attacks.paraphrased_question import paraphrased_question
from hf_transfer_ext.evals.audit.attacks.plain_generation import plain_generation
from hf_transfer_ext.evals.audit.attacks.plain_question import plain_question
from hf_transfer_ext.evals.audit.attacks.prefix_injection import prefix_injection
from hf_transfer_ext.evals.audit.attacks.quantization import quantization
from hf_transfer_ext.evals.audit.attacks.relearn_few import relearn_few
from hf_transfer_ext.evals.audit.attacks.relearn_forget import relearn_forget
from hf_transfer_ext.evals.audit.attacks.relearn_unrelated import relearn_unrelated
from hf_transfer_ext.evals.audit.attacks.role_play import role_play
from hf_transfer_ext.evals.audit.attacks.sampling import sampling
from hf_transfer_ext.registry import Registry

ATTACKS: Registry[Callable] = Registry(
    "attack",
    [
        plain_question,
        plain_generation,
        paraphrased_question,
        prefix_injection,
        role_play,
        sampling,
        adapter_removal,
        quantization,
        relearn_forget,
        relearn_few,
        relearn_unrelated,
        in_context,
    ],
)
