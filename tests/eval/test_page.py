"""The leaderboard's page: what it compares, what it refuses to, that it is complete in itself, and that it works.

Where there is a Chromium the page is clicked in it. Where there is none, its script's contract is checked on the HTML:
every cell carries the key that the script sorts by.
"""

import ast
import cProfile
import json
import math
import pstats
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from browser import PATH, Browser
from rows import figure, row

from eval.images import images as folders
from eval.leaderboard import plots
from eval.leaderboard.commands import read_rows, write_page
from eval.leaderboard.plots import Point, pareto_front, scatter
from eval.leaderboard.tables import (
    COSTS,
    average_seeds,
    columns,
    group_boards,
    headline,
    lower_is_better,
    markdown_tables,
    metric_label,
    row_label,
    row_labels,
    terminal_tables,
)

TEACHER = [
    row("teacher", fid, steps=n, nfe=2 * n - 1, latency=0.002 * n, kind="teacher")
    for n, fid in ((5, 60.0), (9, 12.0), (18, 10.0))
]
STUDENTS = [row("sid <1>", 13.0, 0.2), row("dmd2", 10.4, latency=0.003), row("a|b", 11.2, 0.4)]
REAL = row("real", 8.0, kind="real", steps=None) | {"cost": {}}
ROWS = [*TEACHER, *STUDENTS, REAL]


class Cells(HTMLParser):
    """[[(tag, attributes, text)]] of every table, row by row."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.inside = [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append([tag, attributes, ""])
            self.inside = True

    def handle_endtag(self, tag):
        self.inside &= tag not in ("th", "td")

    def handle_data(self, data):
        if self.inside:
            self.tables[-1][-1][-1][2] += data


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page with two protocols, samples of two models, a training log and an entry that failed."""
    folder = tmp_path_factory.mktemp("page")
    log = folder / "dmd2" / "log.jsonl"
    log.parent.mkdir()
    lines = ({"step": i, "seconds": i, "loss": 1 / (i + 1), "fake": 2.0} for i in range(60))
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = []
    for i, one in enumerate(ROWS[:4]):
        pictures = torch.rand(20, 1, 8, 8) * 2 - 1
        folders.write_folder(folder / f"{i}", pictures, torch.arange(20) % 10, seed=0 if i < 3 else 7, nfe=1)
        made.append(one | {"samples": str(folder / f"{i}")})
    made.append(ROWS[4] | {"samples": str(folder / "gone")})
    other = row("dmd2", 30.0, protocol="other", protocol_hash="bb22", extractor_hash="e2")
    failed = {"broken": "error: no model <there>"}
    return write_page(folder / "out", [*made, *ROWS[5:], other], runs={"dmd2": log}, failed=failed)


def test_overlapping_intervals_tie_and_share_a_rank():
    (board,) = group_boards(ROWS)
    named = {row_label(board.rows[i], board.rows): rank for i, rank in board.rank_rows("fid").items()}
    # 9.5-10.5 and 9.9-10.9 and 10.8-11.6 and 11.5-12.5 overlap in a chain, whose ends do not; the others stand alone
    assert named == {
        "teacher, 18 steps": (1, True),
        "dmd2": (1, True),
        "a|b": (2, False),
        "teacher, 9 steps": (3, False),
        "sid <1>": (5, False),
        "teacher, 5 steps": (6, False),
    }
    assert [r["metrics"]["fid"]["value"] for r in board.rows] == [10.0, 10.4, 11.2, 12.0, 13.0, 60.0]
    assert board.real == [REAL] and "precision" in board.metrics
    best = board.rank_rows("precision")  # no intervals, more is better: the order of the values
    assert [best[i] for i in range(6)] == [(i + 1, False) for i in range(6)]
    assert [lower_is_better(m) for m in ("fid", "patch_fid", "fd_dinov2", "KID", "clip", "fidelity")] == [True] * 4 + [
        False
    ] * 2
    assert metric_label("fd_heldout") == "FD held-out" and metric_label("patch_fid") == "patch FID"
    assert headline(board).endswith("has FID 10.4; its teacher has 10.0 with 35: a tie.")


def test_rows_of_one_name_are_told_apart():
    """By their weights too: two networks are neither one line nor the seeds of one."""
    rows = [row("dmd2", 10.0 + i, model_hash=h, seeds=[i]) for i, h in enumerate(("aaaa1111", "bbbb2222"))]
    assert row_labels(rows, rows) == ["dmd2, weights aaaa11", "dmd2, weights bbbb22"] and average_seeds(rows) == rows
    same = [one | {"model_hash": "aaaa1111"} for one in rows]
    assert row_labels(same, same) == ["dmd2"] * 2 and len(average_seeds(same)) == 1
    runs = [one | {"run": i} for i, one in enumerate(rows)]
    assert average_seeds(runs)[0]["runs"] == [0, 1], "runs are of different weights"


@pytest.mark.parametrize("key", ["protocol", "protocol_hash", "n", "extractor_hash"])
def test_what_is_not_comparable_gets_its_own_table(key):
    found = group_boards([*STUDENTS, row("x", 1.0, **{key: 3})])
    assert [len(b.rows) for b in found] == [3, 1] and found[1].rank_rows("fid") == {0: (1, False)}
    text = markdown_tables([*STUDENTS, row("x", 1.0, **{key: 3})])
    assert (
        text.count("\n## ") + text.startswith("## ") == 2
        and len(terminal_tables([*STUDENTS, row("x", 1.0, **{key: 3})])) == 2
    )


def test_speeds_of_two_machines_stand_beside_their_names():
    (board,) = group_boards(STUDENTS)
    assert "measured on" not in columns(board)
    (board,) = group_boards([*STUDENTS, row("x", 1.0, cost={"nfe": 1, "latency": 1.0, "hardware": "GPU B"})])
    assert [c.text for c in columns(board)["measured on"]] == ["GPU B", "CPU A", "CPU A", "CPU A"]


def test_markdown_and_terminal():
    from rich.console import Console

    text = markdown_tables(ROWS)
    lines = [line.replace("\\|", "") for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 9 and len({line.count("|") for line in lines}) == 1 and "a\\|b" in text
    assert "| 10.4 (9.9 to 10.9) #1 tie |" in text and "| 13.0 (12.8 to 13.2) #5 |" in text
    assert "## p [aa11], n = 2,000, extractor net e1" in text
    assert "seeds 0, 1; commit c0ffee; hardware CPU A" in text
    console = Console(width=80, record=True, file=open("/dev/null", "w"))
    console.print(*terminal_tables(ROWS))
    out = console.export_text()
    assert "10.4 (1)" in out and "2 ms" in out and "aa11" in out and "sid <1>" in out


def test_pareto_front():
    points = [Point(x, y, "", "s0") for x, y in ((1, 3.0), (1, 2.0), (2, 2.0), (3, 2.5), (3, 1.0), (4, 9.0))]
    assert [(p.x, p.y) for p in pareto_front(points, lower=True)] == [(1, 2.0), (3, 1.0)]
    assert [(p.x, p.y) for p in pareto_front(points, lower=False)] == [(1, 3.0), (4, 9.0)]


def test_scatter():
    """Marks stand where their numbers say, labels do not cover each other, one far row does not press the others."""
    points = [Point(1, 10 + i / 8, f"student {i}", f"s{i}", low=9.0, high=13.0) for i in range(6)]
    points += [Point(x, y, f"teacher {x}", "teacher", "teacher") for x, y in ((9, 500.0), (17, 12.0), (35, 10.5))]
    text = scatter(points, True, "calls", "FID", ("real", 9.5))
    marks = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', text)
    assert len(marks) == 2 and float(marks[0][0]) < float(marks[1][0]) and float(marks[0][1]) < float(marks[1][1])
    assert text.count('<g class="point') == 9 and "teacher 9 (500, off the scale)" in text
    assert text.count("best") == 1 and "student 0: FID 10, 1, on the Pareto front" in text
    frame = plots.Axes(points, True, 9.5)
    assert [p.label for p in points if frame.off[p]] == ["teacher 9"] and frame.high < 20
    assert frame.y(10) > frame.y(12) and plots.TOP <= frame.y(13.0) and frame.y(9.0) <= plots.HEIGHT - plots.BOTTOM
    labels = re.findall(r'<text class="label" x="([\d.]+)" y="([\d.]+)">([^<]*)', text)
    boxes = [(float(x), float(y) - 12, float(x) + len(s) * plots.CHARACTER, float(y) + 4) for x, y, s in labels]
    assert len(boxes) == 9 and not [1 for i, a in enumerate(boxes) for b in boxes[:i] if plots._intersects(a, b)]
    assert all(b[0] >= plots.LEFT and b[2] <= plots.WIDTH for b in boxes)
    assert "<circle" in scatter([Point(0.5, 0.0, "one", "teacher")], True, "s", "FID"), "one point, at zero"
    assert plots.linear_ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1]) and plots.log_ticks(1, 30) == [
        1,
        2,
        5,
        10,
        20,
    ]
    assert [plots.format_duration(s) for s in (3e-4, 0.0123, 1.5)] == ["300 us", "12.3 ms", "1.5 s"]


def test_the_page_is_complete_in_itself(page):
    text = page.read_text()
    bare = re.sub(r"base64,[^\"]*", "", text)
    assert not re.search(r"https?:|//[a-z]+\.|@import|<script [^>]*src|<iframe|url\(", bare)
    assert all(a.startswith("data:") for a in re.findall(r'(?:src|href)="([^"]*)"', text))
    assert "prefers-color-scheme" in text and text.isascii()
    assert "sid &lt;1&gt;" in text and "sid <1>" not in text and "error: no model &lt;there&gt;" in text
    assert text.count('<table class="sortable">') == 2 and "bb22" in text and "2 tables" in text
    assert text.count("data:image/png;base64,") == 4 and "Not on this machine: dmd2" in text
    assert text.index("seed 0") < text.index("seed 7"), "other noise is said, apart"
    assert "loss while training dmd2" in text and "12.8 to 13.2" in text and "1 tie" in text
    assert {"rows.json", "leaderboard.md", "index.html", "paper"} == {f.name for f in page.parent.iterdir()}
    assert len(read_rows([page.parent / "rows.json"])) == 8


def test_without_its_script_the_page_says_all(page):
    """The script's contract: every cell of a sortable table has its key; the order is that of the marked heading."""
    found = Cells(page.read_text())
    heads, *rows = found.tables[0]
    assert [c[2].split()[0] for c in heads[:3]] == ["model", "steps", "FID"]
    assert all(c[1].get("data-first") in ("ascending", "descending") for c in heads)
    assert [c[1].get("aria-sort") for c in heads].count("ascending") == 1
    marked = next(i for i, c in enumerate(heads) if "aria-sort" in c[1])
    keys = [float(r[marked][1]["data-key"]) for r in rows[:-1]]
    assert keys == sorted(keys) and rows[-1][0][2] == "real", "the floor is at the foot"
    for r in rows:
        assert len(r) == len(heads) and r[0][0] == "th"
        assert all("data-key" in c[1] or c[2] == "-" for c in r)
    first = {c[2].split()[0]: c[1]["data-first"] for c in heads}
    assert first["FID"] == first["latency"] == "ascending" and first["precision"] == first["images/s"] == "descending"
    assert page.read_text().count('<div class="plots"') == 4 and page.read_text().count(" hidden>") == 2


SCRIPT = "<script>hit=1</script>"
HOSTILE = (
    f"\"'>{SCRIPT}</title></style></td><img src=x onerror=hit=1><a href=javascript:hit=1>`|[a](javascript:hit=1)\n# x"
)
WORDS = ("model", "kind", "scheduler", "protocol", "protocol_hash", "extractor", "extractor_hash", "images", "commit")


def hostile(folder, **more):
    """A row whose every text, and every name, holds markup of HTML and Markdown."""
    metric = figure(1.0, 0.5)
    cost = {"nfe": 1, "latency": 1.0, "hardware": HOSTILE, HOSTILE: HOSTILE}
    made = {"steps": 1, "n": 10, "guidance": 1.0, "runs": [HOSTILE], "hardware": HOSTILE, "samples": f"{folder}"}
    words = dict.fromkeys(WORDS, HOSTILE)
    named = {"metrics": {HOSTILE: metric, "fid": metric}, "left_out": {HOSTILE: HOSTILE}, HOSTILE: {HOSTILE: HOSTILE}}
    return words | made | named | {"cost": cost} | more


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory):
    """Rows, a manifest, a log and a failure of nothing but markup; one folder of samples is broken, one is gone."""
    folder = tmp_path_factory.mktemp("hostile")
    log = folder / "log.jsonl"
    log.write_text(json.dumps({"step": 1, HOSTILE: 2.0}) + "\n")
    pictures = torch.zeros(4, 1, 8, 8)
    folders.write_folder(folder / "a", pictures, prompts=HOSTILE, name=HOSTILE, seed=3)
    folders.write_folder(folder / "b", pictures, prompts=HOSTILE)
    (folder / "b" / "000001.png").write_bytes(b"")
    rows = [hostile(folder / "a"), hostile(folder / "b", steps=2, guidance=2.0), hostile(HOSTILE, kind="teacher")]
    rows += [hostile(None, kind="real"), hostile(None, protocol=f"{HOSTILE}2")]
    return write_page(folder / "out", rows, HOSTILE, HOSTILE, {HOSTILE: log}, {HOSTILE: HOSTILE})


class Elements(HTMLParser):
    """{(tag, its attributes)} of a page."""

    def __init__(self, text):
        super().__init__()
        self.found = set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found |= {(tag, name) for name, _ in attributes} | {(tag, "")}


def test_markup_in_every_field_stays_text(hostile_page, page):
    """The hostile page has no element and no attribute that an honest one has not."""
    text = hostile_page.read_text()
    assert text.count("<script") == text.count("</script") == 1 and text.count("&lt;script&gt;") > 60
    assert not Elements(text).found - Elements(page.read_text()).found - {("p", "class")}
    assert "Not readable:" in text and "b/000001.png cannot be read" in text and "Left out:" in text
    told = (hostile_page.parent / "leaderboard.md").read_text()
    assert "<" not in told and "\n# x" not in told and "](" not in told.replace("\\](", "")
    tables = [part.splitlines() for part in told.split("\n\n") if part.startswith("|")]
    assert len(tables) == 2
    assert all(len({line.replace("\\|", "").count("|") for line in lines}) == 1 for lines in tables)


NUMBERS = ("n", "steps", "guidance", "seeds", *(f"fid {k}" for k in ("value", "low", "high", "n")))


@pytest.mark.parametrize("field", [*NUMBERS, *(f"cost {k}" for k in COSTS)])
def test_numbers_are_numbers(field):
    """Text, NaN, true, an object, a list where a row has a number is refused by its name."""
    part, _, key = field.partition(" ")
    for wrong in (SCRIPT, math.nan, -math.inf, True, {"a": SCRIPT}, [[SCRIPT]]):
        one = row("x", 1.0)
        if part == "fid":
            one["metrics"]["fid"] |= {key: wrong}
        elif part == "cost":
            one["cost"] |= {key: wrong}
        else:
            one[part] = wrong
        with pytest.raises(ValueError, match=f"row 0, 'x'.* {key or part}"):
            group_boards([one])


def test_rows_have_their_kinds():
    for wrong in (
        {"metrics": {"fid": SCRIPT}},
        {"metrics": [1]},
        {"cost": SCRIPT},
        {"left_out": {"fid": 1}},
        {"model": []},
    ):
        with pytest.raises(ValueError, match="row 0"):
            group_boards([row("x", 1.0) | wrong])
    for low, high in ((1.5, 2.0), (0.0, 0.5)):
        with pytest.raises(ValueError, match="without its value 1.0"):
            group_boards([row("x", 1.0) | {"metrics": {"fid": {"value": 1.0, "low": low, "high": high}}}])


def test_html_is_made_of_constants():
    """Every call of markup.tag has a literal of the source, and nothing else marks text as HTML but the assets."""
    for name in ("page", "plots"):
        tree = ast.parse((Path(plots.__file__).parent / f"{name}.py").read_text())
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
        assert all(isinstance(n.args[0], ast.Constant) for n in calls if n.func.id == "tag")
        assert sum(n.func.id == "Markup" for n in calls) == (name == "page")
        assert not [
            n for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) and "<" in ast.unparse(n).replace(" < ", "")
        ]


def test_a_page_grows_with_its_rows(tmp_path):
    """Ten times the rows: at most 14 times the calls of functions. It was 109 times."""

    def calls(n):
        rows = [row(f"model {i}", 10 + i / 100, nfe=1 + i % 8, latency=0.001 * (1 + i % 50)) for i in range(n)]
        counted = cProfile.Profile()
        counted.runcall(write_page, tmp_path / "out", rows)
        return pstats.Stats(counted).total_calls

    calls(2)
    assert calls(200) < 14 * calls(20)


def test_a_page_refuses(tmp_path):
    with pytest.raises(ValueError, match="no list of rows"):
        write_page(tmp_path, [])
    for wrong, match in (
        ({"metrics": {"fid": {"value": math.nan}}}, "'x': fid has no finite value"),
        ({"cost": {"latency": math.inf}}, "'x': cost latency must be a finite number"),
        ({"metrics": None}, "row 0 has no model or no metrics"),
    ):
        with pytest.raises(ValueError, match=match):
            write_page(tmp_path, [row("x", 1.0) | wrong])
    (tmp_path / "log.jsonl").write_text('{"step": 1}\nnonsense\n')
    with pytest.raises(ValueError, match="line 2"):
        write_page(tmp_path / "out", ROWS, runs={"x": tmp_path / "log.jsonl"})
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="no file"):
        read_rows([tmp_path / "absent.json"])
    with pytest.raises(ValueError, match="not valid JSON"):
        read_rows([tmp_path / "log.jsonl"])


if PATH:

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_in_chromium(page, scheme, tmp_path):
        """Clicks sort, by mouse and keyboard; the select changes the plots; nothing is asked for, nothing complains."""
        shown = lambda: b(
            "[...document.querySelectorAll('table.sortable')[0].tBodies[0].rows].map(r => r.cells[0].innerText)"
        )
        marks = (
            "[...document.querySelectorAll('.plots:not([hidden]) .point')].map(p => p.getBoundingClientRect().width)"
        )
        with Browser(tmp_path / "profile", scheme == "dark") as b:
            b.open(page)
            start = ["teacher", "dmd2", "a|b", "teacher", "sid <1>", "teacher"]
            assert shown() == start
            b.click("th:nth-child(3) button")
            assert shown() == start[::-1], "a second order of the column that it was sorted by"
            b.click("th:nth-child(1) button")
            assert shown() == ["a|b", "dmd2", "sid <1>", *["teacher"] * 3]
            b("document.querySelector('th:nth-child(4) button').focus()")
            b.press("Enter", 13)
            assert shown()[0] == "teacher" and shown()[-1] == "teacher"
            assert b("document.querySelectorAll('table.sortable')[0].querySelectorAll('[aria-sort]').length") == 1
            assert b("document.querySelector('tfoot th').innerText") == "real"
            first = b(marks)
            assert len(first) == 2 * 6 + 2 * 1 and min(first) > 5, "two plots a board, every row a mark that is drawn"
            b("s = document.querySelector('select'); s.value = 'precision'; s.dispatchEvent(new Event('change'))")
            assert b("document.querySelector('.plots:not([hidden])').dataset.metric") == "precision"
            assert len(b(marks)) == len(first)
            paper = b("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, re.findall(r"\d+", paper)[:3])) < 150) == (scheme == "dark")
            assert b("document.documentElement.scrollWidth <= innerWidth"), "tables scroll in themselves"
            assert all(b("[...document.images].map(i => i.naturalWidth > 0)"))
            assert b.said == [] and [url for url in b.asked if not url.startswith("data:")] == [page.resolve().as_uri()]

    def test_markup_in_chromium(hostile_page, tmp_path):
        """Nothing of it runs or is asked for, also when headings are clicked and points are hovered over."""
        with Browser(tmp_path / "profile") as b:
            b.open(hostile_page)
            for i in (1, 2, 3):
                b.click(f"th:nth-child({i}) button")
            b("document.querySelectorAll('*').forEach(e => e.dispatchEvent(new MouseEvent('mouseover')))")
            assert b("typeof hit") == "undefined"
            assert b("document.scripts.length") == 1 and b("document.querySelectorAll('a').length") == 0
            asked = [url for url in b.asked if not url.startswith("data:")]
            assert b.said == [] and asked == [hostile_page.resolve().as_uri()]
