"""The README's commands, on a tiny SDXL: cache, train, export, load; links; its goals; the table of docs/recipes.md.

make tables    writes that table
DISTILL_WRITE=1 python -m pytest tests/test_readme.py -k goal    writes memory and hours of the goals
"""

import ast
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distill.data import Text
from pipelines.families import tiny
from pipelines.planning.command import MachineOptions, Plan, resolve_config, resolve_launch
from pipelines.planning.hours import gpu_hours
from pipelines.planning.memory_plan import GiB, Run
from pipelines.planning.micro_batch import measure_activations, with_batch
from pipelines.planning.variants import find_fitting, what_counts

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGE = ROOT / "docs" / "recipes.md"
FIRST, LAST = "<!-- the first lines of recipes/, by tests/test_readme.py -->\n", "<!-- end -->"
GOALS = re.findall(
    r"^\| ([^|]*) \|(?:[^|]*\|) (?:\[\w+\].*see below|`(accelerate launch [^`]*)`) \|", README, re.MULTILINE
)
MARK = "<!-- tests/test_readme.py runs these -->"
BLOCK = re.findall(r"```\n(.*?)```", README.partition(MARK)[2], re.DOTALL)[0]
COMMANDS = BLOCK.strip().replace("\\\n", " ").splitlines()
CARDS = {"RTX 4090": "RTX 4090", "H100": "H100 SXM"}  # of the column of hours
SHORT = "--max_train_steps 2 --train_batch_size 2 --lr_warmup_steps 0 --learning_rate 1e-2 --method.every 1"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder that holds what the README speaks of."""
    folder = tmp_path_factory.mktemp("readme")
    tiny.save("sdxl", folder / "sdxl")
    Text().smoke(folder / "photos")
    (folder / "prompts.txt").write_text("a red fox\na green parrot\n")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    return folder


def test_three_commands(place):
    marked = README.partition(MARK)[2]
    _, program = re.findall(r"```(?:python)?\n(.*?)```", marked, re.DOTALL)[:2]
    lines = COMMANDS
    assert [line.split()[0] for line in lines] == ["python", "accelerate", "python"]
    home = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "ACCELERATE_USE_CPU": "1"}
    for line in lines:
        if line.startswith("accelerate"):
            line += f" {SHORT}"
        done = subprocess.run(line, shell=True, cwd=place, env=os.environ | home, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    program += "\nimage.save('fox.png')"
    done = subprocess.run([sys.executable, "-c", program], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    with Image.open(place / "fox.png") as picture:
        assert np.asarray(picture).std() > 1
    assert (place / "sdxl-dmd2" / "README.md").is_file()


def test_links():
    """What the README, CONTRIBUTING and the pages of docs/ link to is there, headings included."""
    headings = {}
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
        headings[page] = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())]
    for page, link in links:
        if "://" in link:
            continue
        file, _, heading = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not heading or heading in headings[target], f"{page.name} links to {link}"
    assert len(links) > 100


def test_its_length():
    assert len(README.splitlines()) <= 150 and len(README.encode()) <= 14 * 1024


def test_its_table_of_recipes():
    """Every one of a published size, by family, in its own words."""
    rows = []
    for file in sorted((ROOT / "recipes").glob("*.py")):
        text = file.read_text()
        if "\nCONFIG = Config(" in text and "digits" not in file.stem:
            says = ast.get_docstring(ast.parse(text)).partition("\n")[0].rstrip(".")
            says = re.sub(r"(?:arXiv )?(\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\1)", says)
            rows.append((file.stem.rpartition("_")[2], f"| [{file.name}](../recipes/{file.name}) | {says} |"))
    table = "\n".join(["| recipe | what it is |", "|---|---|", *(row for _, row in sorted(rows))]) + "\n"
    head, _, rest = PAGE.read_text().partition(FIRST)
    written, _, tail = rest.partition(LAST)
    if os.environ.get("DISTILL_WRITE"):
        PAGE.write_text(head + FIRST + table + LAST + tail)
    else:
        assert written == table, "make tables writes it"


@pytest.mark.slow
@pytest.mark.parametrize("goal, command", GOALS)
def test_a_goal_fits(goal, command):
    """Its command on the card it names, and the least change of it on 1, 8 and 64 cards; its memory and hours."""
    run, card = plan_command(command or COMMANDS[1])
    limit = (card - 1) * GiB
    batch = run.config.train.train_batch_size
    counted = {}
    own = find_fitting(run, limit, counted)
    assert [flag.split()[0] for flag in own.flags] == ["--gradient_accumulation_steps"]
    for gpus in (1, 8, 64):
        if batch % gpus == 0:
            assert find_fitting(replace(run, gpus=gpus, shards=1), limit, counted), f"{gpus} cards of {card} GiB"
    like = counted[what_counts(run)]
    memory = measure_activations(like).on_top_of(run.state.total, limit)
    flops = with_batch(like, 2).cost.flops / 2 * batch * run.config.train.max_train_steps
    hours = {name: gpu_hours(flops, chip).divide(run.gpus) for name, chip in CARDS.items()}
    said = f"{hours['H100']}" if run.gpus > 1 else ", ".join(f"{value} on an {name}" for name, value in hours.items())
    cells = f"| {memory.total(1) / GiB:.1f} GiB | {said} |"
    row = next(line for line in README.splitlines() if line.startswith(f"| {goal} |"))
    if os.environ.get("DISTILL_WRITE"):
        text = (ROOT / "README.md").read_text()
        (ROOT / "README.md").write_text(text.replace(row, re.sub(r"\| [\d.]+ GiB \| [^|]* \|", cells, row)))
    else:
        assert cells in row, f"{goal}: {cells}; DISTILL_WRITE=1 python -m pytest tests/test_readme.py -k goal writes it"


def plan_command(command):
    """(plan of a launch line, GiB of its cards: 24 of a single one, or 80)."""
    words = shlex.split(command.replace("\\\n", " "))
    file = words.index("--config_file") + 1
    recipe, *flags = words[file + 1 :]
    flags = re.sub(r"--(pretrained_model_name_or_path|output_dir) \S+", "", " ".join(flags)).split()
    gpus, shards, half = resolve_launch(MachineOptions(config_file=ROOT / words[file]))
    return Run(*resolve_config(Plan(Path(recipe)), flags), gpus, half, shards), 24 if gpus == 1 else 80


def test_the_goals_are_launch_lines():
    """Every goal but the last has a command that names a file for accelerate and a recipe."""
    assert len(GOALS) == 7
    for _, command in GOALS:
        words = shlex.split(command or COMMANDS[1].replace("\\\n", " "))
        assert words[:3] == ["accelerate", "launch", "--config_file"] and "--gradient_accumulation_steps" not in words
        assert all((ROOT / word).is_file() for word in words[3:5])
