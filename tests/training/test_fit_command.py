"""`vllm-sparsek fit` from texts to a file that the backend loads."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from vllm_sparsek.attention.layer_budgets import read_shares, split_budget
from vllm_sparsek.cli import main
from vllm_sparsek.config import SparseKConfig
from vllm_sparsek.model_id import model_fingerprint
from vllm_sparsek.scorers.learned import load_layer
from vllm_sparsek.scorers.scorer_reader import ScorerReader
from vllm_sparsek.serving_bench.progress import Progress
from vllm_sparsek.training.budgets import LEAST_SHARE
from vllm_sparsek.training.fit import FitSettings, fit
from vllm_sparsek.training.objective import Split
from vllm_sparsek.training.solve import SolveSettings

sys.path.insert(0, str(Path(__file__).parent.parent / "engine"))
from tiny import write_model

TOKENS = 512


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, model_dir) -> str:
    """A model with random weights and the real tokenizer."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("fit") / "model"
    write_model(folder, vocab_size=49152, max_position_embeddings=4096)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def text(tmp_path_factory, long_text) -> str:
    path = tmp_path_factory.mktemp("data") / "manual.txt"
    path.write_text(long_text, encoding="utf-8")
    return str(path)


def settings(tiny: str, text: str, **changes: object) -> FitSettings:
    solve = SolveSettings(shares=(0.25,), split=Split(sinks=4), steps=3)
    return FitSettings(tiny, (text,), TOKENS, 4, solve=solve, **changes)  # type: ignore[arg-type]


class Quiet(Progress):
    """Progress that shows nothing, and stops the fit at a step if asked to."""

    def __init__(self, stop_at: str | None = None) -> None:
        super().__init__(Console(quiet=True), 1)
        self.stop_at = stop_at
        self.seen: list[str] = []

    def task(self, label: str):
        self.seen.append(label)
        if self.stop_at is not None and label.startswith(self.stop_at):
            raise KeyboardInterrupt
        return super().task(label)


def content(path: Path) -> tuple[dict, dict]:
    """Metadata, whose order in the file is arbitrary, and the tensors' bytes."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names = file.keys()
        return file.metadata(), {name: file.get_tensor(name).numpy().tobytes() for name in names}


def test_a_fitted_file_serves_its_model_and_says_where_it_came_from(tiny, text, tmp_path):
    out = tmp_path / "scorer.safetensors"
    report = fit(settings(tiny, text), out, Quiet())
    reports = report.layers
    assert report.refinement == []
    assert [report.layer for report in reports] == [0, 1]
    assert all(len(report.losses) == 3 and 0 <= report.recall <= 1 for report in reports)
    with ScorerReader(str(out)) as file:
        assert file.header.features == ("key_unrotated", "key", "value")
        assert file.header.model == model_fingerprint(tiny)
        shares = file.tensor("layer_budgets", (2, 2))
    assert shares.mean() == pytest.approx(1)
    assert shares.min() >= LEAST_SHARE
    # both splits were tried, the better one is kept, and the file says so
    layers, heads = report.splits
    assert (layers.name, heads.name) == ("layers", "heads")
    assert all(len(split.divergence) == 2 for split in report.splits)
    assert all(0 < found < 10 for split in report.splits for found in split.divergence)
    ratio = sum(h / la for h, la in zip(heads.divergence, layers.divergence, strict=True))
    assert heads.kept == (ratio < 2) != layers.kept
    kept = heads if heads.kept else layers
    assert shares.tolist() == kept.shares
    said = content(out)[0]["budgets"]
    assert said.startswith(f"by {kept.name}; divergence from dense, held out: layers: ")
    assert f"{heads.divergence[1]:.4g} at 12%" in said
    # what the backend makes of it: the nominal total
    config = SparseKConfig(scorer_path=str(out), k=256)
    split = split_budget(config.budget(32), read_shares(config, 2, 2), (), 4096)
    assert sum(k for b in split for k, _ in b.heads or [(b.k, None)] * 2) == 4 * 256
    for layer in (0, 1):
        scorer = load_layer(str(out), layer, 2, 64)
        scores = scorer.score(*torch.randn(2, 5, 2, 64), torch.arange(5))
        assert scores.shape == (5, 2)
    assert list(tmp_path.iterdir()) == [out], "the work folder goes once the file is written"


def test_the_same_settings_give_the_same_file(tiny, text, tmp_path):
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    fit(settings(tiny, text), one, Quiet())
    fit(settings(tiny, text), two, Quiet())
    assert content(one) == content(two)


@pytest.mark.parametrize("stop_at", ["read window 3", "fit layer 1", "measure", "try"])
def test_an_interrupted_fit_goes_on_and_ends_as_if_nothing_had_happened(
    tiny, text, tmp_path, stop_at
):
    whole, out = tmp_path / "whole.safetensors", tmp_path / "scorer.safetensors"
    fit(settings(tiny, text), whole, Quiet())
    out.write_bytes(b"an earlier scorer")
    with pytest.raises(KeyboardInterrupt):
        fit(settings(tiny, text), out, Quiet(stop_at))
    assert out.read_bytes() == b"an earlier scorer"
    again = Quiet()
    fit(settings(tiny, text), out, again)
    assert not any(label.startswith("read window 1") for label in again.seen)
    assert any(label.startswith(stop_at) for label in again.seen)
    assert content(out) == content(whole)


@pytest.mark.parametrize(
    "refine, stop_at",
    [("outputs", "fit layer 1"), ("logits", "refine all layers, steps 6 to 7 of 7")],
    ids=["outputs", "logits"],
)
def test_a_refined_fit_differs_goes_on_and_ends_as_if_nothing_had_happened(
    tiny, text, tmp_path, refine, stop_at
):
    plain, whole = tmp_path / "plain.safetensors", tmp_path / "whole.safetensors"
    out = tmp_path / "scorer.safetensors"
    steps = {"refine": refine, "refine_steps": 7, "layer_budgets": False}
    fit(settings(tiny, text, layer_budgets=False), plain, Quiet())
    report = fit(settings(tiny, text, **steps), whole, Quiet())
    assert len(report.refinement) == 7
    assert all(loss > 0 for loss in report.refinement)
    with pytest.raises(KeyboardInterrupt):
        fit(settings(tiny, text, **steps), out, Quiet(stop_at))
    again = Quiet()
    assert fit(settings(tiny, text, **steps), out, again) == report
    assert "fit layer 0" not in again.seen
    assert "refine all layers, steps 1 to 5 of 7" not in again.seen
    assert content(out) == content(whole)
    for layer in ("layers.0", "layers.1"):
        assert content(whole)[1][f"{layer}.weight"] != content(plain)[1][f"{layer}.weight"]


def test_every_head_can_be_measured(tiny, text, tmp_path):
    whole, out = tmp_path / "whole.safetensors", tmp_path / "scorer.safetensors"
    report = fit(settings(tiny, text, measure_heads=True), whole, Quiet())
    names = ["layers", "heads", "measured", "measured, wide"]
    assert [split.name for split in report.splits] == names
    assert sum(split.kept for split in report.splits) == 1
    for split in report.splits:
        assert torch.tensor(split.shares).mean() == pytest.approx(1)
    with pytest.raises(KeyboardInterrupt):
        fit(settings(tiny, text, measure_heads=True), out, Quiet("try"))
    again = Quiet()
    assert fit(settings(tiny, text, measure_heads=True), out, again) == report
    assert not any(label.startswith("measure") for label in again.seen)
    assert content(out) == content(whole)


def test_hidden_states_and_an_mlp_can_be_fitted(tiny, text, tmp_path):
    out = tmp_path / "scorer.safetensors"
    solve = SolveSettings((0.25,), Split(sinks=4), hidden_units=4, steps=2)
    features = ("hidden", "value")
    fit(FitSettings(tiny, (text,), TOKENS, 4, features, solve=solve, refine="logits",
                    refine_steps=2), out, Quiet())  # fmt: skip
    scorer = load_layer(str(out), 1, 2, 64, hidden_size=256)
    assert scorer.reads_hidden
    x = torch.randn(3, 256)
    assert scorer.score(*torch.randn(2, 3, 2, 64), torch.arange(3), x).shape == (3, 2)


def test_the_command_writes_the_file_its_log_and_a_plot(tiny, text, tmp_path, capsys):
    out = tmp_path / "scorer.safetensors"
    status = main(["fit", tiny, "--data", text, "--out", str(out), "--windows", "4",
                   "--window-tokens", "2048", "--steps", "2", "--device", "cpu",
                   "--refine", "outputs", "--refine-steps", "3"])  # fmt: skip
    assert status == 0
    log = json.loads((tmp_path / "scorer.json").read_text())
    assert log["settings"]["window_tokens"] == 2048
    assert [split["name"] for split in log["splits"]] == ["layers", "heads"]
    assert [layer["layer"] for layer in log["layers"]] == [0, 1]
    assert len(log["refinement"]) == 3
    assert (tmp_path / "scorer.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "keeps" in printed
    assert "far attention" in printed
    assert "error of outputs" in printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--input", "key,keys"], "--input keys: unknown; known are"),
        (["--out", "nowhere/s.safetensors"], "there is no folder nowhere"),
        (["--out", "scorer.bin"], "must end in .safetensors"),
        (["--data", "nowhere.txt"], "--data nowhere.txt: no such file"),
        (["--measure-heads", "--uniform-layers"], "--measure-heads: not with --uniform-layers"),
        (["--refine-steps", "3"], "--refine-steps: only with --refine outputs or --refine logits"),
    ],
    ids=["input", "folder", "suffix", "data", "measure-heads", "refine-steps"],
)
def test_a_wrong_argument_is_named_in_one_line(
    tiny, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    default = [] if "--out" in arguments else ["--out", "scorer.safetensors"]
    assert main(["fit", tiny, *default, *arguments]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_be_loaded_is_one_line(text, tmp_path, capsys):
    out = tmp_path / "scorer.safetensors"
    assert main(["fit", str(tmp_path / "no-model"), "--data", text, "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert "no-model" in error
    assert "Traceback" not in error
