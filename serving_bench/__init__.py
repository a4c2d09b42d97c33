"""Serving benchmark: one vLLM server per arm, driven by vLLM's own client, compared in one report.

`cli` reads the command line, `run` drives the arms; `config` holds the schema of the YAML files in
`configs/bench`. Import-light: nothing here imports torch or vLLM.
"""
