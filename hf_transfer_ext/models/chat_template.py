"""Chat templates of downloaded models, rendered in a separate process with limited time and memory.

A chat template is a program that comes with a tokenizer. transformers runs it in a sandbox, in which it cannot reach
files or the network, but nothing stops one that never ends (`{% for %}` in `{% for %}`) or fills the memory
(`"x" * 10**10`). Python can neither stop a thread nor limit its memory, so the templates of all tokenizers from
`load_tokenizer` are rendered by a second process, which is started at the first rendering and stopped where a
template exceeds its limits.
"""

from __future__ import annotations

import atexit
import builtins
import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from inspect import isfunction, ismethod
from typing import Any

from hf_transfer_ext.reading import one_line

#: Seconds for one call, and for each further conversation of a batch; an ordinary template takes a millisecond.
SECONDS, MORE_SECONDS = 10.0, 0.1
#: Seconds in which the process has to start; it imports a part of transformers.
START_SECONDS = 120.0
#: Memory of the process above what it holds after its start, and the longest text that it may give back.
MEMORY_BYTES, TEXT_BYTES = 1_000_000_000, 64_000_000
#: Exceptions of a template that are raised again as what they were, so that callers can tell them apart.
_SAME = ("ArithmeticError", "AttributeError", "IndexError", "KeyError", "TypeError", "ValueError", "ZeroDivisionError")
#: Template -> the model that it came with.
_OWNERS: dict[str, str] = {}
_SERVE = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {module} import serve; serve()"


def guard_chat_templates(tokenizer: Any, name: str) -> None:
    """Render the chat templates of a tokenizer under `SECONDS` and `MEMORY_BYTES` from now on, also inside of TRL.

    Args:
        name: The model, for errors.
    """
    templates = getattr(tokenizer, "chat_template", None)
    found = [one for one in (templates.values() if isinstance(templates, Mapping) else [templates]) if one]
    if found:
        _OWNERS.update(dict.fromkeys(found, name))
        _install()


def _install() -> None:
    """Put the guard where all tokenizers of transformers render, whoever calls them; other templates pass it by."""
    from transformers import tokenization_utils_base

    unguarded = tokenization_utils_base.render_jinja_template
    if getattr(unguarded, "is_guarded", False):
        return

    def render_jinja_template(*args: Any, **kwargs: Any) -> Any:
        template = kwargs.get("chat_template")
        if args or template not in _OWNERS:
            return unguarded(*args, **kwargs)
        tools = kwargs.get("tools")
        if tools is not None:  # functions stay in this process
            from transformers.utils import get_json_schema

            kwargs["tools"] = [get_json_schema(one) if isfunction(one) or ismethod(one) else one for one in tools]
        chats = kwargs.get("conversations") or []
        kwargs["conversations"] = [getattr(chat, "messages", chat) for chat in chats]
        return _PROCESS.render(kwargs, _OWNERS[template])

    render_jinja_template.is_guarded = True  # type: ignore[attr-defined]
    tokenization_utils_base.render_jinja_template = render_jinja_template


class TemplateProcess:
    """The process that renders. Each process has its own, which ends with it; threads take turns."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._watch = threading.Lock()
        self._deadline: float | None = None
        self._expired = False

    def render(self, arguments: Mapping[str, Any], name: str) -> tuple[list[str], list[Any]]:
        """The rendered conversations, and where the assistant's parts are in each, as `render_jinja_template` does.

        Raises:
            ValueError: The template takes more than its time or memory, or writes too long a text.
            TypeError: A conversation holds values that JSON does not have.
            jinja2.TemplateError: The template refuses the conversation, or is wrong.
        """
        try:
            request = json.dumps(arguments, default=_plain).encode()
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"A conversation for the chat template of {name!r} may hold text, numbers, lists and mappings: {error}"
            ) from error
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            seconds = SECONDS + MORE_SECONDS * (len(arguments["conversations"]) - 1)
            answer = self._exchange(request, seconds)
            if answer is None:
                expired = self._expired
                self.close()
                limit = f"{seconds:g} seconds" if expired else f"{MEMORY_BYTES / 1e9:g} GB of memory"
                raise ValueError(_stopped(name, f"took more than {limit}"))
        try:
            found = json.loads(answer)
        except ValueError as error:
            raise ValueError(_stopped(name, f"wrote no answer ({one_line(error)})")) from error
        if "problem" in found:
            raise ValueError(_stopped(name, found["problem"]))
        if "error" in found:
            raise _error_of(found["error"], f"The chat template of {name!r}: {found['message']}")
        return found["rendered"], [[tuple(one) for one in indices] for indices in found["indices"]]

    def close(self) -> None:
        """End the process; the next rendering starts another one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _start(self) -> None:
        code = _SERVE.format(module=__name__)
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(sys.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
        threading.Thread(target=self._stop_late, args=(self._process,), daemon=True).start()
        if self._exchange(None, START_SECONDS) is None:
            self.close()
            raise OSError(
                "The process that renders chat templates did not start. Memory or processes may be at their limit, "
                "or the installation of transformers is damaged. `hf-transfer-ext doctor` shows the versions."
            )

    def _exchange(self, request: bytes | None, seconds: float) -> bytes | None:
        """Send a request, if any, and read the next answer; None where the process ended or was stopped for time."""
        process: Any = self._process
        self._expired = False
        with self._watch:
            self._deadline = time.monotonic() + seconds
        try:
            if request is not None:
                process.stdin.write(b"%d\n" % len(request) + request)
                process.stdin.flush()
            size = process.stdout.readline()
            if not size.strip().isdigit():
                return None
            answer = process.stdout.read(min(int(size), 4 * TEXT_BYTES))
            return answer if len(answer) == int(size) else None
        except BrokenPipeError:
            return None
        finally:
            with self._watch:
                self._deadline = None

    def _stop_late(self, process: subprocess.Popen[bytes]) -> None:
        """Look at the deadline as long as the process runs. (A timer for each rendering would cost more than that.)"""
        pause = threading.Event()
        while process.poll() is None:
            with self._watch:
                if self._deadline is not None and time.monotonic() > self._deadline and process is self._process:
                    self._expired = True
                    process.kill()
                    return
            pause.wait(0.1)


def _plain(value: Any) -> Any:
    """A value that JSON does not know, as mappings and lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if hasattr(value, "model_dump"):
        return value.model_dump()
    raise TypeError(f"it holds a {type(value).__name__}.")


def _stopped(name: str, what: str) -> str:
    return (
        f"The chat template of {name!r} was stopped: it {what}. It does not do what a chat template is for; look at "
        "chat_template.jinja or tokenizer_config.json of the model, and do not use a model that you do not trust. "
        "With `template: plain`, or with a `chat_template` of your own set on the tokenizer, it is not run."
    )


def _error_of(kind: str, message: str) -> Exception:
    import jinja2

    if kind in _SAME:
        found: Exception = getattr(builtins, kind)(message)
        return found
    known = {"SecurityError", "TemplateRuntimeError", "UndefinedError"}
    return getattr(jinja2.exceptions, kind if kind in known else "TemplateError")(message)  # type: ignore[no-any-return]


def serve() -> None:
    """Render what comes in on standard input, until it is closed. Runs in the second process alone.

    A request and an answer are each a line with a number of bytes, and so many bytes of JSON.
    """
    answers, requests = sys.stdout.buffer, sys.stdin.buffer
    sys.stdout = sys.stderr  # what a template or a library prints is no answer
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_memory()
    _answer(answers, {})  # ready
    while size := requests.readline():
        _answer(answers, _rendered(render_jinja_template, json.loads(requests.read(int(size)))))


def _rendered(render: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    try:
        rendered, indices = render(**arguments)
    except MemoryError:
        return {"problem": f"took more than {MEMORY_BYTES / 1e9:g} GB of memory"}
    except RecursionError:
        return {"problem": "calls itself without an end"}
    except Exception as error:
        return {"error": type(error).__name__, "message": one_line(error)[:2000]}
    if sum(map(len, rendered)) > TEXT_BYTES:
        return {"problem": f"wrote a text of more than {TEXT_BYTES / 1e6:g} million characters"}
    return {"rendered": rendered, "indices": indices}


def _answer(answers: Any, content: dict[str, Any]) -> None:
    text = json.dumps(content).encode()
    answers.write(b"%d\n" % len(text) + text)
    answers.flush()


def _limit_memory() -> None:
    """Limit the address space of this process, where the system can (not on Windows)."""
    try:
        import resource

        with open("/proc/self/statm", "rb") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY_BYTES, now + MEMORY_BYTES))
    except (ImportError, OSError, ValueError):
        pass


_PROCESS = TemplateProcess()


def _after_fork() -> None:
    """A forked process must not share the pipes of its parent."""
    global _PROCESS
    _PROCESS = TemplateProcess()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
atexit.register(lambda: _PROCESS.close())
