"""SparseK kernels (import name ``vllm_sparsek.kernels``): a folder for every operation."""
