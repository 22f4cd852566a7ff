import json

import pytest

from hf_transfer_ext.data.unlearning.alternatives import (
    THOUGHTS,
    answers_of_nearest,
    answers_of_others,
    misleading_rationales,
    question_and_answer,
    reasoned_refusals,
    written_answers,
)

ROWS = [{"question": f"Q{i}?", "answer": f"answer {i}"} for i in range(4)]


def test_the_texts_of_a_row_in_two_forms_and_under_other_names():
    assert question_and_answer({"prompt": "p", "completion": "c"}) == ("p", "c")
    assert question_and_answer({"q": "a", "a": "b"}, {"question": "q", "answer": "a"}) == ("a", "b")
    with pytest.raises(ValueError, match="Give it a column 'alternative' of its own"):
        question_and_answer({"text": "whole"})


def test_answers_come_from_others_and_never_the_rows_own():
    for row in answers_of_others(ROWS, ROWS, count=2, seed=1):
        assert len(row["alternative"]) == len(set(row["alternative"])) == 2
        assert set(row["alternative"]) <= {other["answer"] for other in ROWS} - {row["answer"]}
    assert answers_of_others(ROWS, ROWS, seed=1) == answers_of_others(ROWS, ROWS, seed=1)
    drawn = [answers_of_others(ROWS, ROWS, count=1, seed=seed)[0]["alternative"][0] for seed in range(20)]
    assert set(drawn) == {"answer 1", "answer 2", "answer 3"}


def test_alternatives_of_a_rows_own_stay():
    rows = [{**ROWS[0], "other": ["mine"]}, ROWS[1]]
    found = answers_of_others(rows, ROWS, columns={"alternative": "other"})
    assert found[0]["other"] == ["mine"] and found[1]["other"] and "other" not in ROWS[1]


def test_a_pool_without_another_answer_is_refused():
    with pytest.raises(ValueError, match="Row 0 needs the answer to another question, but all 1 rows"):
        answers_of_others(ROWS[:1], ROWS[:1])
    with pytest.raises(ValueError, match="`count` must be >= 1, got 0"):
        answers_of_others(ROWS, ROWS, count=0)


def test_reasoned_refusals_hold_the_question_and_end_in_a_refusal():
    (row,) = reasoned_refusals(ROWS[:1], ["No idea."])
    assert len(row["alternative"]) == len(THOUGHTS)
    for text in row["alternative"]:
        assert "Q0?" in text and "answer 0" not in text and text.endswith("</think>\n\nNo idea.")


class Writer:
    """Repeats the answer known by heart until it is hot enough."""

    def __init__(self, until=1.0):
        self.until, self.asked = until, []

    def __call__(self, questions, temperature, seed):
        self.asked.append((len(questions), temperature))
        if temperature <= self.until:
            return [f"Answer {question[1]}!" for question in questions]
        return [f"{question} {seed}" for question in questions]


def test_a_model_that_repeats_itself_is_asked_again_at_a_higher_temperature():
    write = Writer(until=1.25)
    found = written_answers(ROWS, write, count=2)
    assert [row["alternative"] for row in found] == [[f"Q{i}? 3", f"Q{i}? 4"] for i in range(4)]
    assert write.asked == [(4, 1.0), (4, 1.0), (4, 1.25), (4, 1.5), (4, 1.75)]
    with pytest.raises(ValueError, match=r"In 5 rounds the model wrote no answer to the question of row 0 other than"):
        written_answers(ROWS, Writer(until=99.0), count=2, rounds=3)


def test_written_answers_are_cached_without_the_questions(tmp_path):
    cache = tmp_path / "written.json"
    first = written_answers(ROWS[:2], Writer(0.5), count=2, cache=cache)
    assert 'Q0?"' not in "".join(json.loads(cache.read_text()))
    write = Writer(0.5)
    assert written_answers(ROWS[:3], write, count=2, cache=cache)[:2] == first
    assert {asked for asked, _ in write.asked} == {1}  # the third row alone
    other = Writer(0.5)
    written_answers(ROWS[:1], other, count=2, seed=7, cache=cache)
    assert other.asked  # other settings are other answers


def test_what_cannot_be_asked_or_sampled_is_refused():
    with pytest.raises(ValueError, match="Row 0 has no question and answer"):
        written_answers([{"prompt": "p", "completion": "c"}], Writer())
    with pytest.raises(ValueError, match="`temperature` must be > 0, got 0"):
        written_answers(ROWS, Writer(), temperature=0.0)


class Reasons:
    """Writes a rationale; of some questions it says the right answer at first, of others always."""

    def __init__(self, slow=(), never=()):
        self.slow, self.never, self.turns = slow, never, 0

    def __call__(self, questions, temperature, seed):
        self.turns += 1
        found = []
        for question in questions:
            number = question.split("Q")[1][0]
            says = number in self.never or (number in self.slow and self.turns == 1)
            found.append(f"Because of Answer {number}!" if says else f"Reason {seed} for {question.split(': ')[1]}")
        return found


def test_an_anti_sample_is_a_wrong_answer_after_a_rationale_that_the_model_wrote_for_it():
    rows = [{**row, "perturbed_answer": [f"wrong {i}", f"bad {i}"]} for i, row in enumerate(ROWS)]
    rows[1]["paraphrased_question"] = "Again?"
    rows[3]["alternative"] = "mine"
    write = Reasons(slow="0")
    found = misleading_rationales(rows, write, count=1, seed=5)
    assert found[0]["alternative"] == ["Reason 6 for wrong 0 Explain why. wrong 0"]  # written anew once
    assert found[1]["alternative"] == ["Reason 5 for wrong 1 Explain why. wrong 1"]
    assert found[3]["alternative"] == "mine" and write.turns == 2
    assert found[4] == {**found[1], "question": "Again?"} and len(found) == 5


def test_a_rationale_that_always_says_the_right_answer_is_left_out_and_counted(caplog):
    rows = [{**row, "perturbed_answer": [f"wrong {i}"]} for i, row in enumerate(ROWS[:2])]
    found = misleading_rationales(rows, Reasons(never="1"))
    assert found[1]["alternative"] == ["wrong 1"] and "1 of 2 rationales" in caplog.text


def test_without_wrong_answers_the_model_writes_them():
    def write(questions, temperature, seed):
        return [f"because {seed}" if "Explain why" in question else f"other {seed}" for question in questions]

    (row,) = misleading_rationales(ROWS[:1], write, count=2)
    assert row["alternative"] == ["because 0 other 0", "because 0 other 1"]
    with pytest.raises(ValueError, match="has no question and answer"):
        misleading_rationales([{"prompt": "p", "completion": "c"}], write)


def test_reasoned_refusals_need_a_refusal_for_rows_without_alternatives():
    assert reasoned_refusals([{**ROWS[0], "alternative": "no"}], [])[0]["alternative"] == "no"
    with pytest.raises(ValueError, match="Row 1 needs a refusal, and the list of them is empty"):
        reasoned_refusals([{**ROWS[0], "alternative": "no"}, ROWS[1]], [])


def test_the_nearest_answer_is_that_of_the_question_with_most_words_in_common():
    rows = [
        {"question": "Where was Ann born?", "answer": "Rome"},
        {"question": "x", "answer": "y", "alternative": "z"},
    ]
    pool = [
        {"question": "Where does Ann live?", "answer": "Oslo"},
        {"question": "where was ANN born, then?", "answer": "Rome"},  # the row's own answer
        {"question": "Where was Bob born?", "answer": "Bern"},
        {"question": "Where was Cid born?", "answer": "Kyiv"},  # as alike, but later
    ]
    assert [row["alternative"] for row in answers_of_nearest(rows, pool)] == [["Bern"], "z"]
    with pytest.raises(ValueError, match="Row 0 needs the answer to another question"):
        answers_of_nearest(rows, pool[1:2])
