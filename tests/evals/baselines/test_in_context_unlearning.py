import numpy as np
import pytest
import torch
from evals.audit.planted_people import DATA, FORGET, PLAIN, RETAIN, planted, subject
from tiny import CHAT_TEMPLATE, byte_tokenizer

from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.evals.audit.attacks.prompt_removal import prompt_removal
from hf_transfer_ext.evals.audit.run import audit
from hf_transfer_ext.evals.baselines import BASELINES, template_of
from hf_transfer_ext.evals.engine.evaluate import evaluate


def test_the_prompt_holds_wrong_answers_then_right_ones():
    made = BASELINES["in_context_unlearning"](FORGET, RETAIN, PLAIN, forgotten=2, correct=3, seed=1)
    wrong, right = made.examples[:2], made.examples[2:]
    own = {row["question"]: row["answer"] for row in FORGET}
    assert [question for question, _ in wrong] == [row["question"] for row in FORGET[:2]]
    assert all(said != own[question] and said in own.values() for question, said in wrong)
    assert len(set(right)) == 3 and set(right) <= {(row["question"], row["answer"]) for row in RETAIN}
    again = BASELINES["in_context_unlearning"](FORGET, RETAIN, PLAIN, forgotten=2, correct=3, seed=1)
    assert again == made and len(template_of("in_context_unlearning", FORGET, [], PLAIN)[0].examples) == 4


def test_one_answer_to_forget_is_flipped_to_one_of_the_retain_set():
    made = BASELINES["in_context_unlearning"](FORGET[:1], RETAIN, PLAIN, correct=0)
    assert made.examples[0][1] in {row["answer"] for row in RETAIN}


def test_the_probability_is_that_after_the_whole_prompt():
    model, template = planted()[0], template_of("in_context_unlearning", FORGET, RETAIN, PLAIN, forgotten=1)[0]
    text = "".join(f"{question} {said}\n\n" for question, said in template.examples) + FORGET[0]["question"]
    ids = byte_tokenizer()(text, add_special_tokens=False)["input_ids"]
    answer = [*byte_tokenizer()(" " + FORGET[0]["answer"], add_special_tokens=False)["input_ids"], 257]
    encoded = template.encode(byte_tokenizer(), FORGET[0]["question"], FORGET[0]["answer"])
    assert (
        encoded.input_ids[-len(answer) :] == answer
        and encoded.input_ids[-len(answer) - len(ids) : -len(answer)] == ids
    )
    log_p = torch.log_softmax(model(torch.tensor([encoded.input_ids])).logits[0].detach().double(), -1)
    start = encoded.answer_start
    expected = sum(log_p[i - 1, encoded.input_ids[i]] for i in range(start, len(encoded.input_ids)))
    found = evaluate(model, byte_tokenizer(), FORGET[:1], ["answer_probability"], template=template, resamples=0)
    assert found.values["answer_probability"][0] == pytest.approx(float((expected / len(answer)).exp()), rel=1e-5)


def test_a_chat_gets_the_examples_as_turns_after_its_system_message():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    template = QuestionAnswerFormat(system="Be brief.", examples=(("A?", "B"),))
    said = [("system", "Be brief."), ("user", "A?"), ("assistant", "B"), ("user", "C?")]
    messages = [{"role": role, "content": content} for role, content in said]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert template.prompt_text(tokenizer, "C?") == rendered
    encoded = template.encode(tokenizer, "C?", "D")
    assert encoded.input_ids[: encoded.answer_start] == tokenizer(rendered, add_special_tokens=False)["input_ids"]


def test_whoever_drops_the_prompt_has_everything_and_the_report_says_so():
    original, shallow, _ = planted()
    template, sentence = template_of("in_context_unlearning", FORGET, RETAIN, PLAIN, forgotten=2, correct=1)
    found = audit(
        subject(original, template), DATA, original=subject(original), attacks=["plain_question", "prompt_removal"],
        membership=[], resamples=0,
    )  # fmt: skip
    by_name = {verdict.attack: verdict for verdict in found.verdicts}
    assert by_name["prompt_removal"].recovered == pytest.approx(1.0) and found.worst.attack == "prompt_removal"
    assert by_name["plain_question"].unlearned < by_name["plain_question"].original
    assert sentence.startswith("Nothing was removed: `in_context_unlearning`")
    with pytest.raises(ValueError, match="no prompt to remove"):
        prompt_removal(subject(shallow), DATA)
    assert np.allclose(prompt_removal(subject(original, template), DATA), found.scores["prompt_removal"])


@pytest.mark.parametrize(
    "forget, options, message",
    [
        ([], {}, "needs rows to forget"),
        (FORGET, {"forgotten": 0}, "`forgotten` must be >= 1"),
        (FORGET, {"correct": -1}, "`correct` must be >= 0"),
        (FORGET, {"corect": 1}, "Did you mean 'correct'"),
        ([{"text": "plain"}], {}, "rows with a question and an answer"),
    ],
)
def test_what_gives_no_prompt_is_refused(forget, options, message):
    with pytest.raises(ValueError, match=message):
        template_of("in_context_unlearning", forget, RETAIN, PLAIN, **options)


def test_rows_without_a_question_are_not_measured_without_the_prompt():
    template = template_of("in_context_unlearning", FORGET, RETAIN, PLAIN)[0]
    with pytest.raises(
        ValueError, match="`examples` of the template come before a question, and a plain text has none"
    ):
        evaluate(planted()[0], byte_tokenizer(), [{"text": "plain"}], ["perplexity"], template=template)
    with pytest.raises(ValueError, match="a prompt with its completion has none"):
        template.encode_completion(byte_tokenizer(), "a", "b")
