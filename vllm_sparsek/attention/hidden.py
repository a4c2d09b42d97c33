"""Hidden states for scorers that read them.

An attention implementation sees queries, keys and values only. So the projection that makes them
keeps its input in one buffer that all layers share: a layer reads it before the next overwrites
it. Keeping is an operator of its own, so that torch.compile traces it and CUDA graphs hold it. It
claims to change the projection's output, which orders it before the layer's attention and
protects it from being removed; without a layer's name, all layers still compile to one graph.
"""

from __future__ import annotations

from typing import Any

import torch

_LIBRARY = torch.library.Library("sparsek", "FRAGMENT")
_LIBRARY.define("keep_hidden(Tensor hidden, Tensor(a!) projected) -> ()")


class HiddenStates:
    """The hidden states of the step and layer that run now.

    Attributes:
        rows: [tokens, E] in the model's dtype.
        kept: whether something was kept since it was last asked for.
    """

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows
        self.kept = False

    def require_kept(self, layer_name: str) -> None:
        """Raise RuntimeError if the layer's projection kept nothing in its first run."""
        if not self.kept:
            raise RuntimeError(
                f"sparsek: the hidden states of {layer_name}, which the scorer reads, do not "
                "arrive: a compiled graph of another start was used. Set "
                "VLLM_DISABLE_COMPILE_CACHE=1, or use a scorer of key and value."
            )
        self.kept = False


# by hidden size and device; all layers of a process share a buffer
_buffers: dict[tuple[int, torch.device], HiddenStates] = {}


def _keep_hidden(hidden: torch.Tensor, projected: torch.Tensor) -> None:
    width = hidden.shape[-1]
    hidden = hidden.reshape(-1, width)
    buffer = _buffers[width, hidden.device]
    buffer.rows[: hidden.shape[0]].copy_(hidden)
    buffer.kept = True


def _keep_nothing(hidden: torch.Tensor, projected: torch.Tensor) -> None:
    """What tracing sees."""


_LIBRARY.impl("keep_hidden", _keep_hidden, "CompositeExplicitAutograd")
torch.library.register_fake("sparsek::keep_hidden", _keep_nothing, lib=_LIBRARY)


def keep_input(
    projection: torch.nn.Module,
    tokens: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
) -> HiddenStates:
    """Let a projection keep its input, from now on.

    Args:
        projection: maps hidden states [T, E] to queries (and keys and values); returns a
            tensor, or a tuple that begins with it.
        tokens: most tokens of a step.
        width: E; dtype, device: of the model's hidden states.

    Returns:
        Where the input is, valid until the next projection runs.
    """
    key = (width, device)
    found = _buffers.get(key)
    if found is None or found.rows.shape[0] < tokens or found.rows.dtype != dtype:
        # an earlier engine of this process has gone by now
        _buffers[key] = HiddenStates(torch.zeros(tokens, width, dtype=dtype, device=device))

    def keep(module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        projected = output[0] if isinstance(output, tuple) else output
        torch.ops.sparsek.keep_hidden(inputs[0], projected)

    projection.register_forward_hook(keep)
    return _buffers[key]
