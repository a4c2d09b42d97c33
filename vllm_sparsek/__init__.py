"""vllm-sparsek: learned sparse attention as a plugin for stock vLLM."""

__version__ = "0.1.0"
