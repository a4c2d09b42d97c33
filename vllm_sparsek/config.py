"""SparseKConfig: what to keep of the context, read from five places and checked once.

Precedence, lowest first: defaults < the checkpoint's ``sparsek_config`` < a YAML preset <
``--additional-config '{"sparsek": {...}}'`` < ``SPARSEK_*`` environment variables.
"""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from vllm_sparsek.kernels.common.budget import Budget

Granularity = Literal["auto", "token", "page"]
Mode = Literal["hard", "soft_v"]
Pooling = Literal["lse", "max", "mean"]
Prefill = Literal["auto", "dense", "sparse"]
LayerBudgets = Literal["auto", "uniform"]

ENV_PREFIX = "SPARSEK_"
# tokens per unit of query-aware selection: Quest's page, whatever the KV block is
QUERY_UNIT = 16
# ``dense_until: auto`` reads sparsely where the context is at least so many times what is read.
# On an H200, 16 to 64 requests, the sparse decode kernel takes 1.2 to 1.4 times as long a token
# as FlashAttention-3: just above the budget, sparse attention loses time as well as quality.
WORTH_SPARSE = Fraction(4, 3)


class SparseKConfigError(ValueError):
    """A setting that cannot be used; the message names the key, the value and the remedy."""


@dataclass(frozen=True)
class SparseKConfig:
    """Settings of SparseK attention.

    Attributes:
        k: tokens kept per KV head outside sinks and window: a number, or a share of the
            context (0 < k < 1) with ``k_min`` as its floor.
        k_min: least number of tokens kept when ``k`` is a share.
        window: tokens of the sliding window that every query reads.
        sinks: tokens at the start that every query reads.
        refresh: query positions that share one selection (R).
        granularity: what competes for the k places: ``token``, ``page`` (a KV block), or
            ``auto``: 16 tokens with ``quest``, one token with any other scorer.
        pooling: how the scores of a page's tokens become the page's score.
        mode: ``hard`` (plain softmax over what is kept) or ``soft_v`` (values outside the
            window weighted by the SparseK operator).
        scorer: a name from ``vllm_sparsek.scorers``, or ``auto``: ``learned`` when
            ``scorer_path`` is set or a scorer of the model served ships with the package, else
            ``quest``, which selects by every decode step's query.
        scorer_path: safetensors file of a learned scorer; relative paths of a checkpoint's
            ``sparsek_config`` are relative to the checkpoint, whose own folder is no place for
            it: vLLM loads every safetensors file there as weights.
        prefill: ``sparse``, ``dense`` (only decode is sparse), or ``auto``: sparse with a
            learned scorer, dense without one.
        dense_until: queries at positions below it read their whole context, also where prefill
            is sparse: a document read densely, and the question about it sparsely. ``auto``:
            the position from which the context is at least 4/3 of what is read, see
            ``dense_below``; a ``k`` of 3/4 of the context or more is then never sparse. 0: sparse
            as soon as the budget is exceeded.
        dense_layers: indices of layers that always read the whole context.
        layer_budgets: ``auto`` (a scorer's file may split the total budget unevenly over layers
            and KV heads) or ``uniform`` (every head of every layer keeps ``k``).
        seed: seed of the ``random`` scorer.
    """

    k: int | float = 1536
    k_min: int = 256
    window: int = 512
    sinks: int = 16
    refresh: int = 64
    granularity: Granularity = "auto"
    pooling: Pooling = "lse"
    mode: Mode = "hard"
    scorer: str = "auto"
    scorer_path: str | None = None
    prefill: Prefill = "auto"
    dense_until: int | Literal["auto"] = "auto"
    dense_layers: tuple[int, ...] = ()
    layer_budgets: LayerBudgets = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_types()
        if isinstance(self.k, float) and not 0 < self.k < 1:
            raise _error("k", self.k, "a share of the context lies between 0 and 1")
        least_values = {
            "k": 1, "k_min": 1, "window": 1, "sinks": 0, "refresh": 1, "dense_until": 0,
        }  # fmt: skip
        for key, least in least_values.items():
            value = getattr(self, key)
            if isinstance(value, int) and value < least:
                raise _error(key, value, f"it must be at least {least}")
        if any(layer < 0 for layer in self.dense_layers):
            raise _error("dense_layers", list(self.dense_layers), "layer indices start at 0")
        from vllm_sparsek.scorers import SCORERS

        if self.scorer != "auto" and self.scorer not in SCORERS:
            raise _error("scorer", self.scorer, f"known are auto, {', '.join(SCORERS)}",
                         nearest(self.scorer, SCORERS))  # fmt: skip
        if self.scorer_path is not None and self.scorer not in ("auto", "learned"):
            why = f"scorer={self.scorer!r} reads no file: set scorer to learned or auto"
            raise _error("scorer_path", self.scorer_path, why)
        if self.scorer == "learned" and self.scorer_path is None:
            raise _error("scorer", "learned", "it needs scorer_path, a safetensors file")
        if self.query_aware:
            for key, value in (("granularity", "token"), ("mode", "soft_v"), ("prefill", "sparse")):
                if getattr(self, key) == value:
                    raise _error(key, value,
                                 "quest, the scorer of models without a fitted one, chooses pages "
                                 "by the query of every decode step: leave it out, name another "
                                 "scorer (scorer=keydiff), or set scorer_path")  # fmt: skip

    def _check_types(self) -> None:
        kinds: dict[str, tuple[type, ...]] = {"k": (int, float), "dense_layers": (tuple,)}
        choices = {
            "granularity": Granularity, "pooling": Pooling, "mode": Mode, "prefill": Prefill,
            "layer_budgets": LayerBudgets,
        }  # fmt: skip
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in choices:
                allowed = get_args(choices[field.name])
                if value not in allowed:
                    raise _error(field.name, value, f"it must be one of {', '.join(allowed)}",
                                 nearest(str(value), allowed))  # fmt: skip
                continue
            if field.name == "scorer_path" and value is None:
                continue
            if field.name == "dense_until" and value == "auto":
                continue
            if field.name == "dense_until" and isinstance(value, str):
                raise _error(field.name, value, "it must be auto or a number of tokens",
                             nearest(value, ("auto",)))  # fmt: skip
            default_kind: tuple[type, ...] = (
                (str,) if field.name in ("scorer", "scorer_path") else (int,)
            )
            kind = kinds.get(field.name, default_kind)
            if isinstance(value, bool) or not isinstance(value, kind):
                names = " or ".join(k.__name__ for k in kind)
                raise _error(field.name, value, f"it must be of type {names}")
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in self.dense_layers):
            raise _error("dense_layers", list(self.dense_layers), "it must be a list of integers")

    @property
    def scorer_name(self) -> str:
        """The scorer in use, ``auto`` resolved."""
        if self.scorer != "auto":
            return self.scorer
        return "learned" if self.scorer_path else "quest"

    @property
    def query_aware(self) -> bool:
        """Whether every decode step selects by its own query."""
        return self.scorer_name == "quest"

    @property
    def sparse_prefill(self) -> bool:
        """Whether prompts are read sparsely too, ``auto`` resolved."""
        if self.prefill != "auto":
            return self.prefill == "sparse"
        return self.scorer_name == "learned"

    def budget(self, page: int) -> Budget:
        """The nominal budget of every layer, for KV blocks of ``page`` tokens."""
        share = self.k if isinstance(self.k, float) else None
        unit = QUERY_UNIT if self.query_aware else 1
        return Budget(
            k=self.k_min if share is not None else int(self.k),
            k_share=share,
            window=self.window,
            sinks=self.sinks,
            refresh=self.refresh,
            unit=page if self.granularity == "page" else unit,
        )

    def first_sparse_position(self, page: int, limit: int) -> int:
        """Smallest position whose query may be sparse, or ``limit`` if there is none below it."""
        by_budget = self.budget(page).first_sparse_position(limit)
        until = self.dense_below if isinstance(self.dense_until, str) else self.dense_until
        return limit if until is None else max(by_budget, min(until, limit))

    @property
    def dense_below(self) -> int | None:
        """What ``dense_until: auto`` stands for; None: everything is read densely.

        The first position from which positions are at least ``WORTH_SPARSE`` times what a query
        there reads (a share of the context is not rounded here), and stay so.
        """
        around = self.sinks + self.window
        if not isinstance(self.k, float):
            return math.ceil(WORTH_SPARSE * (around + self.k))
        share = Fraction(self.k)
        if WORTH_SPARSE * share >= 1:
            return None
        # position >= WORTH_SPARSE * (around + share * (position + 1)), and the same of the floor
        by_share = WORTH_SPARSE * (around + share) / (1 - WORTH_SPARSE * share)
        return math.ceil(max(by_share, WORTH_SPARSE * (around + self.k_min)))

    @classmethod
    def resolve(
        cls,
        checkpoint: Mapping[str, Any] | None = None,
        additional: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        checkpoint_dir: str | None = None,
        shipped: Callable[[], str | None] | None = None,
    ) -> SparseKConfig:
        """Merge all sources.

        Args:
            checkpoint: ``sparsek_config`` of the checkpoint's config.json.
            additional: the ``sparsek`` entry of vLLM's ``--additional-config``.
            env: environment; default ``os.environ``.
            checkpoint_dir: folder of the checkpoint, for a relative ``scorer_path`` in it.
            shipped: path of the shipped scorer of the model, if there is one; called where the
                sources leave the choice of a scorer open, to be its ``scorer_path``.

        Raises:
            SparseKConfigError: unknown key, wrong type, value out of range, contradiction.
        """
        from_checkpoint = _known(checkpoint or {}, "the checkpoint's sparsek_config")
        path = from_checkpoint.get("scorer_path")
        if isinstance(path, str) and checkpoint_dir and not Path(path).is_absolute():
            if Path(path).parent == Path() and Path(path).suffix == ".safetensors":
                raise _error("scorer_path", path,
                             "vLLM would load it as weights of the model: put it into a folder "
                             f"of the checkpoint, e.g. sparsek/{path}")  # fmt: skip
            from_checkpoint["scorer_path"] = str(Path(checkpoint_dir) / path)
        direct = _known(additional or {}, "additional_config")
        from_env = _from_env(os.environ if env is None else env)
        preset: Any = None
        for source in (from_checkpoint, direct, from_env):
            preset = source.pop("preset", preset)
        from_preset = _load_preset(preset) if preset is not None else {}
        merged: dict[str, Any] = {}
        for source in (from_checkpoint, from_preset, direct, from_env):
            if source.get("scorer", "learned") not in ("learned", "auto"):
                # another scorer asked for at a higher level drops a file named below it
                merged.pop("scorer_path", None)
            merged.update(source)
        if isinstance(merged.get("dense_layers"), list):
            merged["dense_layers"] = tuple(merged["dense_layers"])
        if "k_min" in merged and not isinstance(merged.get("k"), float):
            raise _error("k_min", merged["k_min"], "it is the floor of a k given as a share (0..1)")
        if merged.get("scorer", "auto") == "auto" and not merged.get("scorer_path") and shipped:
            merged["scorer_path"] = shipped()
        return replace(cls(), **merged)


KEYS = tuple(field.name for field in fields(SparseKConfig))


def nearest(word: str, known: Any) -> str | None:
    """The known word most like ``word``, or None."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return found[0] if found else None


def _error(key: str, value: Any, why: str, suggestion: str | None = None) -> SparseKConfigError:
    hint = f" Did you mean {suggestion!r}?" if suggestion else ""
    return SparseKConfigError(f"sparsek: {key}={value!r} cannot be used: {why}.{hint}")


def _known(source: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(source, Mapping):
        raise SparseKConfigError(f"sparsek: {where} must be a mapping, got {source!r}.")
    for key, value in source.items():
        if key != "preset" and key not in KEYS:
            raise _error(str(key), value, f"unknown key in {where}; known are {', '.join(KEYS)}",
                         nearest(str(key), KEYS))  # fmt: skip
    return dict(source)


def _from_env(env: Mapping[str, str]) -> dict[str, Any]:
    found = {}
    for name, text in env.items():
        if not name.startswith(ENV_PREFIX):
            continue
        key = name[len(ENV_PREFIX) :].lower()
        if key != "preset" and key not in KEYS:
            match = nearest(key, KEYS)
            raise _error(name, text, "unknown environment variable",
                         f"{ENV_PREFIX}{match.upper()}" if match else None)  # fmt: skip
        try:
            found[key] = json.loads(text)
        except json.JSONDecodeError:
            found[key] = text
    return found


def preset_names() -> list[str]:
    """Names of the presets that ship with the package."""
    folder = resources.files("vllm_sparsek.configs")
    return sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".yaml"))


def _load_preset(name: Any) -> dict[str, Any]:
    if not isinstance(name, str):
        raise _error("preset", name, "it must be the name of a preset or a path to a YAML file")
    if name.endswith((".yaml", ".yml")):
        path: Any = Path(name)
        if not path.is_file():
            raise _error("preset", name, "no such file")
    else:
        if name not in preset_names():
            raise _error("preset", name, f"shipped presets are {', '.join(preset_names())}",
                         nearest(name, preset_names()))  # fmt: skip
        path = resources.files("vllm_sparsek.configs") / f"{name}.yaml"
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise _error("preset", name, f"not valid YAML: {error}") from None
    values = _known(content if content is not None else {}, f"preset {name}")
    if "preset" in values:
        raise _error("preset", name, "a preset cannot name another preset")
    return values
