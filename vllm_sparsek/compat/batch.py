"""What a step's batch tells metadata builders."""

from __future__ import annotations

import functools
import sys
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from vllm.v1.attention.backend import CommonAttentionMetadata

_prompt_lens: ContextVar[Any] = ContextVar("sparsek_prompt_lens", default=None)


def hook_prompt_lengths() -> None:
    """Give metadata builders the prompt length of every row of the batch.

    With dense prefill, whether a query reads sparsely depends on its position in the request
    (prompt or generated), also when a preempted request is recomputed. vLLM hands prompt
    lengths to builders for R-SWA models only (``rswa_prefix_lens``); ends when it always does.
    """
    v1 = sys.modules.get("vllm.v1.worker.gpu_model_runner")
    if v1 is not None and not hasattr(v1.GPUModelRunner, "_sparsek_hooked"):
        build = v1.GPUModelRunner._build_attention_metadata

        @functools.wraps(build)
        def build_with_prompt_lengths(self: Any, *args: Any, **kwargs: Any) -> Any:
            batch = self.input_batch
            lengths = batch.num_prompt_tokens_cpu_tensor.numpy() if batch.num_reqs else None
            token = _prompt_lens.set(lengths)
            try:
                return build(self, *args, **kwargs)
            finally:
                _prompt_lens.reset(token)

        v1.GPUModelRunner._build_attention_metadata = build_with_prompt_lengths
        v1.GPUModelRunner._sparsek_hooked = True
    v2 = sys.modules.get("vllm.v1.worker.gpu.model_runner")
    if v2 is not None and not hasattr(v2.GPUModelRunner, "_sparsek_hooked"):
        prepare = v2.GPUModelRunner.prepare_inputs

        @functools.wraps(prepare)
        def prepare_with_prompt_lengths(self: Any, *args: Any, **kwargs: Any) -> Any:
            import torch

            batch = prepare(self, *args, **kwargs)
            if batch.prompt_lens is None:
                lengths = self.req_states.prompt_len.np[batch.idx_mapping_np]
                batch.prompt_lens = torch.from_numpy(lengths)
            return batch

        v2.GPUModelRunner.prepare_inputs = prepare_with_prompt_lengths
        v2.GPUModelRunner._sparsek_hooked = True


def prompt_lengths(metadata: CommonAttentionMetadata) -> np.ndarray | None:
    """[num_reqs] prompt lengths of the batch being built; None in dummy runs.

    Rows added as padding have arbitrary values.
    """
    lengths = metadata.rswa_prefix_lens
    found = _prompt_lens.get() if lengths is None else lengths.numpy()
    if found is None:
        return None
    import numpy as np

    rows = np.zeros(metadata.num_reqs, dtype=np.int64)
    known = min(metadata.num_reqs, len(found))
    rows[:known] = found[:known]
    return rows


def with_requests(
    metadata: CommonAttentionMetadata, starts: np.ndarray, lengths: np.ndarray, rows: np.ndarray
) -> CommonAttentionMetadata:
    """The batch with its tokens cut into other requests.

    Args:
        metadata: the batch.
        starts: [requests + 1] int, where queries of a request begin.
        lengths: [requests] int, context up to a request's last query.
        rows: [requests] int, whose blocks it reads: of the block table.
    """
    import numpy as np
    import torch

    parts = [part.astype(np.int32) for part in (starts, lengths, rows)]
    device = metadata.block_table_tensor.device
    there = to_device(np.concatenate(parts), device)
    starts_, lengths_, rows_ = there.split([part.size for part in parts])
    return metadata.replace(
        query_start_loc=starts_,
        query_start_loc_cpu=torch.from_numpy(parts[0]),
        seq_lens=lengths_,
        seq_lens_cpu_upper_bound=torch.from_numpy(parts[1]),
        num_reqs=len(lengths),
        max_query_len=int(np.diff(starts).max()),
        max_seq_len=int(lengths.max()),
        block_table_tensor=metadata.block_table_tensor[rows_.long()],
    )


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A host array on ``device`` without waiting for it: pinned, copied asynchronously."""
    import torch

    host = torch.from_numpy(values)
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)
