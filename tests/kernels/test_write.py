"""Write: keys, values and linear scores of new tokens reach their slots, to the same bits."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from caches import FP8, NAN, paged_view
from interpreter import BF16, DEVICE

from vllm_sparsek.kernels.write import api, reference
from vllm_sparsek.kernels.write.linear import LinearScore, turn_back

# tokens, heads, head_dim, page, pairs of the rotation, interleaved, dtype of keys, of the cache
CASES = {
    "llama": (37, 2, 128, 16, 64, False, BF16, BF16),
    "one-token": (1, 8, 64, 16, 32, False, BF16, BF16),
    "partial-rotation": (19, 3, 80, 32, 10, False, torch.float16, torch.float16),
    "interleaved": (23, 2, 96, 16, 24, True, torch.float32, torch.float32),
    "no-rotation": (9, 1, 256, 128, 0, False, torch.float16, torch.float16),
    "fp8": (21, 2, 128, 16, 64, False, BF16, FP8),
}
SCALES = (0.25, 0.5)
# positions of a context of a million tokens
FAR = 1_000_000


def linear_score(heads, head_dim, pairs, interleaved, device):
    """A scorer of random weights."""
    g = torch.Generator().manual_seed(5)
    weight = torch.randn(3, heads, head_dim, generator=g) * head_dim**-0.5
    bias, slope = torch.randn(heads, generator=g), torch.randn(heads, generator=g) * 1e-6
    inv_freq = 500000.0 ** -(torch.arange(pairs) / max(pairs, 1)) if pairs else None
    linear = LinearScore(weight, bias, slope, inv_freq, interleaved)
    return dataclasses.replace(
        linear,
        **{
            name: tensor.to(device)
            for name, tensor in vars(linear).items()
            if isinstance(tensor, torch.Tensor)
        },
    )


def new_tokens(case, device):
    """Arguments up to the scorer, as slices of one projection: strided, padded at the end."""
    tokens, heads, head_dim, page, *_, dtype, _cache = case
    g = torch.Generator().manual_seed(7)
    projected = torch.randn(tokens, 4, heads, head_dim, generator=g)
    if DEVICE != "cuda" and case[-1] == FP8:
        # the interpreter loses a carry when it rounds to fp8: numbers that need no rounding
        projected = projected.to(FP8).float()
    projected = projected.to(dtype).to(device)
    positions = torch.randint(FAR, (tokens + 3,), generator=g).int()
    blocks = -(-tokens // page) + 2
    slots = torch.randperm(blocks * page, generator=g)[: tokens + 5]
    slots[3::5] = -1
    return (projected[:, 2], projected[:, 3], positions.to(device), slots.to(device)), blocks


def caches(blocks, case, device):
    """A cache of keys and values and one of scores, all NaN."""
    _, heads, head_dim, page, *_, cache = case
    kv = paged_view(blocks, heads, page, 2 * head_dim, torch.float32, device).to(cache)
    return kv, paged_view(blocks, heads, page, 1, torch.float32, device)[..., 0]


def run(case, impl, device):
    """The caches [numbers of K and V as float32, scores] after one write."""
    (key, value, positions, slots), blocks = new_tokens(case, device)
    linear = linear_score(*case[1:3], *case[4:6], device)
    kv, scores = caches(blocks, case, device)
    scales = tuple(torch.tensor(s, device=device) for s in SCALES) if case[-1] == FP8 else None
    write = reference.write_tokens if impl == "reference" else api.write_tokens
    extra = {} if impl == "reference" else {"impl": impl}
    write(key, value, positions, slots, linear, kv, scores, scales, **extra)
    return kv.float().cpu(), scores.cpu()


@pytest.mark.parametrize("impl", ["triton", "cpu"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_new_tokens_reach_their_slots_and_no_others(case, impl, device):
    kv, scores = run(case, impl, device if impl == "triton" else torch.device("cpu"))
    expected_kv, expected = run(case, "reference", torch.device("cpu"))
    if case[-1] == FP8:
        # x / scale is rounded to float32 before it is rounded to fp8: neighbours on a tie
        torch.testing.assert_close(kv, expected_kv, rtol=2**-3, atol=2**-9, equal_nan=True)
        assert (kv != expected_kv)[~kv.isnan()].float().mean() < 1e-3
    else:
        assert torch.equal(kv.isnan(), expected_kv.isnan())
        assert torch.equal(kv.nan_to_num(), expected_kv.nan_to_num())
    # float32 sums of 3 D products of order D**-0.5, and a million times a slope of 1e-6
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=2e-5, equal_nan=True)


def test_the_reference_is_the_formula():
    """One pair by hand: turned by a position, the key is turned back."""
    position, base = 3.0, torch.tensor([1.0, 2.0, 7.0])
    for interleaved in (False, True):
        angle = position * 0.5
        c, s = math.cos(angle), math.sin(angle)
        rotated = torch.tensor([[[1 * c - 2 * s, 2 * c + 1 * s, 7.0]]])
        inv_freq = torch.tensor([0.5])
        weight = torch.tensor([[[1.0, 10.0, 100.0]], [[0.5, 0, 0]], [[0, 0, 0.25]]])
        linear = LinearScore(weight, torch.tensor([3.0]), torch.tensor([2.0]), inv_freq,
                             interleaved)  # fmt: skip
        value = torch.tensor([[[0.0, 0.0, 8.0]]])
        kv, scores = torch.zeros(1, 1, 16, 6), torch.zeros(1, 1, 16)
        reference.write_tokens(
            rotated, value, torch.tensor([3]), torch.tensor([5]), linear, kv, scores
        )
        by_hand = 1 + 20 + 700 + 0.5 * rotated[0, 0, 0].item() + 0.25 * 8 + 3 + 2 * 3
        assert scores[0, 0, 5].item() == pytest.approx(by_hand, rel=1e-6)
        assert scores.count_nonzero() == 1
        torch.testing.assert_close(
            turn_back(rotated, torch.tensor([3]), inv_freq, interleaved)[0, 0], base
        )


@pytest.mark.parametrize("impl", ["triton", "cpu"])
@pytest.mark.parametrize("name", ["llama", "interleaved"])
def test_a_token_is_scored_to_the_same_bits_in_any_batch(name, impl, device):
    case = CASES[name]
    at = device if impl == "triton" else torch.device("cpu")
    (key, value, positions, slots), blocks = new_tokens(case, at)
    linear = linear_score(*case[1:3], *case[4:6], at)
    found = []
    for size in (len(key), 1, 5, 8):
        kv, scores = caches(blocks, case, at)
        for low in range(0, len(key), size):
            part = slice(low, low + size)
            api.write_tokens(
                key[part], value[part], positions[part], slots[part], linear, kv, scores,
                impl=impl,
            )  # fmt: skip
        found.append(scores.cpu())
    for scores in found[1:]:
        torch.testing.assert_close(scores, found[0], rtol=0, atol=0, equal_nan=True)


def test_numbers_beyond_fp8_become_its_largest(device):
    case = (1, 1, 64, 16, 0, False, torch.float32, FP8)
    kv, scores = caches(1, case, device)
    key = torch.full((1, 1, 64), 1e4, device=device)
    one = torch.ones((), device=device)
    api.write_tokens(
        key, -key, torch.zeros(1, dtype=torch.int32, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
        linear_score(1, 64, 0, False, device), kv, scores, (one, one), impl="triton",
    )  # fmt: skip
    assert kv[0, 0, 0, :64].float().unique().tolist() == [448.0]
    assert kv[0, 0, 0, 64:].float().unique().tolist() == [-448.0]


def test_no_tokens_are_no_launch(device):
    case = CASES["llama"]
    (key, value, positions, slots), blocks = new_tokens(case, device)
    kv, scores = caches(blocks, case, device)
    linear = linear_score(*case[1:3], *case[4:6], device)
    api.write_tokens(key[:0], value[:0], positions, slots, linear, kv, scores, impl="triton")
    assert bool(scores.isnan().all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": torch.zeros(4, 2, 32)}, "value must have shape"),
        ({"positions": torch.zeros(3, dtype=torch.int32)}, "positions has 3 entries for 4 tokens"),
        ({"slot_mapping": torch.zeros(2, dtype=torch.int64)}, "slot_mapping has 2 entries"),
        ({"kv_cache": torch.zeros(1, 2, 16, 64)}, "kv_cache must have shape"),
        ({"kv_cache": torch.zeros(1, 2, 16, 128).to(FP8)}, "kv_scales go with"),
        ({"scores": torch.zeros(1, 3, 16)}, "scores must have shape"),
        ({"weight": torch.zeros(2, 2, 64)}, "linear.weight must have shape"),
        ({"slope": torch.zeros(3)}, "linear.slope must have shape"),
        ({"inv_freq": torch.zeros(33)}, "linear.inv_freq has 33 pairs"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_that_do_not_fit_are_named(change, message):
    linear = linear_score(2, 64, 32, False, "cpu")
    arguments = {
        "key": torch.zeros(4, 2, 64),
        "value": torch.zeros(4, 2, 64),
        "positions": torch.zeros(4, dtype=torch.int32),
        "slot_mapping": torch.full((4,), -1),
        "kv_cache": torch.zeros(1, 2, 16, 128),
        "scores": torch.full((1, 2, 16), NAN),
    }
    api.write_tokens(linear=linear, **arguments)
    inner = {name: change.pop(name) for name in list(change) if name not in arguments}
    with pytest.raises(ValueError, match=message):
        api.write_tokens(linear=dataclasses.replace(linear, **inner), **{**arguments, **change})
