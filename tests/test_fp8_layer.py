"""One layer over an fp8 cache: what reads densely, the scorers and sparse queries each get it
in the form they take. The kernels themselves are held to float64 in tests/kernels."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vllm_sparsek.kernels.bounds import reference as bounds_reference
from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.decode.reference import attend_one
from vllm_sparsek.kernels.score import reference as score_reference
from vllm_sparsek.kernels.select import reference as select_reference

FP8 = torch.float8_e4m3fn
HEADS, GROUP, D, PAGE, BLOCKS = 2, 3, 64, 16, 20
TOKENS = 150  # of the prompt; the next one is decoded
SCALES = (torch.tensor(0.031), torch.tensor(0.017))
BUDGET = {"quest": Budget(32, 16, 4, 1, PAGE), "keydiff": Budget(24, 16, 4, 16)}
TABLE = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(7))[None].int()


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def make_layer(scorer, dense):
    """A SparseKImpl without an engine around it, and the numbers of its cache."""
    from vllm_sparsek.attention.impl import SparseKImpl
    from vllm_sparsek.attention.workspace import DecodeWorkspace
    from vllm_sparsek.cache.scores import ScoreCache
    from vllm_sparsek.config import SparseKConfig
    from vllm_sparsek.scorers import scorer_class

    budget = BUDGET[scorer]
    config = SparseKConfig(scorer=scorer, prefill="dense" if scorer == "quest" else "sparse")
    cache = ScoreCache("layer.sparsek_scores", HEADS, D, torch.uint8, config)
    spec = cache.get_kv_cache_spec(
        SimpleNamespace(
            cache_config=SimpleNamespace(block_size=PAGE),
            model_config=SimpleNamespace(max_model_len=BLOCKS * PAGE),
        )
    )
    # bounds are values of an fp8 cache, scores are not
    assert spec.dtype == (torch.uint8 if scorer == "quest" else torch.float32)
    cache.bind_kv_cache(torch.zeros(BLOCKS, 1, PAGE, spec.head_size, dtype=spec.dtype))
    impl = object.__new__(SparseKImpl)
    attributes = {
        "fp8": True, "always_dense": False, "config": config, "hidden": None, "dense": dense,
        "scale": D**-0.5, "num_kv_heads": HEADS, "max_model_len": BLOCKS * PAGE,
        "scorer": scorer_class(scorer)(), "score_cache": cache, "cpu_decoder": None, "kept": None,
        "budget": lambda page: budget,
        "_workspace": lambda page, device: DecodeWorkspace(
            4, HEADS * GROUP, HEADS, D, budget, BLOCKS * PAGE, False, scorer == "quest", device),
    }  # fmt: skip
    vars(impl).update(attributes)
    kv = (random(BLOCKS, HEADS, PAGE, 2 * D) / 0.02).to(FP8)
    return impl, kv


def step(first, tokens, sparse_from=None, dense=None):
    """Metadata of ``tokens`` new tokens of one request from position ``first`` on."""
    from vllm_sparsek.attention.metadata import PrefillItems, SparseKMetadata

    at = torch.arange(first, first + tokens)
    decode, items = tokens == 1, None
    if sparse_from is not None:
        position = torch.arange(sparse_from, tokens, 16)
        length = (tokens - position).clamp(max=16)
        columns = (x.int() for x in (0 * position, position, position, length))
        items = PrefillItems(*columns, bases=None)
    return SparseKMetadata(
        num_actual_tokens=tokens, query_start_loc=torch.tensor([0, tokens]).int(),
        seq_lens=torch.tensor([first + tokens]).int(), block_table=TABLE,
        slot_mapping=TABLE[0, at // PAGE].long() * PAGE + at % PAGE, positions=at.int(),
        dense=dense, dense_all=None, num_decodes=int(decode), decode_row=torch.tensor([0]).int(),
        decode_position=torch.tensor([first]).int(), sparse_decodes=decode, items=items,
        step=torch.tensor([0]).int(),
    )  # fmt: skip


@pytest.mark.parametrize("scorer", ["keydiff", "quest"])
def test_sparse_queries_read_dequantised_tokens_that_the_scorer_chose(scorer):
    impl, kv = make_layer(scorer, dense=None)
    budget, scale = BUDGET[scorer], D**-0.5
    layer = SimpleNamespace(layer_name="layer", _k_scale=SCALES[0], _v_scale=SCALES[1])
    query = random(TOKENS + 1, HEADS * GROUP, D)
    new = torch.zeros(TOKENS + 1, HEADS, D)
    out = torch.full_like(query, float("nan"))
    # the prompt's sparse queries (a scorer that needs queries has none), then one decode step
    for part, metadata in (
        (slice(TOKENS), step(0, TOKENS, None if scorer == "quest" else 64)),
        (slice(TOKENS, None), step(TOKENS, 1)),
    ):
        impl.forward(
            layer, query[part], new[part], new[part], kv.view(torch.uint8), metadata, out[part]
        )

    checked = [TOKENS] if scorer == "quest" else [64, 79, 80, 149, TOKENS]
    row = torch.zeros(len(checked), dtype=torch.int32)
    position = torch.tensor(checked, dtype=torch.int32)
    dequantised = kv.float() * torch.cat([s.repeat(D) for s in SCALES])
    if scorer == "quest":
        bounds = torch.zeros(BLOCKS, HEADS, 1, 2, D)
        at = torch.arange(TOKENS)
        mapping = TABLE[0, at // PAGE].long() * PAGE + at % PAGE
        bounds_reference.write_bounds(dequantised, mapping, bounds)
        units = bounds_reference.select_by_query(
            query[checked], bounds, TABLE, row, position, budget, budget.k // PAGE
        )
    else:
        scores, anchors = torch.zeros(BLOCKS, HEADS, PAGE), torch.zeros(BLOCKS, HEADS, D)
        ends = torch.tensor([TOKENS]).int()
        score_reference.keydiff(
            dequantised, TABLE, torch.tensor([0, TOKENS]).int(), ends, scores, anchors
        )
        units, _ = select_reference.select(scores, TABLE, row, position, budget, "lse", False)
    for index, at in enumerate(checked):
        exact = attend_one(
            query[at].double(), *dequantised.double().chunk(2, dim=-1), TABLE[0], at,
            units[index], None, budget, scale,
        )  # fmt: skip
        torch.testing.assert_close(out[at].double(), exact, rtol=0, atol=1e-5)
    assert out[:64].isnan().all()


@pytest.mark.parametrize("takes_quantised", [True, False])
def test_the_dense_path_gets_the_bytes_and_queries_as_it_takes_them(monkeypatch, takes_quantised):
    from vllm import _custom_ops as ops

    def quantise(x, scale):
        assert x.dim() == 2
        return (x / scale).to(FP8), scale

    monkeypatch.setattr(ops, "scaled_fp8_quant", quantise)
    calls = []
    dense = SimpleNamespace(
        supports_quant_query_input=takes_quantised, forward=lambda *a: calls.append(a)
    )
    impl, kv = make_layer("keydiff", dense)
    layer = SimpleNamespace(
        layer_name="layer", _q_scale=torch.tensor(0.5), _k_scale=SCALES[0], _v_scale=SCALES[1]
    )
    query, new = random(40, HEADS * GROUP, D), torch.zeros(40, HEADS, D)
    plan = step(0, 40, dense="its metadata")
    stored = kv.view(torch.uint8)
    impl.forward(layer, query, new, new, stored, plan, torch.empty_like(query))
    (given,) = calls
    assert given[0] is layer
    assert given[4] is stored
    assert given[5] == "its metadata"
    expected = (query / 0.5).to(FP8) if takes_quantised else query
    assert given[1].dtype == expected.dtype
    assert torch.equal(given[1].float(), expected.float())
