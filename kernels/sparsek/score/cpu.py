"""Score on the CPU, vectorised torch. Same meaning and signatures as the reference."""

from __future__ import annotations

import torch


def write_scores(
    token_scores: torch.Tensor, slot_mapping: torch.Tensor, scores: torch.Tensor
) -> None:
    """See ``reference.write_scores``."""
    slots = slot_mapping[: token_scores.shape[0]]
    real = slots >= 0
    if not bool(real.all()):
        slots, token_scores = slots[real], token_scores[real]
    page = scores.shape[2]
    scores[slots // page, :, slots % page] = token_scores


def project(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """See ``reference.project``.

    One output a head (M = 1) is a product and a row sum, whose order does not depend on the
    number of tokens. For more, a matrix product is worth it; its order does depend on them, so
    pass float64 weights: rounded to float32, the order no longer shows.
    """
    if weight.shape[1] == 1:
        return ((x * weight[:, 0]).sum(-1) + bias[:, 0])[..., None].float()
    return (torch.einsum("thw,hmw->thm", x.to(weight.dtype), weight) + bias).float()


def keydiff(
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    scores: torch.Tensor,
    anchors: torch.Tensor,
) -> None:
    """See ``reference.keydiff``. Sums run in page order, so chunks change nothing."""
    page, head_dim = kv_cache.shape[2], kv_cache.shape[3] // 2
    new_tokens = (query_start_loc[1:] - query_start_loc[:-1]).tolist()
    for row, (end, new) in enumerate(zip(seq_lens.tolist(), new_tokens, strict=True)):
        if new == 0:
            continue
        start = end - new
        first, last = start // page, -(-end // page)
        blocks = block_table[row, first:last].long()
        if new == 1:
            # decode: one key against the pages before it
            offset = start - first * page
            key = kv_cache[blocks[0], :, offset, :head_dim].float()  # [H, D]
            key = key / key.norm(dim=-1, keepdim=True).clamp_min(1e-6)
            if first == 0:
                scores[blocks[0], :, offset] = 0.0
            else:
                before = anchors[block_table[row, first - 1]]
                before = before / before.norm(dim=-1, keepdim=True).clamp_min(1e-6)
                scores[blocks[0], :, offset] = -(key * before).sum(-1)
            if offset < page - 1:
                continue
        key = kv_cache[blocks, :, :, :head_dim].float()  # [P, H, page, D]
        unit = key / key.norm(dim=-1, keepdim=True).clamp_min(1e-6)
        before = anchors[block_table[row, first - 1]] if first else torch.zeros_like(anchors[0])
        running = []
        for p in range(last - first):
            running.append(before)
            if (first + p + 1) * page <= end:
                before = before + unit[p].sum(1)
                anchors[blocks[p]] = before
        if new == 1:
            continue
        anchor = torch.stack(running)  # [P, H, D]
        anchor = anchor / anchor.norm(dim=-1, keepdim=True).clamp_min(1e-6)
        # same arithmetic as in decode: a matrix product would round differently
        u = -(unit * anchor[:, :, None]).sum(-1)  # [P, H, page]
        position = (torch.arange(last - first)[:, None] + first) * page + torch.arange(page)
        fresh = (position >= start) & (position < end)  # [P, page]
        scores[blocks] = torch.where(fresh[:, None], u, scores[blocks])
