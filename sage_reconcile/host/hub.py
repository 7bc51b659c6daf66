"""What a hub of models tells of those that are not on this machine: asked in the background, and remembered.

Asked for are ``config.json`` and the headers of the safetensors files, never weights; see ``hub_fetch``, which does it
in a process of its own. What it learns, or why it could not, is kept in a file for each endpoint, model and revision.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sage_reconcile.host import hub_fetch

FRESH_S = 86400.0
"""So long what a hub told of a branch counts before it is asked for again; a commit never changes."""
AGAIN_S = 600.0
"""So long after a failure it is not asked again."""
PATIENCE_S = 5.0
"""So long the first start of an engine waits for what a hub tells of its model."""
AT_ONCE = 4
DEFAULT_ENDPOINT = "https://huggingface.co"
MISSING = "huggingface_hub is not installed, so the hub was not asked: pip install 'huggingface_hub>=1'"
_TRUE = {"1", "ON", "YES", "TRUE"}
_REPO = re.compile(r"(?:[A-Za-z0-9_][\w.-]{0,95}/)?[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PASSED_ON = re.compile(
    r"HF_\w+|HUGGING_?FACE_\w+|TRANSFORMERS_OFFLINE|(?:HTTPS?|ALL|NO)_PROXY|SSL_CERT_(?:FILE|DIR)", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Sought:
    """A model on a hub, and with what environment to ask for it (it holds the token, and is shown nowhere)."""

    repo: str
    revision: str
    endpoint: str
    environ: Mapping[str, str] = field(repr=False, compare=False)

    @property
    def key(self) -> str:
        """Tells it from all others, and tells nobody what it is."""
        return hashlib.sha256(repr((self.endpoint, self.repo, self.revision)).encode()).hexdigest()[:32]

    @property
    def offline(self) -> bool:
        """Whether the environment forbids to ask: ``HF_HUB_OFFLINE`` or ``TRANSFORMERS_OFFLINE``."""
        told = self.environ.get("HF_HUB_OFFLINE") or self.environ.get("TRANSFORMERS_OFFLINE") or ""
        return told.upper() in _TRUE

    @property
    def with_token(self) -> bool:
        """Whether there is a token to show to the hub."""
        return bool(self.environ.get("HF_TOKEN") or self.environ.get("HUGGING_FACE_HUB_TOKEN"))


def sought(model: str, revision: str, environ: Mapping[str, str], overlay: Mapping[str, str]) -> Sought | None:
    """What to ask a hub for; None where the name can be none of a hub's, such as a path, or vLLM loads it elsewhere.

    The rule is ``huggingface_hub.utils.validate_repo_id``. ``overlay`` are an engine's own variables; those that are
    about the hub and the way to it count.
    """
    odd = "--" in model or ".." in model or model.endswith((".git", ".", "-")) or "./" in model or "-/" in model
    elsewhere = {**environ, **overlay}.get("VLLM_USE_MODELSCOPE", "").lower() == "true"
    if odd or elsewhere or not _REPO.fullmatch(model):
        return None
    merged = {**environ, **{name: value for name, value in overlay.items() if _PASSED_ON.fullmatch(name)}}
    endpoint = (merged.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
    return Sought(model, revision or "main", endpoint, merged)


@dataclass(frozen=True, slots=True)
class Told:
    """What a hub told of a model: the data of its ``config.json``, and name, type and shape of each tensor.

    ``problem`` says why it did not tell, or not all. ``pending`` tells that it was asked just now, for the first time.
    """

    source: str = ""
    config: Mapping[str, Any] | None = None
    tensors: tuple[tuple[str, str, list[int]], ...] = ()
    problem: str = ""
    pending: bool = False


class Hub:
    """What is remembered of hubs. It asks only where ``asks`` is set, and only ``wait`` waits.

    ``changed`` is called from a thread when something was learned, and when ``patience_s`` is over for something that
    was asked for the first time.
    """

    def __init__(
        self,
        environ: Mapping[str, str],
        *,
        asks: bool = False,
        patience_s: float = 0.0,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.asks = asks
        self._folder = cache_folder(environ)
        self._patience_s = patience_s
        self._changed = changed
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._asked_at: dict[str, float] = {}
        self._problems: dict[str, str] = {}
        self._read: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {}
        self._one_left = threading.Condition()

    def told(self, wanted: Sought) -> Told | None:
        """What is known now, without asking; None where the hub was never asked."""
        document = self._document(wanted)
        problem = self._problems.get(wanted.key, "")
        if document:
            return _told(wanted, document, problem)
        if problem:
            return Told(problem=problem)
        return Told(pending=True) if self._is_pending(wanted.key) else None

    def ask(self, wanted: Iterable[Sought]) -> None:
        """Begins to ask for what is not known, or not known well; so many at one time. Never waits."""
        for one in wanted:
            if self.asks and not one.offline and one.key not in self._running and self._due(one):
                if len(self._running) >= AT_ONCE:
                    return
                self._start(one)

    def wait(self, wanted: Iterable[Sought], within_s: float) -> list[Sought]:
        """Asks for these and waits until it is known of each what can be; returns those that are left when time is up.

        What is known is not waited for, though it is asked for again where it is old. On an interruption nothing goes
        on asking; else what is left goes on, and is remembered for the next time.
        """
        end = time.monotonic() + within_s
        wanted = list({one.key: one for one in wanted}.values())
        try:
            while True:
                self.ask(wanted)
                with self._one_left:
                    left = [one for one in wanted if one.key in self._running and not self._known(one)]
                    queued = [one for one in wanted if self.asks and not one.offline and self._due(one)]
                    queued = [one for one in queued if one not in left and not self._known(one)]
                    if not (left or queued) or time.monotonic() >= end:
                        return left + queued
                    self._one_left.wait(min(0.1, max(0.0, end - time.monotonic())))
        except KeyboardInterrupt:
            self.close()
            raise

    def close(self) -> None:
        """Ends all that is being asked."""
        for process in list(self._running.values()):
            process.kill()

    def _known(self, wanted: Sought) -> bool:
        return bool(self._document(wanted).get("config"))

    def _due(self, wanted: Sought) -> bool:
        now = time.time()
        document = self._document(wanted)
        tried_at = max(float(document.get("tried_at") or 0.0), self._asked_at.get(wanted.key, 0.0))
        if tried_at > now:  # the clock was set back
            tried_at = 0.0
        if document.get("complete"):
            return not _COMMIT.fullmatch(wanted.revision) and now - tried_at >= FRESH_S
        if document and document.get("with_token") != wanted.with_token and wanted.key not in self._asked_at:
            return True  # the token may be what was missing
        return now - tried_at >= AGAIN_S

    def _is_pending(self, key: str) -> bool:
        return key in self._running and time.time() - self._asked_at[key] < self._patience_s

    def _document(self, wanted: Sought) -> dict[str, Any]:
        """What was kept, read again only where it has changed; empty where there is nothing, or nothing of use."""
        path = self._folder / f"{wanted.key}.json"
        try:
            status = path.stat()
            stamp = (status.st_mtime_ns, status.st_ino)
            if (known := self._read.get(wanted.key)) is None or known[0] != stamp:
                data = json.loads(path.read_bytes())
                usable = isinstance(data, dict) and data.get("version") == hub_fetch.VERSION
                known = self._read[wanted.key] = (stamp, data if usable else {})
        except (OSError, ValueError, RecursionError):
            return {}
        return known[1]

    def _start(self, wanted: Sought) -> None:
        key = wanted.key
        self._asked_at[key] = time.time()
        if importlib.util.find_spec("huggingface_hub") is None:
            self._problems[key] = MISSING
            return
        parts = urlsplit(wanted.endpoint)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            self._problems[key] = "HF_ENDPOINT is no address of a hub: it begins with http:// or https://"
            return
        job = {"repo": wanted.repo, "revision": wanted.revision, "path": str(self._folder / f"{key}.json")}
        environ = {
            **wanted.environ,
            "HF_ENDPOINT": wanted.endpoint,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        }
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", hub_fetch.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environ,
                start_new_session=True,  # Ctrl-C is for us to hear
            )
        except (OSError, ValueError) as error:
            self._problems[key] = f"the hub was not asked: {error}"
            return
        self._problems.pop(key, None)
        self._running[key] = process
        threading.Thread(target=self._follow, args=(key, process, job), name="hub", daemon=True).start()

    def _follow(self, key: str, process: subprocess.Popen[bytes], job: Mapping[str, str]) -> None:
        said = b""
        try:
            said, _ = process.communicate(json.dumps(job).encode(), timeout=self._patience_s or None)
        except subprocess.TimeoutExpired:
            self._changed()
            said, _ = process.communicate()
        with self._one_left:
            if text := said.decode(errors="replace").strip():
                self._problems[key] = text
            elif process.returncode:
                self._problems[key] = f"asking the hub failed (exit {process.returncode})"
            del self._running[key]
            self._one_left.notify_all()
        self._changed()


def _told(wanted: Sought, document: Mapping[str, Any], problem: str) -> Told:
    parts, config = urlsplit(wanted.endpoint), document.get("config")
    return Told(
        source=f"{parts.scheme}://{parts.hostname}/{wanted.repo}@{document['commit'][:12]}" if config else "",
        config=config,
        tensors=tuple(document.get("tensors") or ()),
        problem="" if document.get("complete") else problem or str(document.get("problem") or ""),
    )


def cache_folder(environ: Mapping[str, str]) -> Path:
    """Where is kept what hubs told, open to its owner only."""
    cache = environ.get("XDG_CACHE_HOME")
    home = environ.get("HOME")
    base = Path(cache) if cache else (Path(home) if home else _home()) / ".cache"
    return base / "sage-reconcile" / "models"


def _home() -> Path:
    """The home of who runs this: systemd sets no ``HOME`` for the units of root."""
    with contextlib.suppress(RuntimeError):
        return Path("~").expanduser()
    return Path("/nonexistent")
