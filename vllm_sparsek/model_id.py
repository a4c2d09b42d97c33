"""Which model a scorer was fitted to: a fingerprint of weights that costs milliseconds."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

SAMPLES = 64  # per file
SAMPLE_BYTES = 4096
# far beyond any real header; a length above it means the file is no safetensors file
MAX_HEADER_BYTES = 100 << 20


def model_fingerprint(model: str, revision: str | None = None) -> str | None:
    """SHA-256 over the headers of a model's safetensors files and samples of their bytes.

    Names of files do not enter, nor their metadata; names, dtypes, shapes and offsets of
    tensors do, and 64 samples of 4 KiB spread evenly over every file. Copies of a checkpoint
    have its fingerprint, other weights of the same architecture another.

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
        digests = sorted(_file_digest(path) for path in files)
    except (OSError, ValueError):
        return None
    return hashlib.sha256(b"".join(digests)).hexdigest()


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


def _file_digest(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{path} is not a safetensors file")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        digest.update(json.dumps(header, sort_keys=True).encode())
        start = 8 + length
        room = max(0, path.stat().st_size - start - SAMPLE_BYTES)
        # a small file is read several times over, which does no harm
        for sample in range(SAMPLES):
            file.seek(start + room * sample // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.digest()
