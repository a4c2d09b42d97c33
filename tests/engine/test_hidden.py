"""Scorers of hidden states through the real engine, eager and compiled."""

from __future__ import annotations

import pytest
import torch
from answers import assert_same_tokens
from tiny import random_prompts, run_many, tiny_llm, write_model

from vllm_sparsek.scorers.learned import load_layer
from vllm_sparsek.scorers.scorer_file import ScorerFile, ScorerHeader, save_scorer

pytestmark = pytest.mark.engine

LAYERS, HEADS, DIM, SIZE, UNITS, PAGE = 2, 2, 64, 256, 12, 32
SMALL = {"k": 96, "window": 48, "sinks": 4, "refresh": 16, "dense_until": 0}
TOKENS = 12
# float32 on the CPU, float16 on a GPU
EXACT = not torch.cuda.is_available()
PROMPTS = random_prompts((600, 330))
KINDS = {
    "linear": ("linear", ("hidden",)),
    "mlp": ("mlp", ("hidden",)),
    # without the rotated key, equal tokens of the first layer would tie but for rounding
    "with keys": ("linear", ("key", "key_unrotated", "hidden")),
}


def write_scorer(path, kind, features, inv_freq):
    header = ScorerHeader(
        kind=kind, features=features, activation="gelu",
        rope="neox" if "key_unrotated" in features else None,
    )  # fmt: skip
    width, g = header.width(DIM, SIZE), torch.Generator().manual_seed(0)
    shapes = {"weight": (HEADS, width), "bias": (HEADS,)}
    if kind == "mlp":
        shapes = {
            "w1": (1, UNITS, width), "b1": (1, UNITS), "w2": (HEADS, UNITS), "b2": (HEADS,),
        }  # fmt: skip
    layers = {
        layer: {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
        for layer in range(LAYERS)
    }
    save_scorer(path, ScorerFile(header, layers, inv_freq if header.rope else None))
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("hidden") / "model")


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("scorers")
    inv_freq = AutoModelForCausalLM.from_pretrained(model).model.rotary_emb.inv_freq
    return {
        name: write_scorer(folder / f"{kind}-{len(features)}.safetensors", kind, features, inv_freq)
        for name, (kind, features) in KINDS.items()
    }


@pytest.fixture(scope="module")
def results(model, files, tmp_path_factory):
    call = {"prompts": PROMPTS, "max_tokens": TOKENS}
    many = [call, call, {**call, "reset": True, "one_by_one": True}]
    arms = {}
    for name in KINDS:
        arms[name] = (name, {}, many)
        arms[f"{name}, chunks"] = (name, {"max_num_batched_tokens": 100}, [call])
    arms["linear, compiled"] = ("linear", {"enforce_eager": False}, many)
    # the same model and settings but for what the file holds: no graph of before may be used
    arms["with keys, compiled"] = ("with keys", {"enforce_eager": False}, [call])
    specs = [
        {
            "llm": tiny_llm(
                model, attention_backend="sparsek", block_size=PAGE,
                additional_config={"sparsek": {**SMALL, "scorer_path": files[name]}}, **changes,
            ),
            "calls": calls,
            "scores": len(PROMPTS[0]),
        }
        for name, changes, calls in arms.values()
    ]  # fmt: skip
    found = run_many(specs, tmp_path_factory.mktemp("results"))
    return dict(zip(arms, found, strict=True))


def tokens(results, name, call=0):
    assert "error" not in results[name], results[name]["error"]
    return results[name]["answers"][call]["tokens"]


@pytest.mark.parametrize("name", KINDS)
def test_chunks_batches_and_the_prefix_cache_change_nothing(name, results):
    tokens(results, name)
    tokens(results, f"{name}, chunks")
    expected = results[name]["answers"][0]
    assert_same_tokens(expected, results[f"{name}, chunks"]["answers"][0], EXACT)
    for answer in results[name]["answers"]:
        assert_same_tokens(expected, answer, EXACT)
    assert results[name]["density"] < 0.7


@pytest.mark.parametrize("name", ["linear", "with keys"])
def test_compiled_and_eager_give_the_same_tokens(name, results):
    tokens(results, name)
    tokens(results, f"{name}, compiled")
    for answer in results[f"{name}, compiled"]["answers"]:
        assert_same_tokens(results[name]["answers"][0], answer, EXACT)


def first_layers_scores(model, scorer, dtype):
    """Scores of the first prompt's tokens by the first layer's scorer, in transformers."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    seen = []
    # what is read sparsely differs from the first layer's output on
    reference.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"][0]), with_kwargs=True
    )
    with torch.no_grad():
        reference(torch.tensor([PROMPTS[0]]))
    hidden = seen[0].float()
    empty = torch.zeros(len(hidden), HEADS, DIM)
    return scorer.score(empty, empty, torch.arange(len(hidden)), hidden)


@pytest.mark.parametrize("arm", ["linear", "mlp", "linear, chunks", "linear, compiled"])
def test_scores_are_those_of_the_first_layers_hidden_states(arm, model, files, results):
    tokens(results, arm)
    scorer = load_layer(files[arm.split(",")[0]], 0, HEADS, DIM, hidden_size=SIZE)
    expected = first_layers_scores(model, scorer, torch.float32)
    (found,) = (s for layer, s in results[arm]["scores"].items() if ".0." in layer)
    bound = 1e-3
    if torch.cuda.is_available():
        # the engine runs in float16: what that costs elsewhere is allowed twice
        rounded = first_layers_scores(model, scorer, torch.float16)
        bound += 2 * (rounded - expected).abs().max().item()
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-3, atol=bound)
