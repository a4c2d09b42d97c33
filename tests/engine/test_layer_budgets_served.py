"""Budgets per layer and KV head in the real engine: what is read, whatever the batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from answers import assert_same_tokens
from tiny import random_prompts, run_many, tiny_llm, write_model

from vllm_sparsek.attention.layer_budgets import split_budget
from vllm_sparsek.config import SparseKConfig
from vllm_sparsek.kernels.common.budget import mean_tokens_attended
from vllm_sparsek.scorers.scorer_file import ScorerFile, ScorerHeader, save_scorer

pytestmark = pytest.mark.engine

LAYERS, HEADS, DIM, PAGE = 4, 2, 64, 32
BY_LAYER = (0.25, 2.0, 0.0, 0.75)
BY_HEAD = ((0.25, 0.75), (3.0, 1.0), (0.0, 0.0), (0.5, 0.5))
DENSE = [2]
SETTINGS = {
    "number": {
        "k": 96, "window": 48, "sinks": 4, "refresh": 16, "dense_layers": DENSE, "dense_until": 0,
    },
    "share, pages": {
        "k": 0.25, "k_min": 64, "window": 40, "sinks": 4, "refresh": 32, "granularity": "page",
        "mode": "soft_v", "dense_layers": DENSE, "dense_until": 0,
    },
    "heads": {
        "k": 96, "window": 48, "sinks": 4, "refresh": 16, "dense_layers": DENSE, "dense_until": 0,
    },
    "heads, share, pages": {
        "k": 0.2, "k_min": 64, "window": 40, "sinks": 4, "refresh": 32, "granularity": "page",
        "mode": "soft_v", "dense_layers": DENSE, "dense_until": 0,
    },
}  # fmt: skip
SHARES = {name: BY_HEAD if name.startswith("heads") else BY_LAYER for name in SETTINGS}
TOKENS = 16
# float32 on the CPU, float16 on a GPU
EXACT = not torch.cuda.is_available()
PROMPTS = random_prompts((700, 330, 451))


def write_scorer(path, budgets):
    g = torch.Generator().manual_seed(0)
    layers = {
        layer: {
            "weight": torch.randn(HEADS, 2 * DIM, generator=g) / DIM**0.5,
            "bias": torch.zeros(HEADS),
        }
        for layer in range(LAYERS)
    }
    save_scorer(path, ScorerFile(ScorerHeader(), layers, layer_budgets=budgets))
    return str(path)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("budgets")
    model = write_model(folder / "model", num_hidden_layers=LAYERS)
    files = {
        shares: write_scorer(folder / f"uneven-{i}.safetensors", torch.tensor(shares))
        for i, shares in enumerate((BY_LAYER, BY_HEAD))
    }
    even = write_scorer(folder / "even.safetensors", None)
    call = {"prompts": PROMPTS, "max_tokens": TOKENS}
    # density is the first call's: the others run on engines of their own
    arms = {}
    for name, settings in SETTINGS.items():
        uneven = files[SHARES[name]]
        arms[name] = ({**settings, "scorer_path": uneven}, {}, [call])
        arms[f"{name}, again"] = (
            {**settings, "scorer_path": uneven}, {},
            [call, call, {**call, "reset": True, "one_by_one": True}],
        )  # fmt: skip
        arms[f"{name}, chunks"] = (
            {**settings, "scorer_path": uneven}, {"max_num_batched_tokens": 120}, [call],
        )  # fmt: skip
        arms[f"{name}, uniform"] = (
            {**settings, "scorer_path": uneven, "layer_budgets": "uniform"}, {}, [call],
        )  # fmt: skip
        arms[f"{name}, even"] = ({**settings, "scorer_path": even}, {}, [call])
    arms["dense forgotten"] = (
        {**SETTINGS["number"], "scorer_path": files[BY_LAYER], "dense_layers": []}, {}, [call],
    )  # fmt: skip
    specs = [
        {
            "llm": tiny_llm(
                model, attention_backend="sparsek", additional_config={"sparsek": settings},
                block_size=PAGE, **changes,
            ),
            "calls": calls,
        }
        for settings, changes, calls in arms.values()
    ]  # fmt: skip
    return dict(zip(arms, run_many(specs, folder), strict=True))


def tokens(results, name, call=0):
    assert "error" not in results[name], results[name]["error"]
    return results[name]["answers"][call]["tokens"]


@pytest.mark.parametrize("name", SETTINGS)
def test_uneven_budgets_change_what_is_read(name, results):
    assert tokens(results, name) != tokens(results, f"{name}, even")


@pytest.mark.parametrize("name", SETTINGS)
def test_uniform_ignores_the_files_budgets(name, results):
    assert tokens(results, f"{name}, uniform") == tokens(results, f"{name}, even")
    assert results[f"{name}, uniform"]["density"] == results[f"{name}, even"]["density"]


@pytest.mark.parametrize("name", SETTINGS)
def test_chunks_batches_and_the_prefix_cache_change_nothing(name, results):
    for arm in (name, f"{name}, chunks", f"{name}, again"):
        tokens(results, arm)
    expected = results[name]["answers"][0]
    assert_same_tokens(expected, results[f"{name}, chunks"]["answers"][0], EXACT)
    for answer in results[f"{name}, again"]["answers"]:
        assert_same_tokens(expected, answer, EXACT)


@pytest.mark.parametrize("name", SETTINGS)
def test_tokens_attended_are_the_mean_over_layers(name, results):
    tokens(results, name)
    settings = SETTINGS[name]
    # any scorer of tokens: the budget is the learned one's
    config = SparseKConfig(**{**settings, "scorer": "knorm", "dense_layers": tuple(DENSE)})
    nominal = config.budget(PAGE)
    shares = torch.tensor(SHARES[name]).view(LAYERS, -1)
    split = split_budget(nominal, tuple(map(tuple, shares.tolist())), (2,), 1024)
    budgets = [b for b in split if b is not None]
    assert any(b.heads for b in budgets) == name.startswith("heads")
    attended = context = 0.0
    for prompt in PROMPTS:
        # the last token is never read
        at = np.arange(len(prompt) + TOKENS - 1)
        dense = at < nominal.first_sparse_position(1024)
        sparse = np.where(dense, at + 1, mean_tokens_attended(budgets, at))
        attended += (sparse * len(budgets) + at + 1).sum() / LAYERS
        context += (at + 1).sum()
    assert results[name]["density"] == pytest.approx(attended / context, rel=1e-4)


def test_a_layer_the_file_takes_for_dense_must_be_dense(results):
    error = results["dense forgotten"]["error"]
    for word in ("uneven-0.safetensors", "layer 2", "dense_layers", "layer_budgets=uniform"):
        assert word in error
