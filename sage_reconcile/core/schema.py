"""The JSON Schema of ``engines.yaml``, for editors: what people may write, not what it is read into."""

from __future__ import annotations

from typing import Any

from sage_reconcile.core.fields import ENGINE_NAME, OWN_FLAGS
from sage_reconcile.core.spec import FileSpec

_VARIABLE = {"type": "string", "pattern": r"\$\{[A-Za-z_][A-Za-z0-9_]*(:-[^}]*)?\}"}
_GPUS_IN_WORDS = {"type": "string", "pattern": r"\d", "examples": ["8xH100-80GB", "4x24GiB", "2xMyCard:48GiB"]}
_GPU_LIST = {"type": "array", "minItems": 1, "uniqueItems": True, "items": {"type": ["integer", "string"]}}


def file_schema() -> dict[str, Any]:
    """The schema that ``sage-reconcile schema`` prints and ``schemas/engines.schema.json`` holds."""
    schema = FileSpec.model_json_schema()
    definitions = schema["$defs"]
    engine = definitions["EngineSpec"]["properties"]
    host = definitions["HostSpec"]["properties"]
    _write(engine, "command", {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]})
    _write(engine, "gpus", {"anyOf": [{"const": "auto"}, _GPU_LIST]})
    _write(engine, "port", {"anyOf": [{"const": "auto"}, {"type": "integer", "minimum": 1, "maximum": 65535}]})
    _write(engine, "served_model_name", {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]})
    _write(engine, "args", {"type": "object", "propertyNames": {"not": {"enum": sorted(OWN_FLAGS)}}})
    _write(engine, "env", {"type": "object", "additionalProperties": {"type": ["string", "number"]}})
    for name in ("model", "python", "env_file"):
        _write(engine, name, {"type": "string", "minLength": 1})
    _write(host, "exclude", {"type": "array", "items": {"type": ["integer", "string"]}})
    _write(
        host,
        "gpus",
        {
            "anyOf": [
                {"enum": ["auto", "none"]},
                _GPUS_IN_WORDS,
                {"type": "array", "minItems": 1, "items": {"anyOf": [{"$ref": "#/$defs/DeclaredGpu"}, _GPUS_IN_WORDS]}},
            ]
        },
    )
    del definitions["DeclaredGpu"]["properties"]["memory"]["default"]
    for properties in (engine, host, definitions["DeclaredGpu"]["properties"]):
        for name, field in properties.items():
            properties[name] = _with_variable(field)
    schema["properties"]["defaults"] = {"$ref": "#/$defs/EngineSpec", "description": "Any field of an engine, for all."}
    schema["properties"]["engines"]["propertyNames"] = {"pattern": f"^{ENGINE_NAME}$"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "engines.yaml of sage-reconcile, version 1",
        **{key: value for key, value in schema.items() if key != "title"},
    }


def _write(properties: dict[str, Any], name: str, schema: dict[str, Any]) -> None:
    kept = {key: properties[name][key] for key in ("description", "default") if key in properties[name]}
    if kept.get("default", ...) is None:
        del kept["default"]
    properties[name] = {**schema, **kept}


def _with_variable(field: dict[str, Any]) -> dict[str, Any]:
    """The field, or text with ``${NAME}`` in it where it is no text anyway."""
    if field.get("type") in ("object", "array") or (field.get("type") == "string" and "pattern" not in field):
        return field
    outer: dict[str, Any] = {key: field[key] for key in ("description", "default") if key in field}
    inner = {key: value for key, value in field.items() if key not in ("description", "default", "title")}
    return {**outer, "anyOf": [*(inner.pop("anyOf", None) or [inner]), _VARIABLE]}
