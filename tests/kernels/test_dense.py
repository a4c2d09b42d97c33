"""attention_forward over [B, H, S, D]: held to a mask per query in float64, whatever the layout."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from caches import EPS, NAN, assert_within_twice
from interpreter import BF16

import vllm_sparsek
from vllm_sparsek.config import SparseKConfig, SparseKConfigError
from vllm_sparsek.dense import PAGE, _items, attention_forward
from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.common.projection import sparsek_gates
from vllm_sparsek.kernels.score import reference as score_reference
from vllm_sparsek.scorers import scorer_class

F16, F32, F64 = torch.float16, torch.float32, torch.float64


def by_mask(q, k, v, scores, budget: Budget, scale, soft, dtype):
    """The definition, one query at a time: which tokens it reads, softmax, weights of values."""
    queries, keys = q.shape[2], k.shape[2]
    group = q.shape[1] // k.shape[1]
    k, v = (t.to(dtype).repeat_interleave(group, dim=1) for t in (k, v))
    logits = q.to(dtype) @ k.mT * scale  # [B, Hq, Sq, Skv]
    weight = torch.zeros(*scores.shape[:2], queries, keys, dtype=F64)
    unit = budget.unit
    whole = scores[..., : keys // unit * unit].unflatten(-1, (-1, unit)).double()
    pooled = whole.logsumexp(-1) if unit > 1 else whole[..., 0]
    seen = torch.zeros_like(weight, dtype=torch.bool)
    for i in range(queries):
        position = keys - queries + i
        at = position // budget.refresh * budget.refresh
        first = -(-budget.sinks // unit)
        end = max(first, (at - budget.window + 1) // unit)
        seen[:, :, i, : first * unit] = True
        seen[:, :, i, end * unit :] = True
        weight[:, :, i] = 1
        z = pooled[..., first:end]
        keep = min(-(-budget.tokens_kept(at) // unit), end - first)
        order = z.sort(dim=-1, descending=True, stable=True).indices[..., :keep]
        kept = torch.zeros_like(z, dtype=torch.bool).scatter(-1, order, True)
        seen[:, :, i, first * unit : end * unit] = kept.repeat_interleave(unit, -1)
        if soft and end > first:
            gates = sparsek_gates(z, keep).repeat_interleave(unit, -1)
            weight[:, :, i, first * unit : end * unit] = gates
        seen[:, :, i, position + 1 :] = False
    seen, weight = (t.repeat_interleave(group, dim=1) for t in (seen, weight))
    p = torch.softmax(logits.masked_fill(~seen, -torch.inf), dim=-1)
    return (p * weight.to(dtype)) @ v


def separate(shape, generator, dtype):
    return torch.randn(shape, generator=generator).to(dtype)


def transposed(shape, generator, dtype):
    b, h, s, d = shape
    return torch.randn((b, s, h, d), generator=generator).to(dtype).transpose(1, 2)


def padded(shape, generator, dtype):
    """Every row of the batch, head and token a step apart that nothing else divides."""
    b, h, s, d = shape
    storage = torch.full((b, h * (s + 3) * (d + 16) + 48), NAN, dtype=dtype)
    view = storage[:, 5:].as_strided(shape, (storage.stride(0), (s + 3) * (d + 16), d + 16, 1))
    return view.copy_(torch.randn(shape, generator=generator))


def expanded(shape, generator, dtype):
    b, _, s, d = shape
    return torch.randn((b, 1, s, d), generator=generator).to(dtype).expand(shape)


def by_sequence(shape, generator, dtype):
    b, h, s, d = shape
    return torch.randn((s, b, h, d), generator=generator).to(dtype).permute(1, 2, 0, 3)


def repeated(shape, generator, dtype):
    b, h, _, d = shape
    return torch.randn((b, h, 1, d), generator=generator).to(dtype).expand(shape)


CASES = {
    # dtype, B, H, G, D, (Sq, Skv), settings, layouts of q, k, v
    "r16-token": (F32, 2, 2, 2, 64, (111, 111), dict(k=16, window=8, sinks=3, refresh=16),
                  (separate, separate, separate)),
    "r64-d128-bf16": (BF16, 1, 2, 1, 128, (150, 150), dict(k=24, window=17, sinks=4, refresh=64),
                      (transposed, transposed, transposed)),
    "r128-page": (F32, 1, 1, 3, 64, (301, 301), dict(k=32, window=20, sinks=5, refresh=128,
                  granularity="page"), (separate, transposed, transposed)),
    "r1-d80-soft": (F16, 1, 1, 3, 80, (40, 73), dict(k=12, window=5, sinks=2, refresh=1,
                    mode="soft_v"), (padded, padded, padded)),
    "r64-page-soft": (F32, 2, 1, 2, 64, (190, 190), dict(k=48, window=9, sinks=17, refresh=64,
                      granularity="page", mode="soft_v"), (separate, padded, separate)),
    "short-queries": (F32, 2, 2, 1, 64, (7, 203), dict(k=20, window=6, sinks=0, refresh=64),
                      (transposed, separate, transposed)),
    "one-query": (F16, 3, 2, 4, 128, (1, 130), dict(k=0.2, k_min=8, window=8, sinks=2, refresh=16),
                  (transposed, expanded, expanded)),
    "budget-exceeds-context": (F32, 2, 1, 2, 64, (60, 63), dict(k=50, window=8, sinks=2,
                               refresh=16), (separate, separate, separate)),
    # no whole number of tokens lies between rows
    "sequence-first": (F32, 2, 2, 2, 64, (90, 90), dict(k=16, window=8, sinks=3, refresh=16),
                       (by_sequence, by_sequence, by_sequence)),
    "sequence-first-one-key": (F32, 3, 2, 2, 64, (1, 1), dict(k=16), (by_sequence,) * 3),
    "one-key-for-all-tokens": (F32, 2, 2, 1, 64, (20, 90), dict(k=16, window=8, sinks=3,
                               refresh=16), (separate, repeated, separate)),
}  # fmt: skip


def problem(case, seed=0):
    """q, k, v, scores on the CPU, and the settings."""
    dtype, batch, heads, group, head_dim, (queries, keys), settings, layouts = case
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        layout((batch, h, s, head_dim), generator, dtype)
        for layout, h, s in zip(
            layouts, (heads * group, heads, heads), (queries, keys, keys), strict=True
        )
    )
    return q, k, v, torch.randn(batch, heads, keys, generator=generator), settings


def moved(tensor, device):
    """On ``device``, strides kept."""
    if tensor.device == device:
        return tensor
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    flat = tensor.as_strided((span,), (1,)).to(device)
    return flat.as_strided(tensor.shape, tensor.stride(), 0)


@pytest.mark.parametrize("impl", ["triton", "cpu", "reference"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_dense_layout_attention_is_what_a_mask_per_query_says(case, impl, device):
    if impl != "triton" and device.type == "cuda":
        pytest.skip("runs on the CPU")
    q, k, v, scores, settings = problem(case)
    soft = settings.get("mode") == "soft_v"
    budget = SparseKConfig.resolve(additional={"scorer": "knorm", **settings}, env={}).budget(PAGE)
    scale = 0.11
    exact, eager = (
        by_mask(q, k, v, scores, budget, scale, soft, dtype) for dtype in (F64, q.dtype)
    )
    there = [moved(t, device) for t in (q, k, v)]
    out = attention_forward(
        *there, scores=scores.to(device), config=settings, scale=scale, impl=impl
    )
    assert out.shape == q.shape
    assert out.dtype == q.dtype
    assert_within_twice(out, eager, exact, EPS[q.dtype])


@pytest.mark.parametrize("settings", [dict(k=500), dict(k=20, window=300, granularity="page")])
def test_a_budget_that_holds_everything_gives_ordinary_attention(settings, device):
    q, k, v, scores, _ = problem(CASES["r16-token"])
    settings = {"sinks": 4, **settings}
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    arguments = [t.to(device) for t in (q, k, v)]
    for impl in ("auto", "triton"):
        out = attention_forward(*arguments, scores=scores.to(device), config=settings, impl=impl)
        torch.testing.assert_close(out.cpu(), dense, rtol=0, atol=2e-6)
    # the last queries alone: SDPA has no causal mask for that, the kernels do
    last = attention_forward(
        arguments[0][:, :, -9:], *arguments[1:], scores=scores.to(device), config=settings
    )
    torch.testing.assert_close(last.cpu(), dense[:, :, -9:], rtol=0, atol=2e-6)


def test_queries_in_pieces_give_what_all_give_together(device):
    q, k, v, scores, settings = problem(CASES["r16-token"])
    q, k, v, scores = (t.to(device) for t in (q, k, v, scores))
    whole = attention_forward(q, k, v, scores=scores, config=settings)
    for low, high in ((0, 50), (50, 93), (93, 111)):
        part = attention_forward(
            q[:, :, low:high], k[:, :, :high], v[:, :, :high],
            scores=scores[..., :high], config=settings,
        )  # fmt: skip
        torch.testing.assert_close(part, whole[:, :, low:high], rtol=0, atol=2e-6)


def test_selection_lists_are_made_in_parts_when_they_are_large(device, monkeypatch):
    q, k, v, scores, settings = problem(CASES["r16-token"])
    q, k, v, scores = (t.to(device) for t in (q, k, v, scores))
    whole = attention_forward(q, k, v, scores=scores, config=settings)
    monkeypatch.setattr("vllm_sparsek.dense.SELECTION_BYTES", 1000)
    parts = attention_forward(q, k, v, scores=scores, config=settings)
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["r16-token", "r64-page", "short-queries", "share"])
@pytest.mark.parametrize("at_once", [1 << 28, 1000], ids=["whole", "parts"])
def test_selections_that_share_a_base_are_those_made_alone(name, at_once, device, monkeypatch):
    from vllm_sparsek.kernels.select import triton as select_triton

    case = {
        **CASES,
        "r64-page": (F32, 2, 1, 2, 64, (331, 331), dict(k=48, window=9, sinks=17, refresh=16,
                     granularity="page"), (separate, separate, separate)),
        "share": (F32, 2, 1, 2, 64, (150, 203), dict(k=0.2, k_min=8, window=8, sinks=2, refresh=4),
                  (separate, separate, separate)),
    }[name]  # fmt: skip
    q, k, v, scores, settings = problem(case)
    q, k, v, scores = (t.to(device) for t in (q, k, v, scores))
    monkeypatch.setattr("vllm_sparsek.dense.SELECTION_BYTES", at_once)
    # pages of short rows would be selected by a walk
    monkeypatch.setattr(select_triton.expiry, "MAX_UNITS", 0)
    launched = []
    lists = select_triton._base_lists
    monkeypatch.setattr(select_triton, "_base_lists", lambda *a: launched.append(1) or lists(*a))
    alone = attention_forward(q, k, v, scores=scores, config=settings, impl="triton")
    assert not launched
    monkeypatch.setattr(select_triton, "shares_base", lambda *_: True)
    monkeypatch.setattr(select_triton, "_base_pays", lambda *_: True)
    together = attention_forward(q, k, v, scores=scores, config=settings, impl="triton")
    assert launched
    torch.testing.assert_close(together, alone, rtol=0, atol=0)


class Recorder:
    """Stands for a kernel and keeps what it is launched with."""

    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        return lambda *args, **constexprs: self.calls.append((args, constexprs))


def test_lengths_share_a_compilation_and_no_tensor_is_copied(device, monkeypatch):
    from vllm_sparsek.kernels.prefill import triton as prefill_triton
    from vllm_sparsek.kernels.select import triton as select_triton

    prefill, lists, select = Recorder(), Recorder(), Recorder()
    monkeypatch.setattr(prefill_triton, "prefill_fwd_kernel", prefill)
    monkeypatch.setattr(prefill_triton, "lists_fwd_kernel", lists)
    monkeypatch.setattr(select_triton, "select_fwd_kernel", select)
    settings = dict(k=16, window=8, sinks=3, refresh=16)
    # selections of contexts up to 4,096 tokens have tiles of powers of two
    for keys in (600, 1001):
        q, k, v = (transposed((2, 2, keys, 64), None, F16).to(device) for _ in range(3))
        scores = torch.randn(2, 2, keys, device=device)
        attention_forward(q, k, v, scores=scores, config=settings, impl="triton")
        found = [tensor.data_ptr() for tensor in prefill.calls[-1][0][:3]]
        assert found == [q.data_ptr(), k.data_ptr(), v.data_ptr()]
        assert select.calls[-1][0][0].data_ptr() == scores.data_ptr()
    for recorder in (prefill, lists, select):
        (_, first), (_, second) = recorder.calls
        assert first == second


@pytest.mark.parametrize("shape", [(3, 5, 203), (2, 301, 301), (1, 1, 64), (4, 130, 131)])
def test_items_made_on_the_device_are_those_made_on_the_host(shape, device):
    from vllm_sparsek.kernels.prefill.triton import ITEMS_BLOCK, items_fwd_kernel

    batch, queries, keys = shape
    for refresh in (1, 64):
        expected = _items(batch, queries, keys, refresh, torch.device("cpu"))[:4]
        items = expected[0].numel()
        found = torch.full((4, items + 1), -7, dtype=torch.int32, device=device)
        items_fwd_kernel[(-(-items // ITEMS_BLOCK),)](
            *found, queries, keys, refresh, items // batch, items, BLOCK=ITEMS_BLOCK
        )
        assert torch.equal(found[:, :items].cpu(), torch.stack(expected))
        assert (found[:, items] == -7).all()


@pytest.mark.parametrize("name", ["knorm", "keydiff", "recency", "random"])
def test_without_scores_the_named_scorer_is_applied_to_the_keys(name, device):
    q, k, v, _, settings = problem(CASES["r16-token"])
    q, k, v = (t.to(device) for t in (q, k, v))
    made = scorer_class(name)()
    scores = made.score_rows(k, v)
    assert scores.shape == k.shape[:3]
    expected = attention_forward(q, k, v, scores=scores, config=settings)
    out = attention_forward(q, k, v, config={"scorer": name, **settings})
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    if name == "keydiff":
        # the scorer where the settings name none
        torch.testing.assert_close(attention_forward(q, k, v, config=settings), expected)
        resolved = SparseKConfig(**settings)
        torch.testing.assert_close(attention_forward(q, k, v, config=resolved), expected)


def test_scores_of_rows_are_those_of_the_paged_cache():
    keys = 53
    key = torch.randn(2, 3, keys, 64, generator=torch.Generator().manual_seed(1))
    for name in ("knorm", "recency", "random"):
        scorer = scorer_class(name)()
        rows = scorer.score_rows(key, key)
        for b in range(2):
            tokens = key[b].transpose(0, 1)
            expected = scorer.score(tokens, tokens, torch.arange(keys)).T
            torch.testing.assert_close(rows[b], expected, rtol=0, atol=0)
    pages = -(-keys // PAGE)
    for b in range(2):
        cache = torch.zeros(pages, 3, PAGE, 128)
        for j in range(keys):
            cache[j // PAGE, :, j % PAGE, :64] = key[b, :, j]
        scores, anchors = torch.full((pages, 3, PAGE), NAN), torch.full((pages, 3, 64), NAN)
        score_reference.keydiff(
            cache, torch.arange(pages).int()[None], torch.tensor([0, keys]).int(),
            torch.tensor([keys]).int(), scores, anchors,
        )  # fmt: skip
        expected = scores.transpose(0, 1).flatten(1)[:, :keys]
        found = scorer_class("keydiff")().score_rows(key, key)[b]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


WRONG = {
    "q-no-tensor": ("q", lambda t: t.tolist(), TypeError),
    "q-of-wrong-rank": ("q", lambda t: t[0], ValueError),
    "q-integer": ("q", lambda t: t.int(), TypeError),
    "q-heads-not-a-multiple": ("q", lambda t: t[:, :3], ValueError),
    "q-longer-than-k": ("q", lambda t: t.repeat(1, 1, 2, 1), ValueError),
    "q-strided-inside": ("q", lambda t: t.mT.contiguous().mT, ValueError),
    "k-of-another-dtype": ("k", lambda t: t.half(), TypeError),
    "k-of-another-head-size": ("k", lambda t: t[..., :32], ValueError),
    "k-of-another-batch": ("k", lambda t: t[:1], ValueError),
    "v-of-another-length": ("v", lambda t: t[:, :, :20], ValueError),
    "v-on-another-device": ("v", lambda t: t.to("meta"), ValueError),
    "scores-half": ("scores", lambda t: t.half(), TypeError),
    "scores-of-the-query-heads": ("scores", lambda t: t.repeat(1, 2, 1), ValueError),
    "causal-off": ("causal", lambda _: False, ValueError),
    "config-no-mapping": ("config", lambda _: 512, TypeError),
    "config-of-a-server": ("dense_until", lambda _: {"dense_until": 5}, ValueError),
    "config-unknown-key": ("windw", lambda _: {"windw": 5}, SparseKConfigError),
    "impl-unknown": ("impl", lambda _: "cuda", ValueError),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_what_does_not_fit_is_refused_by_the_arguments_name(wrong):
    name, change, error = wrong
    q, k, v, scores, settings = problem(CASES["r16-token"])
    arguments = {"q": q, "k": k, "v": v, "scores": scores, "causal": True, "config": settings}
    argument = name if name in (*arguments, "impl") else "config"
    arguments[argument] = change(arguments.get(argument))
    with pytest.raises(error, match=name):
        attention_forward(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


@pytest.mark.parametrize("name", ["q", "k", "v", "scores"])
def test_a_gradient_that_would_be_lost_is_an_error(name):
    q, k, v, scores, settings = problem(CASES["r16-token"])
    tensors = {"q": q, "k": k, "v": v, "scores": scores}
    tensors[name].requires_grad_()
    positional = [tensors[n] for n in "qkv"]
    with pytest.raises(RuntimeError, match=f"{name} requires a gradient"):
        attention_forward(*positional, scores=tensors["scores"], config=settings)
    with torch.no_grad():
        out = attention_forward(*positional, scores=tensors["scores"], config=settings)
    assert not out.requires_grad


@pytest.mark.parametrize(("scorer", "says"), [("quest", "keydiff"), ("learned", "score_rows")])
def test_scorers_that_need_more_than_keys_say_what_to_do(scorer, says, tmp_path):
    q, k, v, scores, settings = problem(CASES["r16-token"])
    config = {**settings, "scorer": scorer}
    if scorer == "learned":
        config["scorer_path"] = str(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=says):
        attention_forward(q, k, v, config=config)
    expected = attention_forward(q, k, v, scores=scores, config=settings)
    assert torch.equal(attention_forward(q, k, v, scores=scores, config=config), expected)


@pytest.mark.parametrize("empty", [(0, 5, 5), (2, 0, 5)], ids=["no-rows", "no-queries"])
def test_nothing_in_gives_nothing_out(empty, device):
    batch, queries, keys = empty
    k = torch.randn(batch, 1, keys, 64, device=device)
    q = torch.randn(batch, 2, queries, 64, device=device)
    assert attention_forward(q, k, k).shape == q.shape


def test_the_package_is_imported_without_torch_and_the_function_without_vllm():
    code = (
        "import sys, vllm_sparsek\n"
        "assert not {'torch', 'vllm', 'yaml'} & set(sys.modules)\n"
        "vllm_sparsek.attention_forward\n"
        "assert not {'vllm', 'triton'} & set(sys.modules), 'heavy'\n"
        "assert not hasattr(vllm_sparsek, 'attention_backward')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert vllm_sparsek.attention_forward is attention_forward


@pytest.mark.gpu
def test_tensors_beyond_two_to_the_31_elements_are_read_at_their_place(device):
    # one head lies 2**31 elements behind the other
    keys, head_dim = 300, 64
    q, k, v = (torch.randn(1, 2, keys, head_dim, dtype=F16, device=device) for _ in range(3))
    v = v.transpose(1, 2).contiguous().transpose(1, 2)
    scores = torch.randn(1, 2, keys, device=device)
    settings = dict(k=32, window=16, sinks=4, refresh=64)
    expected = attention_forward(q, k, v, scores=scores, config=settings)
    storage = torch.empty((1 << 31) + keys * head_dim, dtype=F16, device=device)
    far = storage.as_strided(q.shape, (0, 1 << 31, head_dim, 1))
    far.copy_(k)
    found = attention_forward(q, far, v, scores=scores, config=settings)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    far.copy_(q)
    found = attention_forward(far, k, v, scores=scores, config=settings)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
