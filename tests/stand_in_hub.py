"""A hub of models on loopback, which speaks as much of the real one's HTTP as is needed to describe a model."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ZEROS = bytes(1 << 16)
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "vocab_size": 320,
    "num_attention_heads": 2,
    "intermediate_size": 128,
}
TENSORS = {"model.embed_tokens.weight": [320, 64], "lm_head.weight": [320, 64]} | {
    f"model.layers.{layer}.mlp.up_proj.weight": [128, 64] for layer in range(2)
}
NUMBERS = 2 * 320 * 64 + 2 * 128 * 64
"""How many numbers these tensors have."""
INDEX = "model.safetensors.index.json"


class File(NamedTuple):
    """A file that begins with ``start``; what is left of ``size`` is zeros."""

    start: bytes
    size: int


def weights(tensors: dict[str, list[int]], *, padding: int = 0, size: int = 200 << 20) -> File:
    """A safetensors file, large; ``padding`` bytes more in its header."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "note": " " * padding}}
    for name, shape in tensors.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]}
    text = json.dumps(header).encode()
    return File(len(text).to_bytes(8, "little") + text, size)


def plain(data: object) -> File:
    """A file of JSON, or of the bytes that are given."""
    text = data if isinstance(data, bytes) else json.dumps(data).encode()
    return File(text, len(text))


@dataclass
class Repo:
    """A model. ``token`` is the one that opens it, ``gated`` tells that its description is open all the same."""

    files: dict[str, File]
    commit: str = COMMIT
    token: str = ""
    gated: bool = False
    revisions: tuple[str, ...] = ("main",)
    info: object = None


class Asked(NamedTuple):
    """A request: what was asked for, with which range and which token."""

    path: str
    range: str
    token: str
    agent: str


@dataclass
class StandInHub:
    """``status`` is answered to everything; ``silent`` holds answers back until it is cleared."""

    repos: dict[str, Repo] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    served: int = 0
    status: int = 0
    ranges: bool = True
    elsewhere: str = ""
    speaks: threading.Event = field(default_factory=threading.Event)
    reached: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def paths(self) -> list[str]:
        return [asked.path for asked in self.asked]

    def forget(self) -> None:
        self.asked.clear()
        self.served = 0

    def add(self, name: str, **more: Any) -> Repo:
        """A model with the config, in one file of weights."""
        files = {"config.json": plain(CONFIG), "model.safetensors": weights(TENSORS), "README.md": plain(b"# It")}
        self.repos[name] = Repo(**({"files": files} | more))
        return self.repos[name]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: StandInHub

    def do_GET(self) -> None:
        hub = self.hub
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        path = unquote(self.path)
        hub.asked.append(Asked(path, self.headers.get("Range") or "", token, self.headers.get("User-Agent") or ""))
        hub.reached.set()
        hub.speaks.wait()
        with contextlib.suppress(OSError):
            if hub.status:
                self._error(hub.status, "")
            elif found := re.fullmatch(r"/api/models/(.+)/revision/(.+)", path):
                self._info(found[1], found[2], token)
            elif found := re.fullmatch(r"/(.+)/resolve/([^/]+)/(.+)", path):
                self._file(found[1], found[2], found[3], token)
            else:
                self._error(404, "")

    def _repo(self, name: str, revision: str, token: str, *, of_file: bool) -> Repo | None:
        repo = self.hub.repos.get(name)
        if token == "wrong":
            self._error(401, "")
        elif repo is None or (repo.token and not repo.gated and token != repo.token):
            self._error(404 if token else 401, "RepoNotFound")
        elif revision not in (*repo.revisions, repo.commit):
            self._error(404, "RevisionNotFound")
        elif of_file and repo.gated and token != repo.token:
            self._error(403 if token else 401, "GatedRepo")
        else:
            return repo
        return None

    def _info(self, name: str, revision: str, token: str) -> None:
        if repo := self._repo(name, revision, token, of_file=False):
            siblings = [{"rfilename": file} for file in repo.files]
            info = {"id": name, "sha": repo.commit, "gated": repo.gated, "siblings": siblings}
            self._send(plain(info if repo.info is None else repo.info))

    def _file(self, name: str, revision: str, file: str, token: str) -> None:
        if (repo := self._repo(name, revision, token, of_file=True)) is None:
            return
        if file not in repo.files:
            self._error(404, "EntryNotFound")
        elif self.hub.elsewhere and file.endswith(".safetensors"):
            self.send_response(302)
            self.send_header("Location", self.hub.elsewhere + self.path)
            self.send_header("X-Repo-Commit", repo.commit)
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._send(repo.files[file])

    def _send(self, file: File) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "") if self.hub.ranges else None
        start, end = (int(asked[1]), min(int(asked[2]) + 1, file.size)) if asked else (0, file.size)
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{file.size}")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        begun = file.start[start:end]
        self._write(begun)
        left = end - start - len(begun)
        while left > 0:
            self._write(ZEROS[:left])
            left -= len(ZEROS)

    def _write(self, data: bytes) -> None:
        self.wfile.write(data)
        self.hub.served += len(data)

    def _error(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        text = b'{"error": "no"}'
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Who asked has gone."""


@contextlib.contextmanager
def stand_in_hub() -> Iterator[StandInHub]:
    """A hub on a port of its own, for one test."""
    hub = StandInHub()
    hub.speaks.set()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.speaks.set()
        server.shutdown()
        server.server_close()
        thread.join()
