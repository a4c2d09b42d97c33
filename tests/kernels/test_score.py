"""Score: token scores reach their slots, KeyDiff does not depend on chunks."""

from __future__ import annotations

import pytest
import torch
from caches import NAN, build, paged_view, slots

from vllm_sparsek.kernels.score import api, reference


def chunk_arguments(ends, news, device):
    """query_start_loc and seq_lens of one step."""
    start = torch.tensor([0, *news]).cumsum(0).int()
    return start.to(device), torch.tensor(ends, dtype=torch.int32, device=device)


@pytest.mark.parametrize(
    ("heads", "page", "tokens"),
    [(1, 16, 1), (2, 32, 63), (8, 128, 111), (3, 16, 300)],
    ids=["mqa-one-token", "page32", "page128", "odd-heads"],
)
def test_scores_of_new_tokens_reach_their_slots_and_no_others(heads, page, tokens, device):
    blocks = -(-tokens // page) + 2
    scores = paged_view(blocks, heads, page, 1, torch.float32, device)[..., 0]
    expected = scores.cpu().clone()
    generator = torch.Generator().manual_seed(3)
    u = torch.randn(tokens, heads, generator=generator)
    slot = torch.randperm(blocks * page, generator=generator)[:tokens]
    slot[::5] = -1
    # vLLM pads the slot mapping beyond the real tokens
    padded = torch.cat([slot, torch.full((7,), -1)])
    reference.write_scores(u, padded, expected)
    api.write_scores(u.to(device), padded.to(device), scores, impl="triton")
    torch.testing.assert_close(scores.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    on_cpu = torch.full_like(expected, NAN)
    api.write_scores(u, padded, on_cpu, impl="cpu")
    torch.testing.assert_close(on_cpu, expected, rtol=0, atol=0, equal_nan=True)


def test_scores_given_as_a_strided_view_are_read_by_stride(device):
    wide = torch.randn(9, 2, 6, device=device)
    u = wide[:, 1, :3]
    scores = paged_view(3, 3, 16, 1, torch.float32, device)[..., 0]
    slot = torch.arange(20, 29, device=device)
    api.write_scores(u, slot, scores, impl="triton")
    assert torch.equal(scores[1, :, 4:13].T, u)


# tokens, heads, outputs, width
PROJECTIONS = {
    "linear": (61, 3, 1, 128),
    "one-token": (1, 1, 1, 97),
    "mlp": (33, 2, 19, 160),
    "hidden": (70, 8, 1, 577),
}


def projection(case, device, shared=False):
    """x, weight, bias; ``shared``: one x and one weight for all heads, by a stride of 0."""
    tokens, heads, outputs, width = case
    g, own = torch.Generator().manual_seed(0), 1 if shared else heads
    x = torch.randn(tokens, own, width, generator=g).expand(-1, heads, -1)
    weight = torch.randn(own, outputs, width, generator=g).expand(heads, -1, -1)
    bias = torch.randn(own, outputs, generator=g).expand(heads, -1)
    return x.to(device), weight.to(device), bias.to(device)


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("case", PROJECTIONS.values(), ids=PROJECTIONS.keys())
def test_projections_agree_with_the_reference(case, shared, device):
    x, weight, bias = projection(case, device, shared)
    expected = reference.project(x.cpu(), weight.cpu(), bias.cpu())
    # float32 sums of W products of order 1
    near = {"rtol": 1e-5, "atol": 4e-7 * case[3]}
    found = api.project(x, weight, bias, impl="triton")
    torch.testing.assert_close(found.cpu(), expected, **near)
    for dtype in (torch.float32, torch.float64):
        on_cpu = api.project(x.cpu(), weight.cpu().to(dtype), bias.cpu().to(dtype), impl="cpu")
        assert on_cpu.dtype == torch.float32
        torch.testing.assert_close(on_cpu, expected, **near)


@pytest.mark.parametrize("impl", ["triton", "cpu"])
@pytest.mark.parametrize("case", PROJECTIONS.values(), ids=PROJECTIONS.keys())
def test_projections_are_the_same_bits_however_tokens_are_chunked(case, impl, device):
    x, weight, bias = projection(case, device if impl == "triton" else "cpu")
    if impl == "cpu":
        weight, bias = weight.double(), bias.double()
    whole = api.project(x, weight, bias, impl=impl)
    for size in (1, 7, 32, 60):
        parts = [
            api.project(x[low : low + size], weight, bias, impl=impl)
            for low in range(0, len(x), size)
        ]
        assert torch.equal(torch.cat(parts), whole)


def test_a_projection_of_no_tokens_is_empty(device):
    x, weight, bias = projection((1, 2, 3, 32), device)
    assert api.project(x[:0], weight, bias, impl="triton").shape == (0, 2, 3)


KEYDIFF = {
    "d64-page16": (2, 64, 16, [1, 63, 111], torch.float32),
    "d80-page32": (1, 80, 32, [97, 32, 5], torch.float16),
    "d96-page16-bf16": (3, 96, 16, [50, 16], torch.bfloat16),
    "d256-page128": (1, 256, 128, [200, 3], torch.float32),
}


@pytest.mark.parametrize("case", KEYDIFF.values(), ids=KEYDIFF.keys())
def test_keydiff_agrees_with_the_reference_and_not_with_chunks(case, device):
    heads, head_dim, page, lengths, dtype = case
    paged = build(lengths, heads, head_dim, page, dtype)
    table = paged.block_table
    num_blocks = paged.kv_cache.shape[0]
    fresh = lambda width: paged_view(num_blocks, heads, page, width, torch.float32, "cpu")  # noqa: E731
    expected = fresh(1)[..., 0]
    expected_anchors = fresh(head_dim)[:, :, 0]
    reference.keydiff(
        paged.kv_cache, table, *chunk_arguments(lengths, lengths, "cpu"), expected,
        expected_anchors,
    )  # fmt: skip
    there = paged.to(device)
    results = []
    for chunk in (max(lengths), 37, page):
        scores = paged_view(num_blocks, heads, page, 1, torch.float32, device)[..., 0]
        anchors = paged_view(num_blocks, heads, page, head_dim, torch.float32, device)[:, :, 0]
        done = [0] * len(lengths)
        while done != lengths:
            news = [min(chunk, n - d) for n, d in zip(lengths, done, strict=True)]
            done = [d + n for d, n in zip(done, news, strict=True)]
            api.keydiff(
                there.kv_cache, there.block_table, *chunk_arguments(done, news, device), scores,
                anchors, impl="triton",
            )  # fmt: skip
        results.append((scores.cpu(), anchors.cpu()))
    close = {"rtol": 1e-5, "atol": 2e-6, "equal_nan": True}
    torch.testing.assert_close(results[0][0], expected, **close)
    torch.testing.assert_close(results[0][1], expected_anchors, **close)
    for scores, anchors in results[1:]:
        torch.testing.assert_close(scores, results[0][0], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(anchors, results[0][1], rtol=0, atol=0, equal_nan=True)


def test_keydiff_on_the_cpu_agrees_with_the_reference():
    paged = build([111, 63], 2, 64, 16)
    outputs = []
    for module_name in ("reference", "cpu"):
        scores = paged_view(paged.kv_cache.shape[0], 2, 16, 1, torch.float32, "cpu")[..., 0]
        anchors = paged_view(paged.kv_cache.shape[0], 2, 16, 64, torch.float32, "cpu")[:, :, 0]
        for ends, news in [([50, 63], [50, 63]), ([110, 63], [60, 0]), ([111, 63], [1, 0])]:
            api.keydiff(
                paged.kv_cache, paged.block_table, *chunk_arguments(ends, news, "cpu"), scores,
                anchors, impl=module_name,
            )  # fmt: skip
        outputs.append((scores, anchors))
    for got, expected in zip(outputs[1], outputs[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-6, equal_nan=True)


def test_rows_without_new_tokens_change_nothing(device):
    paged = build([40, 20], 2, 64, 16).to(device)
    scores = paged_view(paged.kv_cache.shape[0], 2, 16, 1, torch.float32, device)[..., 0]
    anchors = paged_view(paged.kv_cache.shape[0], 2, 16, 64, torch.float32, device)[:, :, 0]
    start, ends = chunk_arguments([40, 0, 0], [0, 0, 0], device)
    table = torch.cat([paged.block_table, paged.block_table[:1] * 0])
    api.keydiff(paged.kv_cache, table, start, ends, scores, anchors, impl="triton")
    assert scores.isnan().all()
    assert anchors.isnan().all()


def test_first_page_scores_zero(device):
    paged = build([20], 2, 64, 16).to(device)
    scores = paged_view(paged.kv_cache.shape[0], 2, 16, 1, torch.float32, device)[..., 0]
    anchors = paged_view(paged.kv_cache.shape[0], 2, 16, 64, torch.float32, device)[:, :, 0]
    arguments = chunk_arguments([20], [20], device)
    api.keydiff(paged.kv_cache, paged.block_table, *arguments, scores, anchors, impl="triton")
    slot = slots(paged.block_table.cpu(), 0, torch.arange(20), 16)
    found = scores.cpu()[slot // 16, :, slot % 16]
    assert (found[:16] == 0).all()
    assert (found[16:] != 0).all()
