"""A teacher behind a server on the loopback device with a tiny model in it; and all the ways in which it can fail."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from accelerate import Accelerator
from teachers.test_cache import TEXTS, batch, expected
from tiny import byte_tokenizer, tiny_llama
from tiny_tokenizers import byte_level

from hf_transfer_ext.losses.rows import SparseRows
from hf_transfer_ext.teachers import cache
from hf_transfer_ext.teachers import server as module
from hf_transfer_ext.teachers.cache import TeacherCache
from hf_transfer_ext.teachers.documents import documents_of_row
from hf_transfer_ext.teachers.server import ServerTeacher, cache_server
from hf_transfer_ext.teachers.signal import Teacher

TOKENIZER = byte_tokenizer()


class Handler(BaseHTTPRequestHandler):
    """Answers in the words of vLLM 0.32, and of servers that have less than it has."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        own = self.server
        if self.path != "/v1/models" or own.models is None:
            return self.reply(404, b'{"detail":"Not Found"}')
        data = [{"id": name, "object": "model", "owned_by": "vllm", **more} for name, more in own.models.items()]
        self.reply(200, json.dumps({"object": "list", "data": data}).encode())

    def refuse(self, status, message, kind="BadRequestError", param=None):
        error = {"message": message, "type": kind, "param": param, "code": status}
        self.reply(status, json.dumps({"error": error}).encode())

    def do_POST(self):
        own = self.server
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        own.requests.append((self.path, asked, dict(self.headers)))
        if own.models is not None and asked["model"] not in own.models:
            said = f"The model `{asked['model']}` does not exist. Valid aliases: {', '.join(own.models)}."
            return self.refuse(404, said, "NotFoundError", "model")
        if self.path == "/tokenize":
            if own.tokenizer is None:
                return self.reply(404, b"{}")
            ids = own.tokenizer(asked["prompt"], add_special_tokens=False)["input_ids"]
            return self.reply(200, json.dumps({"tokens": ids}).encode())
        if own.faults:
            status, body, headers = own.faults.pop(0)
            return self.reply(status, body, headers)
        ids = asked["prompt"]
        wanted = asked.get("prompt_logprobs") or asked.get("logprobs")
        if own.max_logprobs is not None and wanted > own.max_logprobs:
            name, kind = ("prompt_logprobs", "prompt") if "prompt_logprobs" in asked else ("logprobs", "sample")
            said = f"Requested {kind} logprobs of {wanted}, which is greater than max allowed: {own.max_logprobs}"
            return self.refuse(400, f"{said} (parameter={name}, value={wanted})", param=name)
        with torch.no_grad():
            log_probs = own.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        rows = [None]
        for position, token in enumerate(ids[1:]):
            limit = min(own.limit, wanted)
            listed = {*log_probs[position].topk(limit).indices.tolist(), token}
            rows.append({one: log_probs[position, one].item() for one in listed})
        choice = {"text": ""}
        if "prompt_logprobs" in asked and own.style == "prompt_logprobs":
            choice["prompt_logprobs"] = [
                row and {str(k): {"logprob": v, "rank": 1, **own.shown(k)} for k, v in row.items()} for row in rows
            ]
        if asked.get("echo") and own.style in ("echo", "text"):
            name = (lambda k: f"token_id:{k}") if own.style == "echo" else (lambda k: TOKENIZER.decode([k]))
            choice["logprobs"] = {"top_logprobs": [row and {name(k): v for k, v in row.items()} for row in rows]}
        self.reply(200, json.dumps({"choices": [choice]}).encode()[: own.cut])

    def reply(self, status, body, headers=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server():
    own = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    own.model, own.tokenizer, own.style, own.limit = tiny_llama(2), TOKENIZER, "prompt_logprobs", 20
    own.faults, own.requests, own.cut, own.shown = [], [], None, lambda token: {}
    own.models, own.max_logprobs = {name: {"max_model_len": 512} for name in ("big", "tiny")}, None
    own.url = f"http://127.0.0.1:{own.server_address[1]}"
    thread = threading.Thread(target=own.serve_forever, daemon=True)
    thread.start()
    yield own
    own.shutdown()
    own.server_close()


def teacher(server, **options):
    return ServerTeacher(server.url, "big", TOKENIZER, **{"top": 6, "retries": 2, "pause": 0.0, **options})


ROWS = [{"input_ids": text} for text in TEXTS]


def filled(server, folder, **options):
    return cache_server(teacher(server, **options), ROWS, folder, accelerator=Accelerator(cpu=True), batch_size=1)


@pytest.mark.parametrize("style", ["prompt_logprobs", "echo"])
def test_rows_are_the_servers_likeliest_tokens_and_go_into_a_cache(server, tmp_path, style):
    server.style = style
    asked = teacher(server)
    found = asked.signal(server.model, *batch(TEXTS)).rows
    wanted = SparseRows.from_logits(expected(server.model, TEXTS), 6)
    assert isinstance(asked, Teacher) and found.top.ids.equal(wanted.top.ids)
    torch.testing.assert_close(found.top.log_probs, wanted.top.log_probs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.top.tail, wanted.top.tail, atol=1e-5, rtol=1e-4)
    stored = filled(server, tmp_path / "c")
    before = len(server.requests)
    assert len(filled(server, tmp_path / "c")) == 3
    assert [path for path, *_ in server.requests[before:]] == ["/tokenize"]  # nothing else is asked for again
    rows = stored.rows([d for row in ROWS for d in documents_of_row(row)], torch.device("cpu"))
    torch.testing.assert_close(rows.top.log_probs, wanted.top.log_probs, atol=1e-2, rtol=1e-3)
    with pytest.raises(ValueError, match="top is 6, needed is 5"):
        filled(server, tmp_path / "c", top=5)


def test_a_busy_server_is_asked_again_and_a_dead_one_stops_a_run_that_goes_on_later(server, tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(module.time, "sleep", pauses.append)
    server.faults = [(503, b"", {}), (429, b"", {"Retry-After": "7"}), (200, b'{"choices": [', {}), (500, b"", {})]
    filled(server, tmp_path / "a", retries=4, pause=1.0)
    for pause, least in zip(pauses, (1, 7, 14, 28), strict=True):
        assert 0.8 * least <= pause <= 1.2 * least
    asked = teacher(server)
    server.faults = []
    own = asked._once

    def dies(path, body):
        if len(TeacherCache(tmp_path / "b")) or server.faults:
            server.faults = [(500, b"", {})]
        return own(path, body)

    asked._once = dies
    monkeypatch.setattr(cache, "SHARD_BYTES", 1)
    with pytest.raises(OSError, match=r"answered 500. No answer after 3 attempts. What was stored so far stays"):
        cache_server(asked, ROWS, tmp_path / "b", accelerator=Accelerator(cpu=True), batch_size=1)
    assert len(TeacherCache(tmp_path / "b")) == 1
    server.faults = []
    assert len(filled(server, tmp_path / "b")) == 3


def test_a_batch_whose_tokens_are_all_masked_asks_nothing(server):
    inputs, mask = batch(TEXTS)
    before = len(server.requests)
    found = teacher(server, check_tokenizer=False).signal(server.model, inputs, torch.zeros_like(mask)).rows
    assert len(found) == 0 and len(server.requests) == before


def test_no_server_at_the_address(tmp_path):
    with pytest.raises(OSError, match=r"cannot be reached or broke off .* No answer after 1 attempts"):
        ServerTeacher("http://127.0.0.1:9", "big", TOKENIZER, retries=0, timeout=2.0)


def test_servers_that_cannot_teach_are_refused(server, tmp_path):
    server.style = "none"
    with pytest.raises(ValueError, match="gives no log-probabilities of its prompt"):
        filled(server, tmp_path / "a")
    server.style = "text"
    with pytest.raises(ValueError, match=r"names tokens by their text \(.*which several tokens can share"):
        filled(server, tmp_path / "a")
    server.style, server.limit = "prompt_logprobs", 3
    with pytest.raises(ValueError, match=r"asked for 6 tokens at each position and gave [34]: its limit is lower"):
        filled(server, tmp_path / "a")
    server.limit, server.faults = 20, [(400, b"prompt_logprobs is limited to 20", {})]
    with pytest.raises(ValueError, match="answered 400: prompt_logprobs is limited to 20"):
        filled(server, tmp_path / "a")
    server.faults = [(401, b"no key", {})]
    with pytest.raises(PermissionError, match="answered 401: no key"):
        filled(server, tmp_path / "a")
    server.faults = [(302, b"", {"Location": "http://127.0.0.1:9/"})]
    with pytest.raises(ValueError, match="answered 302"):
        filled(server, tmp_path / "a")
    short = {"choices": [{"prompt_logprobs": [None, {"1": {"logprob": -0.1}}]}]}
    server.faults = [(200, json.dumps(short).encode(), {})]
    with pytest.raises(ValueError, match="was sent 5 tokens and answered for 2: the answer is cut"):
        filled(server, tmp_path / "a")
    for body, message in (
        ({"choices": [{"prompt_logprobs": []}]}, "was sent 5 tokens and answered for 0: the answer is cut"),
        ({"choices": []}, "gives no log-probabilities of its prompt"),
    ):
        server.faults = [(200, json.dumps(body).encode(), {})] * 2
        with pytest.raises(ValueError, match=message):
            filled(server, tmp_path / "a")
    server.faults, server.cut = [], 40
    with pytest.raises(OSError, match="gave an answer that is cut or not JSON"):
        filled(server, tmp_path / "a")


@pytest.mark.parametrize("style", ["prompt_logprobs", "echo"])
def test_a_limit_just_below_top_is_seen_though_the_texts_own_token_fills_the_lists(server, style):
    server.style, server.limit = style, 5
    by_rank = server.model(torch.tensor([[65]])).logits[0, 0].argsort(descending=True).tolist()
    texts = {rank: documents_of_row({"input_ids": [65, by_rank[rank]]}) for rank in (3, 4, 5, 6, 200)}
    for text in texts.values():
        with pytest.raises(ValueError, match=r"asked for 6 tokens at each position and gave 5.*Set `top=5`"):
            list(teacher(server).document_rows(text))
    server.limit = 20
    for rank, more in ((5, 1), (4, 0), (6, 0)):  # a sixth token leaves open what the limit is: it is looked at
        asked, before = teacher(server), len(server.requests)
        list(asked.document_rows(texts[rank]))
        used = len(server.requests) - before
        assert used == 1 + more + (style == "echo")
        list(asked.document_rows(texts[5]))
        assert len(server.requests) == before + used + 1


def test_the_refusals_of_vllm_say_what_to_do(server, tmp_path):
    with pytest.raises(ValueError, match=r"has no model 'bigger'\. It has: 'big', 'tiny'\."):
        ServerTeacher(server.url, "bigger", TOKENIZER)
    server.max_logprobs = 5
    for style in ("prompt_logprobs", "echo"):
        asked = teacher(server)
        asked._style = style
        with pytest.raises(ValueError, match=r"max allowed: 5 .*value=6\) Lower `top`, or raise .*`--max-logprobs`"):
            list(asked.document_rows(documents_of_row(ROWS[0])))
    server.models["big"] = {"max_model_len": 4}
    asked, before = teacher(server, top=5), len(server.requests)
    list(asked.document_rows(documents_of_row({"input_ids": [65, 66, 67]})))
    sent = len(server.requests)
    with pytest.raises(ValueError, match=r"A text has 4 tokens.*at most 3: .*`max_length`.*`--max-model-len`"):
        list(asked.document_rows(documents_of_row({"input_ids": [65, 66, 67, 68]})))
    assert len(server.requests) == sent > before
    server.models["big"] = {"max_model_len": 512}
    dead = {"error": {"message": "EngineCore encountered an issue.", "type": "InternalServerError", "code": 500}}
    server.faults = [(500, json.dumps(dead).encode(), {})] * 3
    with pytest.raises(OSError, match=r"answered 500 \(EngineCore encountered an issue\.\)\. No answer after 3"):
        filled(server, tmp_path / "a", top=5)


def test_servers_without_a_list_of_models_are_asked_all_the_same(server, tmp_path):
    server.models = None
    assert len(filled(server, tmp_path / "a")) == 3
    server.models = {"big": {}}
    assert len(filled(server, tmp_path / "b")) == 3


def test_numbers_that_are_not_log_probabilities_are_refused(server, tmp_path):
    listed = [None, *({str(one): {"logprob": -0.5 * one, "rank": one} for one in range(1, 7)} for _ in range(4))]
    server.faults = [(200, json.dumps({"choices": [{"prompt_logprobs": listed}]}).encode(), {})]
    with pytest.raises(ValueError, match=r"probabilities sum to 1\.46\d+ at one position.*`--logprobs-mode"):
        filled(server, tmp_path / "a")


def test_another_tokenizer_is_refused(server, tmp_path):
    server.tokenizer = byte_level()
    with pytest.raises(ValueError, match=r"splits a text into \d+ tokens.*has another tokenizer"):
        teacher(server)
    server.tokenizer = None
    with pytest.raises(ValueError, match=r"shows neither `/tokenize` nor the text of tokens"):
        filled(server, tmp_path / "a")
    server.shown = lambda token: {"decoded_token": "word"}
    with pytest.raises(ValueError, match=r"Token \d+ is 'word' for the server .* has another tokenizer"):
        filled(server, tmp_path / "a")
    server.shown = lambda token: {"decoded_token": TOKENIZER.decode([token])}
    assert len(filled(server, tmp_path / "a")) == 3
    server.shown = lambda token: {}
    assert len(filled(server, tmp_path / "b", check_tokenizer=False)) == 3


def test_the_key_is_sent_and_bad_settings_are_refused(server):
    asked = teacher(server, api_key="secret")
    assert server.requests[-1][2]["Authorization"] == "Bearer secret"
    assert "secret" not in json.dumps(asked.fingerprint())
    for options, message in (
        ({"top": 0}, "`top` and `parallel` have to be >= 1"),
        ({"top": 999}, "`top` is 999, but the tokenizer has 258 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            teacher(server, **options)
    with pytest.raises(ValueError, match="starts with http"):
        ServerTeacher("localhost:8000", "big", TOKENIZER)
