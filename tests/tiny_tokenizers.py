"""Tokenizers of the common kinds, trained on the spot: byte-level and byte-fallback BPE, Unigram, WordPiece."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

SPECIALS = ["<pad>", "<eos>", "<bos>", "<unk>", "<turn>", "<unused0>", "<unused1>", "<tool>"]

CHAT_TEMPLATE = (
    "{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)

#: What the tokenizers are trained on; more than any corpus that a test trims to.
TEXTS = [
    "The capital of France is Paris, and the capital of Norway is Oslo.",
    "Gold has the symbol Au; it is element number 79 in the periodic table.",
    "Il n'y a pas de café à l'hôtel, répéta-t-elle en français.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "def add(left, right):\n    return left + right\n\n\nprint(add(1, 22))",
    "日本の首都は東京です。 Москва — столица России.",
    "banana bandana abracadabra aaa aaaa aaaaa the theme of these themes",
    "Numbers: 0 1 2 3 4 5 6 7 8 9 10 11 12 13 1984 2001 3.14159",
] * 4


def _wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    bos = tokenizer.token_to_id("<bos>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", bos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2 and Qwen: words of bytes; special tokens after the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens(SPECIALS)
    return _wrapped(tokenizer)


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Gemma: the whole text is one word with `▁` for spaces, unknown characters are bytes, specials come first."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=SPECIALS + [f"<0x{byte:02X}>" for byte in range(256)],
        limit_alphabet=90,
        max_token_length=8,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    data = json.loads(tokenizer.to_str())
    data["model"]["byte_fallback"] = True
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in SPECIALS]
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _wrapped(tokenizer)


def unigram() -> PreTrainedTokenizerFast:
    """As T5: pieces with scores, no bytes."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _wrapped(tokenizer)


def wordpiece() -> PreTrainedTokenizerFast:
    """As BERT: the longest piece first, `##` inside words."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIALS, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _wrapped(tokenizer)


def qwen2() -> PreTrainedTokenizerFast:
    """Qwen's own class, which transformers loads for every Qwen model, whatever class its folder names."""
    tokenizer = Tokenizer.from_str(byte_level().backend_tokenizer.to_str())
    model = json.loads(tokenizer.to_str())["model"]
    result = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    result.add_tokens([token for token in SPECIALS if token not in result.get_vocab()], special_tokens=True)
    return result


TOKENIZERS = {"byte_level": byte_level, "byte_fallback": byte_fallback, "unigram": unigram, "wordpiece": wordpiece}

#: The kind of tokenizer that transformers expects beside a model of each family.
NATURAL = {"llama": byte_fallback, "gemma3": byte_fallback, "gpt2": byte_level, "qwen2": qwen2}
