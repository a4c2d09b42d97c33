"""Bounds: they bound, they follow from a unit's tokens alone, and queries choose by them."""

from __future__ import annotations

import pytest
import torch
from caches import NAN, build, items_of, slots

from vllm_sparsek.kernels.bounds import api, reference
from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.common.score_pages import bounds_per_token, split_bounds_cache

SUM_TOLERANCE = 2e-5  # of an upper bound: float32 sums in another order
IMPLEMENTATIONS = ("triton", "cpu", "reference")


def empty_bounds(paged, unit):
    """Bounds of NaN, laid out as the score cache lays them out; two layers share a block."""
    num_blocks, heads, page, width = paged.kv_cache.shape
    numbers = bounds_per_token(heads, page, unit, width // 2)
    storage = torch.full((num_blocks, 2, page * numbers), NAN, dtype=paged.kv_cache.dtype)
    cache = storage[:, 1].unflatten(1, (1, page, numbers)).to(paged.kv_cache.device)
    return split_bounds_cache(cache, heads, unit, width // 2)


def implementations(device):
    return ("triton",) if device.type == "cuda" else IMPLEMENTATIONS


def write(paged, bounds, starts, ends, impl):
    """One step: the tokens starts..ends of every row are new."""
    page = paged.kv_cache.shape[2]
    table = paged.block_table.cpu()
    new = [slots(table, r, torch.arange(*span), page)
           for r, span in enumerate(zip(starts, ends, strict=True))]  # fmt: skip
    # padding inside, as in a CUDA graph
    mapping = torch.cat([*new, torch.full((5,), -1)]).to(bounds.device)
    api.write_bounds(paged.kv_cache, mapping, bounds, impl=impl)


def written(lengths, heads, head_dim, page, unit, device, dtype=torch.float32, whole=False):
    """Requests with their bounds; ``whole``: small whole numbers, whose sums are exact."""
    paged = build(lengths, heads, head_dim, page, dtype)
    if whole:
        paged.kv_cache.copy_((paged.kv_cache * 2).round().clamp(-4, 4))
    paged = paged.to(device)
    bounds = empty_bounds(paged, unit)
    impl = "triton" if device.type == "cuda" else "reference"
    write(paged, bounds, [0] * len(lengths), lengths, impl)
    return paged, bounds


WRITES = {
    "page16": (2, 64, 16, 16, [1, 63, 111], torch.float32),
    "page128-d80": (3, 80, 128, 16, [300, 127, 16], torch.float16),
    "page48-whole-d96": (1, 96, 48, 48, [100, 48, 47], torch.bfloat16),
    "page32-d256": (1, 256, 32, 16, [63, 15], torch.float32),
}
CHUNKS = (1000, 37, 16, 1)


@pytest.mark.parametrize("case", WRITES.values(), ids=WRITES.keys())
def test_bounds_follow_from_the_tokens_of_a_unit_however_they_arrive(case, device):
    heads, head_dim, page, unit, lengths, dtype = case
    paged = build(lengths, heads, head_dim, page, dtype)
    if device.type == "cpu" and dtype == torch.bfloat16:
        paged.kv_cache = paged.kv_cache.half()
    paged = paged.to(device)
    for impl in implementations(device):
        for chunk in CHUNKS[: 2 if impl == "triton" else None]:
            bounds, done = empty_bounds(paged, unit), [0] * len(lengths)
            while done != lengths:
                ends = [min(d + chunk, n) for d, n in zip(done, lengths, strict=True)]
                write(paged, bounds, done, ends, impl)
                done = ends
            found = bounds.cpu()
            for row, n in enumerate(lengths):
                key = paged.kv_cache.cpu()[..., :head_dim]
                for u in range(n // unit):
                    tokens = torch.arange(u * unit, u * unit + unit)
                    at = slots(paged.block_table.cpu(), row, tokens, page)
                    keys = key[at // page, :, at % page]  # [unit, H, D]
                    got = found[at[0] // page, :, at[0] % page // unit]
                    assert torch.equal(got[:, 0], keys.amin(0))
                    assert torch.equal(got[:, 1], keys.amax(0))
            complete = sum(n // unit for n in lengths)
            assert found.isfinite().sum() == complete * heads * 2 * head_dim


def test_a_recycled_block_gets_the_bounds_of_its_new_tokens(device):
    for impl in implementations(device):
        paged, bounds = written([64], 2, 64, 16, 16, device)
        bounds.mul_(100)
        write(paged, bounds, [0], [63], impl)
        _, fresh = written([64], 2, 64, 16, 16, device)
        blocks = paged.block_table[0, :4].long()
        assert torch.equal(bounds[blocks[:3]], fresh[blocks[:3]])
        # the last one is not complete again, so nothing reads it
        assert torch.equal(bounds[blocks[3]], 100 * fresh[blocks[3]])


def test_no_key_of_a_unit_exceeds_its_upper_bound():
    paged, bounds = written([160], 2, 64, 32, 16, torch.device("cpu"))
    query = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    table = paged.block_table[0]
    units = torch.stack([bounds[table[u // 2].long(), :, u % 2] for u in range(10)])
    upper = reference.upper_bounds(query, units)  # [H, units]
    product = torch.einsum("hgd,nhd->hgn", query.double().view(2, 3, 64), paged.key[0])
    assert (product.amax(1).unflatten(1, (10, 16)).amax(-1) <= upper + 1e-9).all()


SELECTIONS = {
    "page16": (4, 1, 64, 16, 16, Budget(64, 16, 4, 1, 16), [1, 63, 111, 400]),
    "units-in-page128": (3, 2, 80, 128, 16, Budget(100, 33, 20, 16, 16), [700, 130]),
    "page48-whole": (7, 1, 96, 48, 48, Budget(96, 10, 0, 64, 48), [500, 65]),
    "mha-d256": (1, 2, 256, 32, 16, Budget(40, 9, 1, 1, 16), [300]),
    "k-share": (2, 2, 64, 64, 16, Budget(32, 16, 5, 16, 16, k_share=0.2), [63, 1000]),
    "k-beyond-n": (2, 1, 64, 16, 16, Budget(4000, 16, 5, 1, 16), [300]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", SELECTIONS.values(), ids=SELECTIONS.keys())
def test_the_units_of_the_highest_bounds_are_kept_to_the_last_tie(case, dtype, device):
    group, heads, head_dim, page, unit, budget, lengths = case
    paged, bounds = written(lengths, heads, head_dim, page, unit, device, dtype, whole=True)
    pairs = [(row, n - 1) for row, n in enumerate(lengths)] + [(-1, 0), (0, lengths[0] // 2)]
    row, position = items_of(pairs)
    g = torch.Generator().manual_seed(2)
    # few different values: ties
    query = torch.randint(-1, 2, (len(pairs), heads * group, head_dim), generator=g).to(dtype)
    query[..., 3:] = 0
    width = budget.units_kept(max(lengths)) + 3
    expected = reference.select_by_query(
        query, bounds.cpu(), paged.block_table.cpu(), row, position, budget, width
    )
    for impl in implementations(device):
        units = torch.full(expected.shape, 77, dtype=torch.int32, device=device)
        api.select_by_query(
            query.to(device), bounds, paged.block_table, row.to(device), position.to(device),
            budget, units, impl=impl,
        )  # fmt: skip
        assert torch.equal(units.cpu(), expected), impl


def brute_force(query, key, budget, position):
    """Kept units straight from the keys of one request: query [Hq, D], key [n, H, D]."""
    heads = key.shape[1]
    start = position // budget.refresh * budget.refresh
    chosen = []
    for head in range(heads):
        bound = {}
        u = -(-budget.sinks // budget.unit)
        while (u + 1) * budget.unit <= start - budget.window + 1:
            keys = key[u * budget.unit : (u + 1) * budget.unit, head]
            low, high = keys.min(0).values, keys.max(0).values
            group = query.view(heads, -1, query.shape[1])[head]
            bound[u] = max(torch.where(q > 0, q * high, q * low).sum().item() for q in group)
            u += 1
        best = sorted(bound, key=lambda u: (-bound[u], u))[: budget.units_kept(start)]
        chosen.append((sorted(best), bound))
    return chosen


@pytest.mark.parametrize("page", [16, 48], ids=["page16", "page48"])
def test_selection_agrees_with_brute_force_but_for_rounding(page, device):
    budget = Budget(k=70, window=20, sinks=3, refresh=32, unit=16)
    lengths = [111, 500]
    paged, bounds = written(lengths, 2, 64, page, 16, device)
    row, position = items_of([(0, 110), (1, 499), (1, 300)])
    query = torch.randn(3, 6, 64, generator=torch.Generator().manual_seed(3))
    for impl in implementations(device):
        units = torch.empty(3, 2, 5, dtype=torch.int32, device=device)
        api.select_by_query(
            query.to(device), bounds, paged.block_table, row.to(device), position.to(device),
            budget, units, impl=impl,
        )  # fmt: skip
        for item, (r, p) in enumerate(zip(row.tolist(), position.tolist(), strict=True)):
            brute = brute_force(query[item].double(), paged.key[r], budget, p)
            for head, (best, bound) in enumerate(brute):
                got = [u for u in units[item, head].tolist() if u >= 0]
                assert got == sorted(got)
                assert len(got) == len(best)
                lost = [abs(bound[a] - bound[b]) for a in set(best) - set(got)
                        for b in set(got) - set(best)]  # fmt: skip
                assert all(gap < SUM_TOLERANCE * 64 for gap in lost), impl


def test_a_selection_does_not_depend_on_the_items_around_it(device):
    budget = Budget(k=64, window=16, sinks=4, refresh=16, unit=16)
    paged, bounds = written([500, 320], 2, 64, 32, 16, device)
    row, position = (i.to(device) for i in items_of([(0, 499), (1, 319), (-1, 0), (0, 420)]))
    query = torch.randn(4, 4, 64, generator=torch.Generator().manual_seed(4)).to(device)
    for impl in implementations(device):
        units = torch.empty(4, 2, 4, dtype=torch.int32, device=device)
        # unread rows of a larger workspace
        scratch = torch.full((4, 2, 64), NAN, device=device)
        api.select_by_query(
            query, bounds, paged.block_table, row, position, budget, units, scratch, impl=impl
        )
        for item in range(4):
            one = slice(item, item + 1)
            alone = torch.empty(1, 2, 4, dtype=torch.int32, device=device)
            api.select_by_query(
                query[one], bounds, paged.block_table, row[one], position[one], budget, alone,
                impl=impl,
            )  # fmt: skip
            assert torch.equal(units[one], alone), impl


def arguments():
    paged, bounds = written([100], 2, 64, 32, 16, torch.device("cpu"))
    row, position = items_of([(0, 99)])
    return {
        "query": torch.randn(1, 4, 64), "bounds": bounds, "block_table": paged.block_table,
        "item_row": row, "item_position": position,
        "budget": Budget(16, 8, 2, 16, 16),
        "units_out": torch.empty(1, 2, 4, dtype=torch.int32),
    }  # fmt: skip


WRONG = {
    "query": (lambda t: t[:, :3], ValueError),
    "bounds": (lambda t: t.half(), TypeError),
    "block_table": (lambda t: t.long(), TypeError),
    "item_position": (lambda t: t[:0], ValueError),
    "units_out": (lambda t: t[:, :1], ValueError),
    "budget": (lambda budget: budget.with_heads([(16, None), (32, None)]), ValueError),
}


@pytest.mark.parametrize("name", WRONG)
def test_arguments_that_do_not_fit_are_refused_by_name(name):
    change, error = WRONG[name]
    given = arguments()
    given[name] = change(given[name])
    with pytest.raises(error, match=name):
        api.select_by_query(**given)


def test_bounds_that_do_not_fit_the_cache_are_refused():
    paged, bounds = written([40], 1, 64, 48, 16, torch.device("cpu"))
    slot = torch.arange(3)
    with pytest.raises(TypeError, match="bounds"):
        api.write_bounds(paged.kv_cache, slot, bounds.half())
    five = torch.cat([bounds, bounds], 2)[:, :, :5]
    with pytest.raises(ValueError, match="bounds of 5 units do not divide pages of 48"):
        api.write_bounds(paged.kv_cache, slot, five)
