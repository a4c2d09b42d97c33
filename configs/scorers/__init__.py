"""Learned scorers that ship with the package: NAME.safetensors, and NAME.json, the fit's log."""
