"""SparseK attention as an operator of xFormers (written for xFormers 0.0.35).

import xformers.ops as xops
from vllm_sparsek.xformers import SparseKAttentionOp

op = SparseKAttentionOp.with_config(k=1024, window=256)
out = xops.memory_efficient_attention(q, k, v, attn_bias=xops.LowerTriangularMask(), op=op)
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from xformers.ops import LowerTriangularMask
from xformers.ops.fmha.attn_bias import LowerTriangularFromBottomRightMask
from xformers.ops.fmha.common import AttentionFwOpBase, Inputs

from vllm_sparsek.config import SparseKConfig
from vllm_sparsek.dense import attention_forward, resolve_settings
from vllm_sparsek.kernels.common.validate import KERNEL_FLOATS, KERNEL_HEAD_DIMS, kernel_takes


class SparseKFwOp(AttentionFwOpBase):
    """The forward operator, with the settings and scores of ``SparseKAttentionOp.with_config``.

    Tensors that require a gradient are refused, under ``torch.no_grad()`` too: xFormers asks its
    operators in a place where they cannot tell.
    """

    OPERATOR = staticmethod(attention_forward)
    NAME = "sparsekF"
    SUPPORTED_DEVICES: ClassVar[set[str]] = {"cuda", "cpu"}
    CUDA_MINIMUM_COMPUTE_CAPABILITY = (8, 0)
    SUPPORTED_DTYPES: ClassVar[set[torch.dtype]] = set(KERNEL_FLOATS)
    SUPPORTED_MAX_K = max(KERNEL_HEAD_DIMS)
    SUPPORTED_ATTN_BIAS_TYPES = (LowerTriangularMask, LowerTriangularFromBottomRightMask)
    SUPPORTS_DROPOUT = False
    SUPPORTS_CUSTOM_SCALE = True
    SUPPORTS_BMGHK = True

    CONFIG: ClassVar[SparseKConfig] = resolve_settings(None, scored=False)
    SCORES: ClassVar[torch.Tensor | None] = None

    @classmethod
    def not_supported_reasons(cls, d: Inputs) -> list[str]:
        """See ``AttentionOpBase``: why these inputs cannot be attended to; empty if they can."""
        reasons: list[str] = super().not_supported_reasons(d)
        tensors = {"query": d.query, "key": d.key, "value": d.value}
        if d.attn_bias is None:
            reasons.append("attn_bias is None: attention is causal, pass LowerTriangularMask()")
        queries, keys = d.query.shape[1], d.key.shape[1]
        if type(d.attn_bias) is LowerTriangularMask and queries != keys:
            reasons.append(
                f"{queries} queries of {keys} keys under LowerTriangularMask: the queries must be "
                "the last positions, pass LowerTriangularFromBottomRightMask()"
            )
        if queries > keys:
            reasons.append(f"{queries} queries are more than {keys} keys")
        for name, tensor in tensors.items():
            if tensor.requires_grad:
                reasons.append(f"{name}.requires_grad: forward only, pass {name}.detach()")
            if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
                reasons.append(f"{name}.stride(-1) != 1")
        takes, why_not = kernel_takes(d.query, d.key)
        if d.query.device.type == "cuda" and not takes:
            reasons.append(why_not)
        return reasons

    @classmethod
    def apply(cls, inp: Inputs, needs_gradient: bool) -> tuple[torch.Tensor, None]:
        """See ``AttentionFwOpBase``: [B, M, H, K] or [B, M, G, H, K] in and out.

        Keys and values that the heads of a group share (expanded, so that their stride over them
        is 0) are one KV head: nothing is read twice.
        """
        if needs_gradient:
            raise NotImplementedError(
                "SparseKAttentionOp is forward only: it has no logsumexp and no backward"
            )
        query, key, value = inp.query, inp.key, inp.value
        if query.dim() == 5:
            if key.stride(3) == 0 and value.stride(3) == 0:
                key, value = key[:, :, :, 0], value[:, :, :, 0]
            else:
                key, value = key.flatten(2, 3), value.flatten(2, 3)
            query = query.flatten(2, 3)
        out = attention_forward(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2),
            scores=cls.SCORES, config=cls.CONFIG, scale=inp.scale,
        )  # fmt: skip
        return out.transpose(1, 2).reshape(inp.query.shape), None


class AttentionOp(NamedTuple):
    """What ``memory_efficient_attention`` takes as ``op``: a forward operator and no backward."""

    forward: type[SparseKFwOp]
    backward: None = None

    @staticmethod
    def with_config(scores: torch.Tensor | None = None, **settings: Any) -> AttentionOp:
        """An operator with settings and scores of its own.

        Args:
            scores: [B, Hkv, Skv] float32, see ``attention_forward``. KV heads are the heads of
                the keys; of five-dimensional keys that are shared in a group, the groups.
            settings: keys of ``SparseKConfig``, e.g. ``k=1024, window=256``.

        Raises:
            SparseKConfigError, ValueError: a setting cannot be used.
        """
        bound = {"CONFIG": resolve_settings(settings, scores is not None), "SCORES": scores}
        return AttentionOp(type("SparseKFwOp", (SparseKFwOp,), bound))


SparseKAttentionOp = AttentionOp(SparseKFwOp)
