"""The command `distill`: every command is there, under its own name, and `--help` imports nothing heavy."""

import configparser
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import distill
from distill.__main__ import COMMANDS, HERE, MODULES, main
from distill.layout import RECIPES, find_recipe, module_name, program_name, recipe_names

ROOT = Path(__file__).resolve().parents[2]


def run(*command, **options):
    env = os.environ | {"PYTHONPATH": f"{ROOT}"}
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, **options)


@pytest.mark.parametrize("words", ([], ["-h"], ["--help"]))
def test_help_lists_every_command_in_a_line(words, capsys):
    main(words)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert {line[0] for line in lines} == MODULES.keys() and len(lines) == len(MODULES)
    assert all(len(line) > 2 for line in lines)


def test_help_imports_nothing_heavy():
    """It imports no library but Python's own."""
    code = "import sys; before = set(sys.modules); from distill.__main__ import main; main(['--help'])"
    done = run("-c", f"{code}; print(sorted({{name.split('.')[0] for name in set(sys.modules) - before}}))")
    imported = eval(done.stdout.splitlines()[-1])
    assert "distill" in imported and not set(imported) - {"distill"} - sys.stdlib_module_names


def test_the_version_is_written_once(capsys):
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert config["metadata"]["version"] == "attr: distill.__version__"
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == distill.__version__
    main(["--version"])
    assert capsys.readouterr().out == f"distill {distill.__version__}\n"


@pytest.mark.parametrize("command", [name for name in MODULES if name not in HERE])
def test_a_command_has_its_own_name(command, monkeypatch, capsys):
    """`distill COMMAND --help`, and the module that the command runs."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert not ended.value.code and text.startswith(f"usage: distill {command} "), text[:200]


def test_a_module_has_the_name_that_runs_it():
    assert run("-m", "eval.protocols", "--help").stdout.startswith("usage: python -m eval.protocols [-h]")


def test_program_name_of_a_script(monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys, "argv", ["recipes/dmd2_sdxl.py", "--help"])
    assert program_name() == "dmd2_sdxl.py"


@pytest.mark.parametrize(
    ("words", "message"),
    (
        (["plam"], "distill has no command 'plam': did you mean 'plan'? `distill --help` lists them"),
        (["--plan"], "distill has no command '--plan': did you mean 'plan'? `distill --help` lists them"),
        (["zzz"], "distill has no command 'zzz': `distill --help` lists them"),
        (["run", "dmd2_sdlx"], "distill has no recipe 'dmd2_sdlx': did you mean 'dmd2_sdxl'? `distill recipes` lists"),
        (["run", "absent.py"], "distill has no recipe 'absent.py': "),
    ),
)
def test_an_unknown_name(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2 and capsys.readouterr().err.startswith(f"error: {message}")


def test_recipes_are_listed(capsys):
    main(["recipes"])
    text = capsys.readouterr().out
    assert all(f"\n{name} " in f"\n{text}" for name in recipe_names()) and f"{RECIPES}" in text
    assert "DMD2 on SDXL: four steps, a GAN on real images." in text


@pytest.mark.parametrize(("words", "code"), ((["--help"], 0), (["zzz"], 2)))
def test_usage_of_recipes(words, code, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["recipes", *words])
    assert ended.value.code == code and capsys.readouterr().out.startswith("usage: distill recipes\n")


@pytest.mark.parametrize(("words", "code"), (([], 2), (["--help"], 0)))
def test_usage_of_run(words, code, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["run", *words])
    assert ended.value.code == code and capsys.readouterr().out.startswith("usage: distill run RECIPE ")


def test_a_recipe_runs_by_its_name(tmp_path):
    done = run("-m", "distill", "run", "dmd2_sdxl", "--help", cwd=tmp_path)
    assert done.stdout.startswith("usage: distill run dmd2_sdxl ") and "--method.guidance" in done.stdout


def test_a_script_runs_as_python_runs_it(tmp_path):
    """It finds its neighbours, and so do the processes that it spawns."""
    (tmp_path / "values.py").write_text("VALUE = 7\n")
    (tmp_path / "mine.py").write_text(
        "import multiprocessing, sys\nfrom values import VALUE\n\n\ndef work(x):\n    return x * VALUE\n\n\n"
        'if __name__ == "__main__":\n'
        '    with multiprocessing.get_context("spawn").Pool(1) as pool:\n'
        "        print(pool.map(work, [1, 2]), sys.argv)\n"
    )
    assert find_recipe(f"{tmp_path / 'mine.py'}") == tmp_path / "mine.py"
    done = run("-m", "distill", "run", "mine.py", "--flag", cwd=tmp_path)
    assert done.stdout == "[7, 14] ['distill run mine.py', '--flag']\n", done.stderr


def test_modules_of_the_checkout():
    """Commands are in groups, none in two; their modules have a main, under the checkout's names."""
    assert sum(map(len, COMMANDS.values())) == len(MODULES)
    assert module_name("eval.score") == "eval.score"
    assert all(callable(import_module(module).main) for name, module in MODULES.items() if name not in HERE)
