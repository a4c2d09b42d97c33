"""Decode: split-KV attention over a selection, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from caches import EPS, NAN, assert_within_twice, build, chosen, eager_one, items_of
from interpreter import BF16

from vllm_sparsek.attention.side_stream import SideStream
from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.decode import api, reference

F16, F32 = torch.float16, torch.float32
BY_HEAD = Budget(1, 16, 4, 16).with_heads([(600, None), (16, 0.05)])
CASES = {
    # dtype, KV heads, G, D, page, context lengths, budget, soft
    "d64-g4-token": (F32, 2, 4, 64, 16, [1, 63, 111, 1000], Budget(32, 16, 4, 1), False),
    "d128-g3-bf16": (BF16, 2, 3, 128, 16, [111, 300], Budget(40, 33, 5, 16), False),
    "d80-g7-fp16-soft": (F16, 1, 7, 80, 32, [63, 300], Budget(40, 16, 3, 1), True),
    "d96-g1-mha": (F32, 3, 1, 96, 16, [5, 200], Budget(16, 1, 0, 1), False),
    "d256-bf16-page128-unit": (BF16, 1, 2, 256, 128, [900], Budget(256, 64, 9, 64, 128), False),
    "d64-page16-unit-soft": (F32, 2, 4, 64, 16, [63, 400], Budget(64, 20, 17, 64, 16), True),
    "page32-unit-share": (F32, 1, 4, 64, 32, [1, 700], Budget(32, 9, 1, 16, 32, 0.2), False),
    "mqa-g20-many-splits": (F32, 1, 20, 64, 16, [1000], Budget(600, 50, 4, 1), False),
    "heads": (F32, 2, 4, 64, 16, [1, 63, 300, 1000], BY_HEAD, False),
    "heads-bf16-soft": (BF16, 2, 3, 128, 16, [111, 700], BY_HEAD, True),
    "heads-page": (F32, 2, 2, 64, 16, [63, 700], replace(BY_HEAD, unit=16), True),
    "sinks-beyond-context": (F32, 1, 4, 64, 16, [1, 20, 63], Budget(8, 4, 48, 1), True),
    "all-fits": (F32, 2, 3, 64, 16, [63, 111], Budget(4000, 16, 4, 1), True),
}


def attend(paged, query, row, position, units, gates, budget, scale, impl="triton", **kwargs):
    """Output of one implementation, poisoned before."""
    device = paged.kv_cache.device
    out = torch.full_like(query, NAN, device=device)
    api.decode(
        query.to(device), paged.kv_cache, paged.block_table, row.to(device),
        position.to(device), units.to(device), None if gates is None else gates.to(device),
        budget, scale, out, impl=impl, **kwargs,
    )  # fmt: skip
    return out.cpu()


def problem(case, seed=0):
    """Cache, query, items and the reference's selection of one case."""
    dtype, heads, group, head_dim, page, lengths, budget, soft = case
    paged = build(lengths, heads, head_dim, page, dtype, seed=seed)
    row, position = items_of([(-1, 3), *((r, n - 1) for r, n in enumerate(lengths)), (-1, 0)])
    generator = torch.Generator().manual_seed(seed + 5)
    shape = (row.numel(), heads * group, head_dim)
    query = torch.randn(shape, generator=generator).to(dtype)
    units, gates = chosen(paged, row, position, budget, soft)
    return paged, query, row, position, units, gates, budget, head_dim**-0.5


def hold_to_float64(case, device, impls):
    """The error of every implementation is at most twice that of eager attention."""
    paged, query, row, position, units, gates, budget, scale = problem(case)
    exact = torch.full(query.shape, NAN, dtype=torch.float64)
    reference.decode(
        query.double(), paged.kv_cache.double(), paged.block_table, row, position, units, gates,
        budget, scale, exact,
    )  # fmt: skip
    real = row >= 0
    eager = torch.stack(
        [
            eager_one(
                query[i], paged.kv_cache, paged.block_table[row[i]], int(position[i]), units[i],
                None if gates is None else gates[i], budget, scale,
            )
            for i in real.nonzero()[:, 0].tolist()
        ]
    )  # fmt: skip
    for impl in impls:
        out = attend(paged.to(device), query, row, position, units, gates, budget, scale, impl=impl)
        assert out[~real].isnan().all(), impl
        assert_within_twice(out[real], eager, exact[real], EPS[query.dtype])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_decode_is_as_exact_as_low_precision_attention(case, device):
    hold_to_float64(case, device, ["triton"] if device.type == "cuda" else ["triton", "cpu"])


def test_output_does_not_depend_on_the_rest_of_the_batch(device):
    paged, query, row, position, units, gates, budget, scale = problem(CASES["d64-g4-token"])
    there = paged.to(device)
    arguments = (query, row, position, units)
    together = attend(there, *arguments, gates, budget, scale)
    for i in range(1, row.numel() - 1):
        alone = attend(there, *(a[i : i + 1] for a in arguments), None, budget, scale)
        assert torch.equal(alone[0], together[i])


def test_wider_padding_of_the_selection_changes_nothing(device):
    paged, query, row, position, units, gates, budget, scale = problem(CASES["d80-g7-fp16-soft"])
    there = paged.to(device)
    before = attend(there, query, row, position, units, gates, budget, scale)
    padding = torch.full((*units.shape[:2], 9), -1, dtype=torch.int32)
    units = torch.cat([units, padding], dim=-1)
    gates = torch.cat([gates, torch.full(padding.shape, NAN)], dim=-1)
    after = attend(there, query, row, position, units, gates, budget, scale)
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)


def test_a_poisoned_workspace_of_the_stated_shapes_suffices(device):
    paged, query, row, position, units, gates, budget, scale = problem(CASES["mqa-g20-many-splits"])
    there = paged.to(device)
    bound = budget.max_tokens_attended(5000)
    shapes = api.workspace_shapes(*query.shape, bound)
    assert shapes[0][2] > 1
    workspace = tuple(torch.full(shape, NAN, device=device) for shape in shapes)
    expected = attend(there, query, row, position, units, gates, budget, scale)
    out = attend(
        there, query, row, position, units, gates, budget, scale, workspace=workspace,
        max_tokens=bound,
    )  # fmt: skip
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_a_head_has_no_splits_beyond_its_own_list(device):
    paged, query, row, position, units, gates, budget, scale = problem(CASES["heads"])
    bound = budget.max_tokens_attended(1000)
    workspace = tuple(
        torch.full(shape, NAN, device=device) for shape in api.workspace_shapes(*query.shape, bound)
    )
    attend(
        paged.to(device), query, row, position, units, gates, budget, scale, workspace=workspace,
        max_tokens=bound,
    )  # fmt: skip
    # splits written for the last request, whose lists are of 635 and 85 tokens; 4 query heads each
    written = (~workspace[1][4].isnan()).all(-1).sum(-1).tolist()
    assert written == [3] * 4 + [1] * 4


def test_strided_queries_and_outputs_are_read_and_written_by_stride(device):
    paged, query, row, position, units, gates, budget, scale = problem(CASES["d96-g1-mha"])
    there = paged.to(device)
    expected = attend(there, query, row, position, units, gates, budget, scale)
    wide = torch.full((query.shape[0], 5, *query.shape[1:]), NAN, device=device)
    wide[:, 1] = query.to(device)
    api.decode(
        wide[:, 1], there.kv_cache, there.block_table, row.to(device), position.to(device),
        units.to(device), None, budget, scale, wide[:, 3], impl="triton",
    )  # fmt: skip
    torch.testing.assert_close(wide[:, 3].cpu(), expected, rtol=0, atol=0, equal_nan=True)
    assert wide[:, [0, 2, 4]].isnan().all()


def test_while_everything_fits_it_is_ordinary_attention(device):
    paged, query, row, position, units, gates, budget, scale = problem(CASES["all-fits"])
    out = attend(paged.to(device), query, row, position, units, gates, budget, scale)
    for item in (1, 2):
        r = int(row[item])
        q = query[item].double().view(2, 3, -1)
        weights = torch.softmax(torch.einsum("hgd,nhd->hgn", q, paged.key[r]) * scale, -1)
        dense = torch.einsum("hgn,nhd->hgd", weights, paged.value[r]).flatten(0, 1)
        torch.testing.assert_close(out[item].double(), dense, rtol=0, atol=5e-6)


@pytest.mark.parametrize("case", ["d64-g4-token", "heads", "heads-page"])
def test_the_decoder_that_keeps_selections_on_the_cpu_is_the_reference(case):
    from vllm_sparsek.attention.cpu_decode import CpuDecoder, CpuDecodeRow
    from vllm_sparsek.kernels.select import api as select_api

    paged, query, row, position, units, gates, budget, scale = problem(CASES[case])
    real = [i for i, r in enumerate(row.tolist()) if r >= 0]
    decoder = CpuDecoder(2, budget, gates is not None, scale, False)
    selected = []

    def select(query, block_table, row, position, budget, units, gates):
        selected.append(row.item())
        select_api.select(
            paged.scores, block_table, row, position, budget, "lse", gates is not None, units,
            gates, impl="cpu",
        )  # fmt: skip

    expected = torch.full_like(query, NAN)
    reference.decode(
        query, paged.kv_cache, paged.block_table, row, position, units, gates, budget, scale,
        expected,
    )  # fmt: skip
    rows = [
        CpuDecodeRow(r, int(position[i]), (int(position[i]), bytes([r])))
        for r, i in enumerate(real)
    ]
    for _ in range(2):
        out = torch.full_like(query[real], NAN)
        decoder.forward(query[real], paged.kv_cache, select, paged.block_table, rows, {}, out)
        torch.testing.assert_close(out, expected[real], rtol=0, atol=5e-6)
    assert selected == list(range(len(real))), "the second step selects nothing"


@pytest.mark.gpu
def test_blocks_beyond_two_to_the_31_elements_are_found(device):
    case = (BF16, 2, 4, 128, 16, [300], Budget(64, 16, 4, 1), False)
    paged, query, row, position, units, gates, budget, scale = problem(case)
    expected = attend(paged.to(device), query, row, position, units, gates, budget, scale)
    used, heads, page, width = paged.kv_cache.shape
    stride = (1 << 31) // (used - 2) // width * width
    storage = torch.empty(stride * used, dtype=BF16, device=device)
    strides = (stride, page * width, width, 1)
    far = storage.as_strided((used, heads, page, width), strides).copy_(paged.kv_cache)
    paged = paged.to(device)
    paged.kv_cache = far
    out = attend(paged, query, row, position, units, gates, budget, scale)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "budget",
    [Budget(64, 16, 4, 16), Budget(1, 16, 4, 16).with_heads([(600, None), (32, None)])],
    ids=["layer", "heads"],
)
def test_select_and_decode_replay_in_a_cuda_graph(budget, device):
    from vllm_sparsek.kernels.select import api as select_api

    case = (BF16, 2, 4, 128, 16, [1, 300, 1000], budget, False)
    paged, query, row, position, _, _, budget, scale = problem(case)
    paged, query = paged.to(device), query.to(device)
    row, position = row.to(device), position.to(device)
    bound = budget.max_tokens_attended(4096)
    workspace = tuple(
        torch.full(shape, NAN, device=device) for shape in api.workspace_shapes(*query.shape, bound)
    )
    units = torch.empty(row.numel(), 2, budget.k, dtype=torch.int32, device=device)
    out = torch.empty_like(query)

    def step():
        select_api.select(
            paged.scores, paged.block_table, row, position, budget, "lse", False, units
        )
        api.decode(
            query, paged.kv_cache, paged.block_table, row, position, units, None, budget, scale,
            out, workspace, bound,
        )  # fmt: skip

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    # another step of the same shapes: rows change places, positions move, one row is padding
    row.copy_(torch.tensor([2, -1, 1, 0, 1]))
    position.copy_(torch.tensor([999, 0, 250, 0, 299]))
    out.fill_(NAN)
    graph.replay()
    replayed = out.clone()
    out.fill_(NAN)
    step()
    torch.testing.assert_close(out, replayed, rtol=0, atol=0, equal_nan=True)
    assert not out[[0, 2, 3, 4]].isnan().any()
    assert out[1].isnan().all()


@pytest.mark.gpu
def test_what_another_stream_wrote_before_the_event_is_overwritten(device):
    case = (BF16, 2, 4, 128, 16, [1, 300, 1000], Budget(64, 16, 4, 16), False)
    paged, query, row, position, units, gates, budget, scale = problem(case)
    expected = attend(paged.to(device), query, row, position, units, gates, budget, scale)
    paged = paged.to(device)
    there = [x.to(device) for x in (query, row, position, units)]
    out, side = torch.full_like(there[0], NAN), SideStream(device)

    def step():
        with side.use() as event:
            torch.cuda._sleep(20_000_000)  # some 10 ms
            out.fill_(7)
        api.decode(
            there[0], paged.kv_cache, paged.block_table, *there[1:], None, budget, scale, out,
            after=event,
        )  # fmt: skip

    step()
    expected = torch.where(row.to(device)[:, None, None] < 0, 7, expected.to(device))
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    out.fill_(NAN)
    graph.replay()
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
