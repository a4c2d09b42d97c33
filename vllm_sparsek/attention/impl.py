"""One SparseK layer, one step: write K/V and scores, select, attend."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from vllm_sparsek import compat
from vllm_sparsek.attention import warmup
from vllm_sparsek.attention.cpu_decode import CpuDecoder
from vllm_sparsek.attention.hidden import HiddenStates, keep_input
from vllm_sparsek.attention.metadata import PrefillItems, SparseKMetadata
from vllm_sparsek.attention.settings import (
    largest_budget,
    layer_budget,
    reads_hidden,
    settings_of,
)
from vllm_sparsek.attention.support import (
    FP8_CACHES,
    refuse_unsupported_impl,
    refuse_without_projection,
)
from vllm_sparsek.attention.workspace import KeptSelections, decode_workspace, rows_that_fit
from vllm_sparsek.kernels.bounds import api as bounds_api
from vllm_sparsek.kernels.common import architecture
from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.decode import api as decode_api
from vllm_sparsek.kernels.prefill import api as prefill_api
from vllm_sparsek.kernels.select import api as select_api
from vllm_sparsek.kernels.select.chunk import ChunkBases
from vllm_sparsek.kernels.select.memo import SelectionMemo
from vllm_sparsek.scorers import make_scorer
from vllm_sparsek.scorers.base import ScoreBatch, Scorer

# bytes of selection lists at a time in prefill (they are [items, H, K])
SELECTION_BYTES = 64 << 20


class SparseKImpl(AttentionImpl[SparseKMetadata]):
    """SparseK attention of one layer over vLLM's paged KV cache.

    Rows whose queries all read their whole context go to the dense path (vLLM's own
    FlashAttention on CUDA); sparse queries overwrite what it wrote for theirs.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **extra: Any,
    ) -> None:
        self.vllm_config = get_current_vllm_config()
        refuse_unsupported_impl(
            self.vllm_config, alibi_slopes, logits_soft_cap, attn_type,
            kv_sharing_target_layer_name, extra,
        )  # fmt: skip
        self.config = settings_of(self.vllm_config)
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads if num_kv_heads is not None else num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.kv_cache_dtype = kv_cache_dtype
        self.fp8 = kv_cache_dtype in FP8_CACHES
        self.max_model_len = self.vllm_config.model_config.max_model_len
        self.dense = compat.dense_impl_class(self.vllm_config.device_config.device_type)(
            num_heads, head_size, scale, self.num_kv_heads, None, None, kv_cache_dtype,
        )  # fmt: skip
        self.layer = -1
        self.always_dense = False
        # of the whole model's KV heads, those of this rank
        self.heads = slice(0, self.num_kv_heads)
        self._budgets: dict[int, tuple[Budget, Budget]] = {}
        self.scorer: Scorer | None = None
        self.writes_kv = False
        self.score_cache: Any = None
        self.cpu_decoder: CpuDecoder | None = None
        self.hidden: HiddenStates | None = None
        self._hidden_checked = False
        self._watch = compat.ParentWatch(self) if reads_hidden(self.vllm_config) else None
        self.kept: KeptSelections | None = None
        compat.hook_prompt_lengths()
        compat.decode_graphs.hook()

    def get_impl_variants(self) -> tuple[Any, ...]:
        """This and the dense path's.

        vLLM's FlashAttention schedules a step ahead if all its layers have one window. Layers with
        a sliding window that are left to it must not be taken for all: such a schedule is wrong in
        a CUDA graph as soon as all contexts are shorter than the window.
        """
        return (self, self.dense)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Load the scorer and add the score cache, before vLLM profiles memory."""
        layer_name, layer = compat.layer_of(self, self.vllm_config)
        self.layer = compat.layer_index(layer_name)
        self.always_dense = self.layer in self.config.dense_layers
        around = self._watch.stop() if self._watch is not None else None
        if self.always_dense or self.score_cache is not None:
            return
        total, self.heads = compat.total_kv_heads(self.vllm_config, self.num_kv_heads)
        device = layer._k_scale.device
        hidden_size = self.vllm_config.model_config.get_hidden_size()
        self.scorer = make_scorer(
            self.config, self.layer, total, self.head_size, self.heads, device, hidden_size
        )
        # a linear scorer arranges its weights here: not where a graph may be captured
        self.writes_kv = self.scorer.writes_kv
        if self.scorer.reads_hidden:
            projection = None if around is None else compat.query_projection(around)
            if projection is None:
                refuse_without_projection(layer_name)
            tokens = max(
                self.vllm_config.scheduler_config.max_num_batched_tokens,
                compat.max_decode_rows(self.vllm_config),
            )
            self.hidden = keep_input(projection, tokens, hidden_size, act_dtype, device)
        self.score_cache = compat.add_score_cache(
            self.vllm_config, layer_name, self.num_kv_heads, self.head_size,
            layer.kv_cache_torch_dtype, self.config,
        )  # fmt: skip
        if device.type == "cuda":
            # before vLLM's own Triton kernels compile, too
            architecture.prepare(device)
            page = self.vllm_config.cache_config.block_size
            # needs Triton; what it copies to the device is there before a graph is captured
            from vllm_sparsek.kernels.common.device import budget_arguments

            budget_arguments(self.budget(page), device)
            if not self.config.query_aware:
                self.kept = self._kept_selections(page, device)
            self._workspace(page, device)
        warmup.register(self, layer, act_dtype, device)

    def _kept_selections(self, page: int, device: torch.device) -> KeptSelections:
        width, soft = self.budget(page).max_units(self.max_model_len), self.config.mode == "soft_v"
        layers = compat.num_layers(self.vllm_config)
        rows = min(
            compat.max_decode_rows(self.vllm_config),
            rows_that_fit(self.num_kv_heads, width, layers, soft),
        )
        return KeptSelections(rows, self.num_kv_heads, width, soft, device)

    def budget(self, page: int) -> Budget:
        """What this layer's queries read of this rank's KV heads, for blocks of ``page`` tokens."""
        return self._own_and_largest(page)[0]

    def _own_and_largest(self, page: int) -> tuple[Budget, Budget]:
        if page not in self._budgets:
            self._budgets[page] = (
                layer_budget(self.vllm_config, page, self.layer).of_heads(self.heads),
                largest_budget(self.vllm_config, page, self.max_model_len),
            )
        return self._budgets[page]

    def _workspace(self, page: int, device: torch.device) -> Any:
        return decode_workspace(
            compat.max_decode_rows(self.vllm_config), self.num_heads, self.num_kv_heads,
            self.head_size, self._own_and_largest(page)[1], self.max_model_len,
            self.config.mode == "soft_v", self.config.query_aware, device,
        )  # fmt: skip

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write key, value [T, H, D] into the cache, unless ``forward`` does it with scores."""
        if self.writes_kv:
            return
        self.dense.do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: SparseKMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of all queries of the batch.

        Args:
            layer: the attention layer.
            query: [T, Hq, D]; key, value: [T, H, D].
            kv_cache: [num_blocks, H, page, 2 * D], the new tokens already written unless the
                scorer ``writes_kv``; uint8 if it holds float8_e4m3fn.
            attn_metadata: the step; None in profiling runs.
            output: [T, Hq, D], written in place.
            output_scale, output_block_scale: fused output quantisation, not supported.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("sparsek does not support fused output quantization yet")
        if attn_metadata is None:
            # the first run is a profiling run, never a replayed graph
            if self.hidden is not None and not self._hidden_checked:
                self.hidden.require_kept(layer.layer_name)
                self._hidden_checked = True
            return output.zero_()
        m = attn_metadata
        if self.always_dense:
            self._attend_densely(layer, query, key, value, kv_cache, m.dense_all, output)
            return output
        # read where they are: a captured graph follows scales that change
        kv_scales = (layer._k_scale, layer._v_scale) if self.fp8 else None
        numbers = compat.cache_numbers(kv_cache)
        self._score(key, value, numbers, kv_scales, m)
        beside: Any = nullcontext()
        if m.dense is not None and m.sparse_decodes and not m.cpu_rows:
            # neither attention fills the GPU in a decode step
            side = self._workspace(numbers.shape[2], numbers.device).side
            beside = beside if side is None else side.use()
        with beside as attended:
            self._attend_densely(layer, query, key, value, kv_cache, m.dense, output)
        kv_cache = numbers
        if m.cpu_rows:
            self._decode_cpu(query, kv_cache, m, output)
        elif m.sparse_decodes:
            rows = m.num_decodes
            self._decode(
                query[:rows], kv_cache, kv_scales, m, m.decode_row, m.decode_position,
                output[:rows], attended,
            )  # fmt: skip
        if m.items is not None and self.config.query_aware:
            self._decode_again(query, kv_cache, kv_scales, m, m.items, output)
        elif m.items is not None:
            self._prefill(query, kv_cache, kv_scales, m.block_table, m.items, output)
        return output

    def _attend_densely(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: Any | None,
        output: torch.Tensor,
    ) -> None:
        """Attention of the queries that read everything, if ``metadata`` says there are any."""
        if metadata is None:
            return
        q = compat.dense_query(self.dense, query, layer) if self.fp8 else query
        self.dense.forward(layer, q, key, value, kv_cache, metadata, output)

    def _score(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        kv_scales: tuple[torch.Tensor, torch.Tensor] | None,
        m: SparseKMetadata,
    ) -> None:
        views = self.score_cache.views()
        tokens = m.num_actual_tokens
        assert self.scorer is not None
        batch = ScoreBatch(
            key=key[:tokens],
            value=value[:tokens],
            positions=m.positions,
            slot_mapping=m.slot_mapping,
            kv_cache=kv_cache,
            block_table=m.block_table,
            query_start_loc=m.query_start_loc,
            seq_lens=m.seq_lens,
            scores=views.scores,
            anchors=views.anchors,
            bounds=views.bounds,
            hidden=None if self.hidden is None else self.hidden.rows[:tokens],
            kv_scales=kv_scales,
        )
        self.scorer.write(batch)

    def _select(
        self,
        query: torch.Tensor,
        block_table: torch.Tensor,
        row: torch.Tensor,
        position: torch.Tensor,
        budget: Budget,
        units: torch.Tensor,
        gates: torch.Tensor | None,
        unit_scores: torch.Tensor | None = None,
        memo: SelectionMemo | None = None,
        bases: ChunkBases | None = None,
    ) -> None:
        """Write the units that items keep; only query-aware selection reads their queries."""
        views = self.score_cache.views()
        if views.bounds is not None:
            bounds_api.select_by_query(
                query, views.bounds, block_table, row, position, budget, units, unit_scores
            )
            return
        select_api.select(
            views.scores, block_table, row, position, budget, self.config.pooling,
            gates is not None, units, gates, memo=memo, bases=bases,
        )  # fmt: skip

    def _decode(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        kv_scales: tuple[torch.Tensor, torch.Tensor] | None,
        m: SparseKMetadata,
        row: torch.Tensor,
        position: torch.Tensor,
        output: torch.Tensor,
        after: torch.cuda.Event | None = None,
    ) -> None:
        """Attend query, output [items, Hq, D], one query per item; for ``after`` see decode."""
        page, items = kv_cache.shape[2], row.numel()
        budget, space = self.budget(page), self._workspace(page, kv_cache.device)
        units, gates, memo = space.units, space.gates, None
        if self.kept is not None and items <= self.kept.units.shape[0]:
            units, gates = self.kept.units, self.kept.gates
            memo = SelectionMemo(self.kept.stamps[:items], m.step)
        units = units[:items]
        gates = gates[:items] if gates is not None else None
        scratch = space.unit_scores[:items] if space.unit_scores is not None else None
        self._select(query, m.block_table, row, position, budget, units, gates, scratch, memo)
        partials = (space.partials[0][:items], space.partials[1][:items])
        decode_api.decode(
            query, kv_cache, m.block_table, row, position, units, gates, budget,
            self.scale, output, partials, space.max_tokens, kv_scales, after,
        )  # fmt: skip

    def _decode_again(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        kv_scales: tuple[torch.Tensor, torch.Tensor] | None,
        m: SparseKMetadata,
        items: PrefillItems,
        output: torch.Tensor,
    ) -> None:
        """Generated tokens of a preempted request: each selects by its query, as it did before."""
        at_once = self._workspace(kv_cache.shape[2], kv_cache.device).units.shape[0]
        for low in range(0, items.row.numel(), at_once):
            part = slice(low, low + at_once)
            index = items.query_start[part].long()
            found = torch.empty_like(query[index])
            self._decode(
                query[index], kv_cache, kv_scales, m, items.row[part], items.position[part], found
            )
            output[index] = found

    def _decode_cpu(
        self, query: torch.Tensor, kv_cache: torch.Tensor, m: SparseKMetadata, output: torch.Tensor
    ) -> None:
        if self.cpu_decoder is None:
            self.cpu_decoder = CpuDecoder(
                self.num_kv_heads, self.budget(kv_cache.shape[2]), self.config.mode == "soft_v",
                self.scale, self.config.query_aware,
            )  # fmt: skip
        self.cpu_decoder.forward(
            query, kv_cache, self._select, m.block_table, m.cpu_rows, m.cpu_windows, output
        )

    def _prefill(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        kv_scales: tuple[torch.Tensor, torch.Tensor] | None,
        block_table: torch.Tensor,
        items: PrefillItems,
        output: torch.Tensor,
    ) -> None:
        page = kv_cache.shape[2]
        budget, soft = self.budget(page), self.config.mode == "soft_v"
        width = budget.max_units(self.max_model_len)
        # slices of items begin where all items do, at a multiple of 16 bytes: see PrefillItems
        at_once = max(4, SELECTION_BYTES // (4 * self.num_kv_heads * width) // 4 * 4)
        bases = items.bases
        for low in range(0, items.row.numel(), at_once):
            part = slice(low, low + at_once)
            row, position = items.row[part], items.position[part]
            shape = (row.numel(), self.num_kv_heads, width)
            units = torch.empty(shape, dtype=torch.int32, device=query.device)
            gates = torch.empty(shape, dtype=torch.float32, device=query.device) if soft else None
            own = None if bases is None else replace(bases, item_base=bases.item_base[part])
            self._select(query, block_table, row, position, budget, units, gates, bases=own)
            prefill_api.prefill(
                query, *kv_cache.chunk(2, dim=-1), block_table, row, position,
                items.query_start[part], items.query_len[part], units, gates, budget,
                self.scale, output, kv_scales,
            )  # fmt: skip
