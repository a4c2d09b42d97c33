"""Budgets per layer and KV head: some need more of the context than others, at an equal total."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Sequence

from vllm_sparsek.config import SparseKConfig
from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.scorers.scorer_file import ScorerFileError
from vllm_sparsek.scorers.scorer_reader import ScorerReader

# budgets are multiples of it, in tokens
STEP = 16

# of every layer: one share, or one a KV head; 0 for layers that are not sparse
Shares = tuple[tuple[float, ...], ...]


def read_shares(config: SparseKConfig, num_layers: int, num_kv_heads: int) -> Shares | None:
    """``layer_budgets`` of the scorer's file.

    Args:
        config: the settings; names the file.
        num_layers, num_kv_heads: of the whole model.

    Returns:
        The shares; None if every layer and head has the same budget: no such tensor, no such
        scorer, or ``layer_budgets=uniform``.

    Raises:
        ScorerFileError: another number of layers or heads, a negative share, heads of a layer of
            which only some have a share, no share that counts.
    """
    if config.scorer_name != "learned" or config.layer_budgets == "uniform":
        return None
    assert config.scorer_path is not None
    with ScorerReader(config.scorer_path) as file:
        if "layer_budgets" not in file.names:
            return None
        by_head = len(file.shape("layer_budgets")) == 2
        shape = (num_layers, num_kv_heads) if by_head else (num_layers,)
        found = file.tensor("layer_budgets", shape).view(num_layers, -1)
    shares = tuple(map(tuple, found.tolist()))
    sparse = [heads for layer, heads in enumerate(shares) if layer not in config.dense_layers]
    if found.min() < 0 or not any(map(any, sparse)):
        raise ScorerFileError(
            f"sparsek: {config.scorer_path}: layer_budgets must not be negative, nor 0 for every "
            "sparse layer; layer_budgets=uniform ignores them."
        )
    for layer, heads in enumerate(shares):
        if any(heads) != all(heads):
            raise ScorerFileError(
                f"sparsek: {config.scorer_path}: layer_budgets is 0 for some KV heads of layer "
                f"{layer} but not for all; layer_budgets=uniform ignores them."
            )
    return shares


@functools.lru_cache(maxsize=64)
def split_budget(
    budget: Budget, shares: Shares, dense_layers: Collection[int], longest: int
) -> tuple[Budget | None, ...]:
    """The budget of every layer, None for layers that have no share or are dense.

    ``k`` tokens of a head (of all heads of a layer with one share) become multiples of 16 (at
    page granularity: whole pages), at least one of them, and the sparse layers' total is the
    nominal one rounded to such a multiple. A ``k`` given as a share of the context is scaled; its
    floor is split as a number is. What would go beyond the whole context in one head goes to the
    others.

    Args:
        budget: what every layer and head would get under equal shares.
        shares: relative shares of all layers, all with one share or all with one a KV head.
        dense_layers: layers whose share does not count.
        longest: tokens of the longest context.
    """
    layers = [i for i, heads in enumerate(shares) if heads[0] > 0 and i not in dense_layers]
    flat = [share for i in layers for share in shares[i]]
    mean = sum(flat) / len(flat)
    relative = [share / mean for share in flat]
    step = STEP if budget.unit == 1 else budget.unit
    nominal = -(-budget.k // budget.unit) * budget.unit
    tokens = split(nominal, capped(relative, longest / nominal), step)
    of_context = capped(relative, 1 / (budget.k_share or 1.0))
    numbers = [
        (k, None if budget.k_share is None else min(1.0, budget.k_share * share))
        for share, k in zip(of_context, tokens, strict=True)
    ]
    found: list[Budget | None] = [None] * len(shares)
    for at, i in enumerate(layers):
        heads = len(shares[i])
        found[i] = budget.with_heads(numbers[at * heads : (at + 1) * heads])
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
