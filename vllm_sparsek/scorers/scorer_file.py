"""The file of a fitted scorer: what is in it, and how it is written.

A safetensors file in format ``sparsek-scorer-v1``. A scorer maps *features* of one token to one
score per KV head. With ``H`` KV heads, ``D`` head_dim, ``E`` the model's hidden size, ``W`` the
features' total width and ``m`` hidden units, every layer ``i`` that is scored has

    layers.{i}.weight [H, W]       .bias [H]                                        (linear)
    layers.{i}.w1 [H, m, W]        .b1 [H, m]        .w2 [H, m]        .b2 [H]      (mlp)
    layers.{i}.slope [H]           score added per position                      (optional)

``w1`` and ``b1`` may have 1 in place of H: one hidden layer that all KV heads share. Any float
dtype; float32 is what ``save_scorer`` writes. Two tensors belong to the whole file:

    inv_freq [rot / 2]             rotation per position of every pair of key components, as the
                                   model's rotary embedding has it; needed by ``key_unrotated``
    layer_budgets [layers, H]      share of the budget that every KV head gets, relative to all
                                   others of the model; 0 for all heads of a layer that is not
                                   sparse. [layers]: one share for all heads of a layer (optional)

Metadata (strings):

    format          ``sparsek-scorer-v1``
    kind            ``linear`` or ``mlp``; default linear
    input           features in the order in which ``W`` concatenates them, separated by commas:
                    ``key`` [D], rotated, as it lies in the cache; ``key_unrotated`` [D], rotary
                    embedding undone; ``value`` [D]; ``hidden`` [E], the input of the layer's
                    query/key/value projection (after the norm), the same for every KV head.
                    ``key_value`` is ``key,value``, and the default
    activation      of an mlp: ``relu`` (default) or ``gelu`` (exact, with erf)
    rope            with ``key_unrotated``: ``neox`` (component j is paired with j + rot / 2) or
                    ``gptj`` (2j with 2j + 1)
    position_slope  score added per position, for all layers and heads; default 0
    model           ``model_id.model_fingerprint`` of the model it was fitted to: another model
                    is refused. Without it shapes alone are checked
    data, seed      what it was fitted on, for people
    created_with    program and version that wrote the file

Other metadata keys are ignored. Positions count from 0.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

FORMAT = "sparsek-scorer-v1"
FEATURES = ("key", "key_unrotated", "value", "hidden")
KINDS = {"linear": ("weight", "bias"), "mlp": ("w1", "b1", "w2", "b2")}
ACTIVATIONS = ("relu", "gelu")
ROPES = ("neox", "gptj")


class ScorerFileError(ValueError):
    """A scorer file that cannot be used; the message names the file and the tensor or key."""


@dataclass(frozen=True)
class ScorerHeader:
    """The metadata of a scorer file, checked.

    Attributes:
        kind, activation, rope, position_slope, model: see the module; ``rope`` is None without
            ``key_unrotated``.
        features: names from ``FEATURES`` in order.
    """

    kind: str = "linear"
    features: tuple[str, ...] = ("key", "value")
    activation: str = "relu"
    rope: str | None = None
    position_slope: float = 0.0
    model: str | None = None

    def width(self, head_dim: int, hidden_size: int) -> int:
        """W, the width of the concatenated features."""
        return sum(hidden_size if name == "hidden" else head_dim for name in self.features)

    @classmethod
    def parse(cls, where: str, meta: Mapping[str, str]) -> ScorerHeader:
        """The header that metadata spell.

        Args:
            where: the file, for messages.
            meta: metadata of the file.

        Raises:
            ScorerFileError: not a scorer file, or a value that is not known.
        """

        def one_of(key: str, value: Any, known: Any) -> str:
            if value not in known:
                raise ScorerFileError(
                    f"sparsek: {where}: unknown {key} {value!r}; known are {', '.join(known)}."
                )
            return str(value)

        if meta.get("format") != FORMAT:
            raise ScorerFileError(
                f"sparsek: {where} is not a scorer file: metadata format is "
                f"{meta.get('format')!r}, expected {FORMAT!r}."
            )
        text = meta.get("input", "key_value")
        features = tuple(part.strip() for part in text.split(","))
        if text == "key_value":
            features = ("key", "value")
        if any(name not in FEATURES for name in features) or len(set(features)) < len(features):
            raise ScorerFileError(
                f"sparsek: {where} scores {text!r}; this version supports key_value, or any of "
                f"{', '.join(FEATURES)} once, separated by commas."
            )
        slope = meta.get("position_slope", "0")
        try:
            number = float(slope)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ScorerFileError(
                f"sparsek: {where}: position_slope is {slope!r}, not a finite number."
            )
        rope = None
        if "key_unrotated" in features:
            rope = one_of("rope", meta.get("rope"), ROPES)
        return cls(
            kind=one_of("kind", meta.get("kind", "linear"), tuple(KINDS)),
            features=features,
            activation=one_of("activation", meta.get("activation", "relu"), ACTIVATIONS),
            rope=rope,
            position_slope=number,
            model=meta.get("model"),
        )


@dataclass(frozen=True)
class ScorerFile:
    """A fitted scorer, to be written with ``save_scorer``.

    Attributes:
        header: kind, features and so on.
        layers: layer index -> its tensors by their names after ``layers.{i}.``.
        inv_freq: [rot / 2], needed by ``key_unrotated``.
        layer_budgets: [layers, H] or [layers] relative shares, or None.
        data: what it was fitted on.
        seed: seed of the fit, or None if nothing was drawn.
        extra: more metadata to record, for people.
    """

    header: ScorerHeader
    layers: Mapping[int, Mapping[str, torch.Tensor]]
    inv_freq: torch.Tensor | None = None
    layer_budgets: torch.Tensor | None = None
    data: str | None = None
    seed: int | None = None
    extra: Mapping[str, str] = field(default_factory=dict)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Copies of all tensors by their names in the file, float32 and contiguous."""
        found = {
            f"layers.{layer}.{name}": tensor
            for layer, tensors in self.layers.items()
            for name, tensor in tensors.items()
        }
        if self.inv_freq is not None:
            found["inv_freq"] = self.inv_freq
        if self.layer_budgets is not None:
            found["layer_budgets"] = self.layer_budgets
        # safetensors refuses tensors that share memory
        return {
            name: t.detach().to("cpu", torch.float32, copy=True).contiguous()
            for name, t in found.items()
        }

    def metadata(self) -> dict[str, str]:
        """All metadata, as strings."""
        header = self.header
        optional = {
            "activation": header.activation if header.kind == "mlp" else None,
            "rope": header.rope,
            "position_slope": repr(header.position_slope) if header.position_slope else None,
            "model": header.model,
            "data": self.data,
            "seed": None if self.seed is None else str(self.seed),
        }
        return {
            **self.extra,
            "format": FORMAT,
            "kind": header.kind,
            "input": ",".join(header.features),
            "created_with": _program(),
            **{key: value for key, value in optional.items() if value is not None},
        }


def _program() -> str:
    try:
        return f"vllm-sparsek {version('vllm-sparsek')}"
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "vllm-sparsek"


def save_scorer(path: str | Path, scorer: ScorerFile) -> None:
    """Write a scorer file: all of it or nothing.

    The file is written under another name beside ``path`` and renamed, so that an
    interruption or a full disk leaves what was there before.

    Args:
        path: where to; the folder exists.
        scorer: what to write.

    Raises:
        ScorerFileError: ``scorer`` contradicts itself or holds NaN, or ``path`` cannot be
            written.
    """
    from safetensors.torch import save

    path, tensors, meta = Path(path), scorer.tensors(), scorer.metadata()
    header = ScorerHeader.parse(str(path), meta)
    if not scorer.layers:
        raise ScorerFileError(f"sparsek: {path}: a scorer without layers.")
    for layer, found in scorer.layers.items():
        missing = [name for name in KINDS[header.kind] if name not in found]
        unknown = [name for name in found if name not in (*KINDS[header.kind], "slope")]
        if missing or unknown:
            raise ScorerFileError(
                f"sparsek: {path}: layer {layer} of a {header.kind} scorer has the tensors "
                f"{sorted(found)}, expected {', '.join(KINDS[header.kind])} and maybe slope."
            )
    if header.rope is not None and scorer.inv_freq is None:
        raise ScorerFileError(f"sparsek: {path}: key_unrotated needs the tensor inv_freq.")
    for name, tensor in tensors.items():
        refuse_nan(str(path), name, tensor)

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(save(tensors, meta))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise ScorerFileError(f"sparsek: {path} cannot be written: {error}.") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def refuse_nan(where: str, name: str, tensor: torch.Tensor) -> None:
    """Raise ScorerFileError, naming the tensor, if it holds NaN or infinity."""
    if not torch.isfinite(tensor).all():
        raise ScorerFileError(f"sparsek: {where}: tensor {name} holds NaN or infinity.")
