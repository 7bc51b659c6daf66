"""The bodies of requests and responses, in the shapes of vLLM's OpenAI-style API, and its metrics."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from typing import Any

from sage_reconcile.simulator import log
from sage_reconcile.simulator.flags import Options
from sage_reconcile.simulator.scheduler import Counters

_TEXT = (
    "This answer is simulated: no model was asked, and every prompt gets these same words. "
    "Start a real engine to talk to a model."
)
ANSWER = tuple(_TEXT.split())
"""The canned answer; a word is a token."""
_COMPLETION_TOKENS = 16
"""What OpenAI's completions give where the request does not say; chats go on to the end of the answer."""
_BLOCK_TOKENS = 16


class Refused(Exception):
    """A request that gets an error for an answer."""

    def __init__(self, status: int, message: str, kind: str, param: str | None = None) -> None:
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        super().__init__(message)

    def body(self) -> dict[str, object]:
        """The error as JSON has it."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.status}
        return {"error": error}


@dataclass(frozen=True, slots=True)
class Call:
    """A completion that is asked for."""

    chat: bool
    model: str
    prompt_tokens: int
    tokens: int
    finish: str
    stream: bool
    include_usage: bool
    id: str
    created: int

    def usage(self) -> dict[str, int]:
        """The tokens of prompt and answer."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + self.tokens,
            "completion_tokens": self.tokens,
        }

    def head(self, *, chunk: bool) -> dict[str, object]:
        """What every body of this answer begins with."""
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def read_call(body: bytes, options: Options, *, chat: bool) -> Call:
    """Understand the body of a completion request.

    Raises:
        Refused: as vLLM refuses it.
    """
    asked = _read_json(body)
    field = "messages" if chat else "prompt"
    if not asked.get(field):
        text = f"{{'type': 'missing', 'loc': 'body.{field}', 'msg': 'Field required'}}"
        raise Refused(400, f"1 validation error:\n  {text}", "Bad Request", f"body.{field}")
    model = asked.get("model") or options.names[0]
    known = (*options.names, *options.lora_names)
    if model not in known:
        message = f"The model `{model}` does not exist. Valid aliases: {', '.join(known)}."
        raise Refused(404, message, "NotFoundError", "model")
    tokens, finish = _length(asked, options, chat=chat)
    extra = asked.get("stream_options")
    return Call(
        chat=chat,
        model=str(model),
        prompt_tokens=_count(asked[field]),
        tokens=tokens,
        finish=finish,
        stream=bool(asked.get("stream")),
        include_usage=isinstance(extra, dict) and bool(extra.get("include_usage")),
        id=f"{'chatcmpl' if chat else 'cmpl'}-{os.urandom(8).hex()}",
        created=int(time.time()),
    )


def _read_json(body: bytes) -> dict[str, Any]:
    try:
        asked = json.loads(body)
    except ValueError as error:
        text = f"{{'type': 'json_invalid', 'msg': 'JSON decode error', 'ctx': {{'error': '{error}'}}}}"
        raise Refused(400, f"1 validation error:\n  {text}", "Bad Request", "body") from None
    if not isinstance(asked, dict):
        text = "{'type': 'model_attributes_type', 'msg': 'Input should be a valid dictionary'}"
        raise Refused(400, f"1 validation error:\n  {text}", "Bad Request", "body")
    return asked


def _length(asked: dict[str, Any], options: Options, *, chat: bool) -> tuple[int, str]:
    """How many tokens the answer has, and why it ends there."""
    limit = asked.get("max_completion_tokens") if chat else None
    limit = asked.get("max_tokens") if limit is None else limit
    if limit is None:
        limit = len(ANSWER) if chat else _COMPLETION_TOKENS
    elif not isinstance(limit, int) or limit < 1:
        raise Refused(400, f"max_tokens must be at least 1, got {limit}.", "BadRequestError", "max_tokens")
    elif limit > options.max_model_len:
        message = f"max_tokens={limit} cannot be greater than max_model_len={options.max_model_len}."
        raise Refused(400, f"{message} Please request fewer output tokens.", "BadRequestError", "max_tokens")
    if limit < len(ANSWER) or asked.get("ignore_eos"):
        return limit, "length"
    return len(ANSWER), "stop"


def _count(prompt: object) -> int:
    """The tokens of a prompt: its words, or its numbers where it is tokenized already."""
    if isinstance(prompt, str):
        return len(prompt.split())
    if isinstance(prompt, list):
        return sum(_count(part) for part in prompt)
    if isinstance(prompt, dict):
        return _count(prompt.get("content") or prompt.get("text") or "")
    return 1


def token(number: int) -> str:
    """A word of the answer; an answer longer than its text begins again."""
    return ("" if number == 0 else " ") + ANSWER[number % len(ANSWER)]


def whole(call: Call) -> dict[str, object]:
    """The answer in one body."""
    text = "".join(token(number) for number in range(call.tokens))
    said: dict[str, object] = {"text": text}
    if call.chat:
        said = {"message": {"role": "assistant", "content": text, "refusal": None, "reasoning": None}}
    choice = {"index": 0, **said, "logprobs": None, "finish_reason": call.finish, "stop_reason": None}
    return call.head(chunk=False) | {"choices": [choice], "usage": call.usage()}


def opening(call: Call) -> dict[str, object]:
    """The first chunk of a streamed chat, which names the role."""
    return _chunk(call, {"delta": {"role": "assistant", "content": ""}}, None)


def part(call: Call, number: int) -> dict[str, object]:
    """The chunk of one token; the last one says why the answer ends."""
    text = token(number)
    finish = call.finish if number == call.tokens - 1 else None
    return _chunk(call, {"delta": {"content": text}} if call.chat else {"text": text}, finish)


def _chunk(call: Call, said: dict[str, object], finish: str | None) -> dict[str, object]:
    choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish}
    return call.head(chunk=True) | {"choices": [choice]}


def closing(call: Call) -> dict[str, object]:
    """The chunk with the usage, for those who asked for it."""
    return call.head(chunk=True) | {"choices": [], "usage": call.usage()}


def models(options: Options) -> dict[str, object]:
    """``/v1/models``."""
    created = int(time.time())
    base = {"object": "model", "created": created, "owned_by": "vllm", "root": options.model}
    cards = [{"id": name, **base, "parent": None, "max_model_len": options.max_model_len} for name in options.names]
    cards += [{"id": name, **base, "parent": options.names[0]} for name in options.lora_names]
    return {"object": "list", "data": cards}


def metrics(options: Options, counters: Counters, held_mib: int) -> str:
    """``/metrics``, of vLLM's those that tell about load, progress and capacity; all of it as engine 0's."""
    tokens = log.kv_cache_tokens(options, held_mib)
    labels = _labels({"engine": "0", "model_name": options.names[0]})
    lines: list[str] = []

    def add(name: str, kind: str, text: str, values: dict[str, float]) -> None:
        lines.extend((f"# HELP {name} {text}", f"# TYPE {name} {kind}"))
        lines.extend(f"{name}{{{inner}}} {float(value)}" for inner, value in values.items())

    for name, kind, text, value in (
        ("num_requests_running", "gauge", "Number of requests in model execution batches.", counters.running),
        ("num_requests_waiting", "gauge", "Number of requests waiting to be processed.", counters.waiting),
        ("kv_cache_usage_perc", "gauge", "KV-cache usage. 1 means 100 percent usage.", counters.kv_tokens / tokens),
        ("num_preemptions_total", "counter", "Cumulative number of preemption from the engine.", 0),
        ("prompt_tokens_total", "counter", "Number of prefill tokens processed.", counters.prompt_tokens),
        ("generation_tokens_total", "counter", "Number of generation tokens processed.", counters.generation_tokens),
    ):
        add(f"vllm:{name}", kind, text, {labels: value})
    ends = {
        _labels({"engine": "0", "finished_reason": reason, "model_name": options.names[0]}): getattr(counters, reason)
        for reason in ("stop", "length", "abort")
    }
    add("vllm:request_success_total", "counter", "Count of successfully processed requests.", ends)
    config = _labels(_cache_config(options, tokens, log.kv_cache_mib(options, held_mib)))
    add("vllm:cache_config_info", "gauge", "Information of the LLMEngine CacheConfig", {config: 1})
    return "\n".join(lines) + "\n"


def _cache_config(options: Options, tokens: int, kv_cache_mib: int) -> dict[str, str]:
    return {
        "block_size": str(_BLOCK_TOKENS),
        "cache_dtype": options.kv_cache_dtype,
        "enable_prefix_caching": str(options.enable_prefix_caching),
        "engine": "0",
        "gpu_memory_utilization": str(options.gpu_memory_utilization),
        "kv_cache_max_concurrency": str(tokens / options.max_model_len),
        "kv_cache_memory_bytes": str(kv_cache_mib << 20),
        "kv_cache_size_tokens": str(tokens),
        "num_gpu_blocks": str(tokens // _BLOCK_TOKENS),
    }


def _labels(pairs: dict[str, str]) -> str:
    def escaped(value: str) -> str:
        return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

    return ",".join(f'{name}="{escaped(value)}"' for name, value in pairs.items())
