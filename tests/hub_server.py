"""A Hub on the loopback device, of the standard library: what `huggingface_hub` needs to push, list and download.

Repositories live in memory. Models and data sets, regular and large (LFS) files, commits, branches, tags, pull-request
refs, private repositories and tokens behave as on the Hub; Xet storage, discussions and Spaces are not served.
`HF_ENDPOINT` and `HF_HUB_DISABLE_XET=1` have to be set before `huggingface_hub` is imported: `conftest.py` does that.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

#: Files that the Hub's default .gitattributes keeps in large-file storage; other files go there above 10 MB.
LARGE_SUFFIXES = (".safetensors", ".bin", ".parquet", ".arrow", ".gguf", ".pt", ".pth", ".zip", ".gz", ".model")
RELATIONS = ("adapter", "finetune", "merge", "quantized")


@dataclass(frozen=True)
class Blob:
    data: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def git_oid(self) -> str:
        """What git calls the file: the sha1 of its content, or of its pointer for a large file."""
        content = self.pointer if self.large else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def pointer(self) -> bytes:
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        return text.encode()

    @property
    def lfs(self) -> dict[str, Any]:
        return {"oid": self.sha256, "sha256": self.sha256, "size": len(self.data), "pointerSize": len(self.pointer)}


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    message: str
    date: str
    author: str
    files: dict[str, Blob]


@dataclass
class Repo:
    kind: str  # "models" or "datasets"
    repo_id: str
    private: bool = False
    gated: bool | str = False  # a gated repository is listed to all and handed out to its owner alone
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: dict[str, str] = field(default_factory=dict)  # "refs/pr/1" -> commit

    def find(self, revision: str) -> Commit:
        for refs in (self.branches, self.tags, self.pull_requests):
            if revision in refs:
                return self.commits[refs[revision]]
        name = revision.removeprefix("refs/heads/")
        if name in self.branches:
            return self.commits[self.branches[name]]
        if revision in self.commits:
            return self.commits[revision]
        raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def add_commit(self, parent: Commit | None, files: dict[str, Blob], title: str, message: str, author: str) -> str:
        date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        tree = sorted((path, blob.git_oid) for path, blob in files.items())
        seed = json.dumps([parent.oid if parent else None, len(self.commits), tree, title, message])
        oid = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent.oid if parent else None, title, message, date, author, files)
        return oid


class Refusal(Exception):
    """An answer that is no success: status, X-Error-Code (which decides the client's exception) and message."""

    def __init__(self, status: int, code: str | None, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers


class HubServer:
    """The server and its repositories; `endpoint`, `token` and `files()` are what tests use.

    `token` may write everywhere under `user`; `reader_token` belongs to another account that may write nowhere here.
    """

    def __init__(self) -> None:
        self.user = "tester"
        self.token = "hf_" + "t" * 34
        self.reader_token = "hf_" + "r" * 34
        self.accounts = {self.token: self.user, self.reader_token: "reader"}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._handler = handler
        self.start(0)
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def start(self, port: int) -> None:
        """Serve on a port, 0 for a free one; after `close`, what was there before is served again."""
        self._http = _Server(("127.0.0.1", port), self._handler)
        self.port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        """Stop as a killed server does: every connection drops, whatever was on its way."""
        self._http.shutdown()
        self._http.server_close()
        self._http.drop_connections()

    def clear(self) -> None:
        """Forget all repositories; caches of the client keep what they have."""
        with self.lock:
            self.repos.clear()
            self.large.clear()
            self.requests.clear()

    def files(self, repo_id: str, revision: str = "main", *, repo_type: str = "model") -> dict[str, bytes]:
        """Path -> content of all files of a repository at a revision."""
        with self.lock:
            commit = self.repos[(f"{repo_type}s", repo_id)].find(revision)
            return {path: blob.data for path, blob in commit.files.items()}

    def commits(self, repo_id: str, revision: str = "main", *, repo_type: str = "model") -> list[Commit]:
        """Commits of a revision, newest first."""
        with self.lock:
            repo = self.repos[(f"{repo_type}s", repo_id)]
            return _line(repo, repo.find(revision))

    def seed(
        self,
        repo_id: str,
        source: str | Path | dict[str, bytes | str],
        *,
        repo_type: str = "model",
        private: bool = False,
        revision: str = "main",
    ) -> str:
        """Put a folder (or path -> content) into a repository without the client; returns the commit's hash."""
        if isinstance(source, dict):
            contents = {path: data.encode() if isinstance(data, str) else data for path, data in source.items()}
        else:
            root = Path(source)
            contents = {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
        files = {path: Blob(data, is_large(path, len(data))) for path, data in contents.items()}
        with self.lock:
            repo = self.repos.get((f"{repo_type}s", repo_id)) or self.create(f"{repo_type}s", repo_id, private)
            parent = repo.find(revision if revision in repo.branches else "main")
            repo.branches[revision] = repo.add_commit(parent, files, "Seed", "", self.user)
            return repo.branches[revision]

    def create(self, kind: str, repo_id: str, private: bool) -> Repo:
        repo = self.repos[(kind, repo_id)] = Repo(kind, repo_id, private)
        attributes = Blob(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", False)
        repo.branches["main"] = repo.add_commit(None, {".gitattributes": attributes}, "initial commit", "", self.user)
        return repo


def is_large(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(LARGE_SUFFIXES) or size > 10_000_000)


def _line(repo: Repo, commit: Commit | None) -> list[Commit]:
    found = []
    while commit is not None:
        found.append(commit)
        commit = repo.commits.get(commit.parent or "")
    return found


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, *args: Any) -> None:
        self.connections: set[socket.socket] = set()
        super().__init__(*args)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a dropped connection

    def drop_connections(self) -> None:
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # one packet for head and body: two cost 40 ms each time

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _answer(self) -> None:
        body = self._read_body()
        address = urlsplit(self.path)
        self.query = parse_qs(address.query)
        parts = [unquote(part) for part in address.path.strip("/").split("/")]
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {self.path}")
        try:
            self._route(parts, body)
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message.encode("ascii", "replace").decode(), **refusal.headers}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self._json({"error": refusal.message}, refusal.status, headers)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # Who asks, and for which repository

    def _account(self, *, write: bool = False, namespace: str | None = None) -> str | None:
        given = self.headers.get("Authorization", "")
        token = given.removeprefix("Bearer ").strip()
        if token and token not in self.hub.accounts:
            raise Refusal(401, None, "Invalid credentials in Authorization header")
        account = self.hub.accounts.get(token)
        if write and account is None:
            raise Refusal(401, None, "Invalid username or password.")
        if write and namespace not in (None, account):
            raise Refusal(403, None, f"You don't have the rights to write in the namespace {namespace!r}")
        return account

    def _repo(self, kind: str, parts: list[str], *, write: bool = False) -> tuple[Repo, list[str]]:
        """The repository that a path names ("user/name" or an old "name"), and the rest of the path."""
        for length in (2, 1):
            repo = self.hub.repos.get((kind, "/".join(parts[:length])))
            if repo is not None and len(parts) >= length:
                namespace = repo.repo_id.split("/")[0] if "/" in repo.repo_id else self.hub.user
                account = self._account()
                if repo.private and account != namespace:
                    raise Refusal(404 if account else 401, "RepoNotFound", "Repository not found")
                if write:
                    self._account(write=True, namespace=namespace)
                return repo, parts[length:]
        self._account()
        raise Refusal(404, "RepoNotFound", "Repository not found")

    # Where a path leads

    def _route(self, parts: list[str], body: bytes) -> None:
        with self.hub.lock:
            if parts[0] == "api":
                self._api(parts[1:], body)
            elif parts[0] == "lfs":
                self._large_file(parts[1:], body)
            elif "info" in parts and parts[-2:] == ["objects", "batch"]:
                self._large_batch(parts, body)
            else:
                self._resolve(parts)

    def _api(self, parts: list[str], body: bytes) -> None:
        if parts == ["whoami-v2"]:
            account = self._account(write=True)
            self._json({"type": "user", "name": account, "orgs": [], "auth": {"type": "access_token"}})
        elif parts == ["repos", "create"] and self.command == "POST":
            self._create(json.loads(body))
        elif parts == ["repos", "delete"] and self.command == "DELETE":
            self._delete(json.loads(body))
        elif parts == ["validate-yaml"]:
            found = json.loads(body)
            errors, warnings = check_card(found["content"])
            answer = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
            self._json(answer, 400 if errors else 200)
        elif parts[0] in ("models", "datasets") and len(parts) == 1:
            self._list(parts[0])
        elif parts[0] in ("models", "datasets") and len(parts) > 1:
            writes = self.command in ("POST", "PUT", "DELETE") and "paths-info" not in parts
            repo, rest = self._repo(parts[0], parts[1:], write=writes)
            if rest[:1] == ["auth-check"]:
                self._auth_check(repo, write=rest[1:] == ["write"])
            elif not rest or rest[0] == "revision":
                self._json(self._info(repo, repo.find(rest[1] if rest else "main")))
            else:
                actions: dict[str, Callable[[Repo, list[str], bytes], None]] = {
                    "tree": self._tree,
                    "paths-info": self._paths_info,
                    "refs": self._refs,
                    "commits": self._commits,
                    "branch": self._branch,
                    "tag": self._tag,
                    "settings": self._settings,
                    "preupload": self._preupload,
                    "commit": self._commit,
                }
                if rest[0] not in actions:
                    raise Refusal(404, None, f"Not served here: {self.path}")
                actions[rest[0]](repo, rest[1:], body)
        else:
            raise Refusal(404, None, f"Not served here: {self.path}")

    # Repositories

    def _create(self, wanted: dict[str, Any]) -> None:
        account = self._account(write=True)
        namespace = wanted.get("organization") or account
        self._account(write=True, namespace=namespace)
        kind = f"{wanted.get('type') or 'model'}s"
        repo_id = f"{namespace}/{wanted['name']}"
        url = f"{self.hub.endpoint}/{'datasets/' if kind == 'datasets' else ''}{repo_id}"
        if (kind, repo_id) in self.hub.repos:
            self._json({"error": "You already created this model repo", "url": url}, 409)
            return
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.hub.create(kind, repo_id, private)
        self._json({"url": url, "name": repo_id})

    def _auth_check(self, repo: Repo, *, write: bool) -> None:
        if write:
            self._account(write=True, namespace=repo.repo_id.split("/")[0])
        if repo.gated and self._account() != repo.repo_id.split("/")[0]:
            raise Refusal(403, "GatedRepo", f"Access to model {repo.repo_id} is restricted. Ask for access.")
        self._json({})

    def _delete(self, wanted: dict[str, Any]) -> None:
        account = self._account(write=True)
        namespace = wanted.get("organization") or account
        self._account(write=True, namespace=namespace)
        key = (f"{wanted.get('type') or 'model'}s", f"{namespace}/{wanted['name']}")
        if self.hub.repos.pop(key, None) is None:
            raise Refusal(404, "RepoNotFound", "Repository not found")
        self._json({})

    def _list(self, kind: str) -> None:
        account, wanted = self._account(), self.query
        found = []
        for (own_kind, repo_id), repo in sorted(self.hub.repos.items()):
            if own_kind != kind or (repo.private and account != repo_id.split("/")[0]):
                continue
            info = self._info(repo, repo.find("main"))
            del info["siblings"], info["cardData"]
            if (
                set(wanted.get("filter", [])) <= set(info["tags"])
                and wanted.get("search", [""])[0].lower() in repo_id.lower()
                and wanted.get("author", [info["author"]])[0] == info["author"]
            ):
                found.append(info)
        self._json(found[: int(wanted.get("limit", ["1000"])[0])])

    def _info(self, repo: Repo, commit: Commit) -> dict[str, Any]:
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(commit.files)]
        if self.query.get("blobs"):
            for sibling in siblings:
                blob = commit.files[sibling["rfilename"]]
                sibling.update(size=len(blob.data), blobId=blob.git_oid)
                if blob.large:
                    sibling["lfs"] = blob.lfs
        readme = commit.files.get("README.md")
        card = front_matter(readme.data.decode("utf-8", "replace")) if readme else None
        return {
            "_id": hashlib.sha1(repo.repo_id.encode()).hexdigest()[:24],
            "id": repo.repo_id,
            "modelId": repo.repo_id,
            "author": repo.repo_id.split("/")[0],
            "sha": commit.oid,
            "lastModified": commit.date,
            "createdAt": commit.date,
            "private": repo.private,
            "gated": repo.gated,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": tags_of(card or {}),
            "cardData": card,
            "siblings": siblings,
        }

    def _settings(self, repo: Repo, rest: list[str], body: bytes) -> None:
        wanted = json.loads(body)
        if "private" in wanted or "visibility" in wanted:
            repo.private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self._json({"private": repo.private})

    # Reading

    def _tree(self, repo: Repo, rest: list[str], body: bytes) -> None:
        commit = repo.find(rest[0])
        folder = "/".join(rest[1:]).strip("/")
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        prefix = f"{folder}/" if folder else ""
        inside = [path for path in sorted(commit.files) if path.startswith(prefix)]
        if folder and not inside:
            raise Refusal(404, "EntryNotFound", f"{folder} does not exist on {rest[0]!r}", **_commit_header(commit))
        folders = {path[: m.start()] for path in inside for m in re.finditer("/", path) if m.start() >= len(prefix)}
        entries = [*(("folder", path) for path in folders), *(("file", path) for path in inside)]
        shown = [
            entry for entry in sorted(entries, key=lambda e: e[1]) if recursive or "/" not in entry[1][len(prefix) :]
        ]
        self._json([self._entry(repo, commit, path) for _, path in shown])

    def _entry(self, repo: Repo, commit: Commit, path: str) -> dict[str, Any]:
        last = {"lastCommit": {"id": commit.oid, "title": commit.title, "date": commit.date}}
        blob = commit.files.get(path)
        if blob is None:
            return {"type": "directory", "path": path, "size": 0, "oid": _folder_oid(commit, path), **last}
        entry = {"type": "file", "path": path, "size": len(blob.data), "oid": blob.git_oid, **last}
        if blob.large:
            entry["lfs"] = blob.lfs
        return entry

    def _paths_info(self, repo: Repo, rest: list[str], body: bytes) -> None:
        commit = repo.find(rest[0])
        if self.headers.get("Content-Type", "").startswith("application/json"):
            wanted = json.loads(body)["paths"]
        else:
            wanted = parse_qs(body.decode())["paths"]
        paths = [path.strip("/") for path in wanted]
        found = [p for p in paths if p in commit.files or any(f.startswith(f"{p}/") for f in commit.files)]
        self._json([self._entry(repo, commit, path) for path in found])

    def _refs(self, repo: Repo, rest: list[str], body: bytes) -> None:
        def listed(refs: dict[str, str], prefix: str) -> list[dict[str, str]]:
            return [{"name": n, "ref": prefix + n, "targetCommit": oid} for n, oid in sorted(refs.items())]

        answer = {
            "branches": listed(repo.branches, "refs/heads/"),
            "tags": listed(repo.tags, "refs/tags/"),
            "converts": [],
        }
        if self.query.get("include_prs"):
            answer["pullRequests"] = listed(repo.pull_requests, "")
        self._json(answer)

    def _commits(self, repo: Repo, rest: list[str], body: bytes) -> None:
        self._json(
            [
                {
                    "id": c.oid,
                    "title": c.title,
                    "message": c.message,
                    "date": c.date,
                    "authors": [{"user": c.author}],
                }
                for c in _line(repo, repo.find(rest[0]))
            ]
        )

    def _resolve(self, parts: list[str]) -> None:
        kind = "datasets" if parts[0] == "datasets" else "models"
        repo, rest = self._repo(kind, parts[1:] if kind == "datasets" else parts)
        if self.command not in ("GET", "HEAD") or len(rest) < 3 or rest[0] not in ("resolve", "raw"):
            raise Refusal(404, None, f"Not served here: {self.path}")
        # A revision is one percent-encoded part, except for "refs/pr/1" and its like when a user pastes an address.
        length = 3 if rest[1] == "refs" and len(rest) > 4 else 1
        if repo.gated and self._account() != repo.repo_id.split("/")[0]:
            raise Refusal(403, "GatedRepo", f"Access to model {repo.repo_id} is restricted. Ask for access.")
        commit = repo.find("/".join(rest[1 : 1 + length]))
        path = "/".join(rest[1 + length :])
        blob = commit.files.get(path)
        if blob is None:
            raise Refusal(404, "EntryNotFound", "Entry not found", **_commit_header(commit))
        etag = f'"{blob.sha256 if blob.large else blob.git_oid}"'
        headers = {**_commit_header(commit), "ETag": etag, "Accept-Ranges": "bytes"}
        if blob.large:
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(len(blob.data))}
        self._send_range(blob.data, headers)

    def _send_range(self, data: bytes, headers: dict[str, str]) -> None:
        headers["Content-Type"] = "application/octet-stream"
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "").strip())
        if not wanted or not (wanted[1] or wanted[2]):
            self._send(data, 200, headers)
            return
        start = int(wanted[1]) if wanted[1] else max(len(data) - int(wanted[2]), 0)
        stop = min(int(wanted[2]) + 1, len(data)) if wanted[1] and wanted[2] else len(data)
        if start >= len(data) or stop <= start:
            self._send(b"", 416, {**headers, "Content-Range": f"bytes */{len(data)}"})
            return
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        self._send(data[start:stop], 206, headers)

    # Writing

    def _branch(self, repo: Repo, rest: list[str], body: bytes) -> None:
        name = "/".join(rest)
        if self.command == "DELETE":
            if name not in repo.branches:
                raise Refusal(404, "RevisionNotFound", "Reference does not exist")
            del repo.branches[name]
        elif name in repo.branches:
            raise Refusal(409, None, f"Reference already exists: refs/heads/{name}")
        else:
            start = json.loads(body or b"{}").get("startingPoint") or "main"
            repo.branches[name] = repo.find(start).oid
        self._json({})

    def _tag(self, repo: Repo, rest: list[str], body: bytes) -> None:
        name = "/".join(rest)
        if self.command == "DELETE":
            if repo.tags.pop(name, None) is None:
                raise Refusal(404, "RevisionNotFound", "Tag does not exist")
        else:
            tag = json.loads(body)["tag"]
            if tag in repo.tags:
                raise Refusal(409, None, f"Tag reference exists already: refs/tags/{tag}")
            repo.tags[tag] = repo.find(name).oid
        self._json({})

    def _preupload(self, repo: Repo, rest: list[str], body: bytes) -> None:
        try:
            present = repo.find(rest[0]).files
        except Refusal:
            present = {}
        answer = []
        for file in json.loads(body)["files"]:
            blob = present.get(file["path"])
            oid = None if blob is None else blob.sha256 if blob.large else blob.git_oid
            mode = "lfs" if is_large(file["path"], file["size"]) else "regular"
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answer})

    def _commit(self, repo: Repo, rest: list[str], body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        parent = repo.find(rest[0])
        if header.get("parentCommit") not in (None, parent.oid, parent.oid[:7]):
            raise Refusal(412, None, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for line in lines:
            self._apply(files, line["key"], line["value"])
        oid = repo.add_commit(parent, files, header["summary"], header.get("description", ""), self._account() or "")
        prefix = "datasets/" if repo.kind == "datasets" else ""
        answer = {
            "success": True,
            "commitOid": oid,
            "commitUrl": f"{self.hub.endpoint}/{prefix}{repo.repo_id}/commit/{oid}",
        }
        if self.query.get("create_pr"):
            number = len(repo.pull_requests) + 1
            repo.pull_requests[f"refs/pr/{number}"] = oid
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{prefix}{repo.repo_id}/discussions/{number}"
        elif rest[0] in repo.pull_requests:
            repo.pull_requests[rest[0]] = oid
        elif rest[0] in repo.branches:
            repo.branches[rest[0]] = oid
        else:
            raise Refusal(400, None, f"Commits go to a branch, and {rest[0]!r} is none")
        self._json(answer)

    def _apply(self, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
        path = value.get("path", "")
        if key != "header" and (not path or path.startswith("/") or ".." in path.split("/")):
            raise Refusal(400, None, f"Invalid path {path!r}")
        if key == "file":
            files[path] = Blob(base64.b64decode(value["content"]), False)
            if path == "README.md":
                errors, _ = check_card(files[path].data.decode("utf-8", "replace"))
                if errors:
                    raise Refusal(400, None, "Invalid metadata in README.md: " + "; ".join(errors))
        elif key == "lfsFile":
            if value["oid"] not in self.hub.large:
                raise Refusal(400, None, f"Large file {path!r} was not uploaded before the commit")
            files[path] = Blob(self.hub.large[value["oid"]], True)
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise Refusal(404, "EntryNotFound", f"{path!r} is not there to be deleted")
        elif key == "deletedFolder":
            for inside in [p for p in files if p.startswith(path.rstrip("/") + "/")]:
                del files[inside]
        elif key != "header":
            raise Refusal(400, None, f"Unknown operation {key!r}")

    # Large files

    def _large_batch(self, parts: list[str], body: bytes) -> None:
        kind = "datasets" if parts[0] == "datasets" else "models"
        names = parts[1:] if kind == "datasets" else parts
        named = [part.removesuffix(".git") for part in names[: names.index("info")]]
        self._repo(kind, named, write=True)
        objects = []
        for wanted in json.loads(body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.large:
                address = f"{self.hub.endpoint}/lfs/{wanted['oid']}"
                answer["actions"] = {"upload": {"href": address}, "verify": {"href": f"{address}/verify"}}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def _large_file(self, parts: list[str], body: bytes) -> None:
        if self.command == "PUT":
            if hashlib.sha256(body).hexdigest() != parts[0]:
                raise Refusal(400, None, "The content does not have the digest that was announced")
            self.hub.large[parts[0]] = body
        elif parts[0] not in self.hub.large or json.loads(body)["size"] != len(self.hub.large[parts[0]]):
            raise Refusal(404, None, "The large file is not there, or has another size")
        self._json({})


def _commit_header(commit: Commit) -> dict[str, str]:
    return {"X-Repo-Commit": commit.oid}


def _folder_oid(commit: Commit, folder: str) -> str:
    inside: Iterable[str] = sorted(path for path in commit.files if path.startswith(f"{folder}/"))
    return hashlib.sha1(json.dumps([(p, commit.files[p].git_oid) for p in inside]).encode()).hexdigest()


def tags_of(card: dict[str, Any]) -> list[str]:
    """The tags that a list of models is filtered by: those of the card, and its bases with their relation."""
    bases = card.get("base_model") or []
    bases = [bases] if isinstance(bases, str) else bases
    relation = card.get("base_model_relation")
    tags = [*(card.get("tags") or []), *(f"base_model:{base}" for base in bases)]
    tags += [f"base_model:{relation}:{base}" for base in bases if relation]
    return tags + ([f"license:{card['license']}"] if card.get("license") else [])


def front_matter(card: str) -> dict[str, Any] | None:
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", card, re.DOTALL)
    return yaml.safe_load(match[1]) if match else None


def check_card(card: str) -> tuple[list[str], list[str]]:
    """(errors, warnings) of a card's front matter, by the rules of the Hub that its documentation states."""
    try:
        data = front_matter(card)
    except yaml.YAMLError as error:
        return [f"bad YAML: {error}"], []
    if not data:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(data, dict):
        return ["the metadata has to be a mapping"], []
    errors = []
    repo_id = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
    for key in ("base_model", "datasets", "tags"):
        value = data.get(key, [])
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(one, str) and one for one in values):
            errors.append(f'"{key}" must be a string or an array of strings')
        elif key != "tags" and not all(repo_id.fullmatch(one) for one in values):
            errors.append(f'"{key}" must hold ids of repositories, got {values}')
    if data.get("base_model_relation", "finetune") not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of {RELATIONS}')
    for key in ("license", "library_name", "pipeline_tag"):
        if key in data and not re.fullmatch(r"[a-z0-9][a-z0-9.+_-]*", str(data[key])):
            errors.append(f'"{key}" has the invalid value {data[key]!r}')
    if data.get("license") == "other" and not (data.get("license_name") or data.get("license_link")):
        errors.append('"license: other" needs "license_name" or "license_link"')
    for number, model in enumerate(data.get("model-index") or []):
        where = f'"model-index[{number}]'
        if not isinstance(model.get("name"), str) or not model["name"]:
            errors.append(f'{where}.name" is required')
        for result in model.get("results") or []:
            for group, key in (("task", "type"), ("dataset", "type"), ("dataset", "name")):
                if not (result.get(group) or {}).get(key):
                    errors.append(f'{where}.results.{group}.{key}" is required')
            for metric in result.get("metrics") or [{}]:
                if not metric.get("type") or metric.get("value") is None:
                    errors.append(f'{where}.results.metrics" needs type and value')
    return errors, []
