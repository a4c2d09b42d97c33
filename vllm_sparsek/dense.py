"""Sparse attention over plain ``[B, H, S, D]`` tensors, without vLLM and without a paged cache.

The kernels are the backend's: a row of the batch is one block of the cache, as long as its
context, so nothing is copied while keys and values lie alike.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from vllm_sparsek.config import SparseKConfig
from vllm_sparsek.kernels.common.dispatch import (
    ENGINES,
    check_shape,
    check_tensor,
    implementation,
)
from vllm_sparsek.kernels.common.validate import FLOATS
from vllm_sparsek.kernels.prefill import api as prefill_api
from vllm_sparsek.kernels.select import api as select_api
from vllm_sparsek.kernels.select.chunk import row_bases
from vllm_sparsek.scorers import scorer_class

# tokens of a unit at granularity ``page``: vLLM's block on CUDA
PAGE = 16
# the scorer where the settings leave the choice open: no file, no query of a decode step
DEFAULT_SCORER = "keydiff"
# bytes of selection lists held at once
SELECTION_BYTES = 256 << 20
# settings that are about serving, and the values that say nothing
SERVING_ONLY: dict[str, tuple[Any, ...]] = {
    "prefill": ("auto", "sparse"), "dense_until": ("auto", 0), "dense_layers": ((),),
    "layer_budgets": ("auto", "uniform"),
}  # fmt: skip


def attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scores: torch.Tensor | None = None,
    config: SparseKConfig | Mapping[str, Any] | None = None,
    causal: bool = True,
    scale: float | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """SparseK attention, forward only (Lou, Jia, Zheng, Tu, arXiv 2406.16747).

    Every query reads the sinks, the window and the ``k`` tokens per KV head that score highest
    among those that left the window. While a context fits that budget, this is
    ``scaled_dot_product_attention``, which then also runs. Once a shape has been seen, nothing
    waits for the device. No tensor is copied, but for k and v on a GPU where their rows are no
    whole number of tokens apart, the same one in both.

    Args:
        q: [B, Hq, Sq, D] float16, bfloat16, float32 (or float64 on the CPU). Any strides, the
            last one 1, here and below. With Sq < Skv the queries are the last Sq positions.
        k, v: [B, Hkv, Skv, D] of q's dtype; Hq is a multiple of Hkv.
        scores: [B, Hkv, Skv] float32, how much every token is worth keeping; no NaN. None: of
            the settings' training-free scorer, computed here from ``k`` in plain torch; compute
            them once and pass them where time counts.
        config: a ``SparseKConfig`` or a mapping of its keys, e.g. ``{"k": 512, "window": 256}``;
            None: the defaults. At granularity ``page``, pages are 16 tokens. The scorer ``auto``
            is ``keydiff`` here. Environment variables are not read.
        causal: must be True: what a query reads is defined by what came before it.
        scale: softmax scale; None: D ** -0.5.
        impl: auto, triton, cpu or reference, as for every kernel, or an engine that attends while
            our kernels select: fa3 (FlashAttention-3) or hopper (ours for compute capability 9.0).

    Returns:
        [B, Hq, Sq, D] of q's dtype and, where q is dense in memory, q's strides.

    Raises:
        ValueError, TypeError: an argument, named in the message, does not fit.
        SparseKConfigError: a setting cannot be used.
        RuntimeError: a gradient would be needed, or ``impl`` cannot run here.
    """
    _check(q, k, v, scores, causal)
    settings = resolve_settings(config, scored=scores is not None)
    batch, heads, keys, head_dim = k.shape
    queries = q.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    if q.numel() == 0:
        return torch.empty_like(q)
    budget = settings.budget(PAGE)
    if impl == "auto" and queries == keys and budget.is_dense(keys - 1):
        grouped = q.shape[1] != heads
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=grouped
        )
    last = budget.selection_position(keys - 1)
    competing = budget.units_competing(last)
    width = max(1, min(budget.units_kept(last), competing))
    soft = settings.mode == "soft_v"
    shape_key = batch, queries, keys, budget.refresh, q.device
    row, position, start, length, table = _items(*shape_key)
    select_impl = "auto" if impl in ENGINES["prefill"] else impl
    module = implementation("select", select_impl, q.device)
    shared = module.__name__.endswith("triton") and not soft
    shared = shared and module.shares_base(width, competing)
    out = torch.empty_like(q)
    # Triton launches on the current device
    with torch.cuda.device_of(q):
        if scores is None:
            scorer = scorer_class(settings.scorer_name)
            made = scorer(seed=settings.seed) if settings.scorer == "random" else scorer()  # type: ignore[call-arg]
            scores = made.score_rows(k, v)
        at_once = max(1, SELECTION_BYTES // (4 * heads * width))
        for low in range(0, row.numel(), at_once):
            part = slice(low, low + at_once)
            shape = (row[part].numel(), heads, width)
            units = torch.empty(shape, dtype=torch.int32, device=q.device)
            gates = torch.empty(shape, dtype=torch.float32, device=q.device) if soft else None
            bases = row_bases(*shape_key, low, low + shape[0]) if shared else None
            select_api.select(
                scores, table, row[part], position[part], budget, settings.pooling, soft, units,
                gates, impl=select_impl, bases=bases,
            )  # fmt: skip
            prefill_api.prefill(
                q.transpose(1, 2), k, v, table, row[part], position[part], start[part],
                length[part], units, gates, budget, scale, out.transpose(1, 2),
                impl=impl,
            )  # fmt: skip
    return out


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scores: torch.Tensor | None,
    causal: bool,
) -> None:
    if not causal:
        raise ValueError(
            "causal=False is not defined: a selection is made among the tokens before a query. "
            "Use torch.nn.functional.scaled_dot_product_attention"
        )
    tensors = {"q": q, "k": k, "v": v} | ({} if scores is None else {"scores": scores})
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise RuntimeError(
                f"{name} requires a gradient and attention_forward has none: call it under "
                f"torch.no_grad(), or pass {name}.detach()"
            )
    check_tensor("q", q, 4, FLOATS, q.device)
    check_tensor("k", k, 4, q.dtype, q.device)
    check_tensor("v", v, 4, q.dtype, q.device)
    batch, query_heads, queries, head_dim = q.shape
    check_shape("k", k, (batch, *k.shape[1:3], head_dim))
    check_shape("v", v, tuple(k.shape))
    heads, keys = k.shape[1:3]
    if heads == 0 or query_heads % heads:
        raise ValueError(f"q has {query_heads} heads, not a multiple of the {heads} of k")
    if queries > keys:
        raise ValueError(f"q has {queries} positions, more than the {keys} of k")
    if scores is not None:
        check_tensor("scores", scores, 3, torch.float32, q.device)
        check_shape("scores", scores, (batch, heads, keys))


def resolve_settings(
    config: SparseKConfig | Mapping[str, Any] | None, scored: bool
) -> SparseKConfig:
    """The settings of ``attention_forward``, with a scorer that needs neither file nor queries.

    Args:
        config: see ``attention_forward``; scored: whether scores are given.

    Raises:
        ValueError, TypeError, SparseKConfigError: a setting cannot be used.
    """
    if config is None:
        config = {}
    if isinstance(config, Mapping):
        open_choice = config.get("scorer", "auto") == "auto" and not config.get("scorer_path")
        chosen = {"scorer": DEFAULT_SCORER} if open_choice else {}
        config = SparseKConfig.resolve(additional={**config, **chosen}, env={})
    if not isinstance(config, SparseKConfig):
        raise TypeError(f"config must be a SparseKConfig or a mapping, got {type(config).__name__}")
    for key, silent in SERVING_ONLY.items():
        if getattr(config, key) not in silent:
            raise ValueError(
                f"config: {key}={getattr(config, key)!r} is about serving a model and says "
                "nothing about one call: leave it out"
            )
    if not scored and config.scorer == "quest":
        raise ValueError(
            "config: quest selects by the query of a decode step: name keydiff, knorm, recency "
            "or random, or pass scores"
        )
    if not scored and config.scorer_name == "learned":
        raise ValueError(
            "config: a learned scorer belongs to one layer of a model: load it with "
            "vllm_sparsek.scorers.learned.load_layer, and pass its score_rows(k, v) as scores"
        )
    # given scores, the name matters no more
    return replace(config, scorer=DEFAULT_SCORER) if config.query_aware else config


@functools.lru_cache(maxsize=64)
def _items(
    batch: int, queries: int, keys: int, refresh: int, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """What follows from shapes alone: the items of all rows, and the block table.

    Returns:
        item_row, item_position, item_query_start, item_query_len, all [items] int32, and
        block_table [B, 1] int32.
    """
    first = keys - queries
    block = torch.arange(first // refresh, (keys - 1) // refresh + 1)
    position = (block * refresh).clamp(min=first)
    length = ((block + 1) * refresh).clamp(max=keys) - position
    one = torch.stack([position, position - first, length])  # [3, blocks]
    row = torch.arange(batch)
    items = torch.cat(
        [row.repeat_interleave(block.numel())[None], one.repeat(1, batch)]
    )  # [4, items]
    row_, position_, start_, length_ = items.int().to(device)
    return row_, position_, start_, length_, row[:, None].int().to(device)
