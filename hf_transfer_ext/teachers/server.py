"""A teacher behind an OpenAI-compatible server (vLLM and the like): the likeliest tokens of each position, by HTTP.

The server is sent token ids and answers with the log-probabilities of its prompt: `prompt_logprobs` as vLLM has them,
or `echo` with `logprobs` and tokens named by id. Nothing else of the teacher is known: rows are
sparse, at temperature 1, with the mass of all other tokens as the tail. `cache_server` stores them, so that each text
is requested once.
"""

from __future__ import annotations

import http
import http.client
import json
import logging
import math
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hf_transfer_ext.losses.rows import SparseRows, TopTokens
from hf_transfer_ext.losses.slopes import Form
from hf_transfer_ext.teachers.cache import (
    FORMAT,
    CachedTeacher,
    CacheSpec,
    TeacherCache,
    fill_cache,
    tokenizer_digest,
)
from hf_transfer_ext.teachers.documents import Document, documents_of, require_text_alone
from hf_transfer_ext.teachers.signal import TeacherSignal
from hf_transfer_ext.tensors import Mask

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")

#: A text whose tokens tell tokenizers apart: words, case, digits, spaces, accents, another script, an emoji.
PROBE = "The quick brown fox, 1984:\n\n    naïve Zürich 東京 🙂 unbelievably"
#: The environment variable with the key of a server; in settings or on a command line it would be written down.
KEY_VARIABLE = "TEACHER_API_KEY"
#: Which tokenizer has to be the server's.
WHOSE_TOKENIZER = (
    "Losses that compare tokens need a student with the server's tokenizer; `loss: alm` compares texts, and needs the "
    "server's tokenizer as `teacher_processing_class`."
)
#: How far listed probabilities of one position may exceed 1 in sum: rounded ones in half precision do.
MOST_EXCESS = 0.02
#: The longest pause between two attempts, in seconds.
LONGEST_PAUSE = 60.0


class ServerTeacher:
    """Asks a server for the log-probabilities of texts. It is a `Teacher`, and fills a cache.

    Args:
        url: Address up to and without `/v1`, such as "http://localhost:8000".
        model: The model's name on the server.
        tokenizer: That of the texts, which has to be the server's own as well.
        top: Tokens requested at each position, >= 1. Servers limit it (vLLM: `--max-logprobs`, 20 by default).
        api_key: Sent as a bearer token.
        timeout: Seconds that one answer may take.
        retries: Further attempts after a failed one (no connection, a busy or broken server, an answer that is cut).
        pause: Seconds before the first further attempt; doubled for each one after it.
        parallel: Requests at the same time.
        check_tokenizer: Compare the server's tokens with the tokenizer's, by its `/tokenize` or by the text of listed
            tokens; a server that shows neither is refused.

    Raises:
        OSError: The server does not answer, after all attempts.
        ValueError: It has no model of that name, or one with another tokenizer.

    When to use it: the teacher is too large for the machine that trains the student, and runs elsewhere.
    """

    form: Form = "sparse"

    def __init__(
        self,
        url: str,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        top: int = 20,
        api_key: str | None = None,
        timeout: float = 120.0,
        retries: int = 6,
        pause: float = 1.0,
        parallel: int = 8,
        check_tokenizer: bool = True,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"The address of a server starts with http:// or https://, got {url!r}.")
        if top < 1 or retries < 0 or parallel < 1 or not timeout > 0 or pause < 0:
            raise ValueError(
                "`top` and `parallel` have to be >= 1, `retries` and `pause` >= 0, `timeout` > 0, got "
                f"{top}, {parallel}, {retries}, {pause} and {timeout}."
            )
        if top > len(tokenizer):
            raise ValueError(f"`top` is {top}, but the tokenizer has {len(tokenizer)} tokens.")
        self.url, self.model, self.tokenizer, self.top = url.rstrip("/").removesuffix("/v1"), model, tokenizer, top
        self.timeout, self.retries, self.pause, self.parallel = timeout, retries, pause, parallel
        self._key = api_key
        self._open = urllib.request.build_opener(_NoRedirect).open
        self._style: str | None = None  # "prompt_logprobs" or "echo", once an answer has shown it
        self._lists_enough = False  # once an answer has shown that its limit is not below `top`
        self._context = self._context_of_model()
        self._verified = not check_tokenizer or self._tokenizes_alike()

    @property
    def vocab_size(self) -> int:
        """Token ids that an answer may name."""
        return max(self.tokenizer.get_vocab().values()) + 1

    def fingerprint(self) -> dict[str, Any]:
        """Fields that identify this teacher in a cache; its model's name stands for the hidden weights."""
        spec = CacheSpec("top", self.top)
        tokenizer = tokenizer_digest(self.tokenizer)
        return {
            "format": FORMAT, "teacher": self.model, "revision": None, "weights": f"server model {self.model}",
            "tokenizer": tokenizer, "vocab_size": self.vocab_size, **asdict(spec),
        }  # fmt: skip

    def signal(self, student: nn.Module, inputs: dict[str, Any], mask: Mask) -> TeacherSignal:
        """The server's rows at the student's labeled tokens; see `Teacher.signal`."""
        require_text_alone(inputs, "A teacher on a server")
        found = [rows.top for _, rows in self.document_rows(documents_of(inputs, mask))]
        empty = TopTokens(torch.zeros(0, self.top, dtype=torch.long), torch.zeros(0, self.top), torch.zeros(0))
        parts = [empty, *found]
        joined = TopTokens(
            torch.cat([one.ids for one in parts]),
            torch.cat([one.log_probs for one in parts]),
            torch.cat([one.tail for one in parts]),
        )
        return TeacherSignal(SparseRows(joined.to(inputs["input_ids"].device)))

    def token_log_probs(self, inputs: dict[str, Any], mask: Mask) -> Float[Tensor, " tokens"]:
        """The server's log-probability of each labeled token itself, in nats, at temperature 1.

        Raises:
            OSError: The server does not answer, after all attempts.
            ValueError: It does not tell the probability of the tokens that it was sent.
        """
        return self.own_log_probs(documents_of(inputs, mask)).to(inputs["input_ids"].device)

    def own_log_probs(self, documents: Iterable[Document]) -> Float[Tensor, " tokens"]:
        """The server's log-probability of each text's own tokens after its `positions`, one text after the other.

        Raises: as `token_log_probs`.
        """
        return torch.tensor([value for values in self._each(documents, self._own_tokens) for value in values])

    def _own_tokens(self, document: Document) -> list[float]:
        ids = document.ids.tolist()
        listed = self._whole(ids)
        found = [listed[position + 1].get(ids[position + 1]) for position in document.positions.tolist()]
        if None in found:
            position = document.positions.tolist()[found.index(None)] + 1
            raise ValueError(
                f"The server at {self.url} was sent token {ids[position]} and lists only likelier ones at its place, "
                "so that its own probability is not known. Use a server that lists the tokens of its prompt, as vLLM "
                "does."
            )
        return [float(value) for value in found if value is not None]

    def document_rows(self, documents: Iterable[Document]) -> Iterator[tuple[Document, SparseRows]]:
        """Each document with its rows, in order.

        Raises:
            OSError: The server does not answer, after all attempts.
            PermissionError: It refuses the key.
            ValueError: It gives no log-probabilities, too few, or those of another tokenizer.
        """
        documents = list(documents)
        yield from zip(documents, self._each(documents, self._rows), strict=True)

    def _each(self, documents: Iterable[Document], ask: Callable[[Document], Answer]) -> Iterator[Answer]:
        """What `ask` returns for each document, in order, several at a time."""
        documents = list(documents)
        if self._style is None and documents:  # one request alone: all others know then how to ask
            yield ask(documents[0])
            documents = documents[1:]
        with ThreadPoolExecutor(self.parallel) as pool:
            yield from pool.map(ask, documents)

    def _whole(self, ids: list[int]) -> list[dict[int, float]]:
        """The entries that the server lists for each token of a prompt; raises where tokens are missing."""
        if self._context is not None and len(ids) >= self._context:
            raise ValueError(
                f"A text has {len(ids)} tokens, but model {self.model!r} on the server at {self.url} takes at most "
                f"{self._context - 1}: its context of {self._context} also holds one token that it writes. Lower "
                "`max_length`, or raise the context (`--max-model-len` of vLLM)."
            )
        listed = self._listed(ids)
        if len(listed) != len(ids):
            raise ValueError(
                f"The server at {self.url} was sent {len(ids)} tokens and answered for {len(listed)}: the answer is "
                "cut, or the server changes the prompt. Check its longest context (`--max-model-len` of vLLM)."
            )
        return listed

    def _rows(self, document: Document) -> SparseRows:
        ids = document.ids.tolist()
        listed = self._whole(ids)
        rows = [self._likeliest(listed[position + 1]) for position in document.positions.tolist()]
        self._check_limit(ids, listed)
        log_probs = torch.tensor([[value for _, value in row] for row in rows])
        tail = 1 - log_probs.double().exp().sum(1)
        if len(tail) and float(tail.min()) < -MOST_EXCESS:
            raise ValueError(
                f"The server at {self.url} lists tokens whose probabilities sum to {1 - float(tail.min()):g} at one "
                "position, so these are not log-probabilities. Let it list them (vLLM: `--logprobs-mode "
                "raw_logprobs`, its default)."
            )
        tail = tail.clamp(min=0).float()
        if self.top >= self.vocab_size:  # what rounding leaves over belongs to no token
            tail = torch.zeros_like(tail)
        return SparseRows(TopTokens(torch.tensor([[token for token, _ in row] for row in rows]), log_probs, tail))

    def _likeliest(self, entries: Mapping[int, float]) -> list[tuple[int, float]]:
        if len(entries) < self.top:
            raise ValueError(self._too_few(len(entries)))
        found = sorted(entries.items(), key=lambda entry: -entry[1])[: self.top]
        if max(token for token, _ in found) >= self.vocab_size or any(math.isnan(value) for _, value in found):
            raise ValueError(
                f"The server at {self.url} names token {max(token for token, _ in found)}, but the tokenizer has "
                f"{self.vocab_size}: the model on the server has another tokenizer."
            )
        return found

    def _check_limit(self, ids: list[int], listed: list[dict[int, float]]) -> None:
        """Refuse a server whose limit is one below `top`, which its lists can hide: they add the text's own token."""
        for token, entries in zip(ids[1:], listed[1:], strict=True):
            own_is_last = entries.get(token, math.inf) <= min(entries.values(), default=math.inf)
            if len(entries) > self.top or (len(entries) == self.top and not own_is_last):
                self._lists_enough = True
        if self._lists_enough or self.top >= self.vocab_size:
            return
        # After the first token follows one that is not among the likeliest, so that the others in its list are.
        other = next(token for token in range(self.vocab_size) if token not in listed[1])
        found = len(self._whole([ids[0], other])[1].keys() - {other})
        if found < self.top:
            raise ValueError(self._too_few(found))
        self._lists_enough = True

    def _too_few(self, found: int) -> str:
        return (
            f"The server at {self.url} was asked for {self.top} tokens at each position and gave {found}: its limit "
            f"is lower. Set `top={found}`, or raise the limit (`--max-logprobs` of vLLM)."
        )

    def _listed(self, ids: list[int]) -> list[dict[int, float]]:
        """For each token of a prompt, the tokens that the server lists there; none for the first one."""
        body: dict[str, Any] = {"model": self.model, "prompt": ids, "max_tokens": 1, "temperature": 0}
        if self._style != "echo":
            answer = self._answer("/v1/completions", {**body, "prompt_logprobs": self.top})
            listed = _choice(answer).get("prompt_logprobs", answer.get("prompt_logprobs"))
            if isinstance(listed, list):
                self._style = "prompt_logprobs"
                self._check_texts(listed)
                return [{int(token): _log_prob(entry) for token, entry in (row or {}).items()} for row in listed]
        more = {"echo": True, "logprobs": self.top, "return_tokens_as_token_ids": True}
        found = _choice(self._answer("/v1/completions", {**body, **more})).get("logprobs") or {}
        listed = found.get("top_logprobs")
        if not isinstance(listed, list):
            raise ValueError(
                f"The server at {self.url} gives no log-probabilities of its prompt, neither as `prompt_logprobs` nor "
                "with `echo` and `logprobs`. Use vLLM, or a server with one of these."
            )
        self._style = "echo"
        names = [token for row in listed for token in row or {}]
        if not all(name.startswith("token_id:") for name in names):
            raise ValueError(
                f"The server at {self.url} names tokens by their text ({names[0]!r}), which several tokens can share. "
                "Use a server that gives `prompt_logprobs`, or obeys `return_tokens_as_token_ids`, as vLLM does."
            )
        if not self._verified:
            raise ValueError(self._not_verified())
        whole = [{int(name[9:]): float(value) for name, value in (row or {}).items()} for row in listed]
        return whole[: len(ids)]  # a generated token may follow

    def _check_texts(self, listed: list[Any]) -> None:
        """Compare the text of listed tokens with the tokenizer's own."""
        shown = [
            (int(token), entry["decoded_token"])
            for row in listed
            for token, entry in (row or {}).items()
            if isinstance(entry, Mapping) and entry.get("decoded_token") is not None
        ]
        if not shown and not self._verified:
            raise ValueError(self._not_verified())
        for token, text in shown:
            own = str(self.tokenizer.decode([token], skip_special_tokens=False))
            plain = all(t.isascii() and t.isprintable() and t.strip() for t in (own, text))
            if plain and own.strip() != text.strip():
                raise ValueError(
                    f"Token {token} is {text!r} for the server at {self.url} and {own!r} for the tokenizer here: the "
                    f"model {self.model!r} has another tokenizer. {WHOSE_TOKENIZER}"
                )

    def _not_verified(self) -> str:
        return (
            f"The server at {self.url} shows neither `/tokenize` nor the text of tokens, so its tokenizer cannot be "
            "compared with the one here. If you know that they are the same, set `check_tokenizer=False`."
        )

    def _context_of_model(self) -> int | None:
        """The longest context of the model in tokens, if the server tells it.

        Raises:
            ValueError: The server lists its models, and none has this name.
        """
        try:
            listed = self._answer("/v1/models").get("data")
        except ValueError:  # no such address
            return None
        models = {one["id"]: one for one in listed or () if isinstance(one, Mapping) and "id" in one}
        if models and self.model not in models:
            raise ValueError(
                f"The server at {self.url} has no model {self.model!r}. It has: {', '.join(map(repr, models))}."
            )
        context = models.get(self.model, {}).get("max_model_len")
        return context if isinstance(context, int) else None

    def _tokenizes_alike(self) -> bool:
        """Whether the server has `/tokenize`, and splits a text as the tokenizer does.

        Raises:
            ValueError: It splits it otherwise.
        """
        body = {"model": self.model, "prompt": PROBE, "add_special_tokens": False}
        try:
            found = self._answer("/tokenize", body).get("tokens")
        except ValueError:  # no such address
            return False
        own = self.tokenizer(PROBE, add_special_tokens=False)["input_ids"]
        if not isinstance(found, list):
            return False
        if found != own:
            raise ValueError(
                f"The server at {self.url} splits a text into {len(found)} tokens, {found[:6]} ..., the tokenizer "
                f"here into {len(own)}, {own[:6]} ...: the model {self.model!r} has another tokenizer. "
                f"{WHOSE_TOKENIZER}"
            )
        return True

    def _answer(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The server's answer, after up to `retries` further attempts.

        Args:
            body: Sent as JSON; None sends a GET request.
        """
        wait, problem = self.pause, ""
        for attempt in range(self.retries + 1):
            if attempt:
                logger.warning("%s Trying again in %.1f s (%d of %d).", problem, wait, attempt, self.retries)
                time.sleep(wait * random.uniform(0.8, 1.2))
                wait = min(2 * wait, LONGEST_PAUSE)
            try:
                return self._once(path, body)
            except _Busy as error:
                problem = f"The server at {self.url} {error}."
                wait = max(wait, error.wait)
        raise OSError(
            f"{problem} No answer after {self.retries + 1} attempts. What was stored so far stays: start the same run "
            "again when the server is back, and it goes on from there."
        )

    def _once(self, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with self._open(request, timeout=self.timeout) as reply:
                answer = json.loads(reply.read())
        except urllib.error.HTTPError as error:
            said, about = _said(error)
            if error.code == 429 or (error.code >= 500 and error.code != http.HTTPStatus.NOT_IMPLEMENTED):
                status = f"answered {error.code}" + (f" ({said})" if said else "")
                raise _Busy(status, _seconds(error.headers.get("Retry-After"))) from error
            if about in ("prompt_logprobs", "logprobs"):
                said += " Lower `top`, or raise the limit (`--max-logprobs` of vLLM)."
            kind = PermissionError if error.code in (401, 403) else ValueError
            raise kind(f"The server at {self.url}{path} answered {error.code}: {said}") from error
        except json.JSONDecodeError as error:
            raise _Busy("gave an answer that is cut or not JSON") from error
        except (OSError, http.client.HTTPException) as error:
            raise _Busy(f"cannot be reached or broke off ({error or type(error).__name__})") from error
        if not isinstance(answer, dict):
            raise ValueError(f"The server at {self.url}{path} answered with {type(answer).__name__}, not an object.")
        return answer


class _Busy(Exception):
    """Worth another attempt, after `wait` seconds at least."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key goes to the address that was given, and to no other."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _choice(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    choices = answer.get("choices")
    return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], Mapping) else {}


def _said(error: urllib.error.HTTPError) -> tuple[str, str | None]:
    """The message of an error, and the parameter that it is about where the body names one, as OpenAI's API does."""
    try:
        text = error.read(2000).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):  # cut off: the status says enough
        return "", None
    try:
        body = json.loads(text)
    except json.JSONDecodeError:
        return text[:300], None
    found = body.get("error") if isinstance(body, Mapping) else None
    if not isinstance(found, Mapping) or not isinstance(found.get("message"), str):
        return text[:300], None
    return found["message"][:500], found.get("param")


def _log_prob(entry: Any) -> float:
    value = entry.get("logprob") if isinstance(entry, Mapping) else entry
    return -math.inf if value is None else float(value)


def _seconds(header: str | None) -> float:
    try:
        return min(float(header or 0.0), LONGEST_PAUSE)
    except ValueError:  # a date
        return 0.0


def cache_server(
    server: ServerTeacher,
    dataset: Iterable[Mapping[str, Any]],
    folder: str | Path,
    *,
    batch_size: int = 32,
    accelerator: Accelerator | None = None,
) -> TeacherCache:
    """Store a server's rows for a whole data set, as `cache_teacher` does for a model.

    Args:
        dataset: Tokenized rows, as `documents_of_row` reads them.
        folder: A new folder, or a cache of the same server model and `top`.
        batch_size: Texts between two checks of what is missing; `server.parallel` of them are requested at a time.

    Raises:
        OSError: The server does not answer any more. What was captured is stored, and the same call goes on.
        ValueError: The folder is a cache of something else, or the server cannot be used.
    """
    cached = CachedTeacher(TeacherCache(folder, server.fingerprint()), server)
    return fill_cache(
        cached, dataset, batch_size=batch_size, accelerator=accelerator or Accelerator(), student=nn.Identity()
    )
