"""Templates from `load_tokenizer` render as before, and are stopped where they take too much."""

import copy
import json
import multiprocessing
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from jinja2.exceptions import TemplateError, UndefinedError
from tiny import CHAT_TEMPLATE, byte_tokenizer

from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.merging.planning.chat_templates import CHAT_TEMPLATES
from hf_transfer_ext.models import chat_template
from hf_transfer_ext.models.loading import load_tokenizer

CHAT = [{"role": "user", "content": "Hello, café \ud800?"}, {"role": "assistant", "content": "Hi."}]
BOMBS = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a condition on the chat": "{% if messages|length > 1 %}{% for a in range(99999) %}{% for b in range(99999) %}"
    "{% endfor %}{% endfor %}{% endif %}",
    "a long string": "{{ ('x' * 10000000000)|length }}",
    "a string that doubles": "{% set n = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
    "{% endfor %}{{ n.x|length }}",
    "a long text": "{% for i in range(1000) %}{{ 'x' * 100000 }}{% endfor %}",
    "a large number": "{{ 9999999 ** 9999999 }}",
    "a wide field": "{{ '%3000000000d' % 1 }}",
    "a macro that calls itself": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "a macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
}


def loaded(folder, template=CHAT_TEMPLATE):
    byte_tokenizer(template).save_pretrained(folder)
    return load_tokenizer(folder)


#: Stopped as others are; each costs the start of another process.
SLOW = ("a condition on the chat", "a long text", "a wide field")


@pytest.mark.parametrize("kind", [pytest.param(one, marks=[pytest.mark.slow] * (one in SLOW)) for one in BOMBS])
def test_a_template_that_takes_too_much_is_stopped_by_name(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(chat_template, "SECONDS", 0.3)
    tokenizer = loaded(tmp_path / "stranger", BOMBS[kind])
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"template of '.*stranger' was stopped: it (took more|wrote a t|calls)"):
        tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert time.monotonic() - began < 8


def test_the_next_template_renders_after_a_bomb(tmp_path, monkeypatch):
    with monkeypatch.context() as short:
        short.setattr(chat_template, "SECONDS", 0.3)
        with pytest.raises(ValueError, match=r"took more than 0.3 seconds.*template: plain"):
            QuestionAnswerFormat().prompt_text(loaded(tmp_path / "bomb", BOMBS["loops in loops"]), "Who?")
    plain = QuestionAnswerFormat("plain").prompt_text(loaded(tmp_path / "bomb", BOMBS["loops in loops"]), "Who?")
    assert "Who?" in plain
    assert loaded(tmp_path / "good").apply_chat_template(CHAT[:1], tokenize=False).startswith("<|user|>Hello")


@pytest.mark.parametrize("name", ["chatml", "llama3", "exaone"])
def test_what_is_rendered_is_what_transformers_renders(tmp_path, name):
    unguarded = byte_tokenizer("{# by the caller #}" + CHAT_TEMPLATES[name])
    guarded = loaded(tmp_path, CHAT_TEMPLATES[name])
    for options in ({"add_generation_prompt": True}, {"continue_final_message": True}, {"x": [1, {"a": (2, 3)}]}):
        expected = unguarded.apply_chat_template(CHAT, tokenize=False, **options)
        assert guarded.apply_chat_template(CHAT, tokenize=False, **options) == expected
    assert guarded.apply_chat_template([CHAT, CHAT[:1]], tokenize=False) == unguarded.apply_chat_template(
        [CHAT, CHAT[:1]], tokenize=False
    )
    for other in (copy.deepcopy(guarded), pickle.loads(pickle.dumps(guarded))):
        assert other.apply_chat_template(CHAT[1:], tokenize=True) == guarded.apply_chat_template(CHAT[1:])


def test_parts_of_the_assistant_tools_and_objects(tmp_path):
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}{{ tools | tojson }}"
    )

    @dataclass
    class Message:
        role: str
        content: str

        def items(self):
            return vars(self).items()

    def double(x: int):
        """Twice a number.

        Args:
            x: The number.
        """

    unguarded, guarded = byte_tokenizer("{# own #}" + template), loaded(tmp_path, template)
    how = {"return_dict": True, "return_assistant_tokens_mask": True, "tools": [double]}
    chat = [{"role": "user", "content": "Hello"}, Message("assistant", "Hi.")]
    assert dict(guarded.apply_chat_template(chat, **how)) == dict(unguarded.apply_chat_template(chat, **how))
    assert sum(guarded.apply_chat_template(chat, **how)["assistant_masks"]) == 3
    with pytest.raises(TypeError, match="may hold text, numbers, lists and mappings: it holds a set"):
        guarded.apply_chat_template([{"role": "user", "content": {1}}])


def test_errors_of_a_template_stay_what_they_are(tmp_path):
    for template, kind, message in (
        ("{{ raise_exception('take turns') }}", TemplateError, r"The chat template of '.*m': take turns"),
        ("{{ messages[0].a.b }}", UndefinedError, "no attribute 'a'"),
        ("{{ 1 + 'a' }}", TypeError, "unsupported operand"),
        ("{% if %}", TemplateError, "Expected an expression"),
        ("{{ ''.__class__.__mro__ }}{{ messages.append(1) }}", TemplateError, "unsafe"),
    ):
        with pytest.raises(kind, match=message):
            loaded(tmp_path / "m", template).apply_chat_template(CHAT)


def test_threads_and_forked_processes_render(tmp_path):
    tokenizer = loaded(tmp_path)
    chats = [[{"role": "user", "content": f"{n}" * 20_000}] for n in range(24)]
    expected = [f"<|user|>{chat[0]['content']}</s>" for chat in chats]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda chat: tokenizer.apply_chat_template(chat, tokenize=False), chats)) == expected
    process = multiprocessing.get_context("fork").Process(target=_render_and_write, args=(tokenizer, tmp_path / "out"))
    process.start()
    process.join(60)
    assert json.loads((tmp_path / "out").read_text()) == tokenizer.apply_chat_template(CHAT[1:], tokenize=False)


def _render_and_write(tokenizer, path):
    path.write_text(json.dumps(tokenizer.apply_chat_template(CHAT[1:], tokenize=False)))
    chat_template._PROCESS.close()


def test_a_process_that_cannot_start_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(chat_template, "_SERVE", "raise SystemExit(1)")
    monkeypatch.setattr(chat_template, "_PROCESS", chat_template.TemplateProcess())
    with pytest.raises(OSError, match="did not start"):
        loaded(tmp_path).apply_chat_template(CHAT)
