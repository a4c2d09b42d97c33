"""Score: compute token scores and write them into the paged score cache."""

from __future__ import annotations

import torch

from vllm_sparsek.kernels.common.dispatch import check_shape, check_tensor, implementation
from vllm_sparsek.kernels.common.validate import FLOATS, FP8


def write_scores(
    token_scores: torch.Tensor,
    slot_mapping: torch.Tensor,
    scores: torch.Tensor,
    impl: str = "auto",
) -> None:
    """Store the scores of new tokens.

    Args:
        token_scores: [T, H] float32.
        slot_mapping: [>= T] int64, physical slot of every token; -1 is padding.
        scores: [num_blocks, H, page] float32 view of the score cache, written in place.
        impl: auto, triton, cpu or reference.

    Raises:
        ValueError, TypeError: an argument, named in the message, does not fit.
        RuntimeError: ``impl`` cannot run here.
    """
    device = scores.device
    check_tensor("token_scores", token_scores, 2, torch.float32, device)
    check_tensor("slot_mapping", slot_mapping, 1, torch.int64, device)
    check_tensor("scores", scores, 3, torch.float32, device)
    check_shape("token_scores", token_scores, (token_scores.shape[0], scores.shape[1]))
    if slot_mapping.shape[0] < token_scores.shape[0]:
        raise ValueError(
            f"slot_mapping has {slot_mapping.shape[0]} slots for {token_scores.shape[0]} tokens"
        )
    implementation("score", impl, device).write_scores(token_scores, slot_mapping, scores)


def project(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, impl: str = "auto"
) -> torch.Tensor:
    """``weight x + bias`` of every token and KV head, to the same bits in any batch.

    Args:
        x: [T, H, W] float32; the head's stride may be 0.
        weight: [H, M, W] float32, on the CPU float64 too (see ``cpu.project``); the head's
            stride may be 0.
        bias: [H, M] of weight's dtype.
        impl: auto, triton, cpu or reference.

    Returns:
        [T, H, M] float32.

    Raises:
        ValueError, TypeError: an argument, named in the message, does not fit.
        RuntimeError: ``impl`` cannot run here.
    """
    device = x.device
    weights = (torch.float32, torch.float64) if device.type == "cpu" else torch.float32
    check_tensor("x", x, 3, torch.float32, device)
    check_tensor("weight", weight, 3, weights, device)
    check_tensor("bias", bias, 2, weight.dtype, device)
    check_shape("weight", weight, (x.shape[1], weight.shape[1], x.shape[2]))
    check_shape("bias", bias, tuple(weight.shape[:2]))
    found: torch.Tensor = implementation("score", impl, device).project(x, weight, bias)
    return found


def keydiff(
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    scores: torch.Tensor,
    anchors: torch.Tensor,
    impl: str = "auto",
) -> None:
    """Score new tokens by how unlike the keys before them they are (causal KeyDiff).

    Args:
        kv_cache: [num_blocks, H, page, 2 * D]; the new tokens' keys are already in it. The
            scale of an fp8 cache does not matter: cosines have none.
        block_table: [rows, max_blocks] int32.
        query_start_loc: [rows + 1] int32; the last query_len tokens of each row are new.
        seq_lens: [rows] int32, context including the new tokens.
        scores: [num_blocks, H, page] float32, written for the new tokens.
        anchors: [num_blocks, H, D] float32: of block p, the sum of unit keys of pages 0..p;
            written for every page that the new tokens complete.
        impl: auto, triton, cpu or reference.

    Raises:
        ValueError, TypeError: an argument, named in the message, does not fit.
        RuntimeError: ``impl`` cannot run here.
    """
    device = kv_cache.device
    check_tensor("kv_cache", kv_cache, 4, (*FLOATS, FP8), device)
    check_tensor("block_table", block_table, 2, torch.int32, device)
    check_tensor("query_start_loc", query_start_loc, 1, torch.int32, device)
    check_tensor("seq_lens", seq_lens, 1, torch.int32, device)
    check_tensor("scores", scores, 3, torch.float32, device)
    check_tensor("anchors", anchors, 3, torch.float32, device)
    num_blocks, heads, page, width = kv_cache.shape
    check_shape("query_start_loc", query_start_loc, (seq_lens.shape[0] + 1,))
    check_shape("scores", scores, (num_blocks, heads, page))
    check_shape("anchors", anchors, (num_blocks, heads, width // 2))
    if block_table.shape[0] < seq_lens.shape[0]:
        raise ValueError(
            f"block_table has {block_table.shape[0]} rows for {seq_lens.shape[0]} seq_lens"
        )
    implementation("score", impl, device).keydiff(
        kv_cache, block_table, query_start_loc, seq_lens, scores, anchors
    )
