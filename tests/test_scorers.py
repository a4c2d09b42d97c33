"""Scorers: one matrix over all of them, then what each one promises."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vllm_sparsek.config import SparseKConfig
from vllm_sparsek.kernels.common.score_pages import (
    bounds_per_token,
    floats_per_token,
    split_bounds_cache,
    split_score_cache,
)
from vllm_sparsek.scorers import SCORERS, make_scorer, scorer_class
from vllm_sparsek.scorers.base import ScoreBatch, Scorer
from vllm_sparsek.scorers.features import Rope
from vllm_sparsek.scorers.learned import LearnedScorer, load_layer
from vllm_sparsek.scorers.random import RandomScorer
from vllm_sparsek.scorers.recency import RecencyScorer
from vllm_sparsek.scorers.scorer_file import FORMAT, ScorerFileError

LAYER, HEADS, DIM, HIDDEN, PAGE = 3, 3, 16, 5, 16
# of two requests; no multiples of the page
LENGTHS = (53, 17)


def tensors(kind, layer=LAYER, heads=HEADS, dim=DIM, hidden=HIDDEN, seed=0):
    """Random weights of one layer by their names in the file."""
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "linear": {"weight": (heads, 2 * dim), "bias": (heads,)},
        "mlp": {
            "w1": (heads, hidden, 2 * dim), "b1": (heads, hidden),
            "w2": (heads, hidden), "b2": (heads,),
        },
    }  # fmt: skip
    return {
        f"layers.{layer}.{name}": torch.randn(shape, generator=g)
        for name, shape in shapes[kind].items()
    }


def write_file(path, content, **metadata):
    save_file(content, str(path), {"format": FORMAT, "input": "key_value", **metadata})
    return str(path)


@pytest.fixture
def file(tmp_path):
    """``file(kind)`` or ``file(kind, tensors, **metadata)``: a scorer file's path."""

    def make(kind="linear", content=None, **metadata):
        path = tmp_path / f"{kind}.safetensors"
        return write_file(path, content or tensors(kind), kind=kind, **metadata)

    return make


STATIC = [name for name in SCORERS if not scorer_class(name).query_aware]


@pytest.fixture(params=[*(name for name in STATIC if name != "learned"), "linear", "mlp"])
def scorer(request, file) -> Scorer:
    """Every scorer that has scores, made as a layer makes it."""
    config = SparseKConfig(scorer=request.param) if request.param in SCORERS else SparseKConfig(
        scorer_path=file(request.param, position_slope="0.01"))  # fmt: skip
    return make_scorer(config, LAYER, HEADS, DIM, slice(0, HEADS), torch.device("cpu"))


class Cache:
    """Two requests in a paged cache, written chunk by chunk as the engine does."""

    def __init__(self, scorer: Scorer, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        g = torch.Generator().manual_seed(seed)
        self.scorer = scorer
        self.key = [torch.randn(n, HEADS, DIM, generator=g).to(dtype) for n in LENGTHS]
        self.value = [torch.randn(n, HEADS, DIM, generator=g).to(dtype) for n in LENGTHS]
        blocks = 9
        self.kv = torch.full((blocks, HEADS, PAGE, 2 * DIM), float("nan"), dtype=dtype)
        floats = floats_per_token(HEADS, PAGE, DIM if scorer.needs_anchor else 0)
        cache = torch.full((blocks, 1, PAGE, floats), float("nan"))
        self.scores, self.anchors = split_score_cache(
            cache, HEADS, DIM if scorer.needs_anchor else 0
        )
        self.bounds = None
        # block 0 is vLLM's null block
        self.table = torch.tensor([[5, 2, 8, 3], [1, 7, 0, 0]], dtype=torch.int32)

    def step(self, starts: list[int], ends: list[int]) -> None:
        key, value, positions, slots = [], [], [], []
        for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
            at = torch.arange(start, end)
            block = self.table[row, at // PAGE].long()
            k, v = self.key[row][start:end], self.value[row][start:end]
            if not self.scorer.writes_kv:
                self.kv[block, :, at % PAGE] = torch.cat([k, v], dim=-1)
            key.append(k)
            value.append(v)
            positions.append(at)
            slots.append(block * PAGE + at % PAGE)
        new = torch.tensor([0, *(e - s for s, e in zip(starts, ends, strict=True))])
        # vLLM pads the slot mapping beyond the tokens of the step
        padded = torch.cat([*slots, torch.full((3,), -1)])
        batch = ScoreBatch(
            torch.cat(key), torch.cat(value), torch.cat(positions).int(), padded, self.kv,
            self.table, new.cumsum(0).int(), torch.tensor(ends, dtype=torch.int32),
            self.scores, self.anchors, bounds=self.bounds,
        )  # fmt: skip
        self.scorer.write(batch)

    def found(self, row: int) -> torch.Tensor:
        """[n, H] scores of one request, in token order."""
        at = torch.arange(LENGTHS[row])
        return self.scores[self.table[row, at // PAGE].long(), :, at % PAGE]

    def held(self, row: int) -> torch.Tensor:
        """[n, H, 2 * D] keys and values of one request, in token order."""
        at = torch.arange(LENGTHS[row])
        return self.kv[self.table[row, at // PAGE].long(), :, at % PAGE]


def at_once(scorer: Scorer, **options) -> Cache:
    cache = Cache(scorer, **options)
    cache.step([0, 0], list(LENGTHS))
    return cache


# --- the matrix ------------------------------------------------------------------------------


def test_every_module_of_scorers_is_in_the_matrix():
    import vllm_sparsek.scorers as package

    shared = {"base", "features", "scorer_file", "scorer_reader", "shipped"}
    modules = {p.stem for p in Path(package.__file__).parent.glob("[a-z]*.py")} - shared
    assert modules == {path.split(".")[-2] for path in SCORERS.values()} == set(SCORERS)


@pytest.mark.parametrize("name", SCORERS)
def test_every_scorer_is_a_frozen_dataclass_with_a_docstring(name):
    cls = scorer_class(name)
    assert issubclass(cls, Scorer)
    assert cls.__dataclass_params__.frozen
    assert cls.__doc__


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_finite_float32_per_token_and_head(scorer, dtype):
    cache = at_once(scorer, dtype=dtype)
    for row in range(2):
        assert cache.found(row).dtype == torch.float32
        assert cache.found(row).shape == (LENGTHS[row], HEADS)
        assert cache.found(row).isfinite().all()
    if scorer.needs_anchor:
        return
    scores = scorer.score(cache.key[0], cache.value[0], torch.arange(LENGTHS[0]).int())
    assert scores.dtype == torch.float32
    assert scores.shape == (LENGTHS[0], HEADS)


def test_no_tokens_are_no_scores(scorer):
    cache = Cache(scorer)
    cache.step([0, 0], [0, 0])
    assert cache.scores.isnan().all()


def test_slots_of_no_token_stay_untouched(scorer):
    cache = at_once(scorer)
    written = sum(cache.found(row).numel() for row in range(2))
    assert cache.scores.isfinite().sum() == written


CHUNKS = {
    "token by token": [(i + 1, min(i + 1, 17)) for i in range(53)],
    "cut inside pages": [(7, 0), (20, 5), (31, 17), (53, 17)],
    "cut at pages": [(16, 16), (48, 17), (53, 17)],
}


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS.keys())
def test_scores_do_not_depend_on_chunks(scorer, chunks):
    cache, starts = Cache(scorer), [0, 0]
    for ends in chunks:
        cache.step(starts, list(ends))
        starts = list(ends)
    whole = at_once(scorer)
    for row in range(2):
        assert torch.equal(cache.found(row), whole.found(row))


def test_scores_do_not_depend_on_other_requests(scorer):
    alone = Cache(scorer)
    alone.step([0, 0], [LENGTHS[0], 0])
    assert torch.equal(alone.found(0), at_once(scorer).found(0))


def test_scores_do_not_depend_on_later_tokens(scorer):
    whole, cut = at_once(scorer), Cache(scorer)
    for row in range(2):
        cut.key[row][10:] = 7.0
    cut.step([0, 0], list(LENGTHS))
    assert torch.equal(whole.found(0)[:10], cut.found(0)[:10])


# --- one by one ------------------------------------------------------------------------------


def test_knorm_keeps_small_keys():
    cache = at_once(scorer_class("knorm")())
    expected = -cache.key[0].double().pow(2).sum(-1).sqrt()
    torch.testing.assert_close(cache.found(0).double(), expected, rtol=1e-6, atol=1e-6)
    smallest = cache.key[0].norm(dim=-1).argmin(0)
    assert torch.equal(cache.found(0).argmax(0), smallest)


def test_recency_rises_with_the_position():
    found = at_once(RecencyScorer()).found(0)
    assert (found.diff(dim=0) > 0).all()
    far = torch.tensor([2**23 - 1, 2**23], dtype=torch.int32)
    key = torch.zeros(2, HEADS, DIM)
    assert (RecencyScorer().score(key, key, far).diff(dim=0) == 1).all()


def test_keydiff_scores_unlike_keys_higher():
    cache = Cache(scorer_class("keydiff")())
    direction = torch.randn(DIM)
    cache.key[0][:] = direction * torch.rand(LENGTHS[0], HEADS, 1).add(0.5)
    cache.key[0][20] = -direction
    cache.step([0, 0], list(LENGTHS))
    found = cache.found(0)
    assert (found[:PAGE] == 0).all(), "nothing comes before the first page"
    torch.testing.assert_close(found[20], torch.ones(HEADS))
    torch.testing.assert_close(found[21], -torch.ones(HEADS))


def test_keydiff_has_no_score_of_a_token_alone():
    with pytest.raises(NotImplementedError, match="use write"):
        scorer_class("keydiff")().score(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4), torch.zeros(1))


def test_random_is_a_function_of_seed_position_and_head():
    key, at = torch.zeros(100, 4, DIM), torch.arange(100).int()
    scores = RandomScorer(seed=1).score(key, key, at)
    assert torch.equal(scores, RandomScorer(seed=1).score(key + 1, key, at))
    assert torch.equal(scores[50:], RandomScorer(seed=1).score(key[50:], key[50:], at[50:]))
    assert (scores != RandomScorer(seed=2).score(key, key, at)).float().mean() > 0.99
    assert (scores[:, 0] != scores[:, 1]).float().mean() > 0.99


def test_random_takes_its_seed_from_the_settings():
    made = make_scorer(
        SparseKConfig(scorer="random", seed=7), LAYER, HEADS, DIM, slice(0, HEADS),
        torch.device("cpu"),
    )  # fmt: skip
    assert made == RandomScorer(seed=7)


@pytest.mark.parametrize("offset", [0, 10_000_000], ids=["from-zero", "far"])
def test_random_is_uniform_and_independent_between_heads_and_neighbours(offset):
    n, heads = 20_000, 8
    at = torch.arange(offset, offset + n, dtype=torch.int32)
    key = torch.zeros(n, heads, 1)
    u = RandomScorer(seed=3).score(key, key, at).double()
    assert u.min() >= 0
    assert u.max() < 1
    # Kolmogorov-Smirnov distance; 2.5 / sqrt(n) is far beyond any usual level
    grid = (torch.arange(n) + 0.5) / n
    for head in range(heads):
        assert (u[:, head].sort().values - grid).abs().max() < 2.5 / n**0.5
    # five standard deviations of a correlation of independent numbers
    heads_apart = torch.corrcoef(u.T) - torch.eye(heads)
    assert heads_apart.abs().max() < 5 / n**0.5
    neighbours = torch.corrcoef(torch.stack([u[1:, 0], u[:-1, 0]]))[0, 1]
    assert neighbours.abs() < 5 / n**0.5


# --- learned ---------------------------------------------------------------------------------


def formula(kind, key, value, positions, slope):
    """The scorer in float64, head by head."""
    t = {name.split(".")[-1]: x.double() for name, x in tensors(kind).items()}
    scores = torch.empty(key.shape[:2], dtype=torch.float64)
    for h in range(key.shape[1]):
        x = torch.cat([key[:, h], value[:, h]], dim=1).double()
        if kind == "linear":
            scores[:, h] = x @ t["weight"][h] + t["bias"][h]
        else:
            hidden = (x @ t["w1"][h].T + t["b1"][h]).clamp_min(0)
            scores[:, h] = hidden @ t["w2"][h] + t["b2"][h]
    return scores + slope * positions[:, None].double()


@pytest.mark.parametrize("slope", [0.0, -0.25], ids=["no-slope", "slope"])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_learned_scores_are_the_formulas(kind, slope, file):
    g = torch.Generator().manual_seed(5)
    key, value = (torch.randn(111, HEADS, DIM, generator=g) for _ in range(2))
    at = torch.arange(900, 1011).int()
    found = load_layer(file(kind, position_slope=str(slope)), LAYER, HEADS, DIM).score(
        key, value, at
    )
    torch.testing.assert_close(
        found.double(), formula(kind, key, value, at, slope), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_rank_gets_the_scores_of_its_heads(kind, file):
    path = file(kind)
    key, value, at = torch.randn(9, HEADS, DIM), torch.randn(9, HEADS, DIM), torch.arange(9).int()
    whole = load_layer(path, LAYER, HEADS, DIM).score(key, value, at)
    for heads in (slice(0, 1), slice(1, 3)):
        part = load_layer(path, LAYER, HEADS, DIM, heads)
        found = part.score(key[:, heads], value[:, heads], at)
        torch.testing.assert_close(found, whole[:, heads])


def test_weights_are_read_in_any_float_dtype(file):
    half = {name: x.half() for name, x in tensors("linear").items()}
    scorer = load_layer(file("linear", half), LAYER, HEADS, DIM)
    assert scorer.weight.dtype == torch.float32
    torch.testing.assert_close(scorer.weight, half[f"layers.{LAYER}.weight"].float())


# --- quest -----------------------------------------------------------------------------------


class BoundsCache(Cache):
    """The same with bounds in place of scores."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(scorer_class("keydiff")(), dtype=dtype)
        self.scorer = scorer_class("quest")()
        width = bounds_per_token(HEADS, PAGE, PAGE, DIM)
        cache = torch.full((9, 1, PAGE, width), float("nan"), dtype=dtype)
        self.scores = self.anchors = None
        self.bounds = split_bounds_cache(cache, HEADS, PAGE, DIM)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS.keys())
def test_quest_keeps_the_range_of_complete_pages_however_they_fill(chunks, dtype):
    cache, starts = BoundsCache(dtype), [0, 0]
    for ends in chunks:
        cache.step(starts, list(ends))
        starts = list(ends)
    for row, n in enumerate(LENGTHS):
        for p in range(n // PAGE):
            keys = cache.key[row][p * PAGE : (p + 1) * PAGE]
            found = cache.bounds[cache.table[row, p].long(), :, 0]
            assert torch.equal(found, torch.stack([keys.amin(0), keys.amax(0)], dim=1))
    complete = sum(n // PAGE for n in LENGTHS)
    assert cache.bounds.isfinite().sum() == complete * HEADS * 2 * DIM


@pytest.mark.parametrize("page", [16, 128])
def test_bounds_of_16_tokens_take_a_sixteenth_of_the_kv_cache(page):
    assert bounds_per_token(8, page, 16, 128) * 16 == 8 * 2 * 128


def test_quest_has_no_score_of_a_token_alone():
    with pytest.raises(NotImplementedError, match="use write"):
        scorer_class("quest")().score(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4), torch.zeros(1))


@pytest.mark.parametrize("name", [name for name in SCORERS if name != "learned"])
def test_settings_know_which_scorers_select_by_the_query(name):
    assert SparseKConfig(scorer=name).query_aware is scorer_class(name).query_aware


@pytest.mark.parametrize("features", ["key,value", "key_unrotated,key,value", "value"])
def test_linear_scorers_write_keys_and_values_with_the_scores_that_score_gives(features, tmp_path):
    names = tuple(features.split(","))
    g = torch.Generator().manual_seed(1)
    scorer = LearnedScorer(
        torch.randn(HEADS, len(names) * DIM, generator=g), torch.randn(HEADS, generator=g),
        slope=torch.randn(HEADS, generator=g) / 100, inputs=names,
        rope=Rope(10000.0 ** -(torch.arange(DIM // 2) / (DIM // 2)), interleaved=False),
    )  # fmt: skip
    assert scorer.writes_kv
    cache = at_once(scorer)
    for row, n in enumerate(LENGTHS):
        key, value = cache.key[row], cache.value[row]
        assert torch.equal(cache.held(row), torch.cat([key, value], dim=-1))
        torch.testing.assert_close(
            cache.found(row), scorer.score(key, value, torch.arange(n)), rtol=1e-5, atol=1e-5
        )


def test_only_linear_scorers_without_hidden_states_write_keys_and_values(file):
    wide = LearnedScorer(torch.zeros(HEADS, 7), torch.zeros(HEADS), inputs=("hidden",))
    assert not wide.writes_kv
    assert not load_layer(str(file("mlp")), LAYER, HEADS, DIM).writes_kv
    assert load_layer(str(file("linear")), LAYER, HEADS, DIM).writes_kv


def test_only_learned_scorers_count_as_trained():
    assert [name for name in SCORERS if scorer_class(name).trained] == ["learned"]
    assert LearnedScorer.trained


# --- bad files -------------------------------------------------------------------------------


def refused(path, *words, layer=LAYER, heads=HEADS, dim=DIM):
    with pytest.raises(ScorerFileError) as error:
        load_layer(str(path), layer, heads, dim)
    for word in (str(path), *words):
        assert word in str(error.value)


def test_a_missing_file_is_refused(tmp_path):
    refused(tmp_path / "nowhere.safetensors", "no such file")


def test_a_folder_is_refused(tmp_path):
    refused(tmp_path, "no such file")


class Trap:
    """Unpickling it leaves a trace."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_a_pickle_by_another_name_is_refused_and_never_unpickled(how, tmp_path):
    trace, path = tmp_path / "executed", tmp_path / "scorer.safetensors"
    if how == "pickle":
        path.write_bytes(pickle.dumps(Trap(trace)))
    else:
        torch.save(Trap(trace), path)
    refused(path, "not a safetensors file")
    assert not trace.exists()


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"{}"], ids=["empty", "zeros", "json"])
def test_garbage_is_refused(content, tmp_path):
    path = tmp_path / "scorer.safetensors"
    path.write_bytes(content)
    refused(path, "not a safetensors file")


def test_a_truncated_file_is_refused(file, tmp_path):
    path = Path(file("mlp"))
    path.write_bytes(path.read_bytes()[:-40])
    refused(path, "not a safetensors file")


def test_another_programs_safetensors_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(tensors("linear"), str(path))
    refused(path, "metadata format is None", FORMAT)
    save_file(tensors("linear"), str(path), {"format": "pt"})
    refused(path, "metadata format is 'pt'", FORMAT)


def test_an_unknown_kind_is_refused(tmp_path):
    path = write_file(tmp_path / "s.safetensors", tensors("linear"), kind="transformer")
    refused(path, "'transformer'", "linear, mlp")


def test_an_unknown_input_is_refused(tmp_path):
    path = write_file(tmp_path / "s.safetensors", tensors("linear"), input="hidden_state")
    refused(path, "'hidden_state'", "key_value")


def test_a_slope_that_is_no_number_is_refused(file):
    refused(file("linear", position_slope="steep"), "position_slope", "'steep'")


def test_a_missing_layer_is_refused_with_the_layers_there_are(file):
    content = {**tensors("linear", layer=0), **tensors("linear", layer=11)}
    refused(file("linear", content), "layers.12.weight", "layers 0..11", layer=12)


def test_a_missing_tensor_is_refused(file):
    content = tensors("mlp")
    del content[f"layers.{LAYER}.b2"]
    refused(file("mlp", content), f"layers.{LAYER}.b2")


def test_tensors_of_another_naming_are_refused(file):
    content = {"layers.x.weight": torch.zeros(1), "head": torch.zeros(1)}
    refused(file("linear", content), f"layers.{LAYER}.weight", "no layers")


@pytest.mark.parametrize(
    "model", [{"heads": HEADS + 1}, {"dim": DIM * 2}], ids=["heads", "head_dim"]
)
def test_a_scorer_of_another_model_is_refused_with_both_shapes(model, file):
    needed = [model.get("heads", HEADS), 2 * model.get("dim", DIM)]
    refused(file(), f"layers.{LAYER}.weight", f"[{HEADS}, {2 * DIM}]", str(needed), **model)


@pytest.mark.parametrize("name", ["w1", "b1", "w2", "b2"])
def test_every_tensor_of_an_mlp_is_checked(name, file):
    content = tensors("mlp")
    full = f"layers.{LAYER}.{name}"
    content[full] = content[full][..., :-1].contiguous()
    # any hidden width fits w1
    needs = f"needs [{HEADS}, any, {2 * DIM}]" if name == "w1" else "the model needs"
    refused(file("mlp", content), f"tensor {full} ", needs)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_weights_that_are_no_numbers_are_refused(value, file):
    content = tensors("linear")
    content[f"layers.{LAYER}.bias"][1] = float(value)
    refused(file("linear", content), f"layers.{LAYER}.bias", "NaN or infinity")


def test_a_bad_layer_is_only_refused_where_it_is_used(file):
    content = {**tensors("linear"), **tensors("linear", layer=0)}
    content["layers.0.bias"][0] = float("nan")
    path = file("linear", content)
    load_layer(path, LAYER, HEADS, DIM)
    refused(path, "layers.0.bias", layer=0)
