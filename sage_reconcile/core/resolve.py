"""From the data of a file to what it asks for: variables filled in, defaults applied, every fault found."""

from __future__ import annotations

import difflib
import hashlib
import hmac
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from sage_reconcile.core.fields import CPU_KV_SPACE, CPU_KV_SPACE_FAULT, ENGINE_NAME
from sage_reconcile.core.host_spec import DeclaredGpu, HostSpec
from sage_reconcile.core.source import Route, Source, steps_in_file, words
from sage_reconcile.core.spec import Desired, Engine, EngineSpec, FileSpec
from sage_reconcile.core.units import described
from sage_reconcile.errors import Fault

HIDDEN = "(hidden)"
_VARIABLE = re.compile(r"\$\$|\$\{([^{}]*)\}|\$\{")
_REFERENCE = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(:-(.*))?", re.DOTALL)
_SHOWN_FIELDS = ("model", "python", "command", "served_model_name", "args", "env_file")
_MERGED = ("args", "env")


def resolve(
    source: Source, environ: Mapping[str, str], env_files: Mapping[str, Mapping[str, str]]
) -> tuple[Desired, list[Fault]]:
    """What the file asks for, and everything that is wrong with it.

    Where there are faults, the first value must not be used. ``env_files`` are the contents of the files
    that ``env_file`` names, by that name.
    """
    reader = _Reader(source, environ)
    return reader.desired(env_files), sorted(set(reader.faults))


def env_file_names(source: Source, environ: Mapping[str, str]) -> dict[str, Route]:
    """The files that ``env_file`` fields name, each with the route of the first field that names it."""
    reader = _Reader(source, environ)
    names: dict[str, Route] = {}
    for name in reader.engine_names():
        merged, origin = reader.merged(name)
        if isinstance(merged.get("env_file"), str):
            names.setdefault(str(merged["env_file"]), (*origin.get("env_file", ("engines", name)), "env_file"))
    return names


class _Reader:
    """One reading of one source."""

    def __init__(self, source: Source, environ: Mapping[str, str]) -> None:
        self.source = source
        self.environ = environ
        self.faults: list[Fault] = []
        self.references: dict[Route, str] = {}
        self.data: dict[str, Any] = {key: self._filled(value, (key,)) for key, value in source.data.items()}

    def _fault(self, route: Route, message: str, fix: str = "", *, key: bool = False) -> None:
        self.faults.append(self.source.fault(route, message, fix, key=key))

    def _fault_of_value(self, route: Route, message: str, fix: str = "") -> None:
        """A fault whose message may quote the value; one that came from the environment is never quoted."""
        references = [
            text
            for place, text in self.references.items()
            if place[: len(route)] == route or route[: len(place)] == place
        ]
        if references:
            expected, got, _ = message.partition(", got ")
            named = ", ".join(dict.fromkeys(references))
            message = f"{expected}, got what {named} holds" if got else f"what {named} holds cannot be used here"
        self._fault(route, message, fix)

    def _filled(self, value: object, route: Route) -> Any:  # noqa: ANN401 - the data of a file is anything
        if isinstance(value, dict):
            return {key: self._filled(item, (*route, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [self._filled(item, (*route, index)) for index, item in enumerate(value)]
        if isinstance(value, str) and "$" in value:
            return self._text(value, route)
        return value

    def _text(self, value: str, route: Route) -> str:
        from_environment = False

        def fill(match: re.Match[str]) -> str:
            nonlocal from_environment
            if match[0] == "$$":
                return "$"
            reference = _REFERENCE.fullmatch(match[1] or "")
            if reference is None:
                self._fault(
                    route,
                    f"{match[0]} is not a variable",
                    "write ${NAME} or ${NAME:-default}; $$ is a plain $",
                )
                return match[0]
            name, has_default, default = reference[1], reference[2], reference[3]
            found = self.environ.get(name)
            if found or (found is not None and not has_default):
                from_environment = True
                return found
            if has_default:
                return default or ""
            self._fault(
                route,
                f"environment variable {name} is not set",
                f"set it, or give a default: ${{{name}:-value}}",
            )
            return match[0]

        filled = _VARIABLE.sub(fill, value)
        if from_environment:
            self.references[route] = value
        return filled

    def engine_names(self) -> Iterator[str]:
        engines = self.data.get("engines")
        if isinstance(engines, dict):
            yield from (str(name) for name in engines)

    def merged(self, name: str) -> tuple[dict[str, Any], dict[str, Route]]:
        """An entry over the defaults, and for each field the route of the map that gave it."""
        entry, defaults = self.data["engines"][name], self.data.get("defaults")
        fields: dict[str, Any] = dict(defaults) if isinstance(defaults, dict) else {}
        origin: dict[str, Route] = dict.fromkeys(fields, ("defaults",))
        for key, value in (entry if isinstance(entry, dict) else {}).items():
            below = fields.get(key)
            if key in _MERGED and isinstance(below, dict) and isinstance(value, dict):
                given = {spelled for flag in value for spelled in _spellings(_plain(flag))}
                fields[key] = {flag: item for flag, item in below.items() if flag not in given} | value
            else:
                fields[key] = value
            origin[key] = ("engines", name)
        return fields, origin

    def desired(self, env_files: Mapping[str, Mapping[str, str]]) -> Desired:
        self._check_top()
        host = self._validated(HostSpec, self.data.get("host", {}), ("host",))
        defaults = self.data.get("defaults", {})
        if self._is_map(defaults, ("defaults",)):
            self._check_defaults(defaults)
        names = list(self.engine_names())
        engines = [engine for name in names if (engine := self._engine(name, env_files))]
        self._check_ports(engines)
        return Desired(host or HostSpec(), tuple(engines), self.source.digest)

    def _check_top(self) -> None:
        for key in self.data:
            if key not in FileSpec.model_fields:
                self._unknown((key,), tuple(FileSpec.model_fields))
        version = self.data.get("version")
        if version is None:
            self._fault((), "field `version` is missing", "write `version: 1` at the top")
        elif version != 1 or isinstance(version, bool):
            self._fault_of_value(("version",), f"version {version} is not known", "write `version: 1`")
        if "engines" not in self.data:
            self._fault((), "field `engines` is missing", "write `engines: {}` if none shall run")
        elif self.data["engines"] is None:
            self._fault(("engines",), "names no engine", "write `engines: {}` if none shall run", key=True)
        else:
            self._is_map(self.data["engines"], ("engines",))
        for key in ("host", "defaults"):
            if key in self.data and self.data[key] is None:
                self._fault((key,), "has no value", "remove the line, or give it one", key=True)
                self.data[key] = {}

    def _is_map(self, value: object, route: Route) -> bool:
        if not isinstance(value, dict):
            self._fault_of_value(route, f"expected a map, got {described(value)}")
            return False
        return True

    def _check_defaults(self, defaults: dict[str, Any]) -> None:
        """Faults of ``defaults`` are told once, where they stand, not once for every engine."""
        for key, value in defaults.items():
            if key not in EngineSpec.model_fields:
                self._unknown(("defaults", key), tuple(EngineSpec.model_fields))
                continue
            try:
                EngineSpec.__pydantic_validator__.validate_assignment(EngineSpec.model_construct(), key, value)
            except ValidationError as error:
                self._report(error, {}, ("defaults",), only=key)

    def _engine(self, name: str, env_files: Mapping[str, Mapping[str, str]]) -> Engine | None:
        route: Route = ("engines", name)
        if not re.fullmatch(ENGINE_NAME, name):
            fix = "use letters, digits, `-`, `_` and `.`, at most 63, beginning and ending with a letter or digit"
            self._fault(route, f"{name[:80]!r} cannot be the name of an engine", fix, key=True)
        entry = self.data["engines"][name]
        if entry is None:
            self._fault(route, "says nothing about the engine", "give it at least a `model`", key=True)
            return None
        if not self._is_map(entry, route):
            return None
        fields, origin = self.merged(name)
        spec = self._validated(EngineSpec, fields, route, origin)
        if spec is None:
            return None
        file_env = env_files.get(spec.env_file or "", {})
        if spec.sizes_cpu_cache and CPU_KV_SPACE in file_env:
            self._fault((*origin.get("env_file", route), "env_file"), *CPU_KV_SPACE_FAULT)
        if not spec.served_model_name:
            spec = spec.model_copy(update={"served_model_name": (name,)})
        if spec.memory.kind == "all":
            spec = spec.model_copy(update={"exclusive": True})
        return self._hide(name, spec, origin, file_env)

    def _hide(self, name: str, spec: EngineSpec, origin: Mapping[str, Route], file_env: Mapping[str, str]) -> Engine:
        secrets: dict[str, str] = {f"env_file.{key}": value for key, value in file_env.items()}
        shown: dict[str, Any] = {}
        for field_name in _SHOWN_FIELDS:
            value = getattr(spec, field_name)
            route = (*origin.get(field_name, ("engines", name)), field_name)
            hidden = self._shown(value, route, field_name, secrets)
            if hidden != value:
                shown[field_name] = hidden
        env_shown: dict[str, str] = {}
        for key, value in spec.env.items():
            env_shown[key] = self._env_reference(name, key) or HIDDEN
            secrets[f"env.{key}"] = value
        shown["env"] = env_shown
        masked = spec.model_copy(update=shown)
        return Engine(name, spec, masked, masked.model_dump(mode="json"), secrets, {**file_env, **spec.env})

    def _env_reference(self, name: str, key: str) -> str | None:
        places = (("engines", name, "env", key), ("defaults", "env", key))
        return next((self.references.get(place) for place in places if place in self.source.key_places), None)

    def _shown(self, value: Any, route: Route, path: str, secrets: dict[str, str]) -> Any:  # noqa: ANN401
        """The value with every text that came from the environment as it stands in the file."""
        if isinstance(value, dict):
            return {
                key: self._shown(item, self._key_route(route, key), f"{path}.{key}", secrets)
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            shown = [self._shown(item, (*route, index), f"{path}.{index}", secrets) for index, item in enumerate(value)]
            whole = self.references.get(route)
            if whole is not None and shown:  # a text that was split into words
                secrets[path] = "\0".join(str(item) for item in value)
                return type(value)([whole])
            return type(value)(shown)
        if isinstance(value, str) and route in self.references:
            secrets[path] = value
            return self.references[route]
        return value

    def _key_route(self, route: Route, key: str) -> Route:
        """The key in the map at ``route``, as it is spelled (``--max_model_len``); it may stand in the defaults."""
        places = ((*base, spelled) for base in (route, ("defaults", *route[-1:])) for spelled in _spellings(key))
        return next((place for place in places if place in self.source.key_places), (*route, key))

    def _validated(
        self, model: type[Any], fields: object, route: Route, origin: Mapping[str, Route] | None = None
    ) -> Any:  # noqa: ANN401
        if not isinstance(fields, dict):
            self._fault_of_value(route, f"expected a map, got {described(fields)}")
            return None
        fields = {
            key: value
            for key, value in fields.items()
            if not self._empty(value, (*((origin or {}).get(key, route)), key))
        }
        try:
            return model.model_validate(fields)
        except ValidationError as error:
            self._report(error, origin or {}, route, model=model)
        self._check_rest(model, fields, route, origin or {})
        return None

    def _check_rest(self, model: type[Any], fields: dict[str, Any], route: Route, origin: Mapping[str, Route]) -> None:
        """The rules about several fields, tried on the fields that are good, so that they too are told at once."""
        good = {}
        for key, value in fields.items():
            try:
                model.__pydantic_validator__.validate_assignment(model.model_construct(), key, value)
            except ValidationError as error:
                if any(item["loc"][:1] == (key,) for item in error.errors(include_url=False)):
                    continue
            if key in model.model_fields:
                good[key] = value
        if {"model", "runtime", "command"} & (set(fields) - set(good)):
            return
        try:
            model.model_validate(good)
        except ValidationError as error:
            self._report(error, origin, route, model=model)

    def _empty(self, value: object, route: Route) -> bool:
        if value is not None:
            return False
        self._fault(route, "has no value", "remove the line, or give it one", key=True)
        return True

    def _report(
        self,
        error: ValidationError,
        origin: Mapping[str, Route],
        route: Route,
        *,
        model: type[BaseModel] = EngineSpec,
        only: str = "",
    ) -> None:
        for item in error.errors(include_url=False, include_input=True):
            steps = steps_in_file(item["loc"])
            if only and steps[:1] != (only,):
                continue
            base = origin.get(str(steps[0]), route) if steps else route
            where: Route = (*base, *steps)
            if item["type"] == "extra_forbidden":
                if base != ("defaults",) or only:  # said where the defaults stand
                    known = DeclaredGpu if len(steps) > 1 and model is HostSpec else model
                    self._unknown(where, tuple(known.model_fields))
                continue
            message, fix = words(item, self.source.written.get(where))
            context = item.get("ctx") or {}
            if context.get("field"):
                where = (*origin.get(context["field"], route), context["field"])
            for one in (context, *context.get("others", ())) if context.get("key") else ():
                self._fault(self._key_route(where, one["key"]), one["what"], one["fix"], key=True)
            if context.get("key"):
                continue
            if steps:
                self._fault_of_value(where, message, fix)
            else:  # rules about several fields quote no value
                self._fault(where, message, fix)

    def _unknown(self, route: Route, known: tuple[str, ...]) -> None:
        key = str(route[-1])
        close = difflib.get_close_matches(key.replace("-", "_"), known, n=1, cutoff=0.6)
        if close:
            fix = f"did you mean `{close[0]}`?"
        elif len(route) > 2:
            fix = "vLLM's own flags go under `args:`; known fields: " + ", ".join(known)
        else:
            fix = "known fields: " + ", ".join(known)
        self._fault(route, f"unknown field `{key}`", fix, key=True)

    def _check_ports(self, engines: list[Engine]) -> None:
        taken: dict[int, str] = {}
        for engine in engines:
            if engine.spec.port == "auto":
                continue
            for index, replica in enumerate(engine.replicas()):
                port = engine.spec.port + index
                if port in taken:
                    self._fault(
                        ("engines", engine.name, "port"),
                        f"port {port} of {replica} is already the port of {taken[port]}",
                        "choose another, or write auto",
                    )
                taken.setdefault(port, replica)


def _plain(key: object) -> str:
    return str(key).lstrip("-").replace("_", "-")


def _spellings(key: str) -> tuple[str, ...]:
    under = key.replace("-", "_")
    return key, under, f"--{key}", f"--{under}"


def secret_marks(secrets: Mapping[str, str], salt: str) -> dict[str, str]:
    """A keyed digest of each hidden value: tells that one changed without keeping it (HMAC-SHA256)."""
    return {
        path: hmac.new(salt.encode(), value.encode(), hashlib.sha256).hexdigest()[:32]
        for path, value in secrets.items()
    }


def values_mark(desired: Desired, salt: str) -> str:
    """A keyed digest of all hidden values of a file: tells whether two readers of it see the same ones."""
    values = sorted((engine.name, *item) for engine in desired.engines for item in engine.secrets.items())
    return hmac.new(salt.encode(), repr(values).encode(), hashlib.sha256).hexdigest()[:32]
