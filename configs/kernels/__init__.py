"""Cases of the kernel benchmark (YAML)."""
