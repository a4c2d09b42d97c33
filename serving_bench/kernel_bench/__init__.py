"""Kernel benchmark: our kernels against what one would otherwise run, each held to float64.

`cli` reads the command line; `cases` what to run (`configs/kernels/*.yaml`) and `work` what that
asks of the hardware; `inputs` makes the tensors; `arms` are who runs a case, one file a library;
`measure` takes times, `gate` checks results, `run` drives; `results`, `tiers` and `report` are what
is left; `profile` runs the same under Nsight Compute.
"""
