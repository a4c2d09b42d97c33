"""Settings: five sources, one precedence, and an error that names what to change."""

from __future__ import annotations

import dataclasses
import json
from fractions import Fraction

import pytest

from vllm_sparsek.config import KEYS, SparseKConfig, SparseKConfigError, preset_names

resolve = SparseKConfig.resolve


def preset(tmp_path, text, name="mine.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


# --- precedence ------------------------------------------------------------------------------


def test_without_any_source_the_defaults_hold():
    assert resolve(env={}) == SparseKConfig()


def test_every_source_overrides_those_below_it(tmp_path):
    low = preset(tmp_path, "k: 30\nwindow: 30\nsinks: 30")
    checkpoint = {"k": 20, "window": 20, "sinks": 20, "refresh": 20}
    additional = {"preset": low, "k": 40, "window": 40}
    config = resolve(checkpoint, additional, env={"SPARSEK_K": "50"})
    assert (config.k, config.window, config.sinks, config.refresh) == (50, 40, 30, 20)
    assert config.seed == SparseKConfig().seed


@pytest.mark.parametrize("source", ["checkpoint", "additional", "env"])
def test_any_source_may_name_a_preset(source, tmp_path):
    path = preset(tmp_path, "refresh: 7")
    if source == "env":
        config = resolve(env={"SPARSEK_PRESET": path})
    else:
        config = resolve(**{source: {"preset": path}}, env={})
    assert config.refresh == 7


def test_the_highest_source_that_names_a_preset_wins(tmp_path):
    one = preset(tmp_path, "refresh: 1\nsinks: 1", "one.yaml")
    two = preset(tmp_path, "refresh: 2", "two.yaml")
    config = resolve({"preset": one}, {"preset": one}, env={"SPARSEK_PRESET": two})
    assert (config.refresh, config.sinks) == (2, SparseKConfig().sinks)


def test_the_process_environment_is_read_by_default(monkeypatch):
    monkeypatch.setenv("SPARSEK_WINDOW", "99")
    assert resolve().window == 99


def test_environment_variables_are_json_or_plain_text():
    env = {
        "SPARSEK_K": "0.25", "SPARSEK_K_MIN": "64", "SPARSEK_DENSE_LAYERS": "[0, 5]",
        "SPARSEK_GRANULARITY": "page", "SPARSEK_SCORER": "knorm", "OTHER_K": "1",
    }  # fmt: skip
    config = resolve(env=env)
    assert config == SparseKConfig(
        k=0.25, k_min=64, dense_layers=(0, 5), granularity="page", scorer="knorm"
    )


def test_settings_are_frozen_and_hashable():
    config = SparseKConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.k = 3
    assert hash(config) == hash(SparseKConfig())


def test_a_source_is_not_changed_by_reading_it(tmp_path):
    additional = {"preset": preset(tmp_path, "k: 9"), "dense_layers": [1]}
    checkpoint = {"scorer_path": "sparsek/s.safetensors"}
    resolve(checkpoint, additional, env={}, checkpoint_dir="/models/m")
    assert set(additional) == {"preset", "dense_layers"}
    assert checkpoint == {"scorer_path": "sparsek/s.safetensors"}


# --- refusals --------------------------------------------------------------------------------

UNKNOWN = {
    "additional": ({"additional": {"windw": 64}}, ["windw=64", "additional_config", "'window'"]),
    "checkpoint": (
        {"checkpoint": {"refersh": 8}}, ["refersh=8", "checkpoint's sparsek_config", "'refresh'"],
    ),
    "env": ({"env": {"SPARSEK_SINK": "4"}}, ["SPARSEK_SINK='4'", "'SPARSEK_SINKS'"]),
}  # fmt: skip


@pytest.mark.parametrize(("sources", "words"), UNKNOWN.values(), ids=UNKNOWN.keys())
def test_an_unknown_key_is_refused_with_its_source_and_the_nearest_key(sources, words):
    with pytest.raises(SparseKConfigError) as error:
        resolve(**{"env": {}, **sources})
    for word in words:
        assert word in str(error.value)


def test_an_unknown_key_in_a_preset_is_refused_with_the_files_name(tmp_path):
    path = preset(tmp_path, "granularty: page")
    with pytest.raises(SparseKConfigError) as error:
        resolve(additional={"preset": path}, env={})
    for word in ("granularty='page'", path, "'granularity'"):
        assert word in str(error.value)


def test_a_key_unlike_any_other_gets_the_list_of_known_keys():
    with pytest.raises(SparseKConfigError) as error:
        resolve(additional={"xyzzy": 1}, env={})
    assert "Did you mean" not in str(error.value)
    assert all(key in str(error.value) for key in KEYS)


BAD_VALUES = {
    "k-zero": ({"k": 0}, "k=0", "at least 1"),
    "k-share-one": ({"k": 1.0}, "k=1.0", "between 0 and 1"),
    "k-share-negative": ({"k": -0.5}, "k=-0.5", "between 0 and 1"),
    "k-nan": ({"k": float("nan")}, "k=nan", "between 0 and 1"),
    "k-text": ({"k": "many"}, "k='many'", "int or float"),
    "k-bool": ({"k": True}, "k=True", "int or float"),
    "k-null": ({"k": None}, "k=None", "int or float"),
    "k_min-zero": ({"k": 0.5, "k_min": 0}, "k_min=0", "at least 1"),
    "window-zero": ({"window": 0}, "window=0", "at least 1"),
    "window-float": ({"window": 64.0}, "window=64.0", "type int"),
    "sinks-negative": ({"sinks": -1}, "sinks=-1", "at least 0"),
    "refresh-zero": ({"refresh": 0}, "refresh=0", "at least 1"),
    "dense_until-negative": ({"dense_until": -1}, "dense_until=-1", "at least 0"),
    "dense_until-share": ({"dense_until": 0.5}, "dense_until=0.5", "type int"),
    "dense_until-text": ({"dense_until": "aut"}, "dense_until='aut'", "'auto'"),
    "dense_until-bool": ({"dense_until": True}, "dense_until=True", "type int"),
    "dense_until-null": ({"dense_until": None}, "dense_until=None", "type int"),
    "seed-text": ({"seed": "1"}, "seed='1'", "type int"),
    "granularity": ({"granularity": "pages"}, "granularity='pages'", "'page'"),
    "granularity-list": ({"granularity": ["page"]}, "granularity=['page']", "token, page"),
    "pooling": ({"pooling": "avg"}, "pooling='avg'", "lse, max, mean"),
    "mode": ({"mode": "soft"}, "mode='soft'", "'soft_v'"),
    "prefill": ({"prefill": "sparce"}, "prefill='sparce'", "'sparse'"),
    "scorer": ({"scorer": "key_diff"}, "scorer='key_diff'", "'keydiff'"),
    "scorer-number": ({"scorer": 3}, "scorer=3", "type str"),
    "scorer_path-number": ({"scorer_path": 3}, "scorer_path=3", "type str"),
    "dense_layers-text": ({"dense_layers": "0"}, "dense_layers='0'", "tuple"),
    "dense_layers-negative": ({"dense_layers": [3, -1]}, "dense_layers=[3, -1]", "start at 0"),
    "dense_layers-bool": ({"dense_layers": [True]}, "dense_layers=[True]", "list of integers"),
    "contradiction-file-without-learned": (
        {"scorer": "knorm", "scorer_path": "s.safetensors"}, "scorer_path='s.safetensors'",
        "set scorer to learned or auto",
    ),
    "contradiction-learned-without-file": (
        {"scorer": "learned"}, "scorer='learned'", "needs scorer_path",
    ),
    "contradiction-quest-by-token": (
        {"granularity": "token"}, "granularity='token'", "scorer=keydiff",
    ),
    "contradiction-quest-soft_v": (
        {"scorer": "quest", "mode": "soft_v"}, "mode='soft_v'", "scorer=keydiff",
    ),
    "contradiction-quest-sparse-prefill": (
        {"prefill": "sparse"}, "prefill='sparse'", "set scorer_path",
    ),
    "contradiction-floor-of-a-number": ({"k": 100, "k_min": 10}, "k_min=10", "share"),
    "preset-unknown": ({"preset": "balanced_"}, "preset='balanced_'", "'balanced'"),
    "preset-missing-file": ({"preset": "no/x.yaml"}, "preset='no/x.yaml'", "no such file"),
    "preset-number": ({"preset": 3}, "preset=3", "name of a preset or a path"),
}  # fmt: skip


@pytest.mark.parametrize("source", ["checkpoint", "additional"])
@pytest.mark.parametrize(("values", "what", "why"), BAD_VALUES.values(), ids=BAD_VALUES.keys())
def test_a_bad_value_is_refused_with_key_value_and_remedy(values, what, why, source):
    with pytest.raises(SparseKConfigError) as error:
        resolve(**{source: values}, env={})
    assert what in str(error.value)
    assert why in str(error.value)


@pytest.mark.parametrize(
    "case",
    ["k-zero", "window-float", "granularity", "scorer", "dense_layers-negative", "preset-unknown"],
)
def test_a_bad_value_in_the_environment_is_refused(case):
    values, what, why = BAD_VALUES[case]
    env = {
        f"SPARSEK_{k.upper()}": v if isinstance(v, str) else json.dumps(v)
        for k, v in values.items()
    }
    with pytest.raises(SparseKConfigError) as error:
        resolve(env=env)
    assert what in str(error.value)
    assert why in str(error.value)


def test_a_bad_value_in_a_preset_is_refused(tmp_path):
    path = preset(tmp_path, "window: wide")
    with pytest.raises(SparseKConfigError, match="window='wide'"):
        resolve(additional={"preset": path}, env={})


@pytest.mark.parametrize("source", ["checkpoint", "additional"])
def test_a_source_that_is_no_mapping_is_refused(source):
    with pytest.raises(SparseKConfigError, match=r"must be a mapping, got \[1\]"):
        resolve(**{source: [1]}, env={})


# --- presets ---------------------------------------------------------------------------------


def test_every_shipped_preset_loads_and_sets_something():
    names = preset_names()
    assert {"balanced", "quality", "throughput"} <= set(names)
    for name in names:
        resolve(additional={"preset": name}, env={})
    assert resolve(additional={"preset": "quality"}, env={}).k == 0.5
    assert resolve(additional={"preset": "throughput"}, env={}).granularity == "page"
    assert resolve(additional={"preset": "balanced"}, env={}) == SparseKConfig()
    for name in names:
        # with and without a scorer fitted to the model
        resolve(additional={"preset": name, "scorer_path": "s"}, env={})


def test_the_benchmarks_own_settings_are_valid():
    from importlib import resources

    import yaml

    text = (resources.files("vllm_sparsek.configs") / "bench" / "arms.yaml").read_text()
    arms = yaml.safe_load(text)["arms"]
    given = [arm["sparsek"] for arm in arms.values() if "sparsek" in arm]
    assert given
    for values in given:
        resolve(additional=values, env={})


def test_a_preset_is_data_and_never_executed(tmp_path):
    trace = tmp_path / "executed"
    path = preset(tmp_path, f"k: !!python/object/apply:os.mkdir [{trace}]\n")
    with pytest.raises(SparseKConfigError, match="not valid YAML"):
        resolve(additional={"preset": path}, env={})
    assert not trace.exists()


def test_an_object_in_a_preset_is_refused(tmp_path):
    path = preset(tmp_path, "k: !!python/object:decimal.Decimal {}")
    with pytest.raises(SparseKConfigError, match="not valid YAML"):
        resolve(additional={"preset": path}, env={})


def test_broken_yaml_is_refused_with_the_files_name(tmp_path):
    path = preset(tmp_path, "k: [1,")
    with pytest.raises(SparseKConfigError) as error:
        resolve(additional={"preset": path}, env={})
    assert path in str(error.value)


def test_an_empty_preset_changes_nothing(tmp_path):
    path = preset(tmp_path, "# nothing yet\n")
    assert resolve(additional={"preset": path}, env={}) == SparseKConfig()


def test_a_preset_cannot_name_another(tmp_path):
    path = preset(tmp_path, "preset: quality")
    with pytest.raises(SparseKConfigError, match="cannot name another preset"):
        resolve(additional={"preset": path}, env={})


# --- resolution of auto ----------------------------------------------------------------------


def test_a_scorers_file_of_a_checkpoint_is_relative_to_the_checkpoint():
    config = resolve({"scorer_path": "sparsek/s.safetensors"}, env={}, checkpoint_dir="/models/m")
    assert config.scorer_path == "/models/m/sparsek/s.safetensors"


@pytest.mark.parametrize("path", ["s.safetensors", "./s.safetensors"])
def test_a_scorers_file_that_vllm_would_load_as_weights_is_refused(path):
    with pytest.raises(SparseKConfigError, match="would load it as weights"):
        resolve({"scorer_path": path}, env={}, checkpoint_dir="/models/m")


def test_an_absolute_scorers_file_of_a_checkpoint_stays_where_it_is():
    config = resolve({"scorer_path": "/s.safetensors"}, env={}, checkpoint_dir="/models/m")
    assert config.scorer_path == "/s.safetensors"


def test_a_scorers_file_named_on_the_command_line_is_relative_to_the_process():
    config = resolve(
        {"scorer_path": "a"}, {"scorer_path": "s.safetensors"}, env={}, checkpoint_dir="/models/m"
    )
    assert config.scorer_path == "s.safetensors"


AUTO = {
    "nothing given": ({}, "quest", False),
    "a file": ({"scorer_path": "s"}, "learned", True),
    "learned by name": ({"scorer": "learned", "scorer_path": "s"}, "learned", True),
    "a file, dense asked for": ({"scorer_path": "s", "prefill": "dense"}, "learned", False),
    "no file, dense asked for": ({"prefill": "dense"}, "quest", False),
    "static, sparse asked for": ({"scorer": "keydiff", "prefill": "sparse"}, "keydiff", True),
    "another scorer": ({"scorer": "recency"}, "recency", False),
}


@pytest.mark.parametrize(("values", "scorer", "sparse"), AUTO.values(), ids=AUTO.keys())
def test_auto_scorer_and_prefill_follow_from_the_scorers_file(values, scorer, sparse):
    config = resolve(additional=values, env={})
    assert config.scorer_name == scorer
    assert config.sparse_prefill is sparse


def test_another_scorer_asked_for_drops_the_checkpoints_file():
    config = resolve({"scorer_path": "s"}, {"scorer": "knorm"}, env={}, checkpoint_dir="/m")
    assert (config.scorer_name, config.scorer_path) == ("knorm", None)


# --- budget ----------------------------------------------------------------------------------


def test_the_budget_counts_tokens():
    budget = SparseKConfig(k=100, window=20, sinks=3, refresh=8, scorer="knorm").budget(page=32)
    assert (budget.k, budget.window, budget.sinks, budget.refresh) == (100, 20, 3, 8)
    assert (budget.unit, budget.k_share) == (1, None)
    assert budget.units_kept(5000) == 100


def test_the_budget_counts_pages_of_the_cache():
    budget = SparseKConfig(k=100, granularity="page").budget(page=32)
    assert budget.unit == 32
    assert budget.units_kept(5000) == 4


@pytest.mark.parametrize("page", [16, 48, 128])
def test_queries_choose_among_units_of_16_tokens_whatever_the_page(page):
    assert SparseKConfig(k=100, scorer="quest").budget(page).unit == 16
    assert SparseKConfig(k=100, scorer="quest", granularity="page").budget(page).unit == page


def test_a_share_is_of_the_context_with_a_floor():
    budget = SparseKConfig(k=0.25, k_min=64).budget(page=16)
    assert budget.tokens_kept(99) == 64
    assert budget.tokens_kept(3999) == 1000


@pytest.mark.parametrize(
    ("until", "limit", "first"),
    [(0, 4096, 128), (100, 4096, 128), (2000, 4096, 2000), (5000, 4096, 4096), (0, 64, 64)],
    ids=["by the budget", "within the budget", "beyond it", "beyond the limit", "all fits"],
)
def test_queries_are_dense_as_far_as_the_budget_and_dense_until_reach(until, limit, first):
    config = SparseKConfig(k=64, window=48, sinks=16, refresh=32, dense_until=until)
    by_budget = config.budget(16).first_sparse_position(limit)
    assert config.first_sparse_position(16, limit) == max(by_budget, min(until, limit)) == first


def test_by_default_queries_are_sparse_where_the_context_is_4_3_of_what_is_read():
    config = SparseKConfig()
    assert config.dense_until == "auto"
    # 4/3 of 16 + 1536 + 512
    assert config.dense_below == config.first_sparse_position(16, 1 << 17) == 2752
    assert config.first_sparse_position(16, 2100) == 2100
    assert SparseKConfig(k=97, window=48, sinks=5).dense_below == 200
    assert SparseKConfig(k=98, window=48, sinks=5).dense_below == 202


def test_auto_never_ends_within_the_budget():
    # a refresh block that begins within the budget is dense to its end
    config = SparseKConfig(k=3, window=3, sinks=0, refresh=64)
    assert config.dense_below == 8
    assert config.first_sparse_position(16, 4096) == 64


@pytest.mark.parametrize("share", [0.0001, 0.1, 0.25, 1 / 3, 0.5, 0.7, 0.74])
@pytest.mark.parametrize("k_min", [1, 256, 3000])
def test_auto_of_a_share_is_where_the_context_stays_4_3_of_what_is_read(share, k_min):
    config = SparseKConfig(k=share, k_min=k_min, window=512, sinks=16)
    first = config.dense_below

    def enough(position: int) -> bool:
        kept = max(Fraction(k_min), Fraction(share) * (position + 1))
        return 3 * position >= 4 * (16 + 512 + kept)

    assert not enough(first - 1)
    assert all(enough(position) for position in range(first, first + 5000))


def test_a_share_of_three_quarters_is_never_worth_it_and_an_explicit_number_is_obeyed():
    assert SparseKConfig(k=0.75).dense_below is None
    assert SparseKConfig(k=0.9).first_sparse_position(16, 1 << 17) == 1 << 17
    assert SparseKConfig(k=0.75, dense_until=0).first_sparse_position(16, 1 << 17) < 1 << 17


def test_auto_comes_from_every_source():
    asked = {"dense_until": 7}
    assert SparseKConfig.resolve(additional=asked, env={}).dense_until == 7
    env = {"SPARSEK_DENSE_UNTIL": "auto"}
    assert SparseKConfig.resolve(additional=asked, env=env).dense_until == "auto"
