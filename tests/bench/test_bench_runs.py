"""Whole runs of the serving benchmark against a fake `vllm`: no engine is started."""

import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest
from fake import (
    answers,
    bench,
    last_line,
    running,
    wait_until,
)
from rich.console import Console

from vllm_sparsek.serving_bench import (
    processes,
    report,
    server,
)
from vllm_sparsek.serving_bench.errors import Interrupted
from vllm_sparsek.serving_bench.results import Results, Run

# whole runs against the fake


def test_a_run_over_two_arms_reports_json_csv_png_html_and_a_table(fake, capsys):
    assert bench(fake, "org/<model>", "--workloads=small,talk", "--repeat=2") == 0
    out = fake.parent / "out"
    data = json.loads((out / "results.json").read_text())
    assert data["error"] is None
    assert [(r["arm"], r["workload"], r["repeat"]) for r in data["runs"]] == [
        (arm, workload, repeat)
        for arm in ("dense", "sparsek") for workload in ("small", "talk") for repeat in (0, 1)
    ]  # fmt: skip
    dense, sparse = data["runs"][0], data["runs"][4]
    # 4 requests of 100 + 10 tokens in 2 s; the warm-up is not counted
    assert dense["metrics"]["prompt_tokens_per_s"] == 200
    assert dense["metrics"]["generation_tokens_per_s"] == 20
    assert dense["metrics"]["kv_hit_rate"] == 0.25
    assert dense["metrics"]["density"] == 1.0
    assert sparse["metrics"]["density"] == 0.25
    assert sparse["metrics"]["kv_usage_peak"] == 0.5
    assert sparse["metrics"]["itl_p99"] == 1.5
    # the arms are asked the same, the repeats are not
    assert dense["seed"] == sparse["seed"] != data["runs"][1]["seed"]
    assert sparse["server_command"][-2:] == ["--attention-backend", "sparsek"]
    assert sparse["server_command"][0] == "python"
    assert sparse["vllm_result"]["completed"] == 4
    assert set(data["environment"]["versions"]) == {"vllm", "torch", "triton", "vllm-sparsek"}
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert len(rows) == 8
    assert float(rows[0]["prompt_tokens_per_s"]) == 200
    assert rows[0]["model"] == "org/<model>"
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text()
    assert "org/&lt;model&gt;" in page and "<model>" not in page
    assert "data:image/png;base64," in page
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)
    shown = capsys.readouterr().out
    assert "prompt" in shown and "sparsek" in shown and "report.html" in shown
    table = [line for line in shown.splitlines() if "tok/s" in line or line.startswith(" small")]
    assert table and max(map(len, table)) <= 80


def test_an_endpoint_that_runs_already_is_measured_and_left_running(fake):
    port = server.free_port()
    url = f"http://127.0.0.1:{port}"
    endpoint = subprocess.Popen(
        [sys.executable, str(fake), "serve", "org/m", "--port", str(port)], start_new_session=True
    )
    try:
        wait_until(lambda: answers(url))
        assert bench(fake, f"--base-url={url}/v1/", "--workloads=small") == 0
        assert endpoint.poll() is None
    finally:
        os.killpg(endpoint.pid, signal.SIGKILL)
        endpoint.wait()
    run = json.loads((fake.parent / "out" / "results.json").read_text())["runs"][0]
    assert run["arm"] == "endpoint"
    assert run["server_command"] is None
    assert run["metrics"]["density"] is None
    assert run["metrics"]["prompt_tokens_per_s"] == 200
    assert run["client_command"][run["client_command"].index("--model") + 1] == "org/m"


@pytest.mark.parametrize(
    ("model", "cause"),
    [
        ("unknown", "died while starting (exit status 1): Invalid repository ID: 'unknown'."),
        ("engine", "died while starting (exit status 1): ValueError: k must be positive"),
        ("die-in-run", "died during the run (exit status 3): RuntimeError: the engine fell over"),
    ],
)
def test_a_server_that_dies_is_reported_by_its_cause_in_one_line_with_the_log(
    fake, capsys, model, cause
):
    assert bench(fake, model, "--workloads=small") == 1
    captured = capsys.readouterr()
    log = fake.parent / "out" / "logs" / "server-dense.log"
    assert captured.err.strip() == (
        f"error: arm 'dense', model {model!r}: the server {cause} [log: {log}]"
    )
    assert "  | " in captured.out, "the last lines of the log are shown"


def test_finished_arms_are_kept_when_a_later_arm_fails(fake, capsys):
    assert bench(fake, "late", "--workloads=small") == 1
    assert "arm 'sparsek', model 'late': the server died while starting" in last_line(capsys)
    out = fake.parent / "out"
    data = json.loads((out / "results.json").read_text())
    assert [run["arm"] for run in data["runs"]] == ["dense"]
    assert "the second arm fails" in data["error"]
    assert "the second arm fails" in (out / "report.html").read_text()
    assert len((out / "results.csv").read_text().splitlines()) == 2


def test_a_client_that_fails_is_reported_with_its_own_log(fake, capsys):
    assert bench(fake, "bad-client", "--arms=dense", "--workloads=small") == 1
    line = last_line(capsys)
    assert "the client failed (exit status 2): ValueError: the tokenizer is missing" in line
    assert "client-dense-small-0.log" in line


def test_failed_requests_are_reported_and_make_the_run_fail(fake, capsys):
    assert bench(fake, "half-client", "--arms=dense", "--workloads=small") == 1
    captured = capsys.readouterr()
    assert "2 of 4 requests failed" in captured.out
    assert "dense !" in captured.out
    assert captured.err.strip().startswith("error: 2 requests failed")


def test_a_server_that_never_answers_times_out(fake, capsys):
    assert bench(fake, "hang", "--arms=dense", "--startup-timeout=1") == 1
    assert "was not ready after 1 s, see --startup-timeout" in last_line(capsys)


def test_a_port_in_use_is_refused_before_a_server_is_started(fake, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert bench(fake, "m", f"--port={port}") == 1
    assert f"port {port} cannot be used" in last_line(capsys)
    assert not (fake.parent / "out" / "logs").exists()


def test_what_a_server_says_of_a_refused_warm_up_request_is_shown(fake, capsys):
    assert bench(fake, "refuses", "--arms=dense", "--workloads=small") == 1
    line = last_line(capsys)
    assert "a warm-up request failed: HTTP Error 400: Bad Request: too long" in line


def test_an_endpoint_that_does_not_answer_is_named(fake, capsys):
    url = f"http://127.0.0.1:{server.free_port()}"
    assert bench(fake, f"--base-url={url}") == 1
    assert f"no OpenAI-compatible endpoint answers at {url}" in last_line(capsys)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "name a MODEL"),
        (["m", "--arms=dens"], "did you mean 'dense'"),
        (["m", "--scale=big"], "no scale 'big'"),
        (["--base-url=http://x", "--port=1"], "starts no server"),
        (["--base-url=http://x", "--arms=a,b"], "one name"),
    ],
    ids=["model", "arm", "scale", "port", "arms"],
)
def test_options_that_do_not_fit_end_in_one_line(fake, capsys, argv, message):
    assert bench(fake, *argv) == 1
    captured = capsys.readouterr().err.strip()
    assert message in captured and len(captured.splitlines()) == 1


@pytest.mark.parametrize("model", ["hang", "slow-client"], ids=["starting", "running"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["int", "term"])
def test_a_signal_leaves_no_process_behind(fake, model, signum):
    code = (
        "import sys; from tests_argv import argv, fake; from argparse import ArgumentParser\n"
        "from vllm_sparsek.serving_bench import cli\n"
        "parser = ArgumentParser(); cli.add_arguments(parser)\n"
        "sys.exit(cli.run(parser.parse_args(argv), vllm=(sys.executable, fake)))\n"
    )
    folder = fake.parent
    argv = [model, "--arms=dense", "--workloads=small", "--scale=tiny"]
    argv += [f"--bench-config={folder}/bench.yaml", f"--output={folder}/out"]
    (folder / "tests_argv.py").write_text(f"argv = {argv!r}\nfake = {str(fake)!r}\n")
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(folder)},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    # server and engine, and the client
    wanted = 2 if model == "hang" else 3
    wait_until(lambda: len(running(fake)) >= wanted)
    process.send_signal(signum)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 128 + signum
    assert err.strip() == f"error: stopped by signal {int(signum)}"
    wait_until(lambda: not running(fake), 2)


def test_a_signal_while_a_child_is_being_started_waits_until_the_child_is_known(tmp_path):
    marker = tmp_path / "child.py"
    marker.write_text("import time; time.sleep(600)")
    real = subprocess.Popen

    def popen(*args, **kwargs):
        child = real(*args, **kwargs)
        signal.raise_signal(signal.SIGTERM)
        return child

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted) as stop:
        patch.setattr(subprocess, "Popen", popen)
        with processes.interruptible():
            processes.Child([sys.executable, str(marker)], tmp_path / "log")
    assert stop.value.signum == signal.SIGTERM
    wait_until(lambda: not running(marker), 2)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_server_that_ignores_the_polite_signal_is_killed_with_its_children(tmp_path):
    marker = tmp_path / "stubborn.py"
    marker.write_text(
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if len(sys.argv) == 1:\n"
        "    subprocess.Popen([sys.executable, __file__, 'engine'])\n"
        "print('up', flush=True)\n"
        "time.sleep(600)\n"
    )
    log = tmp_path / "log"
    child = processes.Child([sys.executable, str(marker)], log)
    wait_until(lambda: log.read_text().count("up") == 2)
    assert len(running(marker)) == 2
    child.stop(grace=0.2)
    child.stop()
    wait_until(lambda: not running(marker), 2)


def test_the_cause_is_found_behind_vllm_prefixes_and_generic_echoes(tmp_path):
    log = tmp_path / "log"
    log.write_text("vllm: error: argument --port: invalid int value: 'x'\n")
    assert processes.cause(log) == "vllm: error: argument --port: invalid int value: 'x'"
    log.write_text("(APIServer pid=3) RuntimeError: Engine core initialization failed. See above\n")
    assert processes.cause(log) == "RuntimeError: Engine core initialization failed. See above"
    log.write_text("INFO 11-20 06:31:09 [model.py:1] an Error: in the middle\nKilled\n")
    assert processes.cause(log) is None
    assert processes.tail(log, 1) == ["Killed"]
    assert processes.cause(tmp_path / "absent") is None


# reports


def results(metric_values, failed=0):
    runs = [
        Run(
            arm=arm, workload="w", scale="tiny", repeat=repeat, seed=1, started_utc="t",
            duration_s=1.0, completed=1, failed=failed,
            metrics={"prompt_tokens_per_s": value, "generation_tokens_per_s": None,
                     "kv_hit_rate": None, "density": None},
            client_command=["python", "a b"], server_command=None, vllm_result={},
        )
        for arm, values in metric_values.items()
        for repeat, value in enumerate(values)
    ]  # fmt: skip
    return Results(
        command=["x"], model="m", started_utc="t", environment={"device": "cpu", "versions": {}},
        arms={"a": {}}, workloads={"w": {}}, runs=runs,
    )  # fmt: skip


def test_the_summary_takes_medians_and_keeps_what_is_not_available():
    (row,) = results({"a": [1.0, 9.0, 2.0]}).summary()
    assert row["prompt_tokens_per_s"] == 2.0
    assert row["kv_hit_rate"] is None
    assert row["repeats"] == 3


def test_reports_are_written_when_hardly_anything_is_available(tmp_path, capsys):
    measured = results({"a": [None], "<b>": [None]})
    report.save_all(measured, tmp_path)
    report.show(measured, Console(width=60))
    assert "n/a" in capsys.readouterr().out
    assert "&lt;b&gt;" in (tmp_path / "report.html").read_text()
    assert "&#39;a b&#39;" in (tmp_path / "report.html").read_text()
