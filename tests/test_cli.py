"""The command `vllm-sparsek`."""

import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version

import pytest

from vllm_sparsek import cli

LIMIT_SECONDS = 1.0


def run(*argv):
    """Run the command in a fresh interpreter; return what it printed, and the heavy modules."""
    code = (
        "import sys\n"
        "from vllm_sparsek.cli import main\n"
        "try:\n"
        f"    main({list(argv)!r})\n"
        "finally:\n"
        "    heavy = {'torch', 'vllm', 'transformers', 'matplotlib', 'numpy', 'pydantic'}\n"
        "    print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done, time.monotonic() - started


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["--help"], "bench"),
        (["bench", "--help"], "serve"),
        (["bench", "serve", "-h"], "--arms"),
        (["bench", "kernels", "-h"], "--sweep"),
    ],
    ids=["top", "group", "bench serve", "bench kernels"],
)
def test_help_is_fast_and_imports_nothing_heavy(argv, wanted):
    # the first of two may read modules from a cold disk
    run(*argv)
    done, seconds = run(*argv)
    assert done.returncode == 0
    assert wanted in done.stdout
    assert done.stderr.strip() == "[]"
    assert seconds < LIMIT_SECONDS


def test_every_registered_command_has_a_module_with_the_two_functions():
    for command in cli.COMMANDS:
        cli.build_parser(command.words)
        module = __import__(command.module, fromlist=["run"])
        assert callable(module.add_arguments)
        assert callable(module.run)


def test_a_further_command_is_one_entry_and_its_module_is_imported_when_named(monkeypatch):
    import types

    module = types.ModuleType("fake_command")
    module.add_arguments = lambda parser: parser.add_argument("--x", type=int)
    module.run = lambda args: args.x
    commands = (*cli.COMMANDS, cli.Command(("further",), "fake_command", "help"))
    # not importable yet: other commands do not care
    cli.build_parser(["bench", "serve"], commands)
    monkeypatch.setitem(sys.modules, "fake_command", module)
    args = cli.build_parser(["further"], commands).parse_args(["further", "--x", "3"])
    assert args.run(args) == 3


@pytest.mark.parametrize("argv", [[], ["bench"], ["nope"]], ids=["none", "group", "unknown"])
def test_a_missing_or_unknown_command_is_a_usage_error(argv, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(argv)
    assert error.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_version_is_the_distributions(capsys):
    try:
        wanted = version("vllm-sparsek")
    except PackageNotFoundError:
        pytest.skip("not installed")
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.strip() == f"vllm-sparsek {wanted}"
