"""The fingerprint of a model: the same for copies, another for anything else."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from vllm_sparsek.model_id import model_fingerprint


def weights(seed=0, rows=300):
    return {
        "a.weight": torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed)),
        "b.weight": torch.ones(7),
    }


def write(path, tensors):
    """A safetensors file with its tensors in the order given; ``save_file`` sorts them."""
    header, data = {}, b""
    for name, tensor in tensors:
        content = tensor.numpy().tobytes()
        header[name] = {
            "dtype": "F32", "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(content)],
        }  # fmt: skip
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(weights(), str(folder / "model.safetensors"))
    return folder


def test_a_copy_has_the_fingerprint_whatever_its_files_are_called(model, tmp_path):
    found = model_fingerprint(str(model))
    assert found is not None
    assert len(found) == 64
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    (copy / "model.safetensors").rename(copy / "weights.safetensors")
    assert model_fingerprint(str(copy)) == found


def test_metadata_of_a_file_do_not_enter(model):
    found = model_fingerprint(str(model))
    save_file(weights(), str(model / "model.safetensors"), {"format": "pt"})
    assert model_fingerprint(str(model)) == found


def test_the_order_of_tensors_and_their_files_do_not_enter(model, tmp_path):
    found = model_fingerprint(str(model))
    turned, sharded = tmp_path / "turned", tmp_path / "sharded"
    turned.mkdir()
    write(turned / "model.safetensors", reversed(weights().items()))
    assert (turned / "model.safetensors").read_bytes() != (model / "model.safetensors").read_bytes()
    assert model_fingerprint(str(turned)) == found
    sharded.mkdir()
    files = {"b.weight": "model-00001.safetensors", "a.weight": "model-00002.safetensors"}
    for name, file in files.items():
        save_file({name: weights()[name]}, str(sharded / file))
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert model_fingerprint(str(sharded)) == found


CHANGES = ["values", "names", "dtype", "shape", "another file", "a sampled byte", "a small tensor"]


@pytest.mark.parametrize("change", CHANGES)
def test_another_model_has_another_fingerprint(change, model):
    found, path = model_fingerprint(str(model)), model / "model.safetensors"
    middle = 300 * 64 // 2
    if change == "values":
        save_file(weights(seed=1), str(path))
    elif change == "names":
        save_file({f"x.{name}": t for name, t in weights().items()}, str(path))
    elif change == "dtype":
        save_file({name: t.view(torch.int32) for name, t in weights().items()}, str(path))
    elif change == "shape":
        save_file({name: t.unsqueeze(0) for name, t in weights().items()}, str(path))
    elif change == "another file":
        save_file({"c.weight": torch.ones(2)}, str(model / "more.safetensors"))
    elif change == "a sampled byte":
        changed = weights()
        changed["a.weight"].view(-1)[middle] += 1
        save_file(changed, str(path))
    else:
        changed = weights()
        changed["b.weight"][0] += 1
        save_file(changed, str(path))
    assert model_fingerprint(str(model)) not in (found, None)


def test_the_index_says_which_files_are_the_weights(model):
    save_file(weights(seed=3), str(model / "model-2.safetensors"))
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    one = model_fingerprint(str(model))
    (model / "model-2.safetensors").unlink()
    assert model_fingerprint(str(model)) == one
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "gone.st"}}))
    assert model_fingerprint(str(model)) is None
    index.write_text("not json")
    assert model_fingerprint(str(model)) is None


def test_a_second_copy_in_mistrals_naming_changes_nothing(model):
    found = model_fingerprint(str(model))
    save_file(weights(seed=4), str(model / "consolidated.safetensors"))
    assert model_fingerprint(str(model)) == found


def test_no_weights_no_fingerprint(tmp_path):
    assert model_fingerprint(str(tmp_path)) is None
    path = tmp_path / "model.safetensors"
    for header in (b"\xff" * 100, b"[]", b'{"a": 3}', b'{"a": {"dtype": "F32"}}'):
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        assert model_fingerprint(str(tmp_path)) is None
    path.write_bytes(b"\xff" * 100)
    assert model_fingerprint(str(tmp_path)) is None
    write(path, weights().items())
    assert model_fingerprint(str(tmp_path)) is not None
    # an interrupted download
    path.write_bytes(path.read_bytes()[:-20])
    assert model_fingerprint(str(tmp_path)) is None


def test_a_hub_id_is_looked_up_in_the_local_cache(model, tmp_path, monkeypatch):
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    assert model_fingerprint("someone/some-model") is None
    assert model_fingerprint("/no/such/folder/at all") is None
    repository = cache / "models--someone--some-model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc123")
    shutil.copytree(model, repository / "snapshots" / "abc123")
    assert model_fingerprint("someone/some-model") == model_fingerprint(str(model))
    assert model_fingerprint("someone/some-model", revision="other") is None
