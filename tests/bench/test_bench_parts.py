"""The serving benchmark's parts: configuration, metrics, the client's command."""

import dataclasses
import itertools
import json
import re
from importlib.resources import files
from pathlib import Path

import pytest
from fake import (
    VLLM_METRICS,
)

from vllm_sparsek.serving_bench import (
    client,
    config,
    metrics,
    prompts,
    server,
)
from vllm_sparsek.serving_bench.errors import BenchError

# configuration


def test_shipped_arms_and_workloads_are_valid_and_have_both_scales():
    bench = config.load()
    assert {"dense", "sparsek"} <= set(bench.arms)
    assert set(bench.workloads) == {"random", "shared-prefix", "long-context", "multi-turn"}
    for workload in bench.workloads:
        for scale in ("tiny", "gpu"):
            size = bench.size(workload, scale)
            assert size.prompt_len + size.output_len < {"tiny": 4096, "gpu": 65536}[scale]
    assert bench.arm("dense").dense
    assert not bench.arm("sparsek").dense


def test_shipped_sparsek_settings_are_settings_of_the_plugin():
    plugin = pytest.importorskip("vllm_sparsek.config")
    names = {field.name for field in dataclasses.fields(plugin.SparseKConfig)} | {"preset"}
    for name, arm in config.load().arms.items():
        settings = arm.sparsek or {}
        assert set(settings) <= names, name
        if "preset" in settings:
            assert files("vllm_sparsek.configs").joinpath(f"{settings['preset']}.yaml").is_file()
        else:
            plugin.SparseKConfig(**settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arm: {}", "top level: unknown key 'arm'; did you mean 'arms'?"),
        (
            "arms: {a: {atention_backend: x}}",
            "arms.a: unknown key 'atention_backend'; did you mean",
        ),
        (
            "workloads: {w: {dataset: random, scales: {s: {inputlen: 3}}}}",
            "workloads.w.random.scales.s: unknown key 'inputlen'; did you mean 'input_len'?",
        ),
        ("workloads: {w: {dataset: nope, scales: {}}}", "'prefix_repetition'"),
        ("arms: {a: {sparsek: {k: 3}}}", "need `attention_backend: sparsek`"),
        ("arms: [", "not valid YAML"),
        (
            "workloads: {w: {dataset: random, scales: {s: {input_len: 0, output_len: 1,"
            " num_prompts: 1, max_concurrency: 1}}}}",
            "greater than 0",
        ),
        (
            "workloads: {w: {dataset: prefix_repetition, scales: {s: {num_prefixes: 3, prefix_len:"
            " 1, suffix_len: 1, output_len: 1, num_prompts: 4, max_concurrency: 1}}}}",
            "multiple of num_prefixes",
        ),
    ],
    ids=["top", "arm", "size", "dataset", "settings", "syntax", "value", "prefixes"],
)
def test_a_faulty_configuration_is_refused_with_the_place_and_the_nearest_key(text, message):
    with pytest.raises(BenchError) as error:
        config.parse(text, "file.yaml")
    assert str(error.value).startswith("file.yaml: ")
    assert message in str(error.value)


def test_an_unknown_arm_workload_or_scale_names_the_nearest():
    bench = config.load()
    with pytest.raises(BenchError, match="no arm 'sparsk'; did you mean 'sparsek'"):
        bench.arm("sparsk")
    with pytest.raises(BenchError, match="did you mean 'multi-turn'"):
        bench.size("multiturn", "tiny")
    with pytest.raises(BenchError, match="no scale 'huge'; valid: tiny, gpu"):
        bench.size("random", "huge")


def test_a_file_of_the_user_replaces_and_adds_by_name(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("arms: {sparsek: {attention_backend: sparsek, sparsek: {k: 7}}, mine: {}}")
    arms = config.load(path).arms
    assert arms["sparsek"].sparsek == {"k": 7}
    assert {"mine", "dense"} <= set(arms)
    with pytest.raises(BenchError, match="cannot read"):
        config.load(tmp_path / "absent.yaml")


def test_an_arm_becomes_vllm_arguments():
    arm = config.Arm(attention_backend="sparsek", sparsek={"k": 0.25}, server_args=["--seed=1"])
    assert server.serve_command(["vllm"], "m", arm, 81, ["--max-model-len=9"]) == [
        "vllm", "serve", "m", "--host", "127.0.0.1", "--port", "81",
        "--attention-backend", "sparsek", "--additional-config", '{"sparsek": {"k": 0.25}}',
        "--seed=1", "--max-model-len=9",
    ]  # fmt: skip
    assert config.Arm().vllm_args() == []


# metrics


def test_metrics_of_a_real_server_are_read_and_foreign_ones_dropped():
    snapshot = metrics.parse(VLLM_METRICS)
    assert snapshot.total("vllm:prompt_tokens_total") == 4608
    assert snapshot.total(metrics.PROMPT_TOKENS_BY_SOURCE, source="local_compute") == 1536
    assert snapshot.highest(metrics.KV_USAGE) == 0.0
    assert snapshot.total("vllm:absent_total") is None
    assert not any(name.startswith("python") for name in snapshot.samples)


def test_rates_are_growth_over_the_duration_and_the_hit_rate_is_hits_over_queries():
    values = metrics.derive(metrics.Snapshot({}), metrics.parse(VLLM_METRICS), 4.0, dense=True)
    assert values["prompt_tokens_per_s"] == 1152
    assert values["prefill_tokens_per_s"] == 384
    assert values["generation_tokens_per_s"] == 32
    assert values["kv_hit_rate"] == pytest.approx(2 / 3)
    assert values["preemptions"] == 0
    assert values["density"] == 1.0
    assert values["dense_step_share"] is None


def test_nothing_measured_is_not_available_rather_than_zero():
    same = metrics.parse(VLLM_METRICS)
    values = metrics.derive(same, same, 4.0, dense=False)
    assert values["kv_hit_rate"] is None
    assert values["density"] is None
    assert values["prompt_tokens_per_s"] == 0
    empty = metrics.Snapshot({})
    assert set(metrics.derive(empty, empty, 4.0, dense=False).values()) == {None}
    # a server that was restarted in between
    reset = metrics.parse(VLLM_METRICS.replace("} 4608.0", "} 8.0"))
    assert metrics.derive(same, reset, 4.0, dense=False)["prompt_tokens"] is None


def test_counters_are_summed_over_engines():
    def text(attended, context):
        return (
            "# TYPE sparsek:tokens_attended_total counter\n"
            f'sparsek:tokens_attended_total{{engine="0"}} {attended}\n'
            f'sparsek:tokens_attended_total{{engine="1"}} {attended}\n'
            "# TYPE sparsek:context_tokens_total counter\n"
            f'sparsek:context_tokens_total{{engine="0"}} {context}\n'
            f'sparsek:context_tokens_total{{engine="1"}} {context}\n'
        )

    before, after = metrics.parse(text(100, 100)), metrics.parse(text(150, 300))
    assert metrics.derive(before, after, 1.0, dense=False)["density"] == 0.25


# the client


def test_the_client_command_fixes_lengths_and_asks_for_the_percentiles(tmp_path):
    endpoint = server.Endpoint("http://h:1", "served", "org/model", None)
    size = config.load().size("shared-prefix", "tiny")
    command = client.bench_command(["vllm"], endpoint, size, tmp_path / "r.json", seed=5)
    assert command[:3] == ["vllm", "bench", "serve"]
    pairs = dict(itertools.pairwise(command))
    assert pairs["--model"] == "org/model"
    assert pairs["--served-model-name"] == "served"
    assert pairs["--dataset-name"] == "prefix_repetition"
    assert pairs["--prefix-repetition-num-prefixes"] == "2"
    assert pairs["--seed"] == "5"
    assert pairs["--ready-check-timeout-sec"] == "0"
    assert pairs["--percentile-metrics"] == "ttft,tpot,itl"
    assert pairs["--metric-percentiles"] == "50,99"
    assert pairs["--result-filename"] == "r.json"
    assert {"--ignore-eos", "--save-result"} <= set(command)
    assert "--metadata" not in command
    more = size.model_copy(update={"client_args": ["--top-k", "1"], "request_rate": 2.5})
    command = client.bench_command(["vllm"], endpoint, more, tmp_path / "r.json", seed=5)
    assert command[-4:] == ["--request-rate", "2.5", "--top-k", "1"]


def test_vllm_accepts_every_option_of_the_client_command(tmp_path):
    pytest.importorskip("vllm")
    known = set()
    import vllm

    folder = Path(vllm.__file__).parent / "benchmarks"
    for source in (folder / "serve.py", folder / "datasets" / "datasets.py"):
        known |= set(re.findall(r'"(--[a-z][a-z-]+)"', source.read_text()))
    endpoint = server.Endpoint("http://h:1", "served", "org/model", None)
    bench = config.load()
    for workload in bench.workloads:
        size = bench.size(workload, "tiny")
        command = client.bench_command(["vllm"], endpoint, size, tmp_path / "r.json", seed=1)
        assert {word for word in command if word.startswith("--")} <= known


def test_each_turn_extends_the_turn_before_and_conversations_share_nothing(tmp_path):
    size = config.load().size("multi-turn", "tiny")
    texts = prompts.conversations(size, seed=1)
    assert len(texts) == size.num_prompts
    for before, after in zip(texts, texts[size.conversations :], strict=False):
        assert after.startswith(before)
    assert len({text[:100] for text in texts}) == size.conversations
    assert len(texts[-1].split()) == pytest.approx(size.prompt_words, abs=2 * size.turns)
    assert texts == prompts.conversations(size, seed=1) != prompts.conversations(size, seed=2)
    prompts.write_jsonl(texts, 4, tmp_path / "x.jsonl")
    lines = (tmp_path / "x.jsonl").read_text().splitlines()
    assert json.loads(lines[3]) == {"prompt": texts[3], "output_tokens": 4}


def test_a_workload_longer_than_the_context_is_refused_before_anything_runs():
    endpoint = server.Endpoint("http://h:1", "m", "m", 1024)
    size = config.load().size("long-context", "tiny")
    with pytest.raises(BenchError, match="needs a context of 2080 tokens, the server allows 1024"):
        client.check_length("long-context", size, endpoint)
