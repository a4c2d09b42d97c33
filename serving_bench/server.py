"""Start `vllm serve`, wait until it answers, stop it; or look at an endpoint that already runs."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_sparsek.serving_bench import http
from vllm_sparsek.serving_bench.config import Arm
from vllm_sparsek.serving_bench.errors import BenchError
from vllm_sparsek.serving_bench.processes import Child, cause, tail, wait

# the `vllm` command of this interpreter, whatever is first on the PATH; not `-m`, which puts the
# working directory on the path: in a checkout that would hide the installed package
VLLM = (
    sys.executable,
    "-c",
    "import sys; sys.path.pop(0); from vllm.entrypoints.cli.main import main; main()",
)
HOST = "127.0.0.1"
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Endpoint:
    """What is measured: its address, and the model by the names that clients need.

    model: name in requests. tokenizer: name or folder the client loads the tokenizer from.
    max_model_len: longest context in tokens, if the endpoint says so.
    """

    base_url: str
    model: str
    tokenizer: str
    max_model_len: int | None


def free_port() -> int:
    """Return a TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    return port


def check_port(port: int) -> None:
    """Raise BenchError if a server could not listen on this port."""
    with socket.socket() as probe:
        # a port of a server that has just been stopped is free, though in TIME_WAIT
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise BenchError(
                f"port {port} cannot be used ({error}); leave out --port for a free one"
            ) from error


def serve_command(
    vllm: Sequence[str], model: str, arm: Arm, port: int, server_args: Sequence[str]
) -> list[str]:
    """Return the command line of one arm's server; what the user passed comes last and wins."""
    return [
        *vllm, "serve", model, "--host", HOST, "--port", str(port),
        *arm.vllm_args(), *server_args,
    ]  # fmt: skip


def died(child: Child, what: str) -> BenchError:
    """Return the error for a server or client that has ended by itself."""
    reason = cause(child.log)
    said = f": {reason}" if reason else ""
    return BenchError(f"{what} (exit status {child.returncode}){said} [log: {child.log}]")


def show_tail(log: Path, out: Callable[[str], None]) -> None:
    """Print the last lines of a log."""
    for line in tail(log):
        out(f"  | {line}")


def start(command: Sequence[str], arm: Arm, log: Path) -> Child:
    """Start a server and return at once. Raises BenchError if it cannot be started."""
    try:
        return Child(command, log, env={**os.environ, **arm.env})
    except OSError as error:
        raise BenchError(f"cannot start {command[0]}: {error}") from error


def wait_ready(child: Child, base_url: str, timeout: float, tick: Callable[[], None]) -> None:
    """Return when `/health` answers. Raises BenchError if the server dies or `timeout` s pass."""
    deadline = time.monotonic() + timeout
    while True:
        if child.returncode is not None:
            raise died(child, "the server died while starting")
        try:
            http.get(f"{base_url}/health")
        except http.HTTP_ERRORS:
            pass
        else:
            return
        if time.monotonic() >= deadline:
            raise BenchError(
                f"the server was not ready after {timeout:.0f} s, see --startup-timeout"
                f" [log: {child.log}]"
            )
        tick()
        wait(child, POLL_SECONDS)


def inspect(base_url: str, model: str | None = None) -> Endpoint:
    """Ask a running endpoint for its model. Raises BenchError if it does not answer.

    model: what the user named, a served name or the tokenizer's; None: the first one served.
    """
    try:
        cards = http.models(base_url)
    except http.HTTP_ERRORS as error:
        raise BenchError(f"no OpenAI-compatible endpoint answers at {base_url}: {error}") from error
    if not cards:
        raise BenchError(f"{base_url} serves no model")
    card = next((card for card in cards if model in (card.get("id"), card.get("root"))), cards[0])
    name = str(card.get("id"))
    length = card.get("max_model_len")
    return Endpoint(
        base_url=base_url,
        model=name,
        tokenizer=model or str(card.get("root") or name),
        max_model_len=length if isinstance(length, int) else None,
    )
