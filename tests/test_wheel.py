"""The wheel, built and used away from the checkout: it trains, evaluates, and brings nothing but `distill`."""

import ast
import configparser
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import Distribution
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import distill
import pipelines
from distill.__main__ import MODULES
from distill.layout import recipe_names
from pipelines.edm_nets import SongUNet
from pipelines.families import edm

ROOT = Path(__file__).resolve().parent.parent
SETUP = runpy.run_path(f"{ROOT / 'setup.py'}")
ADDRESS = "https://example.org/owner/name"
SOURCES = ("distill", "pipelines", "eval", "recipes")
FILES = ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
LIBRARIES = Path(torch.__file__).parents[1]


def call(*command, **options):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def environment(**more):
    """That of a user: no path to the checkout."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return env | {"ACCELERATE_USE_CPU": "1"} | more


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the checkout that has an address."""
    folder = tmp_path_factory.mktemp("copy")
    for name in SOURCES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    script = folder / "setup.py"
    script.write_text(script.read_text().replace('REPOSITORY = ""', f'REPOSITORY = "{ADDRESS}"'))
    options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder / "dist")
    call(sys.executable, "-m", "pip", "wheel", *options, folder)
    return next((folder / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """bin/ of an environment that holds the wheel and, by a path, the libraries of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    python = folder / "bin" / "python"
    options = ("--quiet", "--no-deps", "--no-index", "--no-compile")
    call(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel)
    (site,) = folder.glob("lib/python*/site-packages")
    names = {path.name for path in site.iterdir()}
    assert names == {"distill", f"distill_one_step-{distill.__version__}.dist-info"}
    (site / "libraries.pth").write_text(f"{LIBRARIES}\n")
    return python.parent


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two folders of random pictures."""
    folder, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / name).mkdir()
        for i in range(12):
            pixels = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def test_it_has_no_name_but_distill(unpacked):
    assert {path.name.partition("-")[0] for path in unpacked.iterdir()} == {"distill", "distill_one_step"}
    (record,) = unpacked.glob("*.dist-info")
    assert (record / "top_level.txt").read_text().split() == ["distill"]


def test_it_holds_every_file(unpacked):
    """All modules of a checkout, and the files beside them that are read."""
    for room in SOURCES:
        here = ROOT / "distill" if room == "distill" else ROOT / room
        there = unpacked / "distill" if room == "distill" else unpacked / "distill" / room
        for file in here.rglob("*"):
            if file.is_file() and file.suffix != ".pyc":
                assert (there / file.relative_to(here)).is_file(), file


@pytest.fixture(scope="module")
def nodes(unpacked):
    """{module's path: the nodes of its syntax tree}."""
    return {file: list(ast.walk(ast.parse(file.read_text()))) for file in (unpacked / "distill").rglob("*.py")}


def test_its_modules_import_from_distill(nodes, unpacked):
    """Every import from this project is a module of the wheel; no recipe imports another by its bare name."""
    modules = {".".join(file.relative_to(unpacked).with_suffix("").parts).removesuffix(".__init__") for file in nodes}
    for file, node in [(path, node) for path, found in nodes.items() for node in found]:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
        for name in names:
            root = name.partition(".")[0]
            here = name in {*modules, "distill.recipes"}
            assert here if root == "distill" else root not in {*SOURCES, *recipe_names()}, (file, name)


def test_code_names_no_module_of_the_checkout(nodes, unpacked):
    """A string that is a module's name is an argument of distill.layout.module_name, or in the table of two files."""
    tables = {unpacked / "distill" / "__main__.py", unpacked / "distill" / "pipelines" / "components.py"}
    for file in nodes.keys() - tables:
        calls = [node for node in nodes[file] if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
        known = {argument for node in calls if node.func.id == "module_name" for argument in node.args}
        strings = [node for node in nodes[file] if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        named = [node for node in strings if re.fullmatch(r"(pipelines|eval|recipes)(\.\w+)+", node.value)]
        assert known >= set(named), (file, [node.value for node in named])


def test_texts_name_commands_that_exist(unpacked):
    for file in (unpacked / "distill").rglob("*.py"):
        text = file.read_text()
        assert not re.search(r"-m\s+(pipelines|eval|recipes)\.|\brecipes/\w+\.py", text), file
        for command in re.findall(r"`distill\s+(\w+)", text):
            assert command in MODULES, (file, command)


def test_what_an_index_shows(wheel, unpacked):
    (record,) = unpacked.glob("*.dist-info")
    data = Distribution.at(record).metadata
    assert (data["Name"], data["Version"]) == ("distill-one-step", distill.__version__)
    assert sorted(data.get_all("Project-URL")) == [f"Issues, {ADDRESS}/issues", f"Source, {ADDRESS}"]
    assert data["Description-Content-Type"] == "text/markdown"
    links = re.findall(r"\]\(([^)]*)\)", data.get_payload())
    assert links and all(link.startswith(("https://", "#")) for link in links)
    files = [re.sub(rf"^{ADDRESS}/(blob|raw)/main/|#.*$", "", link) for link in links if ADDRESS in link]
    assert files and all((ROOT / file).exists() for file in files)


def test_docker_copies_what_the_wheel_is_made_of():
    text = (ROOT / "docs" / "Dockerfile").read_text()
    copied = {name for line in re.findall(r"^COPY (.*) \S+$", text, re.M) for name in line.split()}
    assert copied == {*SOURCES, *FILES} and "Written, not run" in text
    extras = re.search(r'pip install .*"/source\[(.*)\]"', text)[1].split(",")
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert set(extras) <= config["options.extras_require"].keys()


TEXT = '[a](docs/a.md#b) ![c](docs/c.png) [d](#e) [f](https://g.org) <img alt="" src="h.png">'


@pytest.mark.parametrize(
    ("address", "text"),
    (
        ("", 'a c [d](#e) [f](https://g.org) <img alt="" src="h.png">'),
        (
            "https://x.org/y",
            "[a](https://x.org/y/blob/main/docs/a.md#b) ![c](https://x.org/y/raw/main/docs/c.png) [d](#e) "
            '[f](https://g.org) <img alt="" src="https://x.org/y/raw/main/h.png">',
        ),
    ),
)
def test_links_of_the_long_description(address, text):
    assert SETUP["link_files"](TEXT, address) == text


@pytest.mark.parametrize(
    ("source", "text"),
    (
        ("from pipelines import load\n", "from distill.pipelines import load\n"),
        ("def f():\n    from eval.score import score\n", "def f():\n    from distill.eval.score import score\n"),
        (
            "# python -m eval.score, accelerate launch recipes/a.py",
            "# distill score, accelerate launch -m distill run a",
        ),
        ('"""accelerate launch -m eval.generate"""', '"""accelerate launch -m distill.eval.generate"""'),
        ('"see pipelines.load, recipes/a.py"  # eval.cli', '"see distill.pipelines.load, a"  # distill.eval.cli'),
        ('module_name("eval.score"); net.eval().x', 'module_name("eval.score"); net.eval().x'),
    ),
)
def test_sources_of_the_wheel(source, text):
    assert SETUP["rewrite"](source, {"eval.score": "score"}) == text


@pytest.mark.parametrize(
    ("source", "message"),
    (("import pipelines.run\n", "`import pipelines.run` has no name"), ("recipes.items()\n", "rename a variable")),
)
def test_a_source_that_cannot_be_in_the_wheel(source, message):
    with pytest.raises(ValueError, match=message):
        SETUP["rewrite"](source, {})


def test_it_trains_and_evaluates(installed, pictures, tmp_path):
    """In an empty folder, by the commands of the user."""
    here = {"cwd": tmp_path, "env": environment(DISTILL_CACHE=f"{tmp_path / 'cache'}")}
    assert "\n  score " in call(installed / "distill", "--help", **here).stdout
    launch = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1")
    more = ("--mixed_precision", "no", "--dynamo_backend", "no", "-m", "distill", "run", "sid_cifar10")
    call(installed / "python", *launch, *more, "--smoke", "--output_dir", "run", **here)
    assert (tmp_path / "run" / "pipeline" / "model_index.json").is_file()
    where = ("--folder", pictures / "a", "--reference", pictures / "b", "--out", "rows.json")
    call(installed / "distill", "score", *where, "--metrics", "fid", "--extractor", "random:0:8", **here)
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["metrics"]["fid"]["value"] > 0 and row["commit"] is None


EXCHANGE = """
import importlib.util, json, sys
import distill, distill.pipelines, torch
assert not [room for room in ("pipelines", "eval", "recipes") if importlib.util.find_spec(room)]
teacher = distill.pipelines.load(sys.argv[1])
from diffusers import DiffusionPipeline
DiffusionPipeline.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])
(library, _) = json.load(open(f"{sys.argv[2]}/model_index.json"))["unet"]
again = distill.pipelines.load(sys.argv[2]).denoiser.net
assert all(torch.equal(a, b) for a, b in zip(again.parameters(), teacher.denoiser.net.parameters(), strict=True))
print(distill.__version__, library)
"""


def test_exports_of_both_layouts_load_in_both(installed, tmp_path):
    """A network of this project has another name in the wheel; each layout reads the other's exports."""
    net = SongUNet(sample_size=8, stem=16, widths=(16, 32), layers=1, attention=(4,), num_class_embeds=10)
    edm.pipeline(net, 0.5, 80.0, 1).save_pretrained(tmp_path / "a")
    done = call(installed / "python", "-c", EXCHANGE, tmp_path / "a", tmp_path / "b", cwd=tmp_path, env=environment())
    assert done.stdout.splitlines()[-1] == f"{distill.__version__} distill.pipelines.edm_nets"
    for name in ("a", "b"):
        same = pipelines.load(tmp_path / name).denoiser.net
        assert all(torch.equal(a, b) for a, b in zip(same.parameters(), net.parameters(), strict=True))


@pytest.mark.slow
def test_an_empty_environment(wheel, tmp_path):
    """pip installs the wheel and all that it requires; then the digits are trained, sampled and scored."""
    venv.create(tmp_path / "environment", with_pip=True)
    python, env = tmp_path / "environment" / "bin" / "python", environment(OMP_NUM_THREADS="1")
    call(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel, env=env)
    here = {"cwd": tmp_path, "env": env}
    command = python.with_name("distill")
    call(command, "run", "digits_teacher", "--max_train_steps", "20", "--output_dir", "teacher", **here)
    call(command, "generate", "--model", "teacher", "--protocol", "digits", "--n", "100", "--out", "images", **here)
    call(command, "score", "--folder", "images", "--out", "rows.json", **here)
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["metrics"]["fd_heldout"]["value"] > 0
