"""What the folders of models tell of them, without loading anything and without the network.

A model is a folder, or a name that the Hugging Face cache of this machine holds. Read are ``config.json`` and the
headers of the safetensors files, a few MB of JSON at the most; no weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sage_reconcile.core.observed import ModelFacts
from sage_reconcile.core.spec import Desired

if TYPE_CHECKING:
    from sage_reconcile.core.model_config import ModelConfig
    from sage_reconcile.core.weights import Checkpoint, Tensor

INDEX = "model.safetensors.index.json"
_HEADER_LIMIT = 100_000_000
"""Bytes; the format allows no larger header."""
_Stamp = tuple[tuple[str, int, int], ...]


class _Unreadable(Exception):
    """A file of weights is not what it should be; the message says which and how."""


class ModelReader:
    """Reads each model again only when one of its files has changed (by path, time and size).

    ``folder`` is where names of folders are looked for, that of ``engines.yaml``; ``environ`` tells where the cache
    of Hugging Face is.
    """

    def __init__(self, folder: Path, environ: Mapping[str, str]) -> None:
        self._folder = folder
        self._environ = environ
        self._known: dict[str, tuple[_Stamp, ModelFacts]] = {}

    def read(self, desired: Desired) -> dict[str, ModelFacts]:
        """What is known of the models that are served, by their names in the file."""
        facts: dict[str, ModelFacts] = {}
        for engine in desired.engines:
            model = engine.spec.model
            if model is None or engine.spec.runtime == "command" or model in facts:
                continue
            if found := self.facts(model, engine.env):
                facts[model] = found
        return facts

    def facts(self, model: str, overlay: Mapping[str, str] | None = None) -> ModelFacts | None:
        """What can be read of a model; None where nothing of it is here, or what is here tells nothing.

        ``overlay`` are variables that the engine has over the environment.
        """
        folder = self._find(model, {**self._environ, **(overlay or {})})
        if folder is None:
            return None
        try:
            files = list(_files(folder))
            stamp = tuple((str(path), status.st_mtime_ns, status.st_size) for path in files if (status := path.stat()))
        except (OSError, ValueError):
            return None
        known = self._known.get(model)
        if known is None or known[0] != stamp:
            known = self._known[model] = (stamp, _read(folder, files[1:]))
        return known[1]

    def _find(self, model: str, environ: Mapping[str, str]) -> Path | None:
        """The folder with a model's ``config.json``: as a path, else the cache's snapshot of the main revision."""
        try:
            here = self._folder / model
            if (here / "config.json").is_file():
                return here
            entry = hub_cache(environ) / f"models--{model.replace('/', '--')}"
            main = entry / "refs/main"
            if main.is_file():
                snapshot = entry / "snapshots" / main.read_text(encoding="utf-8").strip()
            else:
                snapshot, *others = sorted((entry / "snapshots").iterdir())
                if others:
                    return None
            return snapshot if (snapshot / "config.json").is_file() else None
        except (OSError, ValueError):  # a name that no path can have, a cache that may not be read
            return None


def hub_cache(environ: Mapping[str, str]) -> Path:
    """Where Hugging Face's libraries keep what they have downloaded."""
    if named := environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(named)
    home = Path(environ.get("HOME") or "/nonexistent")
    cache = Path(environ.get("XDG_CACHE_HOME") or home / ".cache")
    return Path(environ.get("HF_HOME") or cache / "huggingface") / "hub"


def _files(folder: Path) -> Iterator[Path]:
    """What is read of a model: first its ``config.json``, then its safetensors files, by the index if it has one."""
    yield folder / "config.json"
    index = folder / INDEX
    if index.is_file():
        yield index
        return
    whole = folder / "model.safetensors"
    yield from (
        [whole]
        if whole.is_file()
        else sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("consolidated"))
    )


def _read(folder: Path, files: list[Path]) -> ModelFacts:
    from sage_reconcile.core.model_config import read_model_config  # noqa: PLC0415 - not for every start

    source = str(folder)
    try:
        data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return ModelFacts(source, problem="its config.json cannot be read")
    config = read_model_config(data) if isinstance(data, dict) else None
    if config is None:
        return ModelFacts(
            source, problem="its config.json does not describe a decoder: layers, widths or heads are missing"
        )
    if not files:
        return ModelFacts(source, config)
    try:
        return ModelFacts(source, config, _checkpoint(files, config))
    except _Unreadable as error:
        return ModelFacts(source, config, problem=str(error))


def _checkpoint(files: list[Path], config: ModelConfig) -> Checkpoint:
    """What the headers of all files tell.

    Raises:
        _Unreadable: one of them is not there, cut short, or no such file.
    """
    if files[0].name == INDEX:
        try:
            shards = set(json.loads(files[0].read_text(encoding="utf-8"))["weight_map"].values())
            files = sorted(files[0].parent / str(shard) for shard in shards)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise _Unreadable(f"its {INDEX} cannot be read") from None
    from sage_reconcile.core.weights import read_checkpoint  # noqa: PLC0415 - not for every start

    tensors = [tensor for file in files for tensor in _header(file)]
    try:
        return read_checkpoint(tensors, config)
    except (TypeError, AttributeError, OverflowError):
        raise _Unreadable("the headers of its safetensors files have odd shapes or types") from None


def _header(path: Path) -> list[Tensor]:
    """The tensors of a file: 8 bytes with the length of a JSON text, that text, the weights.

    https://github.com/huggingface/safetensors, "Format".
    """
    from sage_reconcile.core.weights import Tensor  # noqa: PLC0415 - not for every start

    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= _HEADER_LIMIT:
                raise _Unreadable(f"{path.name} is not a safetensors file")
            header = json.loads(file.read(length))
            there = path.stat().st_size - 8 - length
        header.pop("__metadata__", None)
        end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        tensors = [Tensor(name, tensor["dtype"], tensor["shape"]) for name, tensor in header.items()]
    except OSError as error:
        raise _Unreadable(f"{path.name} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise _Unreadable(f"{path.name} is not a safetensors file, or cut short") from None
    if there < end:
        raise _Unreadable(f"{path.name} is cut short: {there} bytes of weights of {end} are there")
    return tensors
