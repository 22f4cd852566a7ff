"""Faults of the Hub while a result is pushed over an older one, and while one is pulled.

`python benchmarks/hub_faults.py`

The real client talks to the loopback Hub of the tests, which fails at every place in turn: the connection drops after
some bytes, or a request is answered with 429, 500 or 401, or slowly, once or from then on; the server
dies in the middle of a request and comes back; other people commit in between; 16 pushes arrive at once. After each
fault the repository must hold the old result or the new one, and nothing else. A pull, which also meets stale ETags (a
proxy that describes a file as it was before), must give the files that the record states, or an error.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "tests")]

from hub_server import HubServer, _Handler  # noqa: E402

#: The requests of a push and a pull, by a part of their URL.
PLACES = ("whoami", "auth-check", "api/models", "preupload", "objects/batch", "lfs/", "commit/", "resolve")


class Faults:
    """Answers of the server replaced by faults, from the n-th request on whose address holds `place`."""

    def __init__(self, kind: str, place: str, times: int) -> None:
        self.kind, self.place, self.left, self.seen = kind, place, times, 0

    def __call__(self, handler: Any) -> bool:
        """True if the request was answered with the fault."""
        if self.place not in handler.path or self.left <= 0:
            return False
        self.left -= 1
        self.seen += 1
        if self.kind == "slow":
            time.sleep(0.3)
            return False
        if self.kind.startswith("stale"):
            handler.stale = self.kind
            return False
        handler._read_body()
        if self.kind.startswith("drop"):
            if handler.command != "HEAD":
                handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + b"x" * int(self.kind[5:]))
            handler.wfile.flush()
            handler.close_connection = True
            handler.connection.close()
            return True
        if self.kind == "killed":
            server = handler.hub
            threading.Thread(target=server.close).start()
            threading.Timer(0.3, server.start, [server.port]).start()
            handler.close_connection = True
            return True
        status = int(self.kind)
        headers = {"Retry-After": "1"} if status == 429 else {}
        handler._json({"error": "a fault"}, status, headers)
        return True


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "hub_faults.md")
    out = parser.parse_args(argv).out
    server = HubServer()
    os.environ.update(
        HF_ENDPOINT=server.endpoint, HF_HOME=tempfile.mkdtemp(prefix="hub-faults-"), HF_HUB_DISABLE_XET="1",
        HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_PROGRESS_BARS="1", NO_PROXY="127.0.0.1",
    )  # fmt: skip
    rows, pulls = measured(server), pulled(server)
    out.write_text(report(rows) + report_of_pulls(pulls), encoding="utf-8")
    print(out.read_text())
    if any(row["half"] for row in rows) or any(row["wrong"] for row in pulls):
        sys.exit("A repository was half published, or a pull gave other files without an error.")


def measured(server: HubServer) -> list[dict[str, Any]]:
    """One row per kind of fault: runs, how they ended, and how many repositories were neither old nor new."""
    from huggingface_hub.utils import _http
    from tiny import byte_tokenizer, tiny_llama

    from hf_transfer_ext.hub import access
    from hf_transfer_ext.hub.publish import push, save_result
    from hf_transfer_ext.hub.record import RunRecord

    access.WAITS = (0.05, 0.1, 0.4, 0.4)
    # The client waits up to a minute between its attempts; here it makes as many, without the waiting.
    _http.time = SimpleNamespace(sleep=lambda seconds: time.sleep(min(seconds, 0.02)), time=time.time)  # type: ignore
    with tempfile.TemporaryDirectory() as made:
        folders = [
            save_result(
                Path(made) / str(n), model=tiny_llama(n), tokenizer=byte_tokenizer(),
                record=RunRecord("distillation", "r", {}, seed=n),
            )
            for n in range(17)
        ]  # fmt: skip
        states = []
        for folder in folders:
            server.clear()
            push(folder, "tester/a", token=server.token)
            states.append(dict(server.files("tester/a")))
        rows = []
        for kind in ("drop:0", "drop:50", "429", "500", "401", "killed", "slow"):
            row = {"fault": kind, "runs": 0, "struck": 0, "old": 0, "new": 0, "half": 0, "raw": 0, "seconds": 0.0}
            for place in PLACES:
                for count in (1,) if kind == "killed" else (1, 1000):  # once, and from then on
                    _one(row, server, states, Faults(kind, place, count),
                         lambda: push(folders[1], "tester/a", token=server.token))  # fmt: skip
            rows.append(row)
        rows.append(_others_commit(server, folders, states))
        rows.append(_at_once(server, folders, states))
    return rows


def pulled(server: HubServer) -> list[dict[str, Any]]:
    """One row per kind of fault while a result is pulled into an empty cache, over which an older one once lay."""
    import huggingface_hub.file_download as downloads
    from huggingface_hub import constants
    from huggingface_hub.utils import _http
    from tiny import byte_tokenizer, tiny_llama

    from hf_transfer_ext.hub.publish import pull, push, save_result
    from hf_transfer_ext.hub.record import RunRecord

    short: Any = SimpleNamespace(sleep=lambda seconds: time.sleep(min(seconds, 0.02)), time=time.time)
    before = _http.time, downloads.time, constants.HF_HUB_CACHE, _Handler._send
    _http.time, downloads.time = short, short

    def send(handler: Any, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        kind, handler.stale = getattr(handler, "stale", ""), ""
        one = old.get(handler.path.split("/resolve/")[-1].partition("/")[2])
        if kind and one is not None and headers and "ETag" in headers:
            etag = f'"{one.sha256 if one.large else one.git_oid}"'
            headers = {key: etag if "etag" in key.lower() else value for key, value in headers.items()}
            if kind == "stale file":
                data, status = one.data, 200
                headers = {key: value for key, value in headers.items() if key != "Content-Range"}
        before[3](handler, data, status, headers)

    rows = []
    old: dict[str, Any] = {}
    try:
        _Handler._send = send  # type: ignore[method-assign]
        with tempfile.TemporaryDirectory() as made:
            for n in (0, 1):
                folder = save_result(
                    Path(made) / str(n), model=tiny_llama(n), tokenizer=byte_tokenizer(),
                    record=RunRecord("distillation", "r", {}, seed=n),
                )  # fmt: skip
                server.clear()
                push(folder, "tester/a", token=server.token)
                found = server.repos[("models", "tester/a")].find("main").files
                old = old or dict(found)
            state = dict(server.files("tester/a"))
            for kind in ("drop:0", "drop:50", "429", "500", "401", "killed", "slow", "stale etag", "stale file"):
                row = {"fault": kind, "runs": 0, "struck": 0, "right": 0, "refused": 0, "wrong": 0, "raw": 0}
                row["seconds"] = 0.0  # type: ignore[assignment]
                for place in ("api/models", "model.safetensors", "config.json", "hf_transfer_ext.json"):
                    for count in (1,) if kind == "killed" else (1, 1000):
                        constants.HF_HUB_CACHE = tempfile.mkdtemp(dir=made)
                        _pull_once(row, state, Faults(kind, place, count), lambda: pull("tester/a"))
                rows.append(row)
    finally:
        _http.time, downloads.time, constants.HF_HUB_CACHE, _Handler._send = before  # type: ignore[method-assign]
    return rows


def _under(fault: Faults, row: dict[str, Any], work: Callable[[], Any]) -> str:
    """Do the work while the fault strikes, and note it in the row; "done", "refused", or "raw" for any other error."""
    original = _Handler._answer
    _Handler._answer = lambda handler: None if fault(handler) else original(handler)  # type: ignore[method-assign]
    started = time.perf_counter()
    try:
        work()
        end = "done"
    except (OSError, ValueError):
        end = "refused"
    except Exception:  # counted: the table has a column of errors that say nothing to a user
        end = "raw"
    finally:
        _Handler._answer = original  # type: ignore[method-assign]
    row["seconds"] = max(row["seconds"], time.perf_counter() - started)
    row["runs"] += 1
    row["struck"] += fault.seen > 0
    row["raw"] += end == "raw"
    return end


def _pull_once(row: dict[str, Any], state: dict[str, bytes], fault: Faults, work: Callable[[], Path]) -> None:
    pulled: list[Path] = []
    end = _under(fault, row, lambda: pulled.append(work()))
    row["refused"] += end == "refused"
    for folder in pulled:
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        whole = {"model.safetensors", "config.json"} <= set(names)
        same = all((folder / name).read_bytes() == state[name] for name in names)
        row["right" if whole and same else "wrong"] += 1


def _one(row: dict[str, Any], server: HubServer, states: list[Any], fault: Faults, work: Callable[[], Any]) -> None:
    server.clear()
    server.seed("tester/a", states[0])
    _under(fault, row, work)
    _judge(row, server, states, "tester/a")


def _judge(row: dict[str, Any], server: HubServer, states: list[Any], repo: str) -> None:
    files = dict(server.files(repo))
    files.pop(".gitattributes", None)
    found = [n for n, state in enumerate(states) if files == {k: v for k, v in state.items() if k != ".gitattributes"}]
    row["old" if found == [0] else "new" if found else "half"] += 1


def _others_commit(server: HubServer, folders: list[Path], states: list[Any]) -> dict[str, Any]:
    """Someone commits between our check of the repository and our commit, so that the check is stale."""
    from hf_transfer_ext.hub.publish import push

    row = {"fault": "stale parent", "runs": 0, "struck": 0, "old": 0, "new": 0, "half": 0, "raw": 0, "seconds": 0.0}
    for count in (1, 3):
        fault = Faults("stale", "preupload", count)

        def commits(handler: Any, fault: Faults = fault) -> bool:
            if fault.place in handler.path and fault.left > 0:
                fault.left -= 1
                fault.seen += 1
                server.seed("tester/a", states[2 + fault.left])
            return False

        fault.__class__ = type("Stale", (Faults,), {"__call__": lambda self, handler: commits(handler)})
        _one(row, server, states, fault, lambda: push(folders[1], "tester/a", token=server.token))
    return row


def _at_once(server: HubServer, folders: list[Path], states: list[Any]) -> dict[str, Any]:
    """16 pushes to one repository: each is a separate commit, and each commit is one complete result."""
    from hf_transfer_ext.hub.publish import push

    row = {"fault": "16 at once", "runs": 16, "struck": 16, "old": 0, "new": 0, "half": 0, "raw": 0, "seconds": 0.0}
    server.clear()
    server.seed("tester/a", states[0])
    started = time.perf_counter()

    def one(folder: Path) -> None:
        try:
            push(folder, "tester/a", token=server.token)
        except (OSError, ValueError):
            pass
        except Exception:
            row["raw"] += 1

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, folders[1:]))
    row["seconds"] = time.perf_counter() - started
    for commit in server.commits("tester/a")[:-2]:
        files = {path: blob.data for path, blob in commit.files.items() if path != ".gitattributes"}
        whole = any(files == {k: v for k, v in state.items() if k != ".gitattributes"} for state in states)
        row["new" if whole else "half"] += 1
    return row


def report(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "# Faults of the Hub\n",
        "`python benchmarks/hub_faults.py`: a result is pushed over an older one with the real client, and the "
        "loopback Hub of the tests fails at each kind of request in turn, once or from then on "
        "(the waits of the client between its attempts are cut to 20 ms, those of the push to 0.05 to 0.4 s; "
        "*killed*: the server dies in the middle of the request and is back after 0.3 s). "
        "*struck*: runs that met the fault; "
        "*old*, *new*: what the repository held afterwards; *half published*: neither; *raw errors*: other than "
        "OSError and ValueError.\n",
        "| fault | runs | struck | old | new | half published | raw errors | longest run, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        cells = [r["fault"], r["runs"], r["struck"], r["old"], r["new"], r["half"], r["raw"], f"{r['seconds']:.1f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def report_of_pulls(rows: list[dict[str, Any]]) -> str:
    """The rows of `pulled` as a Markdown table."""
    lines = [
        "\n## Pulls\n",
        "A result is pulled into an empty cache. *stale etag*: a file is described by the ETag that it had in an "
        "older result; *stale file*: it also has the content of that one. *right*: the files that the record states; "
        "*refused*: an OSError or a ValueError that says so; *wrong*: other files without an error.\n",
        "| fault | runs | struck | right | refused | wrong | raw errors | longest run, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        cells = [r[key] for key in ("fault", "runs", "struck", "right", "refused", "wrong", "raw")]
        lines.append("| " + " | ".join(map(str, [*cells, f"{r['seconds']:.1f}"])) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
