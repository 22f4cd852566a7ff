"""Named templates render as the formats they are named after."""

from __future__ import annotations

import json

import pytest
from jinja2.exceptions import TemplateError
from merging.mergekit_environment import mergekit_file
from merging.tiny_models import family
from tiny import byte_tokenizer
from transformers import AutoTokenizer

from hf_transfer_ext.merging import merge
from hf_transfer_ext.merging.planning.chat_templates import CHAT_TEMPLATES
from hf_transfer_ext.merging.planning.config import parse_config

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Bye"},
]
EXPECTED = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
    "<|im_start|>assistant\nHi.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHi.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s> [INST] Be brief.\n\nHello [/INST] Hi.</s> [INST] Bye [/INST]",
    "alpaca": "Be brief.\n\n### Instruction:\nHello\n\n### Response:\nHi.\n\n### Instruction:\nBye\n\n### Response:\n",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]Hello\n[|assistant|]Hi.[|endofturn|]\n"
    "[|user|]Bye\n[|assistant|]",
}


def render(template, chat=CHAT, generate=True):
    return byte_tokenizer(template).apply_chat_template(chat, tokenize=False, add_generation_prompt=generate)


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_rendered(name):
    assert render(CHAT_TEMPLATES[name]) == EXPECTED[name]
    answered = render(CHAT_TEMPLATES[name], CHAT[:3], generate=False)
    assert EXPECTED[name].startswith(answered) and answered.rstrip().endswith(("Hi.", "</s>", ">", "]"))


def test_conversations_of_other_forms():
    assert render(CHAT_TEMPLATES["exaone"], CHAT[1:2]).startswith("[|system|][|endofturn|]\n[|user|]Hello\n")
    context = [CHAT[1], {"role": "user_context", "content": "a text"}]
    assert "### Input:\na text\n\n### Response:\n" in render(CHAT_TEMPLATES["alpaca"], context)
    for chat in (CHAT[2:], [CHAT[1], CHAT[3]], [CHAT[1], CHAT[0]]):
        with pytest.raises(TemplateError, match="take turns"):
            render(CHAT_TEMPLATES["mistral"], chat)


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_merge_writes_the_template(tmp_path, name):
    base, tuned = family(tmp_path, 1)
    byte_tokenizer("{{ old }}").save_pretrained(base)
    config = {
        "merge_method": "linear",
        "base_model": base,
        "models": [{"model": tuned[0], "parameters": {"weight": 1}}],
    }
    merge({**config, "chat_template": name}, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == CHAT_TEMPLATES[name]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "qwen2"


def test_names_that_are_not_known():
    config = {"merge_method": "linear", "models": [{"model": "a/b"}]}
    with pytest.raises(ValueError, match=r"Did you mean 'chatml'.*Available: .*llama3"):
        parse_config({**config, "chat_template": "chatlm"})
    assert parse_config({**config, "chat_template": "{{ own }}"}).chat_template == "{{ own }}"
    assert parse_config({**config, "chat_template": "auto"}).chat_template == "auto"


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_beside_mergekit(mergekit, name):
    """Equal but for line breaks: mergekit's llama3, alpaca and exaone write more of them than the models' own do."""
    theirs = mergekit_file(mergekit, f"_data/chat_templates/{name}.jinja").read_text()
    assert "".join(render(theirs).split()) == "".join(render(CHAT_TEMPLATES[name]).split())
    if name in ("chatml", "mistral"):
        assert render(theirs) == render(CHAT_TEMPLATES[name])
