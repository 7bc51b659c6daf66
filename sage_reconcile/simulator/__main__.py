"""The API server: binds, starts the engine, answers, and ends as vLLM's does."""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import time
from types import FrameType

from sage_reconcile.simulator import engine, log
from sage_reconcile.simulator.engine import Child
from sage_reconcile.simulator.flags import Options, parse
from sage_reconcile.simulator.scheduler import Scheduler
from sage_reconcile.simulator.server import Server

_LOOK_S = 0.01
"""How often a server that ends looks whether its last requests are done."""


class StartRefused(Exception):
    """The server ends before it is ready; the message is the exception that vLLM would print."""


class Leader:
    """The API server, leader of the process tree."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.lines = log.Log("APIServer")
        self.cores: list[Child] = []
        self.scheduler = Scheduler(options, [])
        self.asked_read, self.asked_write = os.pipe()

    def run(self) -> int:
        """From the banner to the end; returns the exit code."""
        log.banner(self.lines, self.options)
        try:
            bound, address = self._bind()
            # From here until it is ready a SIGTERM is lost; Ctrl-C is not.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            for index in range(self.options.data_parallel_size):
                self.cores.append(engine.start_core(self.options, index))
            self._await_cores()
            self._serve(bound, address)
            return self._stay()
        except StartRefused as refused:
            self.lines.raised(str(refused))
            return 1
        except KeyboardInterrupt:
            engine.stop_cores(self.options, self.cores)
            return 130

    def _bind(self) -> tuple[socket.socket, str]:
        """Take the port long before anybody can connect to it, as vLLM does."""
        options = self.options
        where: str | tuple[str, int] = options.uds or (options.host, options.port)
        address = f"unix:{options.uds}"
        family = socket.AF_UNIX
        if not options.uds:
            family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
            host = f"[{options.host}]" if ":" in options.host else options.host or "0.0.0.0"  # noqa: S104
            address = f"http://{host}:{options.port}"
        bound = socket.socket(family)
        if not options.uds:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind(where)
        except OSError as error:
            raise StartRefused(f"{type(error).__name__}: {error}") from None
        return bound, address

    def _await_cores(self) -> None:
        waiting = {core.status: core for core in self.cores}
        while waiting:
            for status in self._wait(None, list(waiting)):
                core = waiting.pop(status)
                if os.read(status, 1) != engine.READY:
                    engine.stop_cores(self.options, self.cores)
                    text = "Engine core initialization failed. See root cause above."
                    raise StartRefused(f"RuntimeError: {text} Failed core proc(s): {{'{core.name}': 1}}")

    def _serve(self, bound: socket.socket, address: str) -> None:
        self.scheduler = Scheduler(self.options, [core.pid for core in self.cores])
        server = Server(bound, self.options, self.scheduler)
        if not self.options.ignore_sigterm:
            signal.signal(signal.SIGTERM, self._asked)
        signal.signal(signal.SIGINT, self._asked)
        self.lines.info("entry.py:140", f"Starting vLLM server on {address}")
        log.uvicorn(f"Started server process [{os.getpid()}]")
        log.uvicorn("Waiting for application startup.")
        log.uvicorn("Application startup complete.")
        try:
            server.start()
        except OSError as error:
            # Binding reserves nothing from others who bind as we do: of two that load at once, the second to
            # listen learns of it only here.
            engine.stop_cores(self.options, self.cores)
            raise StartRefused(f"{type(error).__name__}: {error}") from None

    def _asked(self, _signal: int, _frame: FrameType | None) -> None:
        os.write(self.asked_write, b"!")

    def _stay(self) -> int:
        """Be there until asked to end, or until the engine dies, or the time for an exit on demand has come."""
        due_s = self.options.exit_after_s if self.options.fail == "exit" else None
        statuses = [core.status for core in self.cores]
        said = self._wait(due_s, [self.asked_read, *statuses])
        if not said:
            engine.stop_cores(self.options, self.cores)
            return self.options.exit_code
        if self.asked_read in said:
            return self._end(statuses)
        return self._die()

    def _die(self) -> int:
        """The engine is dead: unhealthy at once, and gone a little later, with 0 as if all were well."""
        self.scheduler.dead.set()
        dead = "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue."
        self.lines.error("async_llm.py:829", "AsyncLLM output_handler failed.", f"{dead} See stack trace (above).")
        time.sleep(self.options.death_s)
        self._close()
        return 0

    def _end(self, statuses: list[int]) -> int:
        """End as asked: at once when idle, else after the requests in flight or the time given to them."""
        timeout_s = self.options.shutdown_timeout
        mode = "drain" if timeout_s else "abort"
        self.lines.info("launcher.py:262", "[shutdown] API server: shutdown triggered")
        self.lines.info(
            "launcher.py:276", f"[shutdown] API server: stopping engine client mode={mode} timeout={timeout_s:g}s"
        )
        self.scheduler.draining = True
        ends = time.monotonic() + timeout_s
        while not self.scheduler.idle and time.monotonic() < ends:
            if self._wait(_LOOK_S, statuses):
                return self._die()
        if not self.scheduler.idle and not timeout_s:
            # vLLM kills the engine under its requests, and then waits for clients that wait for it.
            self.scheduler.hanging = True
            engine.stop_cores(self.options, self.cores)
            self.cores.clear()
            while not self.scheduler.idle:
                time.sleep(_LOOK_S)
        self._close()
        return 0

    def _close(self) -> None:
        log.uvicorn("Shutting down")
        engine.stop_cores(self.options, self.cores)
        log.uvicorn(f"Finished server process [{os.getpid()}]")

    def _wait(self, seconds: float | None, descriptors: list[int]) -> list[int]:
        """Those of the pipes that have something to say, or have ended."""
        poll = select.poll()
        for descriptor in descriptors:
            poll.register(descriptor, select.POLLIN)
        return [descriptor for descriptor, _ in poll.poll(None if seconds is None else seconds * 1000)]


def main() -> None:
    """Run the server that the command line describes."""
    code = Leader(parse(sys.argv[1:])).run()
    # Threads may still be talking to clients: they end here and now.
    os._exit(code)


if __name__ == "__main__":
    main()
