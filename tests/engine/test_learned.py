"""Scorer files through the real engine: by setting, with a checkpoint, and wrong ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import run_many

from vllm_sparsek.model_id import model_fingerprint
from vllm_sparsek.scorers.scorer_file import FORMAT

pytestmark = pytest.mark.engine

SMALL = {"k": 96, "window": 48, "sinks": 4, "refresh": 16, "dense_until": 0}
TOKENS = 12


@pytest.fixture(scope="module")
def shape(model_dir):
    """layers, KV heads, head_dim of the real model."""
    config = json.loads((Path(model_dir) / "config.json").read_text())
    return config["num_hidden_layers"], config["num_key_value_heads"], config["head_dim"]


@pytest.fixture(scope="module")
def files(shape, model_dir, tmp_path_factory):
    """Scorer files: a random linear one, the same as an MLP, the position, one too wide, one
    of another model."""
    layers, heads, dim = shape
    folder = tmp_path_factory.mktemp("scorers")
    linear, mlp, position, wide = {}, {}, {}, {}
    g = torch.Generator().manual_seed(0)
    for layer in range(layers):
        w = torch.randn(heads, 2 * dim, generator=g) / dim
        b = torch.randn(heads, generator=g)
        at = f"layers.{layer}"
        linear |= {f"{at}.weight": w, f"{at}.bias": b}
        # x = relu(x) - relu(-x)
        mlp |= {
            f"{at}.w1": torch.stack([w, -w], dim=1), f"{at}.b1": torch.stack([b, -b], dim=1),
            f"{at}.w2": torch.tensor([[1.0, -1.0]]).repeat(heads, 1),
            f"{at}.b2": torch.zeros(heads),
        }  # fmt: skip
        position |= {f"{at}.weight": torch.zeros_like(w), f"{at}.bias": torch.zeros_like(b)}
        wide |= {f"{at}.weight": torch.zeros(heads, 2 * dim + 2), f"{at}.bias": b}
    found = {}
    for name, kind, content, more in (
        ("linear", "linear", linear, {"model": model_fingerprint(model_dir)}),
        ("mlp", "mlp", mlp, {}),
        ("position", "linear", position, {"position_slope": "1"}),
        ("wide", "linear", wide, {}),
        ("stranger", "linear", linear, {"model": "0" * 64}),
    ):
        found[name] = str(folder / f"{name}.safetensors")
        meta = {"format": FORMAT, "kind": kind, "input": "key_value", **more}
        save_file(content, found[name], meta)
    return found


@pytest.fixture(scope="module")
def checkpoint(model_dir, files, tmp_path_factory):
    """The real model with a scorer of its own and settings that name it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    for path in Path(model_dir).iterdir():
        if path.name != "config.json":
            (folder / path.name).symlink_to(path.resolve())
    # in a folder of its own: vLLM loads every safetensors file beside the weights
    (folder / "sparsek").mkdir()
    (folder / "sparsek" / "scorer.safetensors").symlink_to(files["linear"])
    config = json.loads((Path(model_dir) / "config.json").read_text())
    config["sparsek_config"] = {**SMALL, "scorer_path": "sparsek/scorer.safetensors"}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def results(base_llm, prompts, files, checkpoint, tmp_path_factory):
    settings = {
        "linear": {"scorer_path": files["linear"]},
        "mlp": {"scorer_path": files["mlp"]},
        "dense prefill": {"scorer_path": files["linear"], "prefill": "dense"},
        "position": {"scorer_path": files["position"]},
        "recency": {"scorer": "recency", "prefill": "sparse"},
        "wide": {"scorer_path": files["wide"]},
        "stranger": {"scorer_path": files["stranger"]},
    }
    calls = [{"prompts": prompts[:3], "max_tokens": TOKENS}]
    specs = {
        name: {
            **base_llm, "attention_backend": "sparsek",
            "additional_config": {"sparsek": {**SMALL, **more}},
        }
        for name, more in settings.items()
    }  # fmt: skip
    specs["checkpoint"] = {**base_llm, "model": checkpoint, "attention_backend": "sparsek"}
    specs["dense checkpoint"] = {**base_llm, "model": checkpoint}
    found = run_many(
        [{"llm": llm, "calls": calls} for llm in specs.values()],
        tmp_path_factory.mktemp("learned"),
    )  # fmt: skip
    return dict(zip(specs, found, strict=True))


def tokens(results, name):
    assert "error" not in results[name], results[name]["error"]
    return results[name]["answers"][0]["tokens"]


def test_a_learned_scorer_makes_prefill_sparse(results):
    tokens(results, "linear")
    tokens(results, "dense prefill")
    # most prompt tokens have far more context than the budget
    assert results["linear"]["density"] < 0.6
    assert results["dense prefill"]["density"] > 0.9


def test_the_scorers_file_decides_what_is_read(results):
    assert tokens(results, "linear") != tokens(results, "position")


def test_a_linear_scorer_of_the_position_is_the_recency_scorer(results):
    assert tokens(results, "position") == tokens(results, "recency")


def test_an_mlp_that_computes_the_linear_scorer_gives_its_tokens(results):
    assert tokens(results, "mlp") == tokens(results, "linear")


def test_a_checkpoint_brings_its_scorer_and_settings(results):
    assert tokens(results, "checkpoint") == tokens(results, "linear")
    assert results["checkpoint"]["density"] == results["linear"]["density"]


def test_a_checkpoints_settings_do_nothing_without_the_backend(results):
    tokens(results, "dense checkpoint")
    assert "SPARSEK" not in results["dense checkpoint"]["backends"].values()
    assert results["dense checkpoint"]["density"] is None


def test_a_scorer_of_another_model_ends_the_start_with_the_tensors_name(results, files, shape):
    _, heads, dim = shape
    error = results["wide"]["error"]
    for word in (
        files["wide"], "layers.0.weight", f"[{heads}, {2 * dim + 2}]", f"[{heads}, {2 * dim}]",
    ):  # fmt: skip
        assert word in error


def test_a_scorer_of_other_weights_of_the_same_shape_is_refused_with_a_remedy(
    results, files, model_dir
):
    error = results["stranger"]["error"]
    for word in (
        files["stranger"], "0" * 64, model_dir, model_fingerprint(model_dir), "vllm-sparsek fit",
    ):  # fmt: skip
        assert word in error
