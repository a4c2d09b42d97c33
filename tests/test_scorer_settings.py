"""What the settings check of a scorer file before an engine starts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from vllm_sparsek.attention import settings
from vllm_sparsek.config import SparseKConfig
from vllm_sparsek.model_id import model_fingerprint
from vllm_sparsek.scorers.scorer_file import (
    ScorerFile,
    ScorerFileError,
    ScorerHeader,
    save_scorer,
)

LAYERS, HEADS, DIM = 4, 2, 8


@pytest.fixture
def model(tmp_path):
    """A vLLM configuration of a model with some weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"w": torch.ones(3)}, str(folder / "model.safetensors"))
    config = SimpleNamespace(
        model=str(folder), revision=None, get_total_num_hidden_layers=lambda: LAYERS,
        get_total_num_kv_heads=lambda: HEADS,
    )  # fmt: skip
    return SimpleNamespace(model_config=config)


@pytest.fixture
def configured(tmp_path):
    """``configured(model=...)``: settings that name a scorer file with this content."""

    def make(header=None, settings=None, **content):
        path = tmp_path / "scorer.safetensors"
        layer = {"weight": torch.zeros(HEADS, 2 * DIM), "bias": torch.zeros(HEADS)}
        header = ScorerHeader(**(header or {}))
        save_scorer(path, ScorerFile(header, dict.fromkeys(range(LAYERS), layer), **content))
        return SparseKConfig(scorer_path=str(path), **(settings or {}))

    return make


def test_a_scorer_of_this_model_or_of_no_named_model_is_taken(model, configured):
    fingerprint = model_fingerprint(model.model_config.model)
    settings.check_scorer(model, configured({"model": fingerprint}))
    settings.check_scorer(model, configured())
    settings.check_scorer(model, SparseKConfig())


def test_a_scorer_of_another_model_is_refused_naming_both(model, configured):
    with pytest.raises(ScorerFileError) as error:
        settings.check_scorer(model, configured({"model": "abc"}))
    folder = model.model_config.model
    for word in ("abc", folder, model_fingerprint(folder), f"vllm-sparsek fit {folder}"):
        assert word in str(error.value)


@pytest.mark.parametrize("shape", [(LAYERS + 1,), (LAYERS, HEADS + 1)], ids=["layers", "heads"])
def test_budgets_of_another_model_are_refused(shape, model, configured):
    for fitting in ((LAYERS,), (LAYERS, HEADS)):
        settings.check_scorer(model, configured(layer_budgets=torch.ones(fitting)))
    with pytest.raises(ScorerFileError, match="layer_budgets has shape"):
        settings.check_scorer(model, configured(layer_budgets=torch.ones(shape)))


def test_weights_that_cannot_be_found_are_a_warning(model, configured, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(settings.logger, "warning_once", lambda *line: said.append(line))
    (tmp_path / "empty").mkdir()
    model.model_config.model = str(tmp_path / "empty")
    settings.check_scorer(model, configured({"model": "abc"}))
    assert len(said) == 1
    assert "only the shapes are checked" in said[0][0]


def test_a_file_that_is_missing_is_refused_before_the_engine_starts(model):
    with pytest.raises(ScorerFileError, match="no such file"):
        settings.check_scorer(model, SparseKConfig(scorer_path="nowhere.safetensors"))
