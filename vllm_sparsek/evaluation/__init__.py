"""Quality of sparse attention against dense, measured through vLLM: `vllm-sparsek eval`."""
