"""Scorer files: every feature against its formula in float64, and files written whole or not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vllm_sparsek.scorers import scorer_file
from vllm_sparsek.scorers.features import Rope
from vllm_sparsek.scorers.learned import load_layer
from vllm_sparsek.scorers.scorer_file import (
    FORMAT,
    ScorerFile,
    ScorerFileError,
    ScorerHeader,
    save_scorer,
)

LAYER, HEADS, DIM, SIZE, UNITS, TOKENS = 2, 3, 16, 37, 5, 61
ROT = 12  # partial rotary embedding
INPUTS = {
    "key,value": ("key", "value"),
    "key_unrotated,key,value": ("key_unrotated", "key", "value"),
    "hidden": ("hidden",),
    "value,hidden": ("value", "hidden"),
}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(features=("key", "value"), kind="linear", shared=False, rope="neox", **changes):
    """A random scorer of one layer."""
    header = ScorerHeader(
        kind=kind, features=features, rope=rope if "key_unrotated" in features else None,
        **{k: changes.pop(k) for k in ("activation", "position_slope", "model") if k in changes},
    )  # fmt: skip
    width, own = header.width(DIM, SIZE), 1 if shared else HEADS
    shapes = {
        "linear": {"weight": (HEADS, width), "bias": (HEADS,)},
        "mlp": {
            "w1": (own, UNITS, width), "b1": (own, UNITS), "w2": (HEADS, UNITS), "b2": (HEADS,),
        },
    }[kind]  # fmt: skip
    layer = {name: draw(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    if header.rope:
        changes["inv_freq"] = 10000.0 ** -(torch.arange(ROT // 2) / (ROT // 2))
    return ScorerFile(header, {LAYER: layer}, **changes)


@pytest.fixture
def saved(tmp_path):
    """``saved(...)``: path of a file with the scorer ``make`` makes, and that scorer."""

    def save(**options):
        scorer = make(**options)
        save_scorer(tmp_path / "scorer.safetensors", scorer)
        return str(tmp_path / "scorer.safetensors"), scorer

    return save


def tokens():
    """key, value, positions, hidden of some tokens far into a context."""
    return (
        draw(TOKENS, HEADS, DIM, seed=10), draw(TOKENS, HEADS, DIM, seed=11),
        torch.arange(5000, 5000 + TOKENS, dtype=torch.int32), draw(TOKENS, SIZE, seed=12),
    )  # fmt: skip


def unrotate(key, positions, inv_freq, rope):
    """R(-position) key as products of complex numbers, in float64."""
    half = ROT // 2
    angle = (positions.float()[:, None] * inv_freq).double()
    turn = torch.polar(torch.ones_like(angle), -angle)[:, None]
    key = key.double()
    first = slice(0, ROT, 2) if rope == "gptj" else slice(0, half)
    second = slice(1, ROT, 2) if rope == "gptj" else slice(half, ROT)
    turned = torch.complex(key[..., first], key[..., second]) * turn
    result = key.clone()
    result[..., first], result[..., second] = turned.real, turned.imag
    return result


def formula(scorer, key, value, positions, hidden):
    """Scores in float64, head by head."""
    layer = {name: t.double() for name, t in scorer.layers[LAYER].items()}
    parts = {"key": key, "value": value, "hidden": hidden[:, None].expand(-1, HEADS, -1)}
    if scorer.header.rope:
        parts["key_unrotated"] = unrotate(key, positions, scorer.inv_freq, scorer.header.rope)
    x = torch.cat([parts[name].double() for name in scorer.header.features], dim=-1)
    scores = []
    for h in range(HEADS):
        if scorer.header.kind == "linear":
            scores.append(x[:, h] @ layer["weight"][h] + layer["bias"][h])
            continue
        own = h if layer["w1"].shape[0] > 1 else 0
        units = x[:, h] @ layer["w1"][own].T + layer["b1"][own]
        if scorer.header.activation == "relu":
            units = units.clamp_min(0)
        else:
            units = units * (1 + torch.erf(units / 2**0.5)) / 2
        scores.append(units @ layer["w2"][h] + layer["b2"][h])
    slope = layer.get("slope", torch.zeros(HEADS)) + scorer.header.position_slope
    return torch.stack(scores, dim=1) + slope * positions[:, None].double()


CASES = [
    *({"features": features} for features in INPUTS.values()),
    *({"features": features, "kind": "mlp"} for features in INPUTS.values()),
    {"features": ("key_unrotated",), "rope": "gptj"},
    {"features": ("hidden",), "kind": "mlp", "shared": True, "activation": "gelu"},
    {"features": ("key", "hidden"), "kind": "mlp", "shared": True},
    {"position_slope": -0.125},
]
NAMES = ["-".join(str(v) for v in case.values()) for case in CASES]


@pytest.mark.parametrize("options", CASES, ids=NAMES)
def test_scores_are_the_formulas(options, saved):
    path, scorer = saved(**options)
    found = load_layer(path, LAYER, HEADS, DIM, hidden_size=SIZE).score(*tokens())
    torch.testing.assert_close(
        found.double(), formula(scorer, *tokens()), rtol=1e-5, atol=2e-4
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", CASES, ids=NAMES)
def test_scores_are_the_same_bits_however_tokens_are_chunked(options, dtype, saved, monkeypatch):
    path, _ = saved(**options)
    scorer = load_layer(path, LAYER, HEADS, DIM, hidden_size=SIZE)
    key, value, positions, hidden = tokens()
    key, value, hidden = key.to(dtype), value.to(dtype), hidden.to(dtype)
    whole = scorer.score(key, value, positions, hidden)
    for size in (1, 2, 7, 16, 60):
        parts = [
            scorer.score(*(x[low : low + size] for x in (key, value, positions, hidden)))
            for low in range(0, TOKENS, size)
        ]
        assert torch.equal(torch.cat(parts), whole), f"chunks of {size}"
    monkeypatch.setattr("vllm_sparsek.scorers.learned.SLICE_ELEMENTS", 700)
    assert torch.equal(scorer.score(key, value, positions, hidden), whole)


@pytest.mark.parametrize("width", [576, 2048, 4096])
@pytest.mark.parametrize("heads", [1, 8])
def test_scores_of_wide_hidden_states_are_the_same_bits_in_chunks(width, heads):
    from vllm_sparsek.scorers.learned import LearnedScorer

    scorer = LearnedScorer(draw(heads, width), draw(heads), inputs=("hidden",))
    hidden, key = draw(333, width).bfloat16(), torch.zeros(333, heads, 1)
    positions = torch.arange(333)
    whole = scorer.score(key, key, positions, hidden)
    for size in (1, 5, 64, 332):
        parts = [
            scorer.score(*(x[low : low + size] for x in (key, key, positions, hidden)))
            for low in range(0, 333, size)
        ]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("rope", ["neox", "gptj"])
def test_undoing_the_rotation_gives_the_same_key_at_every_position(rope):
    inv_freq = 10000.0 ** -(torch.arange(ROT // 2) / (ROT // 2))
    key, at = draw(1, HEADS, DIM), torch.arange(0, 9000, 450)
    rotated = unrotate(key.expand(20, -1, -1), -at, inv_freq, rope).float()
    found = Rope(inv_freq, rope == "gptj").undo(rotated, at)
    torch.testing.assert_close(found, key.expand(20, -1, -1), rtol=1e-5, atol=1e-5)


def test_slopes_of_layers_and_of_the_file_add_up(tmp_path):
    scorer = make(position_slope=0.5)
    scorer.layers[LAYER]["slope"] = torch.tensor([0.0, -0.5, 2.0])
    path = tmp_path / "s.safetensors"
    save_scorer(path, scorer)
    found = load_layer(str(path), LAYER, HEADS, DIM)
    torch.testing.assert_close(found.slope, torch.tensor([0.5, 0.0, 2.5]))
    torch.testing.assert_close(
        found.score(*tokens()).double(), formula(scorer, *tokens()), rtol=1e-5, atol=1e-3
    )  # fmt: skip


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_a_rank_gets_its_heads_of_every_kind_of_hidden_layer(shared, saved):
    path, _ = saved(features=("value", "hidden"), kind="mlp", shared=shared)
    key, value, positions, hidden = tokens()
    whole = load_layer(path, LAYER, HEADS, DIM, hidden_size=SIZE)
    part = load_layer(path, LAYER, HEADS, DIM, slice(1, 3), hidden_size=SIZE)
    torch.testing.assert_close(
        part.score(key[:, 1:], value[:, 1:], positions, hidden),
        whole.score(key, value, positions, hidden)[:, 1:],
    )  # fmt: skip


def test_only_scorers_of_hidden_states_read_them(saved):
    path, _ = saved()
    assert not load_layer(path, LAYER, HEADS, DIM).reads_hidden
    path, _ = saved(features=("hidden",))
    scorer = load_layer(path, LAYER, HEADS, DIM, hidden_size=SIZE)
    assert scorer.reads_hidden
    with pytest.raises(ValueError, match="hidden states, and none were given"):
        scorer.score(*tokens()[:3])


def test_the_metadata_say_what_was_fitted_and_how(saved):
    path, _ = saved(
        kind="mlp", model="abc", data="prose, code", seed=7, extra={"steps": "300"},
        layer_budgets=torch.arange(8.0).view(4, 2),
    )  # fmt: skip
    with safe_open(path, "pt") as file:
        meta = file.metadata()
        assert file.get_tensor("layer_budgets").tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert meta["created_with"].startswith("vllm-sparsek")
    expected = {
        "format": FORMAT, "kind": "mlp", "input": "key,value", "activation": "relu",
        "model": "abc", "data": "prose, code", "seed": "7", "steps": "300",
    }  # fmt: skip
    assert {key: meta[key] for key in expected} == expected
    assert set(meta) == {*expected, "created_with"}


def test_a_full_disk_leaves_the_old_file_whole(saved, monkeypatch, tmp_path):
    path, _ = saved()
    before = Path(path).read_bytes()

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scorer_file.os, "fsync", full)
    with pytest.raises(ScorerFileError, match=r"cannot be written.*No space left"):
        save_scorer(path, make(features=("key",)))
    assert Path(path).read_bytes() == before
    assert os.listdir(tmp_path) == ["scorer.safetensors"]


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ScorerFileError, match=r"nowhere/s\.safetensors cannot be written"):
        save_scorer(tmp_path / "nowhere" / "s.safetensors", make())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers": {}}, "without layers"),
        ({"layers": {0: {"weight": torch.zeros(1, 1)}}}, "expected weight, bias"),
        ({"layers": {0: {"weight": torch.zeros(1, 1), "bias": torch.full((1,), float("nan"))}}},
         r"layers\.0\.bias holds NaN"),
        ({"header": ScorerHeader(features=("key_unrotated",), rope="neox")}, "inv_freq"),
        ({"header": ScorerHeader(features=("key_unrotated",))}, "rope None"),
        ({"header": ScorerHeader(features=("query",))}, "'query'"),
        ({"header": ScorerHeader(features=("key", "key"))}, "'key,key'"),
    ],
    ids=["no-layers", "no-bias", "nan", "no-inv-freq", "no-rope", "unknown", "twice"],
)  # fmt: skip
def test_a_scorer_that_contradicts_itself_is_not_written(change, words, tmp_path):
    fields = {"header": ScorerHeader(), "layers": make().layers, **change}
    with pytest.raises(ScorerFileError, match=words):
        save_scorer(tmp_path / "s.safetensors", ScorerFile(**fields))
    assert not os.listdir(tmp_path)


def rewrite(path, tensors=None, **metadata):
    """Change tensors and metadata of a file behind the writer's back."""
    with safe_open(path, "pt") as file:
        meta = {**file.metadata(), **metadata}
        content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file({**content, **(tensors or {})}, path, meta)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"rope": "spiral"}, "unknown rope 'spiral'; known are neox, gptj"),
        ({"activation": "tanh"}, "unknown activation 'tanh'; known are relu, gelu"),
        ({"position_slope": "inf"}, "position_slope is 'inf'"),
        ({"input": "key,key_unrotatd"}, "'key,key_unrotatd'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_metadata_of_no_meaning_are_refused(metadata, words, saved):
    path, _ = saved(features=("key", "key_unrotated"))
    rewrite(path, **metadata)
    with pytest.raises(ScorerFileError, match=words):
        load_layer(path, LAYER, HEADS, DIM)


def test_a_rotation_wider_than_the_head_is_refused(saved):
    path, _ = saved(features=("key_unrotated",))
    rewrite(path, {"inv_freq": torch.ones(DIM // 2 + 1)})
    with pytest.raises(ScorerFileError, match=r"inv_freq has 9 entries.*head_dim 16"):
        load_layer(path, LAYER, HEADS, DIM)


def test_a_scorer_of_another_hidden_size_is_refused(saved):
    path, _ = saved(features=("hidden",))
    with pytest.raises(ScorerFileError, match=rf"\[{HEADS}, {SIZE}\].*needs \[{HEADS}, 40\]"):
        load_layer(path, LAYER, HEADS, DIM, hidden_size=40)
