"""The command with the real engine, on a model so small that only its plumbing can be right."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import engine_env, engine_memory

pytestmark = pytest.mark.engine

LENGTH = 512


@pytest.fixture(scope="module")
def small_model(tmp_path_factory, model_dir):
    """Two layers with random weights and a real tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("model")
    config = AutoConfig.from_pretrained(
        model_dir, hidden_size=256, intermediate_size=256, num_hidden_layers=2, head_dim=64,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for path in Path(model_dir).iterdir():
        if "token" in path.name or "chat" in path.name:
            shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def rows(small_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    command = [
        sys.executable, "-m", "vllm_sparsek.cli", "eval", str(small_model),
        "--scorers=recency,oracle", "--budgets=0.25", f"--lengths={LENGTH}", "--samples=2",
        "--windows=1", "--tasks=perplexity,passkey", "--columns=all,question", f"--output={out}",
        *(f"--engine-arg={name}={value}" for name, value in engine_memory().items()),
    ]  # fmt: skip
    done = subprocess.run(command, env=engine_env(), capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return list(csv.DictReader((out / "results.csv").open()))


def find(rows, **wanted):
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def test_every_cell_has_its_rows(rows):
    found = {(row["arm"], row["column"], row["task"] == "passkey") for row in rows}
    assert found == {
        ("dense", "dense", True), ("dense", "dense", False),
        ("recency", "all", True), ("recency", "all", False), ("recency", "question", True),
        ("oracle", "all", True), ("oracle", "question", True),
    }  # fmt: skip


def test_a_random_model_loses_about_a_uniform_guess(rows):
    import math

    for row in find(rows, measure="loss"):
        assert abs(float(row["value"]) - math.log(49152)) < 1


def test_measured_densities_are_those_of_the_budget(rows):
    for arm in ("recency", "oracle"):
        (sparse,) = find(rows, arm=arm, column="all", task="passkey")
        (question,) = find(rows, arm=arm, column="question", task="passkey")
        # a window reaches back up to 63 positions more until the next selection
        for row in (sparse, question):
            assert 0.2 < float(row["decode_density"]) < 0.4
        # the context of 512 was read densely, the question after it was not
        assert float(sparse["density"]) < float(question["density"]) < 1
