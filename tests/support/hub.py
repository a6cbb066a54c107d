"""A local stand-in for the hub's API: enough of it for uploads and downloads by huggingface_hub, held in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlparse

REFUSED = {"gated": (403, "GatedRepo"), "missing": (404, "RepoNotFound"), "forbidden": (403, "")}


@dataclass
class Hub:
    """Repositories: commits[repository][revision] are files by name. refused: repositories by a key of REFUSED."""

    commits: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    created: list[dict] = field(default_factory=list)
    validated: list[str] = field(default_factory=list)

    def files(self, repository: str, revision: str = "main") -> dict[str, bytes]:
        return self.commits[repository][revision]

    def sha(self, repository: str, revision: str) -> str | None:
        """The commit of a branch, tag or commit; None if there is none."""
        known = {name: _sha(files) for name, files in self.commits[repository].items()}
        return known.get(revision, revision if revision in known.values() else None)

    def at(self, repository: str, sha: str) -> dict[str, bytes]:
        return next(files for files in self.commits[repository].values() if _sha(files) == sha)


@contextmanager
def standing_in(monkeypatch, cache) -> Iterator[Hub]:
    """huggingface_hub talks to a stand-in, online, and caches files in the folder `cache`."""
    from huggingface_hub import constants

    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.home = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", handler.home)
    template = f"{handler.home}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _sha(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    home: str  # the address

    def log_message(self, *args) -> None: ...

    def _send(self, body, status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        headers = {"content-type": "application/json", "content-length": str(len(data))} | headers
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _refuse(self, status: int, code: str) -> None:
        self._send({"error": code or "no"}, status, **({"x_error_code": code} if code else {}))

    def _allowed(self, repository: str) -> bool:
        if repository in self.hub.refused:
            self._refuse(*REFUSED[self.hub.refused[repository]])
            return False
        if repository not in self.hub.commits:
            self._refuse(*REFUSED["missing"])
            return False
        return True

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        if found := re.fullmatch(r"/api/models/(\w[\w.-]*/\w[\w.-]*)/(revision|tree)/([^/]+)/?", path):
            repository, what, revision = found.groups()
            if not self._allowed(repository):
                return
            sha = self.hub.sha(repository, revision)
            if sha is None:
                self._refuse(404, "RevisionNotFound")
            elif what == "revision":
                self._send({"id": repository, "sha": sha, "siblings": [], "tags": [], "private": False})
            else:
                files = self.hub.at(repository, sha).items()
                rows = [{"type": "file", "path": name, "size": len(data), "oid": _oid(data)} for name, data in files]
                self._send(rows)
        elif found := re.fullmatch(r"/(\w[\w.-]*/\w[\w.-]*)/resolve/([^/]+)/(.+)", path):
            repository, sha, name = found.groups()
            if self._allowed(repository):
                data = self.hub.at(repository, sha).get(name)
                if data is None:
                    self._refuse(404, "EntryNotFound")
                else:
                    self._send(data, content_type="application/octet-stream", etag=f'"{_oid(data)}"', x_repo_commit=sha)
        else:
            self._refuse(404, "EntryNotFound")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        path = unquote(urlparse(self.path).path)
        if path == "/api/repos/create":
            asked = json.loads(body)
            repository = f"{asked['organization']}/{asked['name']}"
            if repository in self.hub.refused:
                return self._refuse(*REFUSED[self.hub.refused[repository]])
            self.hub.created.append(asked)
            self.hub.commits.setdefault(repository, {"main": {}})
            self._send({"url": f"{self.home}/{repository}", "name": repository})
        elif path == "/api/validate-yaml":
            self.hub.validated.append(json.loads(body)["content"])
            self._send({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/(?:models|spaces)/(\w[\w.-]*/\w[\w.-]*)/(preupload|commit)/([^/]+)", path):
            repository, what, revision = found.groups()
            if not self._allowed(repository):
                return None
            if revision not in self.hub.commits[repository]:
                return self._refuse(404, "RevisionNotFound")
            self._preupload(body) if what == "preupload" else self._commit(repository, revision, body)
        else:
            self._refuse(404, "EntryNotFound")

    def _preupload(self, body: bytes) -> None:
        rows = [
            {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in json.loads(body)["files"]
        ]
        self._send({"files": rows})

    def _commit(self, repository: str, revision: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        files = {one["value"]["path"]: one["value"]["content"] for one in lines if one["key"] == "file"}
        held = self.hub.commits[repository]
        held[revision] = held[revision] | {name: base64.b64decode(data) for name, data in files.items()}
        sha = _sha(held[revision])
        self._send({"success": True, "commitOid": sha, "commitUrl": f"{self.home}/{repository}/commit/{sha}"})


def _oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
