"""The kernels for programs without Python: ``vllm-sparsek export-kernels``."""
