"""What dense attention looks at: keys, values and attention mass of every layer for one window.

The model runs frozen in transformers with an attention function of ours, so any architecture
whose attention goes through transformers' attention interface can be captured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

NAME = "sparsek_capture"
# elements of one tile of attention probabilities, [H, G, queries, keys] float32
TILE = 1 << 24


@dataclass(frozen=True)
class Layer:
    """One layer's view of one window of n tokens.

    Attributes:
        key, value: [H, n, D] in the model's dtype; keys are rotated.
        hidden: [n, E] input of the layer's projections, or None if not asked for.
        mass: [S, H, n] float32: attention that the queries of segment s pay, on average over
            its queries and the heads of the group, to tokens at least ``gap`` before them.
        answers: [H, n] float32: the highest attention that any answer pays, on average over
            its queries, of the head of the group that pays most; 0 in windows without questions.
        query, output: [Hq, m, D] in the model's dtype, queries at the positions ``at`` [m] and
            what attention returns for them; None, all three, if not asked for.
    """

    key: torch.Tensor
    value: torch.Tensor
    hidden: torch.Tensor | None
    mass: torch.Tensor
    answers: torch.Tensor
    query: torch.Tensor | None = None
    at: torch.Tensor | None = None
    output: torch.Tensor | None = None


@dataclass(frozen=True)
class CaptureSettings:
    """How attention mass is measured.

    Attributes:
        segment: query positions a segment; stride: every stride-th query is measured.
        gap: least distance of a token that counts: the window reads nearer ones anyway.
        hidden: also keep the layers' inputs.
        queries: also keep every so-many-th query and those that predict answers; 0: none.
    """

    segment: int = 1024
    stride: int = 16
    gap: int = 512
    hidden: bool = False
    queries: int = 0


class Capture:
    """Runs windows through a model of ``load_model``."""

    def __init__(self, model: Any, settings: CaptureSettings) -> None:
        self.model = model
        self.settings = settings

    def run(self, ids: list[int], answers: list[tuple[int, int]]) -> dict[int, Layer]:
        """Every full-attention layer's view of one window.

        Args:
            ids: token ids.
            answers: (first, end) positions of the queries that predict each answer.
        """
        found: dict[int, Layer] = {}
        at = None
        if self.settings.queries:
            chosen = {*range(0, len(ids), self.settings.queries)}
            chosen.update(position for answer in answers for position in range(*answer))
            at = torch.tensor(sorted(chosen), device=self.model.device)

        with layer_inputs(self.model, self.settings.hidden) as inputs:

            def keep(
                layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                scale: float,
            ) -> None:  # fmt: skip
                found[layer] = Layer(
                    key=key.clone(),
                    value=value.clone(),
                    hidden=inputs.pop(layer, None),
                    mass=segment_mass(query, key, scale, self.settings),
                    answers=answer_attention(query, key, scale, answers, self.settings.gap),
                    **({} if at is None else sampled_attention(query, key, value, scale, at)),
                )

            with attention_hook(keep), torch.inference_mode():
                tokens = torch.tensor(ids, device=self.model.device)[None]
                self.model.get_decoder()(input_ids=tokens, use_cache=False)
        return found


def attention_layers(model: Any) -> dict[int, Any]:
    """The model's attention modules by layer index."""
    return {
        module.layer_idx: module
        for module in model.modules()
        if hasattr(module, "layer_idx") and hasattr(module, "o_proj")
    }


@contextmanager
def layer_inputs(model: Any, wanted: bool = True) -> Iterator[dict[int, torch.Tensor]]:
    """Inputs [n, E] of attention layers by layer index, as they run; empty if not ``wanted``."""
    inputs: dict[int, torch.Tensor] = {}

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        inputs[module.layer_idx] = hidden[0]

    handles = [
        module.register_forward_pre_hook(keep, with_kwargs=True)
        for module in (attention_layers(model).values() if wanted else ())
    ]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def outputs_kept(model: Any) -> Iterator[list[Any]]:
    """Outputs of the decoder's layers, in order, as they run."""
    outputs: list[Any] = []
    handles = [
        layer.register_forward_hook(lambda module, args, output: outputs.append(output))
        for layer in model.get_decoder().layers
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def outputs_replayed(model: Any, outputs: list[Any], first: int) -> Iterator[None]:
    """Let the layers before ``first`` return ``outputs`` instead of running."""
    replaced = list(model.get_decoder().layers)[:first]
    for layer, output in zip(replaced, outputs, strict=False):
        layer.forward = lambda *args, _output=output, **kwargs: _output
    try:
        yield
    finally:
        for layer in replaced:
            del layer.forward


@contextmanager
def layers_recomputed(model: Any) -> Iterator[None]:
    """Let backward passes run the decoder's layers again instead of keeping what is in them."""
    layers = list(model.get_decoder().layers)
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


# (layer, query [Hq, n, D], key, value [H, n, D], scale) -> [Hq, n, D], or None: attend densely
Hook = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor | None]
_hooks: list[Hook] = []


@contextmanager
def attention_hook(hook: Hook) -> Iterator[None]:
    """Let ``hook`` see, and if it returns something replace, attention of models of ``load_model``.

    Layers with a sliding window are left out.
    """
    _hooks.append(hook)
    try:
        yield
    finally:
        _hooks.remove(hook)


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of one unpadded window: query [1, Hq, n, D], key, value [1, H, n, D]."""
    n, scale = query.shape[2], scaling if scaling is not None else query.shape[-1] ** -0.5
    mask = None
    if sliding_window is not None and sliding_window < n:
        # such layers are left to vLLM's own backend: nothing to learn about them
        distance = torch.arange(n, device=query.device)
        distance = distance[:, None] - distance
        mask = (distance >= 0) & (distance < sliding_window)
    else:
        for hook in _hooks:
            replaced = hook(module.layer_idx, query[0], key[0], value[0], scale)
            if replaced is not None:
                return replaced.transpose(0, 1)[None], None
    group = query.shape[1] // key.shape[1]
    out = F.scaled_dot_product_attention(
        query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1),
        attn_mask=mask, is_causal=mask is None, scale=scale,
    )  # fmt: skip
    return out.transpose(1, 2), None


def load_model(folder: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A frozen causal language model whose attention can be captured."""
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=NAME)
    return model.to(device).eval().requires_grad_(False)


def _probabilities(
    query: torch.Tensor, key: torch.Tensor, scale: float, at: torch.Tensor
) -> torch.Tensor:
    """Attention of the queries at positions ``at`` [m]: [H, G, m, last + 1] float32."""
    heads, head_dim = key.shape[0], key.shape[2]
    end = int(at[-1]) + 1
    group = query.shape[0] // heads
    q = query.view(heads, group, -1, head_dim)[:, :, at].flatten(1, 2)
    logits = (q @ key[:, :end].transpose(1, 2)).float().mul_(scale)
    logits = logits.view(heads, group, len(at), end)
    future = torch.arange(end, device=key.device) > at[:, None]
    return logits.masked_fill_(future, float("-inf")).softmax(-1)


def segment_mass(
    query: torch.Tensor, key: torch.Tensor, scale: float, settings: CaptureSettings
) -> torch.Tensor:
    """See ``Layer.mass``. query: [Hq, n, D], key: [H, n, D]; returns [S, H, n] float32."""
    heads, n, _ = key.shape
    segments = -(-n // settings.segment)
    mass = torch.zeros(segments, heads, n, device=key.device)
    tokens = torch.arange(n, device=key.device)
    rows = max(1, TILE // (query.shape[0] * n))
    for s in range(segments):
        at = tokens[s * settings.segment : (s + 1) * settings.segment : settings.stride]
        for part in at.split(rows):
            end = int(part[-1]) + 1
            far = part[:, None] - tokens[:end] >= settings.gap
            p = _probabilities(query, key, scale, part).mul_(far)
            mass[s, :, :end] += p.mean(1).sum(1) / len(at)
    return mass


def answer_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    answers: list[tuple[int, int]],
    gap: int,
) -> torch.Tensor:
    """See ``Layer.answers``. query: [Hq, n, D], key: [H, n, D]; returns [H, n] float32."""
    heads, n, _ = key.shape
    best = torch.zeros(heads, n, device=key.device)
    tokens = torch.arange(n, device=key.device)
    for first, end in answers:
        at = tokens[first:end]
        p = _probabilities(query, key, scale, at).mul_(at[:, None] - tokens[:end] >= gap)
        # over the group the highest: one head of it that retrieves is enough
        best[:, :end] = torch.maximum(best[:, :end], p.amax(1).mean(1))
    return best


def sampled_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, at: torch.Tensor
) -> dict[str, torch.Tensor]:
    """See ``Layer.query``. query: [Hq, n, D]; key, value: [H, n, D]; at: [m] ascending."""
    p = _probabilities(query, key, scale, at).flatten(1, 2).to(value.dtype)
    output = (p @ value[:, : p.shape[2]]).view(query.shape[0], len(at), -1)
    return {"query": query[:, at], "at": at.clone(), "output": output}
