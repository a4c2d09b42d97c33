"""What Triton would compile for sparse prefill, on any machine: keys of launches, not launched.

argv[1]: a JSON list of cases, see ``keys_of``. Prints, for each, what serving would compile, what
of it startup did not compile (missed) and what startup alone compiled (vain). Runs in a process of
its own, whose kernels are not the interpreter's.
"""

from __future__ import annotations

import contextlib
import functools
import json
import random
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from vllm_sparsek import compat
from vllm_sparsek.attention import warmup
from vllm_sparsek.attention.impl import SparseKImpl
from vllm_sparsek.attention.metadata import SparseKMetadataBuilder
from vllm_sparsek.cache.scores import ScoreCache
from vllm_sparsek.config import SparseKConfig
from vllm_sparsek.kernels.prefill import api as prefill_api
from vllm_sparsek.kernels.prefill import fa3, hopper
from vllm_sparsek.kernels.prefill import triton as triton_prefill
from vllm_sparsek.kernels.select import api as select_api
from vllm_sparsek.kernels.select import triton as triton_select

LIMIT, TOKENS, PAGE = 32768, 4096, 16
HEADS, GROUP, D = 2, 4, 64
ROWS = 8
ENGINES = {"triton": triton_prefill, "hopper": hopper, "fa3": fa3}


@functools.cache
def _binder(kernel: JITFunction) -> Any:
    backend = make_backend(GPUTarget("cuda", 90, 32))
    return create_function_from_signature(kernel.signature, kernel.params, backend)


@contextlib.contextmanager
def recorded() -> Iterator[set[str]]:
    """Launches inside do nothing but add what they would be compiled for to the set."""
    found: set[str] = set()

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        arguments, specialization, options = _binder(self)(*args, **kwargs)
        named = [f"{n}={s}" for n, s in zip(arguments, specialization, strict=True)]
        found.add(" ".join([self.fn.__name__, *named, *(f"{k}={v}" for k, v in options.items())]))

    run, JITFunction.run = JITFunction.run, record
    try:
        yield found
    finally:
        JITFunction.run = run


def make_layer(config: SparseKConfig, heads: list[int], fp8: bool) -> tuple[Any, Any]:
    """A SparseKImpl without an engine around it, and its attention layer."""
    budget = config.budget(PAGE)
    if heads:
        budget = budget.with_heads([(k, None) for k in heads])
    stored = torch.uint8 if fp8 else torch.bfloat16
    vllm_config = SimpleNamespace(
        cache_config=SimpleNamespace(block_size=PAGE),
        model_config=SimpleNamespace(max_model_len=LIMIT),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=TOKENS),
    )
    scores = ScoreCache("layer.sparsek_scores", HEADS, D, stored, config)
    spec = scores.get_kv_cache_spec(vllm_config)
    scores.bind_kv_cache(torch.zeros(3, 1, PAGE, spec.head_size, dtype=spec.dtype))
    impl = object.__new__(SparseKImpl)
    vars(impl).update(
        fp8=fp8, config=config, scale=D**-0.5, num_heads=HEADS * GROUP, num_kv_heads=HEADS,
        head_size=D, kv_cache_dtype="fp8" if fp8 else "auto", max_model_len=LIMIT,
        score_cache=scores, budget=lambda page: budget, vllm_config=vllm_config,
    )  # fmt: skip
    layer = SimpleNamespace(
        kv_cache=torch.zeros(3, HEADS, PAGE, 2 * D, dtype=stored),
        _k_scale=torch.ones(()), _v_scale=torch.ones(()),
    )  # fmt: skip
    return impl, layer


def serve(impl: Any, layer: Any, chunks: list[tuple[int, int]], decodes: int) -> None:
    """One step: rows that read [start, end), the first ``decodes`` of them one query each."""
    builder = object.__new__(SparseKMetadataBuilder)
    builder.config, builder.budget = impl.config, impl.config.budget(PAGE)
    builder.device, builder.share_bases = torch.device("cpu"), impl.config.mode == "hard"
    first = impl.config.first_sparse_position(PAGE, LIMIT)
    starts, ends = (np.array(part, dtype=np.int64) for part in zip(*chunks, strict=True))
    lens = ends - starts
    in_batch = np.concatenate([[0], lens.cumsum()])
    items = builder._items(decodes, in_batch, lens, ends, np.full(len(ends), first))
    if items is None:
        return
    # queries as models hand them over: in one tensor with keys and values
    packed = torch.empty(int(lens.sum()), (GROUP + 2) * HEADS * D, dtype=torch.bfloat16)
    query = packed[:, : GROUP * HEADS * D].view(-1, GROUP * HEADS, D)
    out = torch.empty(query.shape, dtype=query.dtype)
    width = compat.block_table_width(LIMIT, PAGE)
    table = torch.empty((ROWS, width), dtype=torch.int32)[: len(chunks)]
    scales = (layer._k_scale, layer._v_scale) if impl.fp8 else None
    impl._prefill(query, compat.cache_numbers(layer.kv_cache), scales, table, items, out)


def steps(first: int, refresh: int) -> Iterator[tuple[list[tuple[int, int]], int]]:
    """Chunks and decodes of the steps of many prompts."""
    for chunk, apart in ((TOKENS, TOKENS), (1024, 1024), (300, 997), (5, 997)):
        for low in range(0, LIMIT, apart):
            yield [(low, min(LIMIT, low + chunk))], 0
    # alone and beside rows that decode
    for blocks in range(1, TOKENS // refresh + 1):
        for doublings in range((LIMIT // first).bit_length()):
            at = min(first << doublings, LIMIT - 1)
            for decodes in (0, ROWS - 1):
                chunk = (at, min(LIMIT, at + blocks * refresh))
                yield [*[(9, 10)] * decodes, chunk], decodes
    for at in range(first, LIMIT, refresh):
        for blocks, decodes in ((4, 0), (16, 0), (16, ROWS - 1)):
            yield [*[(9, 10)] * decodes, (at, min(LIMIT, at + blocks * refresh))], decodes
    draw = random.Random(0)
    for _ in range(50):
        decodes, prompts = draw.randrange(4), draw.randrange(1, 4)
        rows = [(at, at + 1) for at in (draw.randrange(LIMIT - 1) for _ in range(decodes))]
        for _ in range(prompts):
            at = draw.randrange(LIMIT - 2)
            rows.append((at, min(LIMIT, at + draw.randrange(2, TOKENS // prompts))))
        yield rows, decodes


def keys_of(
    engine: str, settings: dict[str, Any], heads: list[int], fp8: bool
) -> dict[str, list[str]]:
    """Keys of one case.

    Args:
        engine: of attention; settings: of SparseKConfig; heads: k of every KV head, or none; fp8:
            whether the cache is.
    """
    prefill_api.attention_module = lambda *arguments: ENGINES[engine]
    config = SparseKConfig(**settings)
    impl, layer = make_layer(config, heads, fp8)
    calls: list[Any] = []
    compat.at_startup = calls.append
    warmup.register(impl, layer, torch.bfloat16, torch.device("cuda"))
    with recorded() as warm:
        calls[0].run()
    with recorded() as launched:
        for chunks, decodes in steps(config.first_sparse_position(PAGE, LIMIT), config.refresh):
            serve(impl, layer, chunks, decodes)
    return {
        "serving": sorted(launched),
        "missed": sorted(launched - warm),
        "vain": sorted(warm - launched),
    }


if __name__ == "__main__":
    select_api.implementation = lambda operation, impl, device: triton_select
    hopper.multiprocessors = lambda device: 132
    compat.flash_attention_3 = lambda: (lambda *arguments, **more: None, "")
    print("RESULT " + json.dumps([keys_of(**case) for case in json.loads(sys.argv[1])]))
