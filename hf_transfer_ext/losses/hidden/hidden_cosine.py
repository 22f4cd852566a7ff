from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from hf_transfer_ext.losses.hidden.hidden_mse import projected
from hf_transfer_ext.losses.layer_reading import reads


@reads("states")
def hidden_cosine(
    student: Float[Tensor, "tokens width"], teacher: Float[Tensor, "tokens teacher_width"],
    projection: Float[Tensor, "teacher_width width"] | None = None,
) -> Float[Tensor, " tokens"]:  # fmt: skip
    r"""One minus the cosine of hidden states, after a learned projection where the widths differ.

    .. math:: 1 - \cos(W h_S, h_T)

    When to use it: as `hidden_mse`, where a few dimensions of the teacher are so large that they would be all that the
    squared difference sees, as in most large decoders.

    Args:
        projection: W, trained along; None for equal widths.

    Returns:
        For each token, from 0 to 2.

    Source: DistilBERT, Sanh et al. 2019, section 3, https://arxiv.org/abs/1910.01108
    """
    return 1 - cosine_similarity(projected(student, teacher, projection), teacher.detach().float(), dim=-1)
