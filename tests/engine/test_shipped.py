"""A shipped scorer in the engine: found by the weights served, and used as if it were named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import random_prompts, run_many, tiny_llm, write_model

from vllm_sparsek.model_id import model_fingerprint
from vllm_sparsek.scorers import shipped
from vllm_sparsek.scorers.scorer_file import ScorerFile, ScorerHeader, save_scorer
from vllm_sparsek.scorers.scorer_reader import ScorerReader

pytestmark = pytest.mark.engine

LAYERS, HEADS, DIM = 2, 2, 64
SMALL = {"k": 32, "window": 24, "sinks": 4, "refresh": 8, "dense_until": 0}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Answers with nothing named, the shipped file named, quest named; without a shipped one."""
    folder = tmp_path_factory.mktemp("shipped")
    model = write_model(folder / "model")
    generator = torch.Generator().manual_seed(0)
    layers = {
        layer: {"weight": torch.randn(HEADS, 2 * DIM, generator=generator),
                "bias": torch.zeros(HEADS)}
        for layer in range(LAYERS)
    }  # fmt: skip
    (folder / "scorers").mkdir()
    (folder / "none").mkdir()
    path = folder / "scorers" / "tiny.safetensors"
    save_scorer(path, ScorerFile(ScorerHeader(model=model_fingerprint(model)), layers))
    arms = {
        "open": ({}, "scorers"), "named": ({"scorer_path": str(path)}, "none"),
        "quest": ({"scorer": "quest"}, "scorers"), "none": ({}, "none"),
    }  # fmt: skip
    specs = [
        {
            "llm": tiny_llm(model, attention_backend="sparsek",
                            additional_config={"sparsek": {**SMALL, **settings}}),
            "calls": [{"prompts": random_prompts((300, 130)), "max_tokens": 12}],
            "shipped": str(folder / where),
        }
        for settings, where in arms.values()
    ]  # fmt: skip
    return dict(zip(arms, run_many(specs, folder), strict=True))


def answered(results, name):
    assert "error" not in results[name], results[name]["error"]
    return results[name]["answers"], results[name]["density"]


def test_a_shipped_scorer_answers_as_if_it_were_named(results):
    assert answered(results, "open") == answered(results, "named")
    assert answered(results, "open") != answered(results, "quest")


def test_prompts_are_read_sparsely_with_it_and_densely_without(results):
    assert answered(results, "open")[1] < 0.6
    assert answered(results, "none") == answered(results, "quest")
    assert answered(results, "none")[1] > 0.9


def test_the_scorer_that_ships_is_that_of_the_demos_model(model_dir):
    path = shipped.shipped_folder() / f"{Path(model_dir).name.lower()}.safetensors"
    if not path.is_file():
        pytest.skip("no scorer ships yet")
    with ScorerReader(str(path)) as file:
        assert file.header.model == model_fingerprint(model_dir)
    assert shipped.shipped_scorer(model_fingerprint(model_dir)) == path
