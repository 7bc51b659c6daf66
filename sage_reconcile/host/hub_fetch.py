"""Asks a hub of models for one model, in a process of its own: its ``config.json`` and the headers of its weights.

``hub`` starts this file; it imports nothing of ours. A process of its own, since ``huggingface_hub`` takes its settings
from the environment when it is imported, and an engine may have its own; since a hub that sends no end of anything is
then ended by the clock; and since the daemon shall not carry the library around. What to ask for comes as JSON on
standard input, what was learned goes into the file that is named there.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

VERSION = 1
TOTAL_S = 60
"""Seconds after which it gives up, whatever still comes."""
_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
_FIRST_BYTES = 128 << 10
"""Of each file of weights this much is asked for at first; most headers are smaller."""
_HEADER_LIMIT = 25_000_000
_HEADERS_LIMIT = 200_000_000
_JSON_LIMIT = 64 << 20
_FILES_LIMIT = 2000
_AT_ONCE = 12
_Tensor = tuple[str, str, list[int]]
"""Name, type and shape."""
_NAME = re.compile(r"(?!.*\.\.)\w[\w.+/ -]{0,200}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NOT_JSON = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


class _Refused(Exception):
    """The hub does not tell; the message says why, and what would help."""


class _Late(Exception):
    """The time is over."""


class _Hub:
    """A model on the hub. The token goes to the endpoint only: the client drops it where it is sent elsewhere."""

    def __init__(self, repo: str, revision: str, token: str) -> None:
        from huggingface_hub import constants, hf_hub_url  # noqa: PLC0415 - whether it is there is told, not raised
        from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415
        from huggingface_hub.utils import build_hf_headers, get_session  # noqa: PLC0415

        self.repo, self.revision, self.token = repo, revision, token
        self.failures: tuple[type[BaseException], ...] = HfHubHTTPError.__bases__  # what its client raises
        self._timeout_s = constants.HF_HUB_DOWNLOAD_TIMEOUT
        self._endpoint = constants.ENDPOINT
        self._url = hf_hub_url
        self._client = get_session()
        self._headers = build_hf_headers(token=token or False, library_name="sage-reconcile") | {
            "accept-encoding": "identity"
        }

    def about(self) -> dict[str, Any]:
        """The commit and the files of the revision."""
        from urllib.parse import quote  # noqa: PLC0415

        path = f"{self._endpoint}/api/models/{self.repo}/revision/{quote(self.revision, safe='')}"
        return _json(self._read(path, _JSON_LIMIT), "what it tells of the model")

    def file(self, name: str, commit: str) -> dict[str, Any]:
        """A file of JSON."""
        return _json(self._read(self._url(self.repo, name, revision=commit), _JSON_LIMIT), name)

    def header(self, name: str, commit: str) -> dict[str, Any]:
        """The header of a file of weights: 8 bytes with the length of a JSON text, that text; nothing after it."""
        url = self._url(self.repo, name, revision=commit)
        begun = self._read(url, _FIRST_BYTES, 0, _FIRST_BYTES)
        length = int.from_bytes(begun[:8], "little")
        if len(begun) < 10 or not 2 <= length <= _HEADER_LIMIT:
            raise _Refused(f"{name} on the hub is not a safetensors file")
        text = begun[8 : 8 + length]
        if len(text) < length:
            text += self._read(url, length - len(text), 8 + len(text), length - len(text))
        if len(text) < length:
            raise _Refused(f"{name} on the hub is cut short")
        return _json(text, name)

    def _read(self, url: str, limit: int, start: int = 0, count: int = 0) -> bytes:
        """At most ``limit`` bytes of an answer; with ``count`` so many from ``start`` on, whatever the hub sends."""
        headers = dict(self._headers)
        if count:
            headers["range"] = f"bytes={start}-{start + count - 1}"
        with self._client.stream("GET", url, headers=headers, timeout=self._timeout_s) as answer:
            self._check(answer.status_code, answer.headers.get("x-error-code") or "")
            skip = start if count and answer.status_code != 206 else 0
            data = bytearray()
            for piece in answer.iter_bytes():
                data += piece
                if len(data) >= skip + limit:
                    break
            if not count and len(data) >= limit:
                raise _Refused("the hub answers with more than it should")
            return bytes(data[skip : skip + limit])

    def _check(self, status: int, code: str) -> None:
        """Codes as ``huggingface_hub.utils.hf_raise_for_status`` reads them; the bodies of errors are not read."""
        if status < 400:
            return
        if code == "GatedRepo":
            with_it = "HF_TOKEN does not open it: accept its licence on the hub with the account of that token"
            without = "accept its licence on the hub and set HF_TOKEN"
            raise _Refused(f"it is gated: {with_it if self.token else without}")
        if code == "RevisionNotFound":
            raise _Refused("it has no such revision on the hub")
        if code == "RepoNotFound" or (status == 404 and not code):
            help_it = "HF_TOKEN does not open it" if self.token else "it is private: then set HF_TOKEN"
            raise _Refused(f"it does not exist on the hub, or {help_it}")
        if status in (401, 403):
            told = "does not accept HF_TOKEN" if self.token else "asks for a token: set HF_TOKEN"
            raise _Refused(f"the hub {told} (HTTP {status})")
        raise _Refused(f"the hub answers with HTTP {status}")


def _json(text: bytes, name: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except _NOT_JSON:
        data = None
    if not isinstance(data, dict):
        raise _Refused(f"the hub sends no JSON where it should ({name})")
    return data


def ask(hub: _Hub, known: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What is learned, step by step, each step with all before it; nothing where ``known`` is of the same commit.

    Raises:
        _Refused: the hub does not tell.
    """
    about = hub.about()
    commit = str(about.get("sha") or "")
    if not _COMMIT.fullmatch(commit):
        raise _Refused("the hub sends no JSON where it should (what it tells of the model)")
    if commit == known.get("commit") and known.get("complete"):
        return
    files = _names(about)
    if "config.json" not in files:
        raise _Refused("it has no config.json on the hub")
    learned: dict[str, Any] = {"commit": commit, "config": hub.file("config.json", commit), "tensors": []}
    yield learned
    weights = _weights(hub, files, commit)
    yield {**learned, "tensors": _all_tensors(hub, weights, commit), "complete": True}


def _all_tensors(hub: _Hub, weights: list[str], commit: str) -> list[_Tensor]:
    tensors: list[_Tensor] = []
    left = _HEADERS_LIMIT
    threads = ThreadPoolExecutor(_AT_ONCE)
    try:
        for name, header in zip(weights, threads.map(lambda name: hub.header(name, commit), weights), strict=True):
            found = _tensors(header, name)
            left -= sum(len(tensor[0]) + 32 for tensor in found)
            if left < 0:
                raise _Refused("the headers of its weights are larger than they should be")
            tensors += found
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
    return tensors


def _names(about: Mapping[str, Any]) -> set[str]:
    try:
        return {str(file["rfilename"]) for file in about["siblings"]}
    except _NOT_JSON:
        raise _Refused("the hub sends no JSON where it should (the names of its files)") from None


def _weights(hub: _Hub, files: set[str], commit: str) -> list[str]:
    """The files of weights that vLLM would load, by the index where there is one; none where it has no safetensors."""
    if _INDEX in files:
        try:
            names = {str(name) for name in hub.file(_INDEX, commit)["weight_map"].values()}
        except _NOT_JSON:
            raise _Refused(f"its {_INDEX} on the hub cannot be read") from None
        if missing := sorted(names - files):
            raise _Refused(f"its {_INDEX} on the hub names {len(missing)} files that are not there")
    elif _WHOLE in files:
        names = {_WHOLE}
    else:
        names = {
            name
            for name in files
            if name.endswith(".safetensors") and "/" not in name and not name.startswith("consolidated")
        }
    if not all(_NAME.fullmatch(name) for name in names):
        raise _Refused("its files of weights on the hub have odd names")
    if len(names) > _FILES_LIMIT:
        raise _Refused(f"its weights are in {len(names)} files: more than are read")
    return sorted(names)


def _tensors(header: dict[str, Any], name: str) -> list[_Tensor]:
    header.pop("__metadata__", None)
    try:
        return [(key, str(tensor["dtype"]), [int(x) for x in tensor["shape"]]) for key, tensor in header.items()]
    except _NOT_JSON:
        raise _Refused(f"{name} on the hub is not a safetensors file") from None


def learn(job: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """The document of what is known after asking; ``known`` is that of before.

    What was whole stays where the hub does not tell any more, and where it tells the same.
    """
    token = (os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN") or "").strip()
    learned: dict[str, Any] = {}
    try:
        try:
            hub = _Hub(job["repo"], job["revision"], token)
        except (ImportError, AttributeError) as error:
            raise _Refused(f"huggingface_hub cannot be used ({error}); it has to be 1.0 or later") from None
        try:
            for learned in ask(hub, known):  # noqa: B007 - the last one counts, also where the next one fails
                pass
        except hub.failures as error:
            raise _Refused(f"the hub cannot be reached ({type(error).__name__}: {str(error)[:200]})") from None
    except _Refused as error:
        problem = str(error)
    except _Late:
        problem = "the hub has not told all of it in time"
    except ValueError:  # which may quote a token, or a proxy with its password
        problem = "what the environment says of the hub or of a proxy cannot be used (HF_…, …_PROXY)"
    else:
        return _document(learned or known, "", token)
    if known.get("config") and (known.get("complete") or not learned):
        return {**known, "tried_at": time.time()}
    return _document(learned, problem, token)


def _document(learned: Mapping[str, Any], problem: str, token: str) -> dict[str, Any]:
    nothing: dict[str, Any] = {"commit": "", "config": None, "tensors": [], "complete": False}
    return {
        "version": VERSION,
        **nothing,
        **learned,
        "problem": problem,
        "with_token": bool(token),
        "tried_at": time.time(),
    }


def keep(path: Path, document: Mapping[str, Any]) -> None:
    """Writes the file at once or not at all, open to its owner only.

    Raises:
        OSError: it cannot be written.
    """
    for folder in (path.parent.parent, path.parent):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".new")  # has mode 0600
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(document, file, separators=(",", ":"))
        Path(temporary).replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise


def read(path: Path) -> dict[str, Any]:
    """The document that is kept; empty where there is none that can be used."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) and document.get("version") == VERSION else {}


def _late(*_: object) -> None:
    raise _Late


def main() -> None:
    """Reads what to ask for, asks, keeps what it learned; prints why where that cannot be kept."""
    signal.signal(signal.SIGALRM, _late)
    job = json.load(sys.stdin)
    signal.alarm(int(job.get("within_s") or TOTAL_S))
    path = Path(job["path"])
    document = learn(job, read(path))
    signal.alarm(0)
    try:
        keep(path, document)
    except OSError as error:
        print(f"what the hub tells cannot be kept: {error.filename or path}: {error.strerror}", flush=True)
    os._exit(0)  # a thread may still be waiting for the hub


if __name__ == "__main__":
    main()
