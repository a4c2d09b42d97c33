"""Every way to ask for the backend works, in every process; not asking changes nothing."""

from __future__ import annotations

import json
import subprocess

import pytest
from processes import engine_env, engine_flags, run_python
from tiny import random_prompts, run_many, tiny_llm, write_model

pytestmark = pytest.mark.engine

# the configuration is built as the command line and LLM do, and sent to a spawned process as the
# engine does; that process has loaded no plugin when it unpickles
FORMS = """
import json, multiprocessing, pickle, sys

def child(data, queue):
    before = "vllm" in sys.modules
    config = pickle.loads(data)
    queue.put((before, config.attention_config.backend.name,
               config.attention_config.backend.get_path()))

if __name__ == "__main__":
    model, forms = json.loads(sys.argv[1])
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    found = {}
    for name, form in forms.items():
        if isinstance(form, dict):
            args = EngineArgs(model=model, **form)
        else:
            parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
            args = EngineArgs.from_cli_args(parser.parse_args(["--model", model, *form]))
        config = args.create_engine_config()
        backend = config.attention_config.backend
        found[name] = backend and backend.name
        if found[name]:
            data = pickle.dumps(config)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(data, queue))
    process.start()
    found["spawned"] = queue.get(timeout=300)
    process.join()
    print("RESULT " + json.dumps(found))
"""
PYTHON_FORMS = {
    "LLM(attention_config={...})": {"attention_config": {"backend": "sparsek"}},
    "LLM(attention_config={...}), upper case": {"attention_config": {"backend": "SPARSEK"}},
    "LLM(attention_backend=...)": {"attention_backend": "sparsek"},
    "LLM(attention_backend=...), upper case": {"attention_backend": "SPARSEK"},
}
COMMAND_LINE_FORMS = {
    "--attention-backend": ["--attention-backend", "sparsek"],
    "--attention-backend, mixed case": ["--attention-backend", "SparseK"],
    "--attention-config.backend": ["--attention-config.backend", "sparsek"],
    "--attention-config.backend, upper case": ["--attention-config.backend", "SPARSEK"],
    "-ac": ["-ac", '{"backend": "sparsek"}'],
}
# a process each: the first form of a kind must not rely on what another has loaded
KINDS = {"LLM": PYTHON_FORMS, "command line": COMMAND_LINE_FORMS}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "tiny", weights=False)


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_gives_the_backend_and_reaches_a_spawned_process(kind, model, tmp_path):
    script = tmp_path / "forms.py"
    script.write_text(FORMS)
    forms = {**KINDS[kind], "nothing": {}}
    code = f"""
import runpy, sys
sys.argv = ["forms", {json.dumps(json.dumps([model, forms]))}]
runpy.run_path({str(script)!r}, run_name="__main__")
"""
    out = run_python(code, env=engine_env())
    found = json.loads(out.split("RESULT ")[1])
    path = "vllm_sparsek.attention.backend.SparseKBackend"
    assert found.pop("spawned") == [False, "SPARSEK", path]
    assert found.pop("nothing") is None
    assert found == dict.fromkeys(KINDS[kind], "SPARSEK")


COMMANDS = {
    "bench throughput": [
        "throughput", "--attention-backend", "sparsek", "--dataset-name", "random",
        "--random-input-len", "96", "--random-output-len", "4", "--num-prompts", "2",
    ],
    "bench latency": [
        "latency", "--attention-config.backend", "SPARSEK", "--input-len", "64", "--output-len",
        "4", "--batch-size", "1", "--num-iters-warmup", "0", "--num-iters", "1",
    ],
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_vllms_benchmarks_run_with_the_backend(command, model_dir, vllm_command):
    done = subprocess.run(
        [*vllm_command, "bench", *COMMANDS[command], "--model", model_dir, "--enforce-eager",
         "--max-model-len", "512", *engine_flags()],
        env=engine_env(), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    out = done.stdout + done.stderr
    assert done.returncode == 0, out[-6000:]
    assert "SPARSEK backend" in out
    assert ("Throughput:" if command == "bench throughput" else "Avg latency:") in out


@pytest.fixture(scope="module")
def unasked(tmp_path_factory):
    """What a model answers with the plugin installed but not asked for, and with it disabled."""
    folder = tmp_path_factory.mktemp("unasked")
    llm = tiny_llm(write_model(folder / "tiny"))
    specs = [{"llm": llm, "calls": [{"prompts": random_prompts((300, 40)), "max_tokens": 16}]}]
    (installed,) = run_many(specs, folder)
    (disabled,) = run_many(specs, folder, VLLM_PLUGINS="")
    return installed, disabled


def test_installing_the_plugin_changes_no_answer(unasked):
    installed, disabled = unasked
    assert installed["answers"] == disabled["answers"]
    assert installed["backends"] == disabled["backends"]
    assert "SPARSEK" not in installed["backends"].values()


def test_installing_the_plugin_exports_and_counts_nothing(unasked):
    installed, _ = unasked
    assert installed["density"] is None
    assert not [name for name in installed["metrics"] if name.startswith("sparsek")]
    assert len(installed["metrics"]) > 5
