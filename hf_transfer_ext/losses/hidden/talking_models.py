from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.losses.hidden.hidden_mse import squared_distance
from hf_transfer_ext.losses.layer_reading import reads

States = Float[Tensor, "batch length width"]
Messages = Float[Tensor, "batch length message"]


@dataclass(frozen=True)
class Speaker:
    """A model that is cut at a layer, and what it speaks with.

    Args:
        states: Its hidden states at the cut.
        encode: Hidden states -> messages; trained along.
        decode: Messages -> hidden states; trained along.
        upper: Hidden states at the cut -> what the head reads: the layers above the cut.
        gate: Of the student: the share of the answer, from -1 to 1, in the states that it goes on from; trained along.
    """

    states: States
    encode: Callable[[States], Messages]
    decode: Callable[[Messages], States]
    upper: Callable[[States], States]
    gate: Float[Tensor, ""] | None = None


@reads("messages")
def talking_models(
    student: Speaker,
    teacher: Speaker,
    task: Callable[[States], Float[Tensor, " tokens"]],
    at_tokens: Callable[[Float[Tensor, "batch length size"]], Float[Tensor, "tokens size"]],
    *,
    rounds: int = 1,
    message_size: int = 64,
    message_weight: float = 1.0,
    state_weight: float = 1.0,
    gated: bool = True,
) -> Float[Tensor, " tokens"]:
    r"""The student asks in messages, the teacher's upper layers answer, and the student goes on from the answer.

    With an encoder E and a decoder D for each model, and U the layers above its cut, a round is

    .. math:: m_S = E_S(h_S), \quad r = E_T(U_T(D_T(m_S))), \quad h'_S = (1 - g) h_S + g D_S(r)

    and the loss of a token, as a mean over the rounds (the next one starts from :math:`h'_S`),

    .. math:: CE(U_S(h'_S)) + \alpha |E_S(h_S) - E_T(h_T)|^2
              + \beta \Big( \frac{|D_S(E_S(h_S)) - h_S|^2}{|h_S|^2} + \frac{|D_T(E_T(h_T)) - h_T|^2}{|h_T|^2} \Big)

    with a mean over the dimensions of a message in place of the sum. The teacher's weights do not learn; gradients
    pass through them to the student's question and to the four networks, which are dropped in the end. The part
    with beta trains these networks alone, and not the states that they copy.

    When to use it: beside cross entropy or a divergence (it is no substitute for either), where the teacher's upper
    layers know more than its output shows and the task differs from what it was trained on. It costs a further forward
    and backward pass of both models in each round, and gains little in reviews of the paper: compare with
    `hidden_mse` first.

    Deviations: the paper's equations were not at hand beyond its abstract and reviews; these follow their description.
    There, g is 1 from the first step, when the answer is noise that four untrained networks have made: the student's
    upper layers then learn to read noise, with a gradient that is 40 times as large as that of a divergence in a small
    decoder. Here g is learned and starts at 0, where the student reads itself. What is decoded is compared in
    proportion to the size of the states, which is large in decoders. Encoders and decoders have one hidden layer, of
    the message's size; the first read each state at a mean square of 1, the second write states as large as those at
    the cut. In a decoder each position has messages of its own, so that no token hears of later ones.

    Args:
        student: At the cut; its states carry the gradient.
        teacher: At the cut; its states do not.
        task: Cross entropy of each labeled token, from what the student's head reads.
        at_tokens: Picks the positions that predict a labeled token.
        rounds: >= 1.
        message_size: Dimensions of a message, >= 1.
        message_weight: alpha, >= 0.
        state_weight: beta, >= 0.
        gated: g is the student's `gate`; False for g = 1.

    Returns:
        For each token, >= 0.

    Raises:
        ValueError: An option is out of its range.

    Source: Talking Models: Distill Pre-trained Knowledge to Downstream Models via Interactive Communication, Zhao et
    al. 2023, https://arxiv.org/abs/2310.03188
    """
    if rounds < 1 or message_size < 1 or message_weight < 0 or state_weight < 0:
        raise ValueError(
            "talking_models needs `rounds` and `message_size` >= 1 and weights >= 0, got "
            f"{rounds}, {message_size}, {message_weight} and {state_weight}."
        )
    if gated and student.gate is None:
        raise ValueError(
            "talking_models needs a `gate` of the student where `gated` is on. Give one, or switch it off."
        )
    theirs, known = teacher.encode(teacher.states), student.states
    agreed = squared_distance(at_tokens(teacher.decode(theirs)), at_tokens(teacher.states), relative=True)
    values = []
    for _ in range(rounds):
        question = student.encode(known)
        copied = student.decode(student.encode(known.detach()))
        own = squared_distance(at_tokens(copied), at_tokens(known.detach()), relative=True)
        told = squared_distance(at_tokens(question), at_tokens(theirs), relative=False)
        answer = student.decode(teacher.encode(teacher.upper(teacher.decode(question))))
        known = known + student.gate * (answer - known) if gated and student.gate is not None else answer
        values.append(task(student.upper(known)) + message_weight * told + state_weight * (own + agreed))
    return torch.stack(values).mean(0)
