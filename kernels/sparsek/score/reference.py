"""Specification of score: computing token scores and writing them into the score cache."""

from __future__ import annotations

import torch


def write_scores(
    token_scores: torch.Tensor, slot_mapping: torch.Tensor, scores: torch.Tensor
) -> None:
    """Store the scores of new tokens.

    Args:
        token_scores: [T, H] float32.
        slot_mapping: [>= T] int64, physical slot of every token; -1 is padding.
        scores: [num_blocks, H, page] float32 view of the score cache, written in place.
    """
    page = scores.shape[2]
    for token, slot in enumerate(slot_mapping[: token_scores.shape[0]].tolist()):
        if slot >= 0:
            scores[slot // page, :, slot % page] = token_scores[token]


def project(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """``weight x + bias`` of every token and KV head.

    The result of a token must not depend on the tokens beside it, to the last bit: scores are
    compared across batches, chunks and cache hits.

    Args:
        x: [T, H, W]; weight: [H, M, W]; bias: [H, M].

    Returns:
        [T, H, M] float32.
    """
    products = x.double()[:, :, None] * weight.double()  # [T, H, M, W]
    return (products.sum(-1) + bias.double()).float()


def keydiff(
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    scores: torch.Tensor,
    anchors: torch.Tensor,
) -> None:
    """Score new tokens by how unlike the keys before them they are (causal KeyDiff).

    u_j = -cos(k_j, E_p) where E_p is the sum of the unit keys of all pages before the page p
    of token j; 0 in page 0. KeyDiff (Park et al., arXiv 2504.15364) takes the mean over all
    keys in the cache; the causal, page-wise sum makes the score final when it is written and
    independent of how the prompt was chunked. Sums run in page order, one addition a page.

    Args:
        kv_cache: [num_blocks, H, page, 2 * D]; the new tokens' keys are already in it.
        block_table: [rows, max_blocks] int32.
        query_start_loc: [rows + 1] int32; the last query_len tokens of each row are new.
        seq_lens: [rows] int32, context including the new tokens.
        scores: [num_blocks, H, page] float32, written for the new tokens.
        anchors: [num_blocks, H, D] float32: of block p, the sum of unit keys of pages 0..p;
            written for every page that the new tokens complete.
    """
    page, head_dim = kv_cache.shape[2], kv_cache.shape[3] // 2
    query_lens = (query_start_loc[1:] - query_start_loc[:-1]).tolist()
    for row, (end, new) in enumerate(zip(seq_lens.tolist(), query_lens, strict=True)):
        start = end - new
        for p in range(start // page, -(-end // page)):
            if new == 0:
                break
            block = int(block_table[row, p])
            key = kv_cache[block, :, :, :head_dim].float()  # [H, page, D]
            unit = key / key.norm(dim=-1, keepdim=True).clamp_min(1e-6)
            before = anchors[int(block_table[row, p - 1])] if p else torch.zeros_like(anchors[0])
            norm = before.norm(dim=-1, keepdim=True).clamp_min(1e-6)  # [H, 1]
            u = -(unit * (before / norm)[:, None]).sum(-1)  # [H, page]
            low, high = max(start - p * page, 0), min(end - p * page, page)
            scores[block, :, low:high] = u[:, low:high]
            if high == page:
                anchors[block] = before + unit.sum(1)
