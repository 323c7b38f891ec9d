"""A Hub on this machine: as much of its HTTP interface as fetching and committing one file takes.

What huggingface_hub sends is answered over real HTTP and kept, so that no call of its client has to be replaced.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

GATED = "someone/gated"


def commit_of(files: dict[str, bytes]) -> str:
    """A commit's hash: other files, another commit."""
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class FakeHub(ThreadingHTTPServer):
    """Repositories by name, files by branch; `commits`: what was committed; `tokens`: what came with each request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.commits: list[dict[str, Any]] = []
        self.tokens: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def replace_the_real_one(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        """Send huggingface_hub here, with an empty cache in a folder and no token."""
        from huggingface_hub import constants

        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.lower(), raising=False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub_cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))


class _Answer(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, data: Any) -> None:
        self._send(200, json.dumps(data).encode(), Content_Type="application/json")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        """A file, at `/OWNER/NAME/resolve/REVISION/FILE`; what else can be asked for is refused to whoever has no token."""
        self.server.tokens.append(self.headers.get("authorization"))
        parts = unquote(urlsplit(self.path).path).lstrip("/").split("/", 4)
        if parts[0] == "api":
            return self._send(401, X_Error_Message="Invalid username or password.")
        repository, revision, file = "/".join(parts[:2]), parts[3], parts[4]
        if repository == GATED:
            return self._send(403, X_Error_Code="GatedRepo", X_Error_Message="Access to this model is restricted.")
        branches = self.server.repositories.get(repository)
        if branches is None:
            return self._send(404, X_Error_Code="RepoNotFound")
        files = {**branches, **{commit_of(files): files for files in branches.values()}}.get(revision)
        if files is None:
            return self._send(404, X_Error_Code="RevisionNotFound")
        body = files.get(file)
        if body is None:
            return self._send(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit_of(files))
        return self._send(200, body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=commit_of(files))

    def do_POST(self) -> None:
        """Make a repository; say how to upload; commit."""
        self.server.tokens.append(self.headers.get("authorization"))
        body = self._body()
        address = urlsplit(self.path)
        parts = unquote(address.path).strip("/").split("/")
        if self.headers.get("authorization") is None:
            return self._send(401, X_Error_Message="Invalid username or password.")
        if parts[1:] == ["repos", "create"]:
            given = json.loads(body)
            repository = f"{given['organization'] or 'me'}/{given['name']}"
            there = repository in self.server.repositories
            self.server.repositories.setdefault(repository, {"main": {}})
            self.server.private.setdefault(repository, given.get("visibility") == "private")
            if there:
                return self._send(409, json.dumps({"url": f"{self.server.url}/{repository}"}).encode())
            return self._json({"url": f"{self.server.url}/{repository}"})
        repository, what, revision = "/".join(parts[2:4]), parts[4], parts[5]
        if what == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]
            ]
            return self._json({"files": files})
        lines = [json.loads(line) for line in body.decode().splitlines()]
        files = {}
        for line in lines[1:]:
            assert line["key"] == "file", line
            files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        asked = parse_qs(address.query).get("create_pr") == ["1"]
        oid = commit_of(files)
        self.server.commits.append(
            {"repo": repository, "revision": revision, "pr": asked, "summary": lines[0]["value"]["summary"], "files": files}
        )
        if not asked:
            branch = self.server.repositories[repository].setdefault(revision, {})
            branch.update(files)
            oid = commit_of(branch)
        answer = {"commitUrl": f"{self.server.url}/{repository}/commit/{oid}", "commitOid": oid}
        if asked:
            answer["pullRequestUrl"] = f"{self.server.url}/{repository}/discussions/1"
        return self._json(answer)

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        out = b""
        while size := int(self.rfile.readline(), 16):
            out += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return out


@contextmanager
def serve() -> Iterator[FakeHub]:
    """A fake Hub that answers while this is open."""
    with FakeHub() as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
