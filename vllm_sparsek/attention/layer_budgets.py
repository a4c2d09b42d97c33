"""Budgets per layer: some layers need more of the context than others, at an equal total."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Sequence
from dataclasses import replace

from vllm_sparsek.config import SparseKConfig
from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.scorers.scorer_file import ScorerFileError
from vllm_sparsek.scorers.scorer_reader import ScorerReader

# budgets of layers are multiples of it, in tokens
STEP = 16


def read_shares(config: SparseKConfig, num_layers: int) -> tuple[float, ...] | None:
    """``layer_budgets`` of the scorer's file.

    Args:
        config: the settings; names the file.
        num_layers: layers of the whole model.

    Returns:
        One share per layer, 0 for layers that are not sparse; None if every layer has the
        same budget: no such tensor, no such scorer, or ``layer_budgets=uniform``.

    Raises:
        ScorerFileError: another number of layers, a negative share, no share that counts.
    """
    if config.scorer_name != "learned" or config.layer_budgets == "uniform":
        return None
    assert config.scorer_path is not None
    with ScorerReader(config.scorer_path) as file:
        if "layer_budgets" not in file.names:
            return None
        shares = tuple(file.tensor("layer_budgets", (num_layers,)).tolist())
    sparse = [share for layer, share in enumerate(shares) if layer not in config.dense_layers]
    if min(shares) < 0 or not any(sparse):
        raise ScorerFileError(
            f"sparsek: {config.scorer_path}: layer_budgets must not be negative, nor 0 for every "
            "sparse layer; layer_budgets=uniform ignores them."
        )
    return shares


@functools.lru_cache(maxsize=64)
def split_budget(
    budget: Budget, shares: tuple[float, ...], dense_layers: Collection[int], longest: int
) -> tuple[Budget | None, ...]:
    """The budget of every layer, None for layers that have no share or are dense.

    ``k`` tokens become multiples of 16 (at page granularity: whole pages), at least one of
    them, and the sparse layers' total is the nominal one rounded to such a multiple. A ``k``
    given as a share of the context is scaled; its floor is split as a number is. What would go
    beyond the whole context in one layer goes to the others.

    Args:
        budget: what every layer would get under equal shares.
        shares: relative shares of all layers.
        dense_layers: layers whose share does not count.
        longest: tokens of the longest context.
    """
    layers = [i for i, share in enumerate(shares) if share > 0 and i not in dense_layers]
    mean = sum(shares[i] for i in layers) / len(layers)
    relative = [shares[i] / mean for i in layers]
    step = STEP if budget.unit == 1 else budget.unit
    nominal = -(-budget.k // budget.unit) * budget.unit
    tokens = split(nominal, capped(relative, longest / nominal), step)
    of_context = capped(relative, 1 / (budget.k_share or 1.0))
    found: list[Budget | None] = [None] * len(shares)
    for i, share, k in zip(layers, of_context, tokens, strict=True):
        k_share = None if budget.k_share is None else min(1.0, budget.k_share * share)
        found[i] = replace(budget, k=k, k_share=k_share)
    return tuple(found)


def capped(shares: Sequence[float], ceiling: float) -> list[float]:
    """Shares of mean 1 that are at most ``ceiling``: the excess goes to the others, in proportion.

    A ceiling of at most 1 leaves equal shares.
    """
    if ceiling <= 1:
        return [1.0] * len(shares)
    found = list(shares)
    while max(found) > ceiling * (1 + 1e-9):
        below = [i for i, share in enumerate(found) if share < ceiling]
        excess = sum(share - ceiling for share in found if share > ceiling)
        grow = 1 + excess / sum(found[i] for i in below)
        found = [share * grow if share < ceiling else ceiling for share in found]
    return found


def split(k: int, shares: Sequence[float], step: int) -> list[int]:
    """``len(shares) * k`` split by shares of mean 1 into positive multiples of ``step``.

    Largest remainders decide what rounding leaves; of equal ones the first.
    """
    exact = [k * share / step for share in shares]
    places = [max(1, math.floor(e)) for e in exact]
    total = max(len(shares), math.floor(len(shares) * k / step + 0.5))
    order = range(len(shares))
    while sum(places) < total:
        places[max(order, key=lambda i: (exact[i] - places[i], -i))] += 1
    while sum(places) > total:
        above = [i for i in order if places[i] > 1]
        places[min(above, key=lambda i: (exact[i] - places[i], -i))] -= 1
    return [place * step for place in places]
