"""Tokenizations are aligned by bytes: groups stand for the same bytes, whatever the text."""

import pytest
import torch
from tiny_tokenizers import byte_fallback, byte_level, unigram, wordpiece
from transformers import AddedToken

from hf_transfer_ext.teachers.alignment import TokenBytes, align, align_vocabularies, special_tokens

ADVERSARIAL = [
    "The capital of France is Paris.",
    "🙂🙃 family: 👨‍👩‍👧‍👦!",
    "日本の首都は東京です。漢字かな交じり文",
    "a    b\t\tc\n\n\n   d ",
    "   leading and trailing   ",
    "naïve café Zürich ß ﬁ",
    "def f(x):\n    return x ** 2\n",
    "12345 1984 3.14159",
    "ЁЖ ქართული العربية",
    "x",
    " ",
    "",
]
PAIRS = [(byte_level, byte_fallback), (byte_fallback, byte_level)]


@pytest.mark.parametrize("bos", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("text", ADVERSARIAL)
@pytest.mark.parametrize("pair", PAIRS, ids=["level-fallback", "fallback-level"])
def test_groups_stand_for_the_same_bytes_cover_the_text_and_cannot_be_split(pair, text, bos):
    own, other = (make() for make in pair)
    one, two = (
        tokenizer(text, add_special_tokens=special)["input_ids"]
        for tokenizer, special in zip((own, other), bos, strict=True)
    )
    known, known_other = TokenBytes(own), TokenBytes(other)
    found = align(one, two, known, known_other)
    whole = b""
    for (a, b), (c, d) in zip(found.student, found.teacher, strict=True):
        left, right = [known[t] for t in one[a:b]], [known_other[t] for t in two[c:d]]
        assert b"".join(left) == b"".join(right) != b""
        ends = [{sum(map(len, parts[: i + 1])) for i in range(len(parts) - 1)} for parts in (left, right)]
        assert not ends[0] & ends[1]  # no smaller group
        whole += b"".join(left)
    assert whole == text.encode()


def test_one_example_by_hand():
    own, other = byte_level(), byte_fallback()
    known, known_other = TokenBytes(own), TokenBytes(other)
    for tokenizer, table in ((own, known), (other, known_other)):
        assert table[tokenizer.bos_token_id] == b""
    emoji = own("🙂", add_special_tokens=False)["input_ids"]
    found = align([own.bos_token_id, *emoji], other("🙂", add_special_tokens=False)["input_ids"], known, known_other)
    assert b"".join(known[t] for t in emoji) == "🙂".encode() and found.student[0][0] == 1
    assert [known_other[other.convert_tokens_to_ids("<0xF0>")]] == [b"\xf0"]


def test_a_space_that_one_tokenizer_puts_in_front_shifts_nothing():
    own, other = byte_level(), unigram()
    text = "The capital of France"
    one, two = (tokenizer(text, add_special_tokens=False)["input_ids"] for tokenizer in (own, other))
    known, known_other = TokenBytes(own), TokenBytes(other)
    assert b"".join(known_other[t] for t in two) == b" " + text.encode()
    found = align(one, two, known, known_other)
    joined = [b"".join(known[t] for t in one[a:b]) for a, b in found.student]
    others = [b"".join(known_other[t] for t in two[c:d]) for c, d in found.teacher]
    assert b"".join(joined) == text.encode() and others[0].lstrip() == joined[0] and others[1:] == joined[1:]


def test_different_texts_and_tokenizers_without_bytes_are_refused():
    own, other = byte_level(), byte_fallback()
    ids = own("the sea")["input_ids"], other("the sky")["input_ids"]
    with pytest.raises(ValueError, match="different texts from byte 5 on: 'the sea' and 'the sky'"):
        align(*ids, TokenBytes(own), TokenBytes(other))
    with pytest.raises(ValueError, match="do not stand for the bytes of a text"):
        TokenBytes(wordpiece())


def test_vocabularies_match_by_bytes_and_special_tokens_by_role():
    own, other = byte_level(), byte_fallback()
    found = align_vocabularies(own, other)
    known, known_other = TokenBytes(own), TokenBytes(other)
    roles = [(own.bos_token_id, other.bos_token_id), (own.eos_token_id, other.eos_token_id)]
    pairs = list(zip(found.student_ids.tolist(), found.teacher_ids.tolist(), strict=True))
    assert set(roles) < set(pairs) and len({one for one, _ in pairs}) == len({two for _, two in pairs}) == len(pairs)
    assert all(known[one] == known_other[two] for one, two in pairs)
    assert f"{len(pairs)} tokens match exactly" in str(found) and "of the teacher's" in str(found)
    own.add_tokens(["[PAD2]"])  # a token that the other side lacks
    more = align_vocabularies(own, other)
    assert torch.equal(more.student_ids, found.student_ids) and more.student_size == found.student_size + 1
    same = align_vocabularies(own, own)
    assert torch.equal(same.student_ids, same.teacher_ids)


def test_special_tokens_match_by_their_text_first_and_by_their_role_where_one_side_has_no_such_token():
    own, other = byte_level(), byte_fallback()
    own.add_special_tokens({"extra_special_tokens": ["<tool>"]})  # listed on one side, and only added on the other
    for tokenizer in (own, other):
        tokenizer.add_tokens([AddedToken("<|im_end|>", special=True, normalized=False)])
    own.eos_token, other.unk_token = "<|im_end|>", "<unused0>"
    found = align_vocabularies(own, other)
    pairs = {
        str(own.convert_ids_to_tokens(one)): str(other.convert_ids_to_tokens(two))
        for one, two in zip(found.student_ids.tolist(), found.teacher_ids.tolist(), strict=True)
    }
    for text in ("<turn>", "<tool>", "<eos>", "<|im_end|>", "<bos>", "<unk>", "<unused0>"):
        assert pairs[text] == text
    assert len(set(pairs.values())) == len(pairs)
    other = byte_fallback()  # without <|im_end|>: the token that ends the student's turns is the teacher's eos
    found = align_vocabularies(own, other)
    pairs = dict(zip(found.student_ids.tolist(), found.teacher_ids.tolist(), strict=True))
    assert pairs[own.eos_token_id] == other.eos_token_id and own.convert_tokens_to_ids("<eos>") not in pairs
    assert special_tokens(TokenBytes(own), TokenBytes(other), ("eos",))[own.eos_token_id] == other.eos_token_id
