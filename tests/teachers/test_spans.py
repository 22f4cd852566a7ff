"""A text in the tokens of another tokenizer: special tokens by role, cut characters left out, odd texts covered."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from teachers.test_alignment import ADVERSARIAL
from tiny import tiny_llama
from tiny_tokenizers import byte_fallback, byte_level, unigram

from hf_transfer_ext.teachers.live import LiveTeacher
from hf_transfer_ext.teachers.spans import Respelling, SpanTeacher


@pytest.mark.parametrize("text", ADVERSARIAL)
@pytest.mark.parametrize("pair", [(byte_level, byte_fallback), (byte_fallback, byte_level)], ids=["down", "up"])
def test_the_teacher_reads_the_text_with_its_own_special_tokens_and_every_byte_is_in_a_group(pair, text):
    own, other = (make() for make in pair)
    respelling = Respelling(own, other)
    ids = [*own(text)["input_ids"], own.eos_token_id]
    found = respelling(np.array(ids))
    assert list(found.ids) == [*other(text)["input_ids"], other.eos_token_id] and not found.problem
    for (a, b), (c, d) in zip(found.own, found.other, strict=True):
        left = b"".join(respelling.own[token] for token in ids[a:b])
        assert left == b"".join(respelling.other[token] for token in found.ids[c:d])
    assert [i for a, b in found.own for i in range(a, b)] == list(range(len(ids)))
    assert [i for c, d in found.other for i in range(c, d)] == list(range(len(found.ids)))


def test_a_teacher_with_a_bos_gets_it_where_the_student_has_none():
    own, other = byte_level(), byte_fallback()
    own.backend_tokenizer.post_processor = None
    ids = own("Paris", add_special_tokens=False)["input_ids"]
    found = Respelling(own, other)(np.array(ids))
    assert found.ids[0] == other.bos_token_id and found.own[0][0] == 0 and found.other[0][0] == 1


def test_a_character_that_is_cut_at_either_end_is_left_out():
    own, other = byte_level(), byte_fallback()
    emoji = own("🙂", add_special_tokens=False)["input_ids"]
    assert len(emoji) > 1
    text = own("a b", add_special_tokens=False)["input_ids"]
    found = Respelling(own, other)(np.array([*emoji[1:], *text, *emoji[:-1]]))
    covered = {i for a, b in found.own for i in range(a, b)}
    assert covered == set(range(len(emoji) - 1, len(emoji) - 1 + len(text)))
    assert found.ids == tuple(other("a b")["input_ids"])


def test_a_text_that_the_teacher_cannot_spell_teaches_nothing_and_says_so(caplog):
    found = Respelling(byte_level(), unigram())(np.array(byte_level()("日本 🙂")["input_ids"]))
    assert "different texts" in found.problem and len(found.own) <= 1


def test_the_share_of_matched_tokens_is_told_and_limited_to_the_heads():
    own, other = byte_level(), byte_fallback()
    live = LiveTeacher(tiny_llama(2, vocab_size=300), Accelerator(cpu=True))
    teacher = SpanTeacher(live, own, other, 280)
    assert "tokens match exactly" in str(teacher.vocabularies)
    assert len(teacher.matched[0]) < len(teacher.vocabularies.student_ids)
    assert teacher.matched[0].max() < 280 and teacher.matched[1].max() < 300


def test_only_labeled_spans_count_and_a_batch_without_any_runs():
    own, other = byte_level(), byte_fallback()
    live = LiveTeacher(tiny_llama(2, vocab_size=len(other), num_hidden_layers=1), Accelerator(cpu=True))
    teacher = SpanTeacher(live, own, other, len(own))
    ids = torch.tensor([own("The capital of France is Paris.")["input_ids"]])
    mask = torch.zeros(1, ids.shape[1] - 1, dtype=torch.bool)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    nothing = teacher.spans(tiny_llama(1), inputs, mask)
    assert len(nothing.places) == len(nothing.rows) == 0
    mask[:, ids.shape[1] // 2 :] = True
    some = teacher.spans(tiny_llama(1), inputs, mask)
    assert len(some.rows) == int(some.teacher.sizes.sum()) > 0
    assert some.places.min() >= ids.shape[1] // 2
    assert (ids[0, some.places + 1] == some.student.targets).all()
    with pytest.raises(ValueError, match="reads `input_ids` alone, but the student reads pixel"):
        teacher.spans(tiny_llama(1), {**inputs, "pixel_values": ids}, mask)
