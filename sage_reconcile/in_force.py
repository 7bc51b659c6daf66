"""Which content of the file is in force: read, refused, held back, confirmed.

A content that cannot be used changes nothing, and one that the guard holds back does not either: what was in force
before stays, also over a restart of the daemon and of the machine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from sage_reconcile.core.events import EventType
from sage_reconcile.core.guard import Stops, held_text
from sage_reconcile.core.spec import Desired
from sage_reconcile.errors import FileFaults, StateError
from sage_reconcile.host import files
from sage_reconcile.host.files import Loaded
from sage_reconcile.host.state import Held, StateFolder
from sage_reconcile.telling import Teller


class InForce:
    """The file as a daemon follows it.

    ``desired`` is in force, with its ``generation``. ``offered`` is another valid content that is not in force yet;
    where ``held`` is set it shall not be until a person confirms it. ``error`` says what is wrong with the file.
    """

    def __init__(self, file: Path, state: StateFolder, environ: Mapping[str, str], teller: Teller) -> None:
        self.file = file
        self.state = state
        self.environ = environ
        self.teller = teller
        self.log = teller.log
        self.desired: Desired | None = None
        self.generation = 0
        self.offered: Loaded | None = None
        self.held: Held | None = None
        self.error = ""
        self._signatures: object = None
        self._also: tuple[Path, ...] = ()

    @property
    def latest(self) -> Desired | None:
        """What the file says now, in force or not."""
        return self.offered.desired if self.offered else self.desired

    def stirred(self) -> bool:
        """Whether the file, or one that it names, may have another content than was read."""
        return self._now() != self._signatures

    def read_again(self) -> None:
        """Makes the next ``read`` read, whatever it looks like."""
        self._signatures = None

    def _now(self) -> tuple[tuple[int, ...], ...]:
        return tuple(files.signature(path) for path in (self.file, *self._also))

    def restore(self) -> None:
        """Puts in force what was when the daemon before ended."""
        known = self.state.read_json("generation.json")
        if known.get("file") != str(self.file):
            return
        with contextlib.suppress(OSError, FileFaults):
            text = (self.state.path / "last-good.yaml").read_text(encoding="utf-8")
            self.desired = files.load_text(text, self.file, self.environ).desired
            self.generation = self.state.generation(self.desired.digest)[0]
            self.log.info("last good file in force", generation=self.generation)

    def read(self) -> None:
        """Takes in the file where it may be another one: a content that is in force already, or one that is offered."""
        signatures = self._now()
        if signatures == self._signatures:
            return
        self._signatures = signatures
        try:
            loaded = files.load(self.file, self.environ)
        except FileFaults as error:
            if self.error != str(error):
                faults = str(error).splitlines()
                self.teller.tell(EventType.FILE_REFUSED, faults[0], faults=faults, kept=self.generation)
            self.error = str(error)
            self.offered = self.held = None
            return
        self.error = ""
        self._also = loaded.env_files
        self._signatures = self._now()
        self.offered = loaded
        before, self.held = self.held, self.state.held(self.file, loaded.desired.digest)
        if self._is_known(loaded.desired.digest):
            self.accept()
        elif self.held and self.held != before:
            self._tell(self.held)

    def _is_known(self, digest: str) -> bool:
        """Whether it is in force already: by the state folder, or, after a crash half way, by its copy alone."""
        same_file = self.state.read_json("generation.json").get("file") == str(self.file)
        in_force = self.desired is not None and self.desired.digest == digest
        return in_force or (same_file and self.state.generation(digest)[1])

    def accept(self) -> None:
        """Puts in force what is offered, before anything of it is done.

        Raises:
            StateError: it cannot be put on record; it is in force all the same.
        """
        confirmed = self.held is not None
        loaded, self.offered, self.held = self.offered, None, None
        assert loaded is not None, "only what was offered is accepted"
        self.desired = loaded.desired
        self.generation = self.state.accept(self.file, loaded.desired.digest, loaded.text)
        count, number = len(loaded.desired.engines), self.generation
        if confirmed:
            self.teller.tell(EventType.FILE_CONFIRMED, "it was held back", generation=number)
        self.teller.tell(EventType.FILE_ACCEPTED, f"generation {number}", generation=number, engines=count)

    def hold(self, stops: Stops, now: float) -> None:
        """Holds back what is offered; where that cannot be put on record, as long as this process lives."""
        assert self.offered is not None, "only what was offered is held back"
        desired = self.offered.desired
        self.held = Held(desired.digest, str(self.file), stops.replicas, stops.running, str(desired.host.guard), now)
        self._tell(self.held)
        try:
            self.state.hold(self.held)
        except StateError as error:
            self.log.error("not put on record", error=str(error))  # noqa: TRY400 - the message says it all

    def _tell(self, held: Held) -> None:
        why = held_text(held.replicas, held.running, held.guard)
        confirm = "sage-reconcile apply"
        self.teller.tell(EventType.FILE_HELD_BACK, why, reason=why, kept=self.generation, confirm=confirm)
