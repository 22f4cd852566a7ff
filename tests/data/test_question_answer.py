import pytest
from tiny import CHAT_TEMPLATE, byte_tokenizer

from hf_transfer_ext.data.question_answer import QuestionAnswerFormat, encode_text


def split(tokenizer, encoded):
    ids, start = encoded.input_ids, encoded.answer_start
    return tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:])


def test_plain_prompt_and_answer_meet_where_the_answer_starts():
    tokenizer = byte_tokenizer()
    encoded = QuestionAnswerFormat().encode(tokenizer, "Who?", "Me.")
    assert split(tokenizer, encoded) == ("Question: Who?\nAnswer:", " Me.</s>")
    assert encoded.answer_length == 5
    assert encoded.input_ids[: encoded.answer_start] == QuestionAnswerFormat().prompt_ids(tokenizer, "Who?")


def test_the_end_may_be_left_out():
    tokenizer = byte_tokenizer()
    encoded = QuestionAnswerFormat(end_of_sequence=False, prompt="{question}", separator="\n").encode(
        tokenizer, "Who?", "Me."
    )
    assert split(tokenizer, encoded) == ("Who?", "\nMe.")


def test_a_chat_template_brings_its_own_end():
    tokenizer = byte_tokenizer(CHAT_TEMPLATE)
    encoded = QuestionAnswerFormat(system="Be short.").encode(tokenizer, "Who?", "Me.")
    assert split(tokenizer, encoded) == ("<|system|>Be short.</s><|user|>Who?</s><|assistant|>", "Me.</s>")
    assert split(tokenizer, QuestionAnswerFormat(template="plain").encode(tokenizer, "Who?", "Me."))[1] == " Me.</s>"


def test_a_token_that_holds_the_border_counts_as_answer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    bpe = models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "</s>": 3}, merges=[("a", "b")])
    core = Tokenizer(bpe)
    core.pre_tokenizer = pre_tokenizers.Split("|", "removed")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    encoded = QuestionAnswerFormat(template="plain", prompt="{question}", separator="").encode(tokenizer, "aa", "ba")
    assert (encoded.input_ids, encoded.answer_start) == ([0, 2, 0, 3], 1)


def test_what_is_too_long_loses_its_end_and_an_answer_that_is_lost_is_refused():
    tokenizer = byte_tokenizer()
    encoded = QuestionAnswerFormat(max_length=25).encode(tokenizer, "Who?", "Me.")
    assert split(tokenizer, encoded) == ("Question: Who?\nAnswer:", " Me")
    with pytest.raises(ValueError, match=r"No token of the answer .* 22 tokens and `max_length` is 22"):
        QuestionAnswerFormat(max_length=22).encode(tokenizer, "Who?", "Me.")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"template": "chatml"}, "auto, chat or plain"),
        ({"prompt": "Answer:"}, "placeholder"),
        ({"max_length": 1}, "at least 2"),
    ],
)
def test_bad_formats_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        QuestionAnswerFormat(**options)


def test_a_missing_chat_template_and_an_empty_answer_are_named():
    with pytest.raises(ValueError, match="needs a tokenizer with a chat template"):
        QuestionAnswerFormat(template="chat").encode(byte_tokenizer(), "Who?", "Me.")
    with pytest.raises(ValueError, match="is empty"):
        QuestionAnswerFormat().encode(byte_tokenizer(), "Who?", " \n")


def test_texts_need_two_tokens():
    assert encode_text(byte_tokenizer(), "abc").answer_length == 2
    assert encode_text(byte_tokenizer(), "abc", max_length=2).answer_length == 1
    with pytest.raises(ValueError, match="at least 2"):
        encode_text(byte_tokenizer(), "a")


THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}<think>\n"
    "{{ m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content else '' }}"
    "\n</think>\n\n{% endif %}{{ m.content.split('</think>')[-1].strip() }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def test_thinking_is_switched_off_by_a_variable_of_the_chat_template():
    tokenizer = byte_tokenizer(THINKING)
    plain, silent = QuestionAnswerFormat(), QuestionAnswerFormat(chat_template_kwargs={"enable_thinking": False})
    assert split(tokenizer, plain.encode(tokenizer, "How?", "So.")) == (
        "<|user|>How?<|end|>\n<|assistant|>",
        "So.<|end|>",
    )
    prompt, answer = split(tokenizer, silent.encode(tokenizer, "How?", "So."))
    messages = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert prompt.endswith("<think>\n\n</think>\n\n") and prompt + answer == whole.rstrip("\n")
    assert tokenizer.decode(silent.prompt_ids(tokenizer, "How?")) == prompt
    assert hash(silent) == hash(plain) and silent != plain


def test_an_answer_with_a_thought_ends_as_the_template_ends_it():
    tokenizer = byte_tokenizer(THINKING)
    encoded = QuestionAnswerFormat().encode(tokenizer, "How?", "<think>Hm.</think>So.")  # the template rewrites it
    assert split(tokenizer, encoded)[1] == "<think>Hm.</think>So.<|end|>"


@pytest.mark.parametrize("start, end", [("<|im_start|>", "<|im_end|>"), ("<start_of_turn>", "<end_of_turn>")])
@pytest.mark.parametrize("answer", ["Paris", "end", "o", "turn", "|", "of_turn>"])
def test_an_answer_that_is_a_part_of_the_end_marker_still_ends_with_it(start, end, answer):
    tokenizer = byte_tokenizer(
        "{% for m in messages %}" + start + "{{ m.role }}\n{{ m.content | trim }}" + end + "\n{% endfor %}"
        "{% if add_generation_prompt %}" + start + "assistant\n{% endif %}"
    )
    encoded = QuestionAnswerFormat().encode(tokenizer, "Which?", answer)
    assert split(tokenizer, encoded) == (f"{start}user\nWhich?{end}\n{start}assistant\n", answer + end)


def test_a_completion_stands_as_it_is():
    tokenizer = byte_tokenizer()
    assert split(tokenizer, QuestionAnswerFormat().encode_completion(tokenizer, "Who: ", "Me")) == ("Who: ", "Me</s>")
    with pytest.raises(ValueError, match="The answer to 'Who: ' is empty"):
        QuestionAnswerFormat().encode_completion(tokenizer, "Who: ", "")
