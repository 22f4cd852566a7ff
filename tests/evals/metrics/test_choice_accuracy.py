import math

from evals.scored import example, tokens

from hf_transfer_ext.evals.metrics import choice_accuracy


def test_the_likelier_answer_per_token_is_chosen():
    right = tokens([math.log(0.5)] * 3)  # .5 per token, .125 in all
    assert choice_accuracy(example(right, perturbed=[tokens([math.log(0.4)])])) == 1.0
    assert choice_accuracy(example(right, perturbed=[tokens([math.log(0.4)]), tokens([math.log(0.6)])])) == 0.0


def test_a_tie_is_not_right():
    assert choice_accuracy(example(tokens([-1.0]), perturbed=[tokens([-1.0])])) == 0.0
