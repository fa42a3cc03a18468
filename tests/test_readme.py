"""The README's own commands, on a tiny SDXL: cache, train, export, load; links; the table of docs/recipes.md.

make tables    writes that table
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distill.data import Text
from pipelines.families import tiny

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGE = ROOT / "docs" / "recipes.md"
FIRST, LAST = "<!-- the first lines of recipes/, by tests/test_readme.py -->\n", "<!-- end -->"
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
    marked = README.partition("<!-- tests/test_readme.py runs these -->")[2]
    commands, program = re.findall(r"```(?:python)?\n(.*?)```", marked, re.DOTALL)[:2]
    lines = commands.strip().replace("\\\n", " ").splitlines()
    assert [line.split()[0] for line in lines] == ["python", "accelerate", "python"]
    home = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "ACCELERATE_USE_CPU": "1"}
    for line in lines:
        if line.startswith("accelerate"):
            line = re.sub(r"--gradient_accumulation_steps \d+", SHORT, line)
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
