"""The SparseKConfig of a vLLM instance, read once a process."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.logger import init_logger

from vllm_sparsek import compat
from vllm_sparsek.config import SparseKConfig
from vllm_sparsek.scorers import scorer_class

logger = init_logger("vllm.sparsek")

_current: dict[str, tuple[SparseKConfig, int]] = {}


def resolve_settings(vllm_config: VllmConfig) -> SparseKConfig:
    """Merge the settings from all sources.

    Raises:
        SparseKConfigError: a setting that cannot be used.
    """
    checkpoint, direct, folder = compat.sparsek_settings(vllm_config)
    return SparseKConfig.resolve(checkpoint, direct, checkpoint_dir=folder)


def settings_of(vllm_config: VllmConfig) -> SparseKConfig:
    """The settings in use; logs what was chosen, once."""
    key = vllm_config.instance_id
    if key not in _current:
        config = resolve_settings(vllm_config)
        _current.clear()
        _current[key] = config, vllm_config.model_config.max_model_len
        logger.info("sparsek: %s", config)
        if not scorer_class(config.scorer_name).trained:
            logger.warning(
                "sparsek: no scorer is fitted to this model: %s instead, prefill is %s. "
                "To fit one: vllm-sparsek fit %s --out scorer.safetensors, then serve with "
                '--additional-config \'{"sparsek": {"scorer_path": "scorer.safetensors"}}\'',
                "pages are chosen by every decode step's query (quest)" if config.query_aware
                else f"the training-free scorer {config.scorer_name} loses exact retrieval",
                "sparse" if config.sparse_prefill else "dense",
                vllm_config.model_config.model,
            )  # fmt: skip
    return _current[key][0]


def current_settings() -> tuple[SparseKConfig, int]:
    """Settings and max_model_len of this process's instance, where vLLM passes no config."""
    (found,) = _current.values()
    return found
