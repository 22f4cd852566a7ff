import json

import pytest
from tiny_tokenizers import TEXTS, TOKENIZERS
from tokenizers import Tokenizer

from hf_transfer_ext.students import tokenizer_json as module


def bpe(merges, extra=(), **model):
    """A `tokenizer.json` of plain BPE over a, b, c; ids in the order of writing."""
    tokens = ["a", "b", "c", *("".join(merge) for merge in merges), *extra]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = {"type": "BPE", "vocab": vocabulary, "merges": [list(merge) for merge in merges], **model}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": None, "post_processor": None, "decoder": None, "model": tokenizer,
    }  # fmt: skip


def test_closure_worked_by_hand():
    """abc comes from ab + c, never from a + bc, for (a, b) is the earlier merge: bc is not needed."""
    data = bpe([("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")])
    ids = module.model_vocabulary(data)
    assert module.closure(data, {ids["abc"]}) == {ids[token] for token in ("a", "b", "c", "ab", "abc")}
    small, old_ids = module.trimmed(data, module.closure(data, {ids["abc"]}))
    assert small["model"]["vocab"] == {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4}
    assert small["model"]["merges"] == [["a", "b"], ["ab", "c"]]
    assert old_ids == [0, 1, 2, 3, 5]
    assert Tokenizer.from_str(json.dumps(small)).encode("abcbc").tokens == ["abc", "b", "c"]


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_paths_of_merges_agree_with_the_library(kind):
    """Every token of the vocabulary, given to the trimmed library tokenizer, comes out whole."""
    data = json.loads(TOKENIZERS[kind]().backend_tokenizer.to_str())
    data |= {"normalizer": None, "pre_tokenizer": None, "post_processor": None}
    vocabulary, added = module.model_vocabulary(data), module.added_vocabulary(data)
    for token, i in list(vocabulary.items())[::7]:
        if token in added or module.BYTE_TOKEN.fullmatch(token):
            continue
        small, _ = module.trimmed(data, module.closure(data, {i} | module.indispensable(data)))
        whole = Tokenizer.from_str(json.dumps(data)).encode(token, add_special_tokens=False).tokens
        assert Tokenizer.from_str(json.dumps(small)).encode(token, add_special_tokens=False).tokens == whole == [token]


def test_merges_as_strings_are_read():
    data = bpe([("a", "b")])
    data["model"]["merges"] = ["a b"]
    small, _ = module.trimmed(data, {0, 1, 3})
    assert small["model"]["merges"] == [["a", "b"]]


def test_a_token_that_no_merge_leads_to_is_kept_where_words_match_whole():
    """Llama 3 matches whole words before it merges (`ignore_merges`)."""
    data = bpe([("a", "b")], extra=["cab"], ignore_merges=True)
    ids = module.model_vocabulary(data)
    small, _ = module.trimmed(data, module.closure(data, {ids["cab"]} | module.indispensable(data)))
    assert small["model"]["merges"] == []
    tokenizer = Tokenizer.from_str(json.dumps(small))
    assert tokenizer.encode("cab").tokens == ["cab"]
    assert tokenizer.encode("ab").tokens == ["a", "b"]


def test_added_tokens_outside_the_models_vocabulary_come_last():
    tokenizer = TOKENIZERS["byte_level"]()
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary, added = module.model_vocabulary(data), module.added_vocabulary(data)
    assert not set(vocabulary) & set(added)
    keep = module.closure(data, module.indispensable(data) | {added["<eos>"], added["<tool>"]})
    small, old_ids = module.trimmed(data, keep)
    last = module.added_vocabulary(small)
    assert list(last) == ["<eos>", "<bos>", "<tool>"]  # <bos> because the post-processor writes it
    assert list(last.values()) == [len(small["model"]["vocab"]) + i for i in range(3)]
    assert old_ids[-3:] == [added[token] for token in last]
    template = small["post_processor"]["special_tokens"]["<bos>"]
    assert template["ids"] == [last["<bos>"]] and template["tokens"] == ["<bos>"]


def test_the_worst_unigram_piece_stays_so_that_unknown_text_costs_the_same():
    data = json.loads(TOKENIZERS["unigram"]().backend_tokenizer.to_str())
    small, _ = module.trimmed(data, module.closure(data, module.indispensable(data)))
    assert min(score for _, score in small["model"]["vocab"]) == min(score for _, score in data["model"]["vocab"])
    assert small["model"]["vocab"][small["model"]["unk_id"]][0] == "<unk>"


@pytest.mark.parametrize("processor", ["BertProcessing", "RobertaProcessing"])
def test_post_processors_with_pairs_are_renumbered(processor):
    data = bpe([("a", "b")], extra=["[CLS]", "[SEP]"])
    data["post_processor"] = {
        "type": "Sequence",
        "processors": [{"type": processor, "sep": ["[SEP]", 5], "cls": ["[CLS]", 4]}],
    }
    small, _ = module.trimmed(data, module.closure(data, module.indispensable(data)))
    assert small["post_processor"]["processors"][0]["sep"] == ["[SEP]", 4]
    assert small["post_processor"]["processors"][0]["cls"] == ["[CLS]", 3]
    assert data["post_processor"]["processors"][0]["sep"] == ["[SEP]", 5]


def test_other_kinds_are_refused():
    with pytest.raises(ValueError, match="type 'Magic' cannot be trimmed"):
        module.refuse_unknown_model({"model": {"type": "Magic"}})
    with pytest.raises(ValueError, match="end_of_word_suffix"):
        module.refuse_unknown_model(bpe([], end_of_word_suffix="</w>"))


def test_all_kept_is_the_same_tokenizer():
    for build in TOKENIZERS.values():
        tokenizer = build()
        data = json.loads(tokenizer.backend_tokenizer.to_str())
        same, old_ids = module.trimmed(data, set(tokenizer.get_vocab().values()))
        assert old_ids == list(range(len(tokenizer)))
        again = Tokenizer.from_str(json.dumps(same))
        assert all(again.encode(text).ids == tokenizer(text)["input_ids"] for text in TEXTS)
