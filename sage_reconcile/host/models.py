"""What is known of models without loading anything, and without waiting for a network.

A model is a folder, or a name that the Hugging Face cache of this machine holds, or one that a hub told of (``hub``).
Read are ``config.json`` and the headers of the safetensors files, a few MB of JSON at the most; no weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sage_reconcile.core.observed import ModelFacts
from sage_reconcile.core.spec import Desired, Engine
from sage_reconcile.host.hub import Hub, Sought, sought

if TYPE_CHECKING:
    from sage_reconcile.core.model_config import ModelConfig
    from sage_reconcile.core.weights import Checkpoint, Tensor

INDEX = "model.safetensors.index.json"
_HEADER_LIMIT = 100_000_000
"""Bytes; the format allows no larger header."""
_NO_DECODER = "its config.json does not describe a decoder: layers, widths or heads are missing"


class _Unreadable(Exception):
    """A file of weights is not what it should be; the message says which and how."""


class ModelReader:
    """Reads each model again only when one of its files has changed (by path, time and size).

    ``folder`` is where names of folders are looked for, that of ``engines.yaml``; ``environ`` tells where the cache
    of Hugging Face is. ``hub`` asks for what is nowhere here; without one only what was told before counts.
    """

    def __init__(self, folder: Path, environ: Mapping[str, str], hub: Hub | None = None) -> None:
        self._folder = folder
        self._environ = environ
        self._hub = hub or Hub(environ)
        self._known: dict[str, tuple[object, ModelFacts]] = {}

    def read(self, desired: Desired) -> dict[str, ModelFacts]:
        """What is known of the models that are served, by ``model_at``.

        The hub begins to be asked for those that are not here and whose size is asked for, unless ``host.offline``
        forbids it.
        """
        facts: dict[str, ModelFacts] = {}
        for engine in desired.engines:
            if engine.spec.model is None or engine.spec.runtime == "command":
                continue
            model, key = engine.spec.model, engine.spec.model_at
            if key not in facts and (found := self.facts(model, engine.env, revision_of(engine))):
                facts[key] = found
        away = self.away(desired)
        self._hub.ask([] if desired.host.offline else [one for one, _ in away])
        for one, engine in away:
            key = engine.spec.model_at
            if (key not in facts or not facts[key].config) and (found := self.told(one)):
                facts[key] = found
        return facts

    def away(self, desired: Desired) -> list[tuple[Sought, Engine]]:
        """The models that vLLM shall load, whose size is asked for, and that are not here; with their engines."""
        found = [
            (self.sought(engine.spec.model or "", engine.env, revision_of(engine)), engine)
            for engine in _asking(desired)
            if engine.spec.runtime == "vllm"
        ]
        return [(one, engine) for one, engine in found if one]

    def sought(self, model: str, overlay: Mapping[str, str] | None = None, revision: str = "") -> Sought | None:
        """What to ask a hub for; None where something of that name is here, or no hub has such names."""
        wanted = sought(model, revision, self._environ, overlay or {})
        try:
            here = (self._folder / model).exists()
        except (OSError, ValueError):
            return None
        return None if here or self._find(model, {**self._environ, **(overlay or {})}, revision) else wanted

    def told(self, wanted: Sought) -> ModelFacts | None:
        """What a hub told of a model until now; None where it was never asked."""
        told = self._hub.told(wanted)
        if told is None:
            return None
        if told.config is None:
            return ModelFacts(told.source, problem=told.problem, pending=told.pending)
        known = self._known.get(wanted.key)
        if known is None or known[0] != (told.source, told.problem):
            facts = _described(told.source, told.config, told.problem, told.tensors)
            known = self._known[wanted.key] = ((told.source, told.problem), facts)
        return known[1]

    def facts(self, model: str, overlay: Mapping[str, str] | None = None, revision: str = "") -> ModelFacts | None:
        """What can be read of a model; None where nothing of it is here, or what is here tells nothing.

        ``overlay`` are variables that the engine has over the environment, ``revision`` a branch, tag or commit.
        """
        folder = self._find(model, {**self._environ, **(overlay or {})}, revision)
        if folder is None:
            return None
        try:
            files = list(_files(folder))
            stamp = tuple((str(path), status.st_mtime_ns, status.st_size) for path in files if (status := path.stat()))
        except (OSError, ValueError):
            return None
        known = self._known.get(str(folder))
        if known is None or known[0] != stamp:
            known = self._known[str(folder)] = (stamp, _read(folder, files[1:]))
        return known[1]

    def _find(self, model: str, environ: Mapping[str, str], revision: str) -> Path | None:
        """The folder with a model's ``config.json``: as a path, else the cache's snapshot of the revision."""
        try:
            here = self._folder / model
            if (here / "config.json").is_file():
                return here
            entry = hub_cache(environ) / f"models--{model.replace('/', '--')}"
            named = entry / "refs" / (revision or "main")
            if named.is_file():
                snapshot = entry / "snapshots" / named.read_text(encoding="utf-8").strip()
            elif revision:
                snapshot = entry / "snapshots" / revision
            else:
                snapshot, *others = sorted((entry / "snapshots").iterdir())
                if others:
                    return None
            return snapshot if (snapshot / "config.json").is_file() else None
        except (OSError, ValueError):  # a name that no path can have, a cache that may not be read
            return None


def _asking(desired: Desired) -> Iterator[Engine]:
    """The engines whose model has to be read."""
    yield from (x for x in desired.engines if x.spec.model is not None and x.spec.memory.kind == "auto")


def revision_of(engine: Engine) -> str:
    """The revision of its model that an engine is told to load; empty where it is told none."""
    return str(engine.spec.args.get("revision") or "")


def unread(desired: Desired, facts: Mapping[str, ModelFacts]) -> list[str]:
    """Why engines get their memory by the names of their models, a sentence each; the names may be secret."""
    return [
        f"{engine.name}: its memory goes by the name of its model: {found.problem}"
        for engine in _asking(desired)
        if (found := facts.get(engine.spec.model_at)) and found.problem and not found.config
    ]


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
        return ModelFacts(source, problem=_NO_DECODER)
    if not files:
        return ModelFacts(source, config)
    try:
        return ModelFacts(source, config, _checkpoint(files, config))
    except _Unreadable as error:
        return ModelFacts(source, config, problem=str(error))


def _described(source: str, data: Mapping[str, Any], problem: str, tensors: Iterable[Sequence[Any]]) -> ModelFacts:
    """The same of what a hub told."""
    from sage_reconcile.core.model_config import read_model_config  # noqa: PLC0415 - as above
    from sage_reconcile.core.weights import Tensor  # noqa: PLC0415

    config = read_model_config(data)
    if config is None:
        return ModelFacts(source, problem=_NO_DECODER)
    found = [Tensor(*tensor) for tensor in tensors]
    try:
        return ModelFacts(source, config, _added_up(found, config) if found else None, problem)
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
    return _added_up([tensor for file in files for tensor in _header(file)], config)


def _added_up(tensors: list[Tensor], config: ModelConfig) -> Checkpoint:
    from sage_reconcile.core.weights import read_checkpoint  # noqa: PLC0415 - not for every start

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
