"""The entry points refuse what does not fit by the argument's name, and dispatch as asked."""

from __future__ import annotations

import pytest
import torch
from caches import build, chosen, items_of

from vllm_sparsek.kernels.common import dispatch
from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.decode import api as decode_api
from vllm_sparsek.kernels.prefill import api as prefill_api
from vllm_sparsek.kernels.score import api as score_api
from vllm_sparsek.kernels.select import api as select_api

BUDGET = Budget(k=16, window=8, sinks=2, refresh=16)


def decode_arguments(device):
    paged = build([100, 40], 2, 64, 16)
    row, position = items_of([(0, 99), (1, 39)])
    units, _ = chosen(paged, row, position, BUDGET)
    paged = paged.to(device)
    return {
        "query": torch.randn(2, 8, 64, device=device),
        "kv_cache": paged.kv_cache,
        "block_table": paged.block_table,
        "item_row": row.to(device),
        "item_position": position.to(device),
        "units": units.to(device),
        "gates": None,
        "budget": BUDGET,
        "scale": 0.125,
        "out": torch.empty(2, 8, 64, device=device),
    }


def of_prefill(arguments):
    """The same for prefill: one query an item, keys and values as the halves of the cache."""
    key, value = arguments["kv_cache"].chunk(2, dim=-1)
    item = torch.arange(arguments["item_row"].numel(), device=key.device).int()
    rest = {name: value for name, value in arguments.items() if name != "kv_cache"}
    return {
        **rest, "key_cache": key, "value_cache": value, "item_query_start": item,
        "item_query_len": torch.ones_like(item),
    }  # fmt: skip


WRONG_ATTENTION = {
    "query-of-wrong-rank": ("query", lambda t: t[0], ValueError),
    "query-heads-not-a-multiple": ("query", lambda t: t[:, :7], ValueError),
    "query-with-a-strided-last-dimension": (
        "query", lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), ValueError,
    ),
    "kv_cache-of-another-dtype": ("kv_cache", lambda t: t.half(), TypeError),
    "kv_cache-of-another-head-size": ("kv_cache", lambda t: t[..., :96], ValueError),
    "block_table-int64": ("block_table", lambda t: t.long(), TypeError),
    "item_row-int64": ("item_row", lambda t: t.long(), TypeError),
    "item_position-of-another-length": ("item_position", lambda t: t[:1], ValueError),
    "units-of-another-head-count": ("units", lambda t: t[:, :1], ValueError),
    "units-float": ("units", lambda t: t.float(), TypeError),
    "gates-of-another-shape": ("gates", lambda _: torch.ones(2, 2, 3), ValueError),
    "out-of-another-shape": ("out", lambda t: t[:1], ValueError),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_ATTENTION.values(), ids=WRONG_ATTENTION.keys())
def test_decode_and_prefill_name_the_argument_they_refuse(wrong):
    name, change, error = wrong
    arguments = decode_arguments("cpu")
    arguments[name] = change(arguments[name])
    with pytest.raises(error, match=name):
        decode_api.decode(**arguments)
    with pytest.raises(error, match=name.replace("kv_cache", "key_cache")):
        prefill_api.prefill(**of_prefill(arguments))


def test_head_sizes_without_a_kernel_are_refused_by_name(device):
    paged = build([40], 1, 72, 16).to(device)
    row, position = (i.to(device) for i in items_of([(0, 39)]))
    units = torch.full((1, 1, 16), -1, dtype=torch.int32, device=device)
    query = torch.randn(1, 2, 72, device=device)
    with pytest.raises(ValueError, match="head_dim is 72"):
        decode_api.decode(
            query, paged.kv_cache, paged.block_table, row, position, units, None, BUDGET, 1.0,
            query.clone(), impl="triton",
        )  # fmt: skip


def test_workspaces_of_the_wrong_size_are_refused(device):
    arguments = decode_arguments(device)
    acc, stats = decode_api.workspace_shapes(2, 8, 64, 4000)
    workspace = (torch.empty(acc, device=device), torch.empty(stats, device=device))
    with pytest.raises(ValueError, match="workspace acc"):
        decode_api.decode(**arguments, workspace=workspace, max_tokens=100, impl="triton")


WRONG_SELECT = {
    "scores-half": ("scores", lambda t: t.half(), TypeError),
    "units_out-int64": ("units_out", lambda t: t.long(), TypeError),
    "units_out-of-another-item-count": ("units_out", lambda t: t[:1], ValueError),
    "pooling-unknown": ("pooling", lambda _: "median", ValueError),
    "soft-without-gates": ("gates_out", lambda _: None, ValueError),
    "gates-of-other-strides": ("gates_out", lambda t: t.mT.contiguous().mT, ValueError),
}


@pytest.mark.parametrize("wrong", WRONG_SELECT.values(), ids=WRONG_SELECT.keys())
def test_select_names_the_argument_it_refuses(wrong):
    name, change, error = wrong
    paged = build([100, 40], 2, 8, 16)
    row, position = items_of([(0, 99), (1, 39)])
    arguments = {
        "scores": paged.scores,
        "block_table": paged.block_table,
        "item_row": row,
        "item_position": position,
        "budget": BUDGET,
        "pooling": "lse",
        "soft": True,
        "units_out": torch.empty(2, 2, 16, dtype=torch.int32),
        "gates_out": torch.empty(2, 2, 16),
    }
    select_api.select(**arguments)
    arguments[name] = change(arguments[name])
    with pytest.raises(error, match=name):
        select_api.select(**arguments)


def test_units_that_are_neither_tokens_nor_pages_are_refused_by_the_kernel(device):
    paged = build([100], 1, 8, 16).to(device)
    row, position = (i.to(device) for i in items_of([(0, 99)]))
    budget = Budget(k=16, window=8, sinks=2, refresh=16, unit=4)
    units = torch.empty(1, 1, 4, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=r"budget\.unit is 4"):
        select_api.select(
            paged.scores, paged.block_table, row, position, budget, "max", False, units,
            impl="triton",
        )  # fmt: skip


def test_a_budget_of_other_heads_is_refused(device):
    arguments = decode_arguments(device)
    arguments["budget"] = BUDGET.with_heads([(16, None), (8, None), (8, None)])
    for call, given in (decode_api.decode, arguments), (prefill_api.prefill, of_prefill(arguments)):
        with pytest.raises(ValueError, match=r"budget\.heads is of 3 KV heads, there are 2"):
            call(**given)
    with pytest.raises(ValueError, match=r"budget\.heads is of 3 KV heads, there are 2"):
        select_api.select(
            torch.zeros(3, 2, 16, device=device), arguments["block_table"],
            arguments["item_row"], arguments["item_position"], arguments["budget"], "lse", False,
            arguments["units"],
        )  # fmt: skip


def test_write_scores_names_the_argument_it_refuses():
    u, slot, scores = torch.zeros(4, 2), torch.arange(4), torch.zeros(3, 2, 16)
    with pytest.raises(TypeError, match="slot_mapping"):
        score_api.write_scores(u, slot.int(), scores)
    with pytest.raises(ValueError, match="slot_mapping"):
        score_api.write_scores(u, slot[:3], scores)
    with pytest.raises(ValueError, match="token_scores"):
        score_api.write_scores(u[:, :1], slot, scores)


def test_an_unknown_implementation_is_an_error():
    with pytest.raises(ValueError, match="impl must be"):
        dispatch.implementation("select", "cuda", torch.device("cpu"))


def test_an_implementation_that_cannot_run_gives_its_reason():
    cuda = torch.device("cuda", 0)
    assert dispatch.capability("triton", cuda) == (True, "")
    ok, reason = dispatch.capability("cpu", cuda)
    assert not ok
    assert "CPU tensors" in reason
    with pytest.raises(RuntimeError, match="CPU tensors"):
        dispatch.implementation("decode", "reference", cuda)


def test_auto_takes_triton_on_gpus_and_cpu_elsewhere():
    names = [
        dispatch.implementation("select", "auto", torch.device(device)).__name__
        for device in ("cuda:0", "cpu")
    ]
    assert names == [f"vllm_sparsek.kernels.select.{impl}" for impl in ("triton", "cpu")]


def test_a_batch_without_items_is_no_error(device):
    arguments = decode_arguments(device)
    for name in ("query", "item_row", "item_position", "units", "out"):
        arguments[name] = arguments[name][:0]
    for impl in ("triton", "auto"):
        decode_api.decode(**arguments, impl=impl)
        prefill_api.prefill(**of_prefill(arguments), impl=impl)
        select_api.select(
            torch.zeros(3, 2, 16, device=device), arguments["block_table"],
            arguments["item_row"], arguments["item_position"], BUDGET, "lse", False,
            arguments["units"], impl=impl,
        )  # fmt: skip
