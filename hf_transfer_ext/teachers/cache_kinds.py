"""What a cache stores of a teacher's distribution at each token: the kinds of `teachers.cache.CacheSpec`."""

from __future__ import annotations

from typing import Any, ClassVar

from hf_transfer_ext.losses.slopes import Form


class top:
    """The likeliest tokens, and the mass of all others as one bucket (a *ghost tail*): exact where it matters most.

    Each row is the same whenever it is made. What it leaves out is left out always: the error is small and systematic.

    When to use it: any divergence that takes sparse rows, in trainings of few epochs; 64 tokens of a vocabulary
    of 32000 give 2 % error of the gradient in 267 bytes per token.

    Source: this package's own; the bucket is that of Anshumann et al. 2025 (their "ghost token"),
    https://arxiv.org/abs/2503.16870
    """

    default_top: ClassVar[int] = 64
    default_samples: ClassVar[int] = 0
    form: ClassVar[Form] = "sparse"


class top_and_samples:
    """The likeliest tokens as they are, and weighted draws from the others: unbiased, and less noisy than draws alone.

    When to use it: the default; long trainings, in which an error that averages out beats a smaller one that stays.

    Source: this package's own, from the parts of Anshumann et al. 2025, https://arxiv.org/abs/2503.16870
    """

    default_top: ClassVar[int] = 32
    default_samples: ClassVar[int] = 8
    form: ClassVar[Form] = "sampled"


class samples:
    """Weighted draws from the teacher's distribution alone: unbiased, and the smallest file.

    When to use it: the file has to be small (32 to 64 draws take 66 to 96 bytes per token), and the training is long
    enough for their noise to average out.

    Source: Sparse Logit Sampling (random-sampling KD), Anshumann et al. 2025, https://arxiv.org/abs/2503.16870
    """

    default_top: ClassVar[int] = 0
    default_samples: ClassVar[int] = 50
    form: ClassVar[Form] = "sampled"


class likelihoods:
    """The log-probability of each of the text's own tokens, in the tokens of the teacher's tokenizer: 10 bytes each.

    A text is found by the teacher's tokens, and stored as a whole, whatever is labeled in it: a student with any
    tokenizer reads the same cache.

    When to use it: `loss: alm`, whose teacher may have another tokenizer. Other losses need more of the teacher.

    Source: this package's own.
    """

    default_top: ClassVar[int] = 0
    default_samples: ClassVar[int] = 0
    form: ClassVar[Form] = "likelihood"


#: The kinds by name.
CACHE_KINDS: dict[str, Any] = {kind.__name__: kind for kind in (top, top_and_samples, samples, likelihoods)}
