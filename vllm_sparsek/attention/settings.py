"""The SparseKConfig of a vLLM instance, read once a process."""

from __future__ import annotations

import functools
from pathlib import Path

from vllm.config import VllmConfig
from vllm.logger import init_logger

from vllm_sparsek import compat
from vllm_sparsek.attention.layer_budgets import Shares, read_shares, split_budget
from vllm_sparsek.attention.support import refuse_unsupported_with_hidden
from vllm_sparsek.config import SparseKConfig
from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.model_id import model_fingerprint
from vllm_sparsek.scorers import scorer_class, shipped
from vllm_sparsek.scorers.scorer_file import ScorerFileError
from vllm_sparsek.scorers.scorer_reader import ScorerReader

logger = init_logger("vllm.sparsek")

_current: dict[str, tuple[SparseKConfig, int]] = {}
_shares: dict[str, Shares | None] = {}


def resolve_settings(vllm_config: VllmConfig) -> SparseKConfig:
    """Merge the settings from all sources; a scorer that they leave open may be a shipped one.

    Raises:
        SparseKConfigError: a setting that cannot be used.
    """
    checkpoint, direct, folder = compat.sparsek_settings(vllm_config)
    model = vllm_config.model_config

    def shipped_path() -> str | None:
        path = shipped.shipped_scorer(_served_fingerprint(model.model, model.revision))
        return str(path) if path is not None else None

    return SparseKConfig.resolve(checkpoint, direct, checkpoint_dir=folder, shipped=shipped_path)


# asked for by every reading of the settings; weights do not change under a server
@functools.lru_cache(maxsize=1)
def _served_fingerprint(model: str, revision: str | None) -> str | None:
    return model_fingerprint(model, revision)


def check_scorer(vllm_config: VllmConfig, config: SparseKConfig) -> None:
    """Refuse a scorer file that does not go with this model and configuration, early.

    Raises:
        ScorerFileError: not a scorer file, the fingerprint in it is another model's, or its
            ``layer_budgets`` are.
        UnsupportedError: a feature that its input excludes.
    """
    if config.scorer_name != "learned":
        return
    assert config.scorer_path is not None
    _read_shares(vllm_config, config)
    with ScorerReader(config.scorer_path) as file:
        fitted_to, features = file.header.model, file.header.features
    if "hidden" in features:
        refuse_unsupported_with_hidden(vllm_config)
        compat.mark_compiled_graphs(vllm_config, "hidden")
    if fitted_to is None:
        return
    model = vllm_config.model_config
    served = _served_fingerprint(model.model, model.revision)
    if served is None:
        logger.warning_once(
            "sparsek: no safetensors weights of %s found to compare with the model that %s was "
            "fitted to; only the shapes are checked.", model.model, config.scorer_path,
        )  # fmt: skip
    elif served != fitted_to:
        raise ScorerFileError(
            f"sparsek: scorer_path {config.scorer_path} was fitted to the model with fingerprint "
            f"{fitted_to}; the weights of {model.model} have {served}. Fit a scorer to this "
            f"model: vllm-sparsek fit {model.model}."
        )


def settings_of(vllm_config: VllmConfig) -> SparseKConfig:
    """The settings in use; logs what was chosen, once."""
    key = vllm_config.instance_id
    if key not in _current:
        config = resolve_settings(vllm_config)
        _current.clear()
        _current[key] = config, vllm_config.model_config.max_model_len
        logger.info("sparsek: %s", config)
        path = config.scorer_path
        if path is not None and Path(path).parent == shipped.shipped_folder():
            logger.info("sparsek: the learned scorer %s, shipped for this model", Path(path).stem)
        if not scorer_class(config.scorer_name).trained:
            logger.warning(
                "sparsek: no scorer fitted to this model is in use: %s instead, prefill is %s. "
                "To fit one: vllm-sparsek fit %s --out scorer.safetensors, then serve with "
                '--additional-config \'{"sparsek": {"scorer_path": "scorer.safetensors"}}\'',
                "pages are chosen by every decode step's query (quest)" if config.query_aware
                else f"the training-free scorer {config.scorer_name} loses exact retrieval",
                "sparse" if config.sparse_prefill else "dense",
                vllm_config.model_config.model,
            )  # fmt: skip
    return _current[key][0]


def reads_hidden(vllm_config: VllmConfig) -> bool:
    """Whether the scorer in use reads hidden states."""
    config = settings_of(vllm_config)
    if config.scorer_name != "learned":
        return False
    assert config.scorer_path is not None
    with ScorerReader(config.scorer_path) as file:
        return "hidden" in file.header.features


def layer_budget(vllm_config: VllmConfig, page: int, layer: int) -> Budget:
    """What queries of a layer that is not dense read, for KV blocks of ``page`` tokens.

    It is that of all KV heads of the model, before tensor parallelism.

    Raises:
        ScorerFileError: the scorer's ``layer_budgets`` leave the layer nothing.
    """
    budgets = _layer_budgets(vllm_config, page)
    if not budgets:
        return settings_of(vllm_config).budget(page)
    found = budgets[layer]
    if found is None:
        raise ScorerFileError(
            f"sparsek: {settings_of(vllm_config).scorer_path}: layer_budgets takes layer {layer} "
            "for dense: name it in dense_layers, or set layer_budgets=uniform."
        )
    return found


def largest_budget(vllm_config: VllmConfig, page: int, limit: int) -> Budget:
    """The budget of the layer with the head that keeps most of contexts up to ``limit`` tokens."""
    budgets = _layer_budgets(vllm_config, page) or (settings_of(vllm_config).budget(page),)
    return max(filter(None, budgets), key=lambda budget: budget.max_units(limit))


def _read_shares(vllm_config: VllmConfig, config: SparseKConfig) -> Shares | None:
    model = vllm_config.model_config
    return read_shares(config, model.get_total_num_hidden_layers(), model.get_total_num_kv_heads())


def _layer_budgets(vllm_config: VllmConfig, page: int) -> tuple[Budget | None, ...]:
    """One budget per layer, or none if all have the nominal one."""
    config, key = settings_of(vllm_config), vllm_config.instance_id
    if key not in _shares:
        _shares.clear()
        _shares[key] = _read_shares(vllm_config, config)
    shares = _shares[key]
    if not shares:
        return ()
    longest = vllm_config.model_config.max_model_len
    return split_budget(config.budget(page), shares, config.dense_layers, longest)


def current_settings() -> tuple[SparseKConfig, int]:
    """Settings and max_model_len of this process's instance, where vLLM passes no config."""
    (found,) = _current.values()
    return found
