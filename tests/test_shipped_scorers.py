"""Scorers that ship with the package: found by the model's weights, unless another is named."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from vllm_sparsek.attention import settings
from vllm_sparsek.config import SparseKConfig, SparseKConfigError
from vllm_sparsek.model_id import model_fingerprint
from vllm_sparsek.scorers import shipped
from vllm_sparsek.scorers.scorer_file import ScorerFile, ScorerHeader, save_scorer
from vllm_sparsek.scorers.scorer_reader import ScorerReader

REAL = shipped.shipped_folder()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder in place of the package's."""
    found = tmp_path / "shipped"
    found.mkdir()
    monkeypatch.setattr(shipped, "shipped_folder", lambda: found)
    return found


@pytest.fixture
def model(tmp_path):
    """A checkpoint with some weights."""
    found = tmp_path / "model"
    found.mkdir()
    save_file({"w": torch.arange(5.0)}, str(found / "model.safetensors"))
    return str(found)


def ship(path, fitted_to):
    layer = {"weight": torch.zeros(1, 4), "bias": torch.zeros(1)}
    save_scorer(path, ScorerFile(ScorerHeader(model=fitted_to), {0: layer}))
    return path


@pytest.fixture
def file(folder, model):
    """Its shipped scorer, behind another model's."""
    ship(folder / "a.safetensors", "0" * 64)
    return str(ship(folder / "b.safetensors", model_fingerprint(model)))


def resolve(model, sparsek=None, checkpoint=None):
    return settings.resolve_settings(
        SimpleNamespace(
            additional_config={"sparsek": sparsek or {}},
            model_config=SimpleNamespace(
                model=model, revision=None, hf_config=SimpleNamespace(sparsek_config=checkpoint)
            ),
        )
    )


OPEN = {
    "nothing": {}, "auto": {"scorer": "auto"}, "a preset": {"preset": "quality"},
    # none of them is possible with quest
    "soft_v": {"mode": "soft_v"}, "tokens": {"granularity": "token"},
    "sparse prefill": {"prefill": "sparse"},
}  # fmt: skip


@pytest.mark.parametrize("given", OPEN)
def test_the_scorer_of_the_model_is_used_where_none_is_named(given, model, file):
    found = resolve(model, OPEN[given])
    assert (found.scorer_name, found.scorer_path) == ("learned", file)
    assert found.sparse_prefill


def test_what_is_used_is_what_its_path_would_give(model, file):
    assert resolve(model, {"k": 99}) == resolve(model, {"k": 99, "scorer_path": file})


def test_a_model_without_one_gets_quest(model, folder):
    assert resolve(model).scorer_name == "quest"
    ship(folder / "other.safetensors", "0" * 64)
    # fitted to no model in particular
    ship(folder / "none.safetensors", None)
    assert resolve(model) == SparseKConfig()
    with pytest.raises(SparseKConfigError, match="mode='soft_v'"):
        resolve(model, {"mode": "soft_v"})


def test_a_model_whose_weights_are_not_found_gets_quest(tmp_path, file):
    (tmp_path / "empty").mkdir()
    assert resolve(str(tmp_path / "empty")).scorer_name == "quest"


@pytest.mark.parametrize("scorer", ["quest", "keydiff", "recency"])
def test_a_scorer_asked_for_by_name_wins(scorer, model, file):
    found = resolve(model, {"scorer": scorer})
    assert (found.scorer_name, found.scorer_path) == (scorer, None)


@pytest.mark.parametrize("source", ["setting", "checkpoint", "environment"])
def test_a_file_asked_for_wins(source, model, file, monkeypatch):
    own = {"scorer_path": "/own/scorer.safetensors"}
    if source == "environment":
        monkeypatch.setenv("SPARSEK_SCORER_PATH", own["scorer_path"])
    sparsek, checkpoint = ({"setting": (own, None), "checkpoint": (None, own)}).get(
        source, (None, None)
    )
    assert resolve(model, sparsek, checkpoint).scorer_path == own["scorer_path"]


def test_weights_are_looked_at_only_where_the_choice_is_open_and_once(model, file, monkeypatch):
    asked = []

    def fingerprint(*arguments):
        asked.append(arguments)
        return model_fingerprint(*arguments)

    monkeypatch.setattr(settings, "model_fingerprint", fingerprint)
    settings._served_fingerprint.cache_clear()
    resolve(model, {"scorer": "keydiff"})
    resolve(model, {"scorer_path": "own.safetensors"})
    assert asked == []
    assert resolve(model) == resolve(model, {"scorer": "auto"})
    assert len(asked) == 1


def test_one_line_of_the_log_names_it(model, file, monkeypatch):
    said = []
    monkeypatch.setattr(settings.logger, "info", lambda *line: said.append(line[0] % line[1:]))
    monkeypatch.setattr(settings, "_current", {})
    for sparsek in ({}, {"scorer": "quest"}, {"scorer_path": "/own/b.safetensors"}):
        config = SimpleNamespace(
            instance_id=str(sparsek), additional_config={"sparsek": sparsek},
            model_config=SimpleNamespace(
                model=model, revision=None, max_model_len=64, hf_config=SimpleNamespace()
            ),
        )  # fmt: skip
        settings.settings_of(config)
        settings.settings_of(config)
    assert [line for line in said if "shipped for" in line] == [
        "sparsek: the learned scorer b, shipped for this model"
    ]


def test_what_ships_names_its_model_and_has_its_log():
    for path in REAL.glob("*.safetensors"):
        with ScorerReader(str(path)) as file:
            assert file.header.model is not None
            assert file.layers()
        assert json.loads(path.with_suffix(".json").read_text())
