"""The command line teaches: its help is complete and its examples are true."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import subprocess
import sys

import pytest
import shtab
from zero_weights import write_weights

from fastserve_mega import cli
from fastserve_mega.logs import JsonFormatter, launched_rank
from fastserve_mega.simulator.config import load_simulation_config
from fastserve_mega.system.config_file import load_config

COMMANDS = [command for group in cli.GROUPS for command in group.commands]
EXAMPLES = [(command, example) for command in COMMANDS for example in command.examples]


def help_of(capsys, *words):
    with pytest.raises(SystemExit) as end:
        cli.main([*words, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_the_first_page_lists_every_command_in_its_group(capsys):
    page = help_of(capsys)
    for group in cli.GROUPS:
        section = page.partition(f"\n{group.title}:\n")[2].partition("\n\n")[0]
        for command in group.commands:
            assert f"  {command.name} " in section
            assert command.summary in section
    assert max(map(len, page.splitlines())) < 80


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_says_what_it_does_and_how(command, capsys):
    page = " ".join(help_of(capsys, command.name).split())
    assert command.description in page
    assert command.description.count(". ") >= 1
    assert command.description.endswith(".")
    for example in command.examples:
        assert f"fastserve-mega {command.name} {example}".strip() in page


@pytest.mark.parametrize(("command", "example"), EXAMPLES, ids=lambda value: str(value)[:60])
def test_the_examples_are_true(command, example):
    options = cli.make_parser().parse_args([command.name, *shlex.split(example)])
    if getattr(options, "config", None) is not None:
        load_config(options.config, options.overrides)
    if getattr(options, "workload", None) is not None:
        load_simulation_config(options.config, options.workload, options.overrides)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_a_wrong_override_is_one_sentence(command, capsys):
    if command.config == "none" or command.name == "doctor":
        return
    words = ["--config", "configs/smollm2-135m-cpu.yaml", "--set", "model.colour=red"]
    needed = {
        "batch": ["in.jsonl", "out.jsonl"],
        "bench": ["--burst"],
        "profile": ["--output", "nowhere.json"],
    }
    words += needed.get(command.name, [])
    with pytest.raises(SystemExit) as end:
        cli.main([command.name, *words])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "unknown field 'model.colour'" in error
    assert error.count("\n") == 1


def test_no_command_is_answered_with_help(capsys):
    assert cli.main([]) == 2
    assert capsys.readouterr().out == cli.make_parser().format_help()


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["serve", "my.yaml"], "given with --config; did you mean --config my.yaml?\n"),
        (["plan", "--json", "a/b.yml"], "with --config; did you mean --config a/b.yml?\n"),
        (["profile", "c.yml"], "required: --config, --output; did you mean --config c.yml?\n"),
        (["serve"], "serve: say what to serve: MODEL, or --config YAML\n"),
    ],
)
def test_a_file_without_config_is_answered_with_the_option(capsys, words, hint):
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2
    assert capsys.readouterr().err.endswith(hint)


def test_a_model_by_its_name_stands_for_a_configuration(monkeypatch, tmp_path):
    asked = []

    def serve(config, arguments, **_):
        asked.append((config, arguments))
        return 0

    monkeypatch.setattr("fastserve_mega.launcher.serve", serve)
    directory = tmp_path / "odd name: 'x'"
    shutil.copytree("fastserve_mega/experiments/configs/architectures/opt-13b", directory)
    (directory / "tokenizer.json").touch()
    write_weights(directory)
    name = str(directory)
    assert (
        cli.main(["serve", name, "--tensor", "2", "--port", "8080", "--set", "server.port=9"]) == 0
    )
    [(config, arguments)] = asked
    assert config.model.path == name
    assert config.parallel.tensor == 2
    assert config.server.port == 9
    overrides = [word for word in arguments if word != "--set"]
    assert "--config" not in arguments
    assert load_config(None, overrides) == config


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from fastserve_mega import cli; cli.make_parser().format_help();"
        "heavy = {'torch', 'zmq', 'transformers', 'fastapi', 'rich', 'mpi4py'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# --- completion ----------------------------------------------------------------------------------

BASH = """
source "$1"
shift
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
_shtab_fastserve_mega
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("completion") / "completion.bash"
    path.write_text(shtab.complete(cli.make_parser(), shell="bash"))
    return path


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("line", "completions"),
    [
        ("fastserve-mega be", {"bench"}),
        ("fastserve-mega ", {command.name for command in COMMANDS}),
        ("fastserve-mega bench --r", {"--requests", "--rate"}),
        ("fastserve-mega worker --runner ", {"megatron", "fake"}),
        ("fastserve-mega plan --config configs/smol", {"configs/smollm2-135m-cpu.yaml"}),
    ],
)
def test_bash_completes(script, line, completions):
    words = ["bash", "-c", BASH, "bash", str(script), *line.split(" ")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    assert set(done.stdout.split()) == completions
    assert done.stderr == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "fastserve-mega" in script
    assert all(command.name in script for command in COMMANDS)


def test_completion_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 2
    assert "pip install 'fastserve_mega[completion]'" in capsys.readouterr().err


# --- logs ----------------------------------------------------------------------------------------


def log_line(tmp_path, *words):
    """What a coordinator that cannot start says."""
    path = tmp_path / "config.yaml"
    path.write_text("model: {path: /nowhere}")
    command = [sys.executable, "-m", "fastserve_mega", "coordinator", "--config", str(path), *words]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 2
    return run.stderr


def test_log_lines_of_a_process(tmp_path):
    line = json.loads(log_line(tmp_path, "--log-format", "json"))
    assert line["level"] == "error"
    assert line["process"] == "coordinator"
    assert "/nowhere" in line["message"]
    assert line["time"].endswith("+00:00")
    assert " ERROR coordinator: " in log_line(tmp_path)


def test_nothing_but_json_is_said_of_a_crash_or_a_warning():
    code = (
        "from fastserve_mega.logs import set_up_logging; import warnings;"
        "set_up_logging('worker', verbose=False, log_format='json');"
        "warnings.warn('old'); raise ValueError('broken')"
    )
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    warning, crash = map(json.loads, done.stderr.splitlines())
    assert "UserWarning: old" in warning["message"]
    assert crash["message"] == "uncaught: broken"
    assert "Traceback" in crash["exception"]


def test_a_line_of_json_names_the_rank_and_the_exception(monkeypatch):
    for name in ("RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    formatter = JsonFormatter("worker", launched_rank())
    try:
        raise ValueError("no\nroom")
    except ValueError:
        exception = sys.exc_info()
    record = logging.LogRecord("a.b", logging.ERROR, __file__, 1, "it %s", ("broke",), exception)
    text = formatter.format(record)
    assert "\n" not in text
    line = json.loads(text)
    assert (line["rank"], line["message"], line["logger"]) == (3, "it broke", "a.b")
    assert "ValueError: no\nroom" in line["exception"]


def test_what_is_not_there_is_named_before_anything_is_started(capsys, tmp_path):
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_attention_heads": 2,
        "num_hidden_layers": 2, "intermediate_size": 16, "vocab_size": 9,
        "max_position_embeddings": 64,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    missing = str(tmp_path / "missing")
    mistakes = {
        (missing,): f"{missing} is not a model directory: it does not exist",
        ("--config", missing): f"{missing}: No such file or directory",
        (str(tmp_path),): f"{tmp_path} holds no weights",
        (str(tmp_path), "--port", "9"): f"{tmp_path} has no tokenizer",
    }
    for words, sentence in mistakes.items():
        if "tokenizer" in sentence:
            write_weights(tmp_path)
        with pytest.raises(SystemExit) as end:
            sys.exit(cli.main(["serve", *words]))
        assert end.value.code == 2
        assert capsys.readouterr().err.startswith(f"fastserve-mega serve: {sentence}")


def test_a_batch_is_not_sent_to_what_is_no_url(capsys):
    assert cli.main(["batch", "in.jsonl", "out.jsonl", "--url", "localhost:8000"]) == 2
    assert "--url must begin with http:// or https://" in capsys.readouterr().err
