"""``vllm-sparsek import-scorer``: published KVzap scorers as scorer files.

KVzap (arXiv 2601.07891, code and checkpoints by NVIDIA, ``kvpress``) predicts the importance of a
token's key and value, one number per KV head, from the hidden state alone: a linear layer or an
MLP with one hidden layer of exact GELUs, shared by the KV heads, for every layer of the model.

What it reads, by kvpress's own code: the ``hidden_states`` argument of the layer's attention
module, which is the input of the query/key/value projections after the layer's norm and the
feature ``hidden`` of ``scorers/scorer_file.py``. kvpress computes in the model's dtype; here the
same hidden states, in the model's dtype, meet weights and sums in float32. Nothing depends on the
position. A checkpoint is a folder with ``config.json`` (``model_type`` ``kvzap``, ``input_dim``,
``output_dim``, ``hidden_dim`` or null, ``n_modules``) and safetensors ``layers.{i}.weight|bias``,
or for an MLP ``layers.{i}.0.weight|bias`` and ``layers.{i}.2.weight|bias``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_sparsek.model_id import local_folder, model_fingerprint

if TYPE_CHECKING:
    import torch


class ImportScorerError(ValueError):
    """A checkpoint that cannot be converted; the message names it and what is wrong."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See ``cli.Command``."""
    parser.add_argument("source", help="KVzap checkpoint: a folder, or a hub id in the local cache")
    parser.add_argument("--model", required=True, help="the model it was trained for, likewise")
    parser.add_argument("--out", required=True, help="the scorer file to write")


def run(args: argparse.Namespace) -> int:
    """See ``cli.Command``."""
    from vllm_sparsek.scorers.scorer_file import ScorerFileError

    try:
        print(import_scorer(args.source, args.model, args.out))
    except (ImportScorerError, ScorerFileError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def import_scorer(source: str, model: str, out: str) -> str:
    """Convert a KVzap checkpoint.

    Args:
        source: its folder, or a hub id in the local Hugging Face cache.
        model: the model it was trained for, likewise.
        out: the scorer file to write.

    Returns:
        One line that says what was written.

    Raises:
        ImportScorerError: nothing there, not a KVzap checkpoint, or one for another model.
        ScorerFileError: ``out`` cannot be written.
    """
    from vllm_sparsek.scorers.scorer_file import ScorerFile, ScorerHeader, save_scorer

    folder, config = _checkpoint(source)
    layers, heads, hidden_size = _model_shape(model)
    for key, found, needed, what in (
        ("n_modules", config.get("n_modules"), layers, "layers"),
        ("output_dim", config.get("output_dim"), heads, "KV heads"),
        ("input_dim", config.get("input_dim"), hidden_size, "as hidden size"),
    ):
        if found != needed:
            raise ImportScorerError(
                f"sparsek: {source} was not trained for {model}: its {key} is {found}, and the "
                f"model has {needed} {what}."
            )
    fingerprint = model_fingerprint(model)
    units = config.get("hidden_dim")
    header = ScorerHeader(
        kind="linear" if units is None else "mlp",
        features=("hidden",),
        activation="relu" if units is None else "gelu",
        model=fingerprint,
    )
    tensors = _read_tensors(folder)

    def tensor(name: str, *shape: int) -> torch.Tensor:
        found = tensors.get(name)
        if found is None or tuple(found.shape) != shape:
            has = "is missing" if found is None else f"has shape {list(found.shape)}"
            raise ImportScorerError(
                f"sparsek: {source}: tensor {name} {has}, expected shape {list(shape)}."
            )
        return found

    found = {}
    for i in range(layers):
        if units is None:
            found[i] = {
                "weight": tensor(f"layers.{i}.weight", heads, hidden_size),
                "bias": tensor(f"layers.{i}.bias", heads),
            }
        else:
            found[i] = {
                "w1": tensor(f"layers.{i}.0.weight", units, hidden_size)[None],
                "b1": tensor(f"layers.{i}.0.bias", units)[None],
                "w2": tensor(f"layers.{i}.2.weight", heads, units),
                "b2": tensor(f"layers.{i}.2.bias", heads),
            }
    save_scorer(out, ScorerFile(header, found, extra={"imported_from": source}))
    bound = "" if fingerprint else " (its weights are not here: any model of the shape takes it)"
    return f"{out}: {header.kind} scorer of hidden states, {layers} layers, for {model}{bound}"


def _checkpoint(source: str) -> tuple[Path, dict]:
    folder = local_folder(source)
    path = None if folder is None else folder / "config.json"
    if folder is None or path is None or not path.is_file():
        raise ImportScorerError(
            f"sparsek: {source} is neither a folder with a config.json nor in the local Hugging "
            f"Face cache: hf download {source}."
        )
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ImportScorerError(f"sparsek: {path} is not JSON: {error}.") from None
    if config.get("model_type") != "kvzap":
        raise ImportScorerError(
            f"sparsek: {source} is not a KVzap checkpoint: its model_type is "
            f"{config.get('model_type')!r}, expected 'kvzap'."
        )
    return folder, config


def _model_shape(model: str) -> tuple[int, int, int]:
    """layers, KV heads, hidden size."""
    from transformers import AutoConfig

    folder = local_folder(model)
    if folder is None:
        raise ImportScorerError(
            f"sparsek: --model {model} is neither a folder nor in the local Hugging Face cache: "
            f"hf download {model}."
        )
    try:
        config = AutoConfig.from_pretrained(folder).get_text_config()
    except (OSError, ValueError) as error:
        raise ImportScorerError(f"sparsek: --model {model} has no usable config: {error}") from None
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return config.num_hidden_layers, heads, config.hidden_size


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            found.update(load_file(path))
        except SafetensorError as error:
            raise ImportScorerError(f"sparsek: {path} is not a safetensors file: {error}") from None
    if not found:
        raise ImportScorerError(f"sparsek: {folder} holds no *.safetensors.")
    return found
