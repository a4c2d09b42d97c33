"""Work beside the current CUDA stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SideStream:
    """A CUDA stream for kernels that the current one need not wait for at once.

    It begins behind what the current stream was given before, and ends with an event. A CUDA graph
    that is captured meanwhile holds both branches if the current stream waits for the event.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)

    @contextmanager
    def use(self) -> Iterator[torch.cuda.Event]:
        """Launch the block's kernels beside; the event that is given is recorded at its end."""
        done = torch.cuda.Event()
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            yield done
            done.record()
