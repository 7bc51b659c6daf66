"""HTTP for the API server: one thread a connection, and of the protocol what clients of vLLM use.

Its own, and not the standard library's, whose import alone takes as long as the whole start may take.
"""

from __future__ import annotations

import hmac
import json
import os
import select
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO

from sage_reconcile.simulator import engine, log, protocol
from sage_reconcile.simulator.flags import Options
from sage_reconcile.simulator.protocol import Call, Refused
from sage_reconcile.simulator.scheduler import ClientGone, Draining, EngineDead, Scheduler

GUARDED = ("/v1", "/v2", "/inference", "/cohere")
"""Where vLLM asks for the API key; everything else is open."""
_ROUTES = {
    "/health": ("GET",),
    "/ping": ("GET", "POST"),
    "/version": ("GET",),
    "/metrics": ("GET",),
    "/v1/models": ("GET",),
    "/v1/chat/completions": ("POST",),
    "/v1/completions": ("POST",),
}
_PHRASES = {
    200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 405: "Method Not Allowed",
    500: "Internal Server Error", 503: "Service Unavailable",
}  # fmt: skip
_KEEP_ALIVE_S = 5.0
_LONGEST_LINE = 1 << 16
_MOST_HEADERS = 256
_BACKLOG = 2048


@dataclass(frozen=True, slots=True)
class _Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class Server:
    """Answers on a socket that is bound already."""

    def __init__(self, bound: socket.socket, options: Options, scheduler: Scheduler) -> None:
        self.bound = bound
        self.options = options
        self.scheduler = scheduler
        self.keys = [key.encode() for key in options.api_keys or (os.environ.get("VLLM_API_KEY", ""),) if key]
        self.held_mib = engine.held_mib(options)

    def start(self) -> None:
        """Accept connections from now on; until now they were refused."""
        self.bound.listen(_BACKLOG)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                accepted, address = self.bound.accept()
            except OSError:  # one client that left at once, or no descriptors left: the others shall be served
                time.sleep(0.01)
                continue
            peer = f"{address[0]}:{address[1]}" if isinstance(address, tuple) else ""
            threading.Thread(target=_Connection(self, accepted, peer).run, daemon=True).start()


class _Connection:
    """One client's connection."""

    def __init__(self, server: Server, accepted: socket.socket, peer: str) -> None:
        self.server = server
        self.socket = accepted
        self.peer = peer
        self.head_sent = False
        self._hangup = select.poll()
        self._hangup.register(accepted, select.POLLRDHUP)

    def run(self) -> None:
        """Serve requests until either side has had enough."""
        self.socket.settimeout(_KEEP_ALIVE_S)
        if self.socket.family != socket.AF_UNIX:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with suppress(OSError, ClientGone), self.socket, self.socket.makefile("rb") as stream:
            while (request := self._read(stream)) is not None:
                self.head_sent = False
                self._answer(request)
                if request.headers.get("connection", "").lower() == "close":
                    return

    def gone(self) -> bool:
        """Whether the client has closed its side."""
        return bool(self._hangup.poll(0))

    def _read(self, stream: BinaryIO) -> _Request | None:
        """The next request; None at the end, also where what comes is not HTTP."""
        words = stream.readline(_LONGEST_LINE).decode("latin-1").split()
        if len(words) != 3:
            return None
        headers: dict[str, str] = {}
        while (line := stream.readline(_LONGEST_LINE).decode("latin-1").strip()) and len(headers) < _MOST_HEADERS:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        if headers.get("expect", "").lower() == "100-continue":
            self.socket.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        length = headers.get("content-length", "0")
        body = stream.read(int(length)) if length.isdecimal() else b""
        return _Request(words[0], words[1].partition("?")[0], headers, body)

    def _answer(self, request: _Request) -> None:
        try:
            self._route(request)
        except Refused as refused:
            self._send(request, refused.status, refused.body())
        except Draining:
            self._fail(request, "cannot schedule new futures after shutdown")
        except EngineDead:
            self._fail(request, "EngineCore encountered an issue. See stack trace (above) for the root cause.")

    def _fail(self, request: _Request, message: str) -> None:
        error = Refused(500, message, "InternalServerError").body()
        if self.head_sent:  # in the middle of a stream the status is said already: an error event, and the end
            self._event(json.dumps(error))
            self._event("[DONE]")
            self._chunk(b"")
        else:
            self._send(request, 500, error)

    def _route(self, request: _Request) -> None:
        if request.path.startswith(GUARDED) and not self._authorized(request):
            self._send(request, 401, {"error": "Unauthorized"})
        elif request.path not in _ROUTES:
            self._send(request, 404, {"detail": "Not Found"})
        elif request.method not in _ROUTES[request.path]:
            self._send(request, 405, {"detail": "Method Not Allowed"})
        elif request.path.endswith("completions"):
            self._complete(request, chat="chat" in request.path)
        else:
            self._inform(request)

    def _authorized(self, request: _Request) -> bool:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        keys = self.server.keys
        fits = [hmac.compare_digest(given.encode(), key) for key in keys]
        return not keys or (scheme.lower() == "bearer" and any(fits))

    def _inform(self, request: _Request) -> None:
        options, scheduler = self.server.options, self.server.scheduler
        match request.path:
            case "/metrics":
                text = protocol.metrics(options, scheduler.counters, self.server.held_mib)
                self._send(request, 200, text, "text/plain; version=0.0.4; charset=utf-8")
            case "/version":
                self._send(request, 200, {"version": log.VERSION})
            case "/v1/models":
                self._send(request, 200, protocol.models(options))
            case _:
                self._send(request, 503 if scheduler.dead.is_set() else 200, "")

    def _complete(self, request: _Request, *, chat: bool) -> None:
        call = protocol.read_call(request.body, self.server.options, chat=chat)
        scheduler = self.server.scheduler
        finish = "abort"
        try:
            with scheduler.request(call.prompt_tokens, self.gone) as tokens:
                if call.stream:
                    self._begin_stream(request, call)
                for number, _ in zip(range(call.tokens), tokens, strict=False):
                    if call.stream:
                        self._event(json.dumps(protocol.part(call, number)))
                if call.stream:
                    self._end_stream(call)
                else:
                    self._send(request, 200, protocol.whole(call))
            finish = call.finish
        finally:
            scheduler.count_end(finish)

    def _begin_stream(self, request: _Request, call: Call) -> None:
        self._head(request, 200, "content-type: text/event-stream; charset=utf-8", "transfer-encoding: chunked")
        if call.chat:
            self._event(json.dumps(protocol.opening(call)))

    def _end_stream(self, call: Call) -> None:
        if call.include_usage:
            self._event(json.dumps(protocol.closing(call)))
        self._event("[DONE]")
        self._chunk(b"")

    def _event(self, data: str) -> None:
        self._chunk(f"data: {data}\n\n".encode())

    def _chunk(self, data: bytes) -> None:
        self.socket.sendall(b"%x\r\n%s\r\n" % (len(data), data))

    def _send(self, request: _Request, status: int, body: object, kind: str = "application/json") -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body, separators=(",", ":")).encode()
        fields = [f"content-length: {len(data)}", *([f"content-type: {kind}"] if data else [])]
        self._head(request, status, *fields, body=data)

    def _head(self, request: _Request, status: int, *fields: str, body: bytes = b"") -> None:
        self.head_sent = True
        phrase = f"{status} {_PHRASES[status]}"
        if self.server.options.access_log:
            log.write(1, f'INFO:     {self.peer} - "{request.method} {request.path} HTTP/1.1" {phrase}\n')
        date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())
        lines = [f"HTTP/1.1 {phrase}", f"date: {date}", "server: uvicorn", *fields, "", ""]
        self.socket.sendall("\r\n".join(lines).encode("latin-1") + body)
