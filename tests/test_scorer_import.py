"""import-scorer: synthetic checkpoints built as KVzap's are."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vllm_sparsek.cli import main
from vllm_sparsek.model_id import model_fingerprint
from vllm_sparsek.scorers.learned import load_layer
from vllm_sparsek.scorers.scorer_reader import ScorerReader

LAYERS, HEADS, DIM, SIZE, UNITS = 3, 2, 16, 64, 10


def modules(units):
    """One module per layer, as the published scorers are built."""
    if units is None:
        return nn.ModuleList(nn.Linear(SIZE, HEADS) for _ in range(LAYERS))
    return nn.ModuleList(
        nn.Sequential(nn.Linear(SIZE, units), nn.GELU(), nn.Linear(units, HEADS))
        for _ in range(LAYERS)
    )


@pytest.fixture
def model(tmp_path):
    """A model's configuration and some weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    config = {
        "model_type": "llama", "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "num_key_value_heads": HEADS, "hidden_size": SIZE, "head_dim": DIM,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"w": torch.ones(9)}, str(folder / "model.safetensors"))
    return str(folder)


@pytest.fixture
def checkpoint(tmp_path):
    """``checkpoint(units)``: folder and modules of a random scorer; changes go into its config."""

    def make(units=None, dtype=torch.float32, **changes):
        torch.manual_seed(0)
        layers = modules(units).to(dtype)
        folder = tmp_path / "kvzap"
        folder.mkdir()
        config = {
            "model_type": "kvzap", "input_dim": SIZE, "output_dim": HEADS, "n_modules": LAYERS,
            "hidden_dim": units, **changes,
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))
        state = {f"layers.{name}": t for name, t in layers.state_dict().items()}
        save_file(state, str(folder / "model.safetensors"))
        return str(folder), layers

    return make


def convert(source, model, out):
    return main(["import-scorer", source, "--model", model, "--out", str(out)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("units", [None, UNITS], ids=["linear", "mlp"])
def test_the_imported_scorer_scores_as_the_published_modules_do(
    units, dtype, model, checkpoint, tmp_path, capsys
):
    source, layers = checkpoint(units, dtype)
    out = tmp_path / "scorer.safetensors"
    assert convert(source, model, out) == 0
    assert f"{LAYERS} layers, for {model}" in capsys.readouterr().out
    hidden = torch.randn(41, SIZE)
    empty, at = torch.zeros(41, HEADS, DIM), torch.arange(41)
    with torch.no_grad():
        for i, module in enumerate(layers.float()):
            scorer = load_layer(str(out), i, HEADS, DIM, hidden_size=SIZE)
            assert scorer.reads_hidden
            found = scorer.score(empty, empty, at, hidden)
            torch.testing.assert_close(found, module(hidden), rtol=1e-4, atol=1e-5)


def test_the_file_is_bound_to_the_model(model, checkpoint, tmp_path):
    source, _ = checkpoint()
    out = tmp_path / "scorer.safetensors"
    convert(source, model, out)
    with ScorerReader(str(out)) as file:
        assert file.header.model == model_fingerprint(model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_modules": 4}, ["n_modules is 4", "has 3 layers"]),
        ({"output_dim": 8}, ["output_dim is 8", "has 2 KV heads"]),
        ({"input_dim": 128}, ["input_dim is 128", "has 64 as hidden size"]),
        ({"model_type": "llama"}, ["not a KVzap checkpoint", "'llama'"]),
        ({"hidden_dim": 5}, ["tensor layers.0.0.weight is missing", "[5, 64]"]),
    ],
    ids=["layers", "heads", "hidden-size", "no-kvzap", "tensors"],
)
def test_a_scorer_of_another_model_is_refused(change, words, model, checkpoint, tmp_path, capsys):
    source, _ = checkpoint(**change)
    assert convert(source, model, tmp_path / "out.safetensors") == 1
    said = capsys.readouterr().err
    for word in (source, *words):
        assert word in said
    assert not (tmp_path / "out.safetensors").exists()


def test_a_tensor_of_another_shape_is_named(model, checkpoint, tmp_path, capsys):
    source, _ = checkpoint(UNITS)
    path = f"{source}/model.safetensors"
    content = load_file(path)
    content["layers.1.2.bias"] = torch.zeros(HEADS + 1)
    save_file(content, path)
    assert convert(source, model, tmp_path / "out.safetensors") == 1
    assert "layers.1.2.bias has shape [3], expected shape [2]" in capsys.readouterr().err


@pytest.mark.parametrize("which", ["source", "model"])
def test_what_is_not_there_is_named_with_the_command_that_gets_it(
    which, model, checkpoint, tmp_path, capsys
):
    source, _ = checkpoint()
    arguments = {"source": source, "model": model, which: "nobody/nothing"}
    assert convert(**arguments, out=tmp_path / "out.safetensors") == 1
    assert "hf download nobody/nothing" in capsys.readouterr().err
