"""Which engine attends on a GPU: our Triton kernel, the one for Hopper, or FlashAttention-3.

Where `impl` is `auto`, a table measured per compute capability decides: `configs/engines`.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from importlib.resources import files
from types import ModuleType
from typing import Any

import torch
import yaml

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.common.dispatch import ENGINES, implementation, require
from vllm_sparsek.kernels.common.validate import compute_capability

GRANULARITIES = ("token", "page")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rule:
    """One line of a table; see configs/engines/sm_90.yaml."""

    operation: str
    engine: str
    granularity: str | None = None
    head_dims: tuple[int, ...] = ()
    rows_at_least: int = 1

    def holds(self, operation: str, granularity: str, head_dim: int, rows: int) -> bool:
        """Whether the rule is about such calls."""
        return (
            self.operation == operation
            and self.granularity in (None, granularity)
            and (not self.head_dims or head_dim in self.head_dims)
            and rows >= self.rows_at_least
        )


def parse(text: str, name: str) -> tuple[Rule, ...]:
    """The rules of one table.

    Raises:
        ValueError: the table is faulty; the message names it and the rule.
    """
    content = yaml.safe_load(text)
    if not isinstance(content, dict) or [*content] != ["rules"] or not isinstance(
        content["rules"], list
    ):  # fmt: skip
        raise ValueError(f"{name}: it must have the key `rules`, a list, and no other")
    rules = []
    for number, entry in enumerate(content["rules"]):
        where = f"{name}: rule {number + 1}"
        try:
            rule = Rule(**{**entry, "head_dims": tuple(entry.get("head_dims", ()))})
        except (TypeError, AttributeError) as error:
            raise ValueError(f"{where}: {error}") from error
        _one_of(rule.operation, tuple(ENGINES), f"{where}: operation")
        _one_of(rule.engine, ("triton", *ENGINES[rule.operation]), f"{where}: engine")
        _one_of(rule.granularity, (None, *GRANULARITIES), f"{where}: granularity")
        rules.append(rule)
    return tuple(rules)


def _one_of(value: Any, known: tuple[Any, ...], what: str) -> None:
    if value not in known:
        raise ValueError(f"{what} must be one of {known}, got {value!r}")


@functools.cache
def table_of(capability: int) -> tuple[Rule, ...]:
    """The rules for GPUs of a compute capability (90: 9.0); none where nothing was measured."""
    name = f"sm_{capability}.yaml"
    file = files("vllm_sparsek.configs").joinpath("engines", name)
    return parse(file.read_text(encoding="utf-8"), name) if file.is_file() else ()


@functools.lru_cache(maxsize=256)
def engines_of(
    capability: int, operation: str, unit: int, head_dim: int, rows: int
) -> tuple[str, ...]:
    """What the table says: the first of these that can do a call does it.

    Args:
        capability, operation: see ``table_of`` and ``Rule``.
        unit: of the budget; rows: query rows that share a list.
    """
    granularity = GRANULARITIES[unit > 1]
    rules = table_of(capability)
    found = [rule.engine for rule in rules if rule.holds(operation, granularity, head_dim, rows)]
    found.append("triton")
    return tuple(found[: found.index("triton") + 1])


@functools.cache
def _log_passed_over(operation: str, engine: str, reason: str) -> None:
    logger.info("sparsek %s passes over %s, which the table says: %s", operation, engine, reason)


def attention_module(
    operation: str,
    impl: str,
    query: torch.Tensor,
    rows: int,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    gates: torch.Tensor | None,
    budget: Budget,
) -> ModuleType:
    """The module that decodes or prefills.

    Args:
        operation: decode or prefill.
        impl: auto, triton, fa3, hopper (prefill), cpu or reference.
        query: [..., D]; rows: query rows that share a list, whatever the batch.
        key_cache, value_cache, gates, budget: as the operation's; a packed cache twice.

    Raises:
        ValueError: ``impl`` is unknown, or is an engine that cannot do this.
        RuntimeError: ``impl`` cannot run here.
    """
    device = query.device
    candidates: tuple[str, ...] = (impl,)
    if impl == "auto" and device.type == "cuda":
        capability = compute_capability(device)
        candidates = engines_of(capability, operation, budget.unit, query.shape[-1], rows)
    for engine in candidates:
        try:
            module = implementation(operation, engine, device)
        except ImportError as error:
            if engine == impl:
                raise RuntimeError(
                    f"{operation}: impl {impl!r} cannot be loaded: {error}"
                ) from error
            _log_passed_over(operation, engine, str(error))
            continue
        if engine not in ENGINES[operation]:
            break
        ok, reason = module.fits(query, key_cache, value_cache, gates, budget)
        if ok:
            break
        if engine == impl:
            require((ok, f"{operation}: impl {impl!r} does not fit: {reason}"))
        _log_passed_over(operation, engine, reason)
    return module
