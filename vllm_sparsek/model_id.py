"""Which model a scorer was fitted to: a fingerprint of weights that costs milliseconds."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

SAMPLE_BYTES = 256  # of every tensor
# far beyond any real header; a length above it means the file is no safetensors file
MAX_HEADER_BYTES = 100 << 20


def model_fingerprint(model: str, revision: str | None = None) -> str | None:
    """SHA-256 over names, dtypes, shapes and samples of a model's tensors.

    The sample is the 256 bytes in the middle of a tensor's data, or all of a smaller tensor.
    Tensors enter in the order of their names: how they are spread over files, their order there,
    names of files and metadata do not matter. A checkpoint that is copied, sharded or written by
    another version of transformers keeps its fingerprint; other weights of the same architecture,
    or another dtype, have another.

    Args:
        model: a checkpoint's folder, or a hub id that is looked up in the local Hugging Face
            cache; nothing is downloaded.
        revision: of a hub id.

    Returns:
        64 hexadecimal digits, or None if no (complete, readable) weights are found.
    """
    folder = local_folder(model, revision)
    files = _weight_files(folder) if folder is not None else None
    if not files:
        return None
    try:
        tensors = sorted(line for path in files for line in _tensors(path))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        # unreadable, cut short, or a header that is none
        return None
    return hashlib.sha256("\n".join(tensors).encode()).hexdigest()


def local_folder(model: str, revision: str | None = None) -> Path | None:
    """Folder of a checkpoint: itself, or its place in the local cache; None without one."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _weight_files(folder: Path) -> list[Path] | None:
    """The weights: what the index lists, else every file of the folder; None if one is missing."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError):
            return None
        found = [folder / name for name in names]
        return found if all(path.is_file() for path in found) else None
    found = [path for path in folder.glob("*.safetensors") if path.is_file()]
    # Mistral's checkpoints hold their weights a second time in its own naming
    return [path for path in found if not path.name.startswith("consolidated")] or found


def _tensors(path: Path) -> list[str]:
    """One line per tensor of a file: name, dtype, shape and a sample, as JSON."""
    lines = []
    # unbuffered: of every tensor only the sample is wanted
    with path.open("rb", buffering=0) as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{path} is not a safetensors file")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            size = min(SAMPLE_BYTES, end - begin)
            file.seek(8 + length + (begin + end - size) // 2)
            sample = file.read(size)
            if len(sample) < size:
                raise ValueError(f"{path} is cut short")
            lines.append(json.dumps([name, entry["dtype"], entry["shape"], sample.hex()]))
    return lines
