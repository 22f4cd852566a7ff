from itertools import islice

import pytest

from hf_transfer_ext.data.synthesis.few_shot import few_shot_prompt, first_item, synthetic_inputs

SEEDS = ["What is 1 + 1?", "What is 2 + 2?", "What is 3 + 3?"]


def test_the_prompt_is_a_list_that_breaks_off():
    assert few_shot_prompt(SEEDS[:2]) == "Here are 10 examples:\n1. What is 1 + 1?\n2. What is 2 + 2?\n3."
    with pytest.raises(ValueError, match="At least one seed"):
        few_shot_prompt([])


@pytest.mark.parametrize(
    "written, item",
    [
        (" What is 4?\n4. What is 5?", "What is 4?"),
        (" two\nlines\n 7) next", "two\nlines"),
        (" to the end", "to the end"),
        ("\n4. nothing", ""),
        (" in 1999. It was", "in 1999. It was"),
    ],
)
def test_an_item_ends_before_the_next_number(written, item):
    assert first_item(written) == item


def test_repetitions_empty_and_long_inputs_are_passed_over_and_counted():
    answers = iter([" a", " What is 1 + 1?", "", " a", " b", " " + "x" * 30, " c", " d"])

    def write(prompts, seed):
        return [next(answers) for _ in prompts]

    found = list(islice(synthetic_inputs(write, SEEDS, batch_size=4, longest=20), 4))
    assert found == [(1, "a"), (5, "b"), (7, "c"), (8, "d")]


def test_prompts_show_other_seeds_in_another_order_and_are_the_same_for_a_seed():
    shown = []

    def write(prompts, seed):
        shown.append((tuple(prompts), seed))
        return [f" {len(shown)} {i}" for i in range(len(prompts))]

    for _ in range(2):
        list(islice(synthetic_inputs(write, SEEDS, shown=2, batch_size=8), 16))
    assert shown[0] == shown[2] and shown[1] == shown[3] and shown[0] != shown[1]
    assert len(set(shown[0][0])) > 1


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ValueError, match="must be at least 1"):
        next(synthetic_inputs(lambda prompts, seed: [], SEEDS, shown=0))


def test_an_interrupted_run_goes_on_as_if_it_had_not_been():
    def write(prompts, seed):
        return [f" {(seed + i) % 7}" for i in range(len(prompts))]

    whole = list(islice(synthetic_inputs(write, SEEDS, batch_size=4), 6))
    for cut in range(1, 6):
        first = whole[:cut]
        rest = synthetic_inputs(write, SEEDS, batch_size=4, exclude=[item for _, item in first], attempt=first[-1][0])
        assert [*first, *islice(rest, 6 - cut)] == whole


def test_it_ends_after_a_number_of_attempts():
    def write(prompts, seed):
        return ["always the same\n7."] * len(prompts)

    found = list(synthetic_inputs(write, ["a"], batch_size=4, attempts=10))
    assert found == [(1, "always the same")]
