import json
from itertools import combinations

import pytest
from evals.scored import example, tokens
from evals.shared_tofu import reference_log, tofu_folder

from hf_transfer_ext.evals.metrics import rouge_l_recall
from hf_transfer_ext.evals.text.rouge import longest_common_subsequence, rouge_l, rouge_tokens
from hf_transfer_ext.evals.text.stemming import stem


def test_the_longest_common_subsequence_is_the_longest_of_all():
    def oracle(a, b):
        chosen = (set(combinations(a, n)) & set(combinations(b, n)) for n in range(len(a), -1, -1))
        return next(len(next(iter(common))) for common in chosen if common)

    for a, b in [("abcbdab", "bdcaba"), ("aaaa", "aa"), ("abc", "xyz"), ("", "abc"), ("abcdef", "fedcba")]:
        assert longest_common_subsequence(a, b) == oracle(a, b)


def test_by_hand_with_stems():
    assert rouge_tokens("The author's RUNNING horses ran.") == ["the", "author", "s", "run", "hors", "ran"]
    recall, precision, f1 = rouge_l("He runs the mills", "She said he is running a mill")
    # "he", "run" and "mill" stand in both, once stemmed.
    assert (recall, precision) == (pytest.approx(3 / 4), pytest.approx(3 / 7))
    assert f1 == pytest.approx(2 * recall * precision / (recall + precision))


@pytest.mark.parametrize(
    "word, expected",
    [
        ("caresses", "caress"),
        ("ponies", "poni"),
        ("flies", "fli"),
        ("dies", "die"),
        ("agreed", "agre"),
        ("plastered", "plaster"),
        ("hopping", "hop"),
        ("falling", "fall"),
        ("relational", "relat"),
        ("happily", "happili"),
        ("generalizations", "gener"),
        ("controll", "control"),
        ("skies", "sky"),
        ("enjoy", "enjoy"),
        ("adoption", "adopt"),
    ],
)
def test_stems(word, expected):
    assert stem(word) == expected


def test_answers_in_other_scripts_are_scored_and_one_without_letters_is_named():
    def recall(answer, generation, **options):
        return rouge_l_recall(example(tokens([-1.0]), answer=answer, generation=generation), **options)

    assert recall("東京タワー", "東京") == pytest.approx(2 / 5)  # each letter is a token
    assert recall("Мастер Орло", "мастер Борис") == pytest.approx(1 / 2)
    assert recall("1999年に東京", "1999年") == pytest.approx(2 / 5)
    assert recall("हिन्दी भाषा", "हिन्दी") == pytest.approx(1 / 2)  # vowel signs belong to their letters
    # An answer mostly of a-z is scored as published: José is one word, "jos".
    assert recall("José Molina", "jos") == pytest.approx(1 / 2)
    assert recall("José Molina", "jos", letters="unicode") == 0.0
    for text, options in (("!?", {}), ("東京", {"letters": "ascii"})):
        with pytest.raises(ValueError, match="none of them"):
            recall(text, "東京", **options)
    with pytest.raises(ValueError, match="auto, ascii, unicode"):
        recall("a", "a", letters="latin")


def test_an_empty_generation_recalls_nothing():
    assert rouge_l_recall(example(tokens([-1.0]), answer="Tokyo", generation="")) == 0.0


def test_the_published_generations_give_the_published_recall():
    questions = [json.loads(line) for line in (tofu_folder() / "forget10_perturbed.json").read_text().splitlines()]
    log = reference_log("full")["eval_log_forget.json"]
    by_answer = {q["answer"].strip(): q for q in questions}
    checked = 0
    for key, texts in log["generated_text"].items():
        _, generation, answer = texts[0], texts[1], texts[2]
        scored = example(tokens([-1.0]), answer=answer, generation=generation)
        assert rouge_l_recall(scored) == pytest.approx(log["rougeL_recall"][key], abs=1e-9)
        checked += answer.strip() in by_answer
    assert checked > 200


def test_the_first_line_alone_counts_where_asked():
    scored = example(tokens([-1.0]), answer="the cats ran", generation="\n \nthe cat\ncats ran")
    assert rouge_l_recall(scored) == pytest.approx(3 / 3)
    assert rouge_l_recall(scored, first_line=True) == pytest.approx(2 / 3)
    assert rouge_l_recall(scored, first_line=True, stemmed=False) == pytest.approx(1 / 3)
    empty = example(tokens([-1.0]), answer="the cats ran", generation="\n")
    assert rouge_l_recall(empty, first_line=True) == 0.0
