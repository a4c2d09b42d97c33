"""Child processes that never outlive us: each leads its own session, and its whole group is killed.

vLLM's engine runs in grandchildren, so killing the child alone would leave them on the GPU.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from vllm_sparsek.serving_bench.errors import Interrupted

# seconds between SIGTERM and SIGKILL: vLLM needs a few to shut its engine down in order
GRACE_SECONDS = 15.0
TAIL_LINES = 15

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_running: set[Child] = set()


class _Spawning:
    """Holds a signal back while a child is being started, until the child is registered.

    An exception between fork and registration would leave a child that nobody stops.
    """

    def __init__(self) -> None:
        self.active = False
        self.pending: int | None = None

    def __enter__(self) -> None:
        self.active = True

    def __exit__(self, *exc: object) -> None:
        self.active = False
        if self.pending is not None:
            signum, self.pending = self.pending, None
            raise Interrupted(signum)


_spawning = _Spawning()


class Child:
    """A subprocess in its own session, both outputs going to `log`.

    env: the complete environment. Raises OSError if the executable cannot be started.
    """

    def __init__(
        self, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.command = list(command)
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as stream, _spawning:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=None if env is None else dict(env),
                start_new_session=True,
            )
            _running.add(self)

    @property
    def pid(self) -> int:
        """Process id, which is also the id of the process group."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    def stop(self, grace: float = GRACE_SECONDS) -> None:
        """End the whole process group: SIGTERM, `grace` seconds, SIGKILL. Idempotent."""
        if self not in _running:
            return
        if self._process.poll() is None:
            self._signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=grace)
        # the leader may be gone and its children not: the group lives as long as one member does
        self._signal(signal.SIGKILL)
        self._process.wait()
        _running.discard(self)

    def _signal(self, signum: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signum)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


@atexit.register
def stop_all() -> None:
    """Stop every child that still runs."""
    for child in list(_running):
        child.stop(grace=2.0)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turn the first SIGINT, SIGTERM or SIGHUP into `Interrupted`, and ignore further ones.

    Further ones are ignored because they would cut short the clean-up, which is bounded anyway.
    """

    def handler(signum: int, frame: FrameType | None) -> None:
        for other in _STOP_SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        if _spawning.active:
            _spawning.pending = signum
        else:
            raise Interrupted(signum)

    # one that is ignored stays so: under nohup, a hang-up is not to stop us
    previous = {
        signum: signal.signal(signum, handler)
        for signum in _STOP_SIGNALS
        if signal.getsignal(signum) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        stop_all()
        for signum, old in previous.items():
            signal.signal(signum, old)


def wait(child: Child, seconds: float) -> bool:
    """Wait up to `seconds` for the child to end; return whether it has."""
    deadline = time.monotonic() + seconds
    while child.returncode is None:
        if time.monotonic() >= deadline:
            return False
        time.sleep(min(0.05, max(0.0, deadline - time.monotonic())))
    return True


def shown(command: Sequence[str]) -> list[str]:
    """Return a command line for the record: the interpreter by name, not by its place."""
    return ["python" if part == sys.executable else part for part in command]


def tail(log: Path, lines: int = TAIL_LINES) -> list[str]:
    """Return the last lines of a log that are not blank."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()][-lines:]


# "(EngineCore pid=7) ERROR 11-20 06:31:09 [core.py:72] "
_PREFIX = re.compile(
    r"^(?:\([^)]*pid=\d+\)\s*)?(?:[A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d (?:\.\.\./)?\[[^\]]*\] ?)?"
)
_EXCEPTION = re.compile(r"^(?:[\w.]+\.)?\w*(?:Error|Exception|Refused|Failure)\b(?::|$)")
_USAGE = re.compile(r"^\S+(?: \w+)*: error: ")
# what vLLM's front end says when the engine has already said why
_GENERIC = re.compile(r"Engine core initialization failed|EngineDeadError|WorkerProc init.* failed")
_DETAIL = re.compile(r"^ +(?:Value error|Assertion failed), (.*?)(?: \[type=.*)?$")


def cause(log: Path) -> str | None:
    """Return the line of a vLLM log that says why it died, or None.

    The last exception that is not the front end's echo of another one; of pydantic's, the detail
    line that follows.
    """
    found: str | None = None
    echo: str | None = None
    for raw in tail(log, lines=2000):
        line = _PREFIX.sub("", raw)
        detail = _DETAIL.match(line)
        if detail and found and "validation error" in found:
            found = detail.group(1)
        elif _USAGE.match(line) or _EXCEPTION.match(line):
            if _GENERIC.search(line):
                echo = line
            else:
                found = line
    return found or echo
