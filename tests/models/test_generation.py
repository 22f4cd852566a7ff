"""Continuations as tokens: drawn from the model's softmax, cut at their end, without a trace in the random state."""

from contextlib import nullcontext
from string import ascii_letters

import pytest
import torch
from tiny import byte_tokenizer, tiny_llama

from hf_transfer_ext.models.generation import TeacherMixture, continuations, padded_left, stop_token_ids

PROMPTS = [[1, 2, 3, 4, 5], [7], [9, 8, 7]]
SETTINGS = {"pad_id": 257, "stop_ids": [257], "max_new_tokens": 5, "temperature": 1.0, "seed": 3}


def test_draws_depend_on_the_seed_and_leave_the_random_state():
    state = torch.random.get_rng_state()
    first, *_ = continuations(tiny_llama(1), PROMPTS, **SETTINGS)
    torch.random.set_rng_state(state)
    again, written, _ = continuations(tiny_llama(1), PROMPTS, **SETTINGS)
    assert first == again and written.shape == (3, 5)
    before = torch.random.get_rng_state()
    other, *_ = continuations(tiny_llama(1), PROMPTS, **{**SETTINGS, "seed": 4})
    assert other != first and torch.equal(torch.random.get_rng_state(), before)


def test_a_continuation_ends_with_the_first_of_its_stop_tokens():
    free, *_ = continuations(tiny_llama(1), PROMPTS, **{**SETTINGS, "stop_ids": []})
    stop = free[0][2]
    found, *_ = continuations(tiny_llama(1), PROMPTS, **{**SETTINGS, "stop_ids": [257, stop]})
    assert found[0] == free[0][: free[0].index(stop) + 1] and all(found)


def test_padding_after_another_stop_token_is_no_token_of_the_text():
    """The padding token is one that the model knows as its end; the text ends with another token."""
    free = continuations(tiny_llama(1), PROMPTS, **{**SETTINGS, "stop_ids": []}).texts
    stop = free[0][1]
    found = continuations(tiny_llama(1), PROMPTS, **{**SETTINGS, "stop_ids": [stop]})
    assert found.texts[0] == free[0][: free[0].index(stop) + 1] and 257 not in found.texts[0]
    assert found.tokens[0, len(found.texts[0])] == 257
    assert found.ended == [stop in text for text in found.texts] and not all(found.ended)


@pytest.mark.parametrize("stop_ids", [[257], []])
def test_a_stop_string_ends_a_text_with_the_token_that_completes_it(stop_ids):
    tokenizer = byte_tokenizer()
    others = sorted(set(range(258)) - set(tokenizer(ascii_letters)["input_ids"]))
    settings = {**SETTINGS, "stop_ids": stop_ids, "max_new_tokens": 8, "suppress_tokens": others}
    free = continuations(tiny_llama(1), PROMPTS, **settings).texts
    stop = tokenizer.decode(free[0][2:4])
    found = continuations(tiny_llama(1), PROMPTS, **settings, stop_strings=[stop, "never"], tokenizer=tokenizer)
    assert found.texts == [free[0][:4], *free[1:]] and found.ended == [True, False, False]


def test_padding_on_the_left_changes_nothing_for_the_likeliest_tokens():
    together, *_ = continuations(tiny_llama(1), PROMPTS, **SETTINGS, top_k=1)
    alone = [continuations(tiny_llama(1), [prompt], **SETTINGS, top_k=1)[0][0] for prompt in PROMPTS]
    assert together == alone


def test_stop_tokens_are_those_of_the_model_and_of_the_tokenizer():
    model = tiny_llama(1)
    model.generation_config.eos_token_id = [5, 257]
    assert stop_token_ids(model, byte_tokenizer()) == [5, 257]
    model.generation_config.eos_token_id = None
    assert stop_token_ids(model, byte_tokenizer()) == [257]


@pytest.mark.parametrize("entries", [250, 258, 300])
def test_a_mixture_takes_teachers_with_other_padding_rows(entries):
    """Entries that the teacher lacks keep the student's share alone; those that the student lacks are left out."""
    student, teacher = tiny_llama(1), tiny_llama(2, vocab_size=entries, eos_token_id=0, bos_token_id=0, pad_token_id=0)
    ids, mask = padded_left(PROMPTS, 0, torch.device("cpu"))
    mixture = TeacherMixture(lambda: nullcontext(teacher), mask, 0.25)
    with torch.no_grad():
        scores = student(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, -1]
        found = mixture(ids, scores).exp()
        own = torch.stack([student(torch.tensor([p])).logits[0, -1].softmax(-1) for p in PROMPTS])
        other = torch.stack([teacher(torch.tensor([p])).logits[0, -1, :258].softmax(-1) for p in PROMPTS])
    shared = min(entries, 258)
    torch.testing.assert_close(found[:, :shared], 0.75 * own[:, :shared] + 0.25 * other, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[:, shared:], 0.75 * own[:, shared:], atol=1e-5, rtol=1e-4)
