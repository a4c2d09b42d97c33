"""SparseK kernels: score, select, decode, prefill (import name ``vllm_sparsek.kernels``)."""
