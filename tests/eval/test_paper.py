"""The leaderboard's files for a paper say what the page says: CSV, LaTeX, SVG and PDF; rows of several machines."""

import csv
import io
import json
import re
import zlib
from xml.etree import ElementTree

import pytest
from rows import row

from eval.leaderboard.commands import build_page
from eval.leaderboard.drawings import STYLES, pdf
from eval.leaderboard.paper import paper_files

ROWS = [
    row("teacher", 9.0, steps=9, nfe=17, kind="teacher"),
    row("sid_x & 50% \x00", 10.4, latency=0.004),
    row("dmd2 (ours)", 10.6, steps=2, nfe=2),
    row("real", 8.0, kind="real", steps=None) | {"cost": {}},
]


@pytest.fixture(scope="module")
def files():
    return paper_files(ROWS)


def operators(file):
    """The lines of the page of a PDF, found by its table of places."""
    start = int(re.search(rb"startxref\n(\d+)\n%%EOF\n$", file)[1])
    assert file[start:].startswith(b"xref\n0 5\n0000000000 65535 f \n")
    places = [int(line[:10]) for line in file[start:].split(b"\n")[3:7]]
    assert all(file[place:].startswith(b"%d 0 obj\n" % (i + 1)) for i, place in enumerate(places))
    length, content = re.match(rb".*?/Length (\d+).*?stream\n(.*)", file[places[3] :], re.S).groups()
    assert content[int(length) :].startswith(b"\nendstream")
    return zlib.decompress(content[: int(length)]).decode("cp1252").splitlines()


def test_tables(files):
    assert {name.split(".")[0] for name in files} == {
        "p-aa11-e1-2000",
        *(f"p-aa11-e1-2000-{metric}-{axis}" for metric in ("fid", "precision") for axis in ("nfe", "latency")),
    }
    rows = list(csv.DictReader(io.StringIO(files["p-aa11-e1-2000.csv"].decode())))
    assert [one["model"] for one in rows] == ["teacher", "sid_x & 50% \x00", "dmd2 (ours)", "real"]
    assert [float(one["fid"]) for one in rows] == [9.0, 10.4, 10.6, 8.0] and rows[1]["fid low"] == "9.9"
    assert rows[1]["latency"] == "0.004" and rows[3]["latency"] == "" and rows[0]["protocol_hash"] == "aa11"
    lines = files["p-aa11-e1-2000.tex"].decode().splitlines()
    assert lines[3].startswith(r"model & steps & FID $\downarrow$ & precision $\uparrow$ & calls")
    assert lines[5].startswith(r"teacher & 9 & \textbf{9.0} {\scriptsize [8.5, 9.5]} & ")
    assert lines[6].startswith(r"sid\_x \& 50\% " + "\x00 & 1 & 10.4 ") and lines[8] == r"\midrule"
    assert all(line.count(" & ") == lines[3].count(" & ") for line in [*lines[5:8], lines[9]] if "& 50" not in line)


def test_plots(files):
    """Each mark and text of the SVG has its colours, and stands at the same place in the PDF."""
    assert all(set(styles) <= {"fill", "stroke", "stroke-width", "stroke-opacity", "stroke-dasharray", "paint-order",
                               "font-family", "font-size"} for styles in STYLES.values())  # fmt: skip
    for name in (name for name in files if name.endswith(".svg")):
        root = ElementTree.fromstring(files[name])
        assert (root.get("width"), root.get("height")) == ("620", "430") and "var(" not in files[name].decode()
        elements = {kind: root.findall(f".//{{*}}{kind}") for kind in ("text", "circle", "polyline", "path")}
        for kind in ("text", "circle", "path"):
            assert elements[kind] and all(e.get("fill") or e.get("stroke") for e in elements[kind])
        lines = operators(files[name.replace(".svg", ".pdf")])
        written = [line for line in lines if line.endswith(" Tj")]
        halos = sum(e.get("stroke") is not None for e in elements["text"])
        assert len(written) == len(elements["text"]) + halos
        for element in elements["text"]:
            words = re.sub(r"([\\()])", r"\\\1", element.text)
            assert f"({words}) Tj" in written, words
        ends = [line for line in lines if line in ("S", "f")]
        assert len(ends) == sum(len(elements[kind]) for kind in ("circle", "path", "polyline"))
        start = next(e for e in elements["text"] if e.get("text-anchor") is None)
        assert f"1 0 0 -1 {float(start.get('x')):g} {start.get('y')} Tm" in lines
        assert lines.count("q") == lines.count("Q") and lines[0] == "0.75 0 0 -0.75 0 322.5 cm"


def test_shapes_of_a_pdf():
    drawing = (
        '<svg viewBox="0 0 40 20"><path d="M1 2H5V6L7 8.5"/><path d="M1 2h12l-6 9.5z"/><circle cx="10" cy="5" r="2"/>'
        '<text x="30" y="9" text-anchor="end" class="tick">1.5</text></svg>'
    )
    lines = operators(pdf(drawing))
    assert [line for line in lines if line.endswith((" m", " l", "h"))] == [
        "1 2 m", "5 2 l", "5 6 l", "7 8.5 l", "1 2 m", "13 2 l", "7 11.5 l", "h", "12 5 m",
    ]  # fmt: skip
    curves = [list(map(float, line.split()[:-1])) for line in lines if line.endswith(" c")]
    assert [curve[4:] for curve in curves] == [[10, 7], [8, 5], [10, 3], [12, 5]]
    assert curves[0][:4] == pytest.approx([12, 5 + 2 * 0.5523, 10 + 2 * 0.5523, 7])
    assert f"1 0 0 -1 {30 - 11 * (0.556 * 2 + 0.278):g} 9 Tm" in lines, "Helvetica's own widths"


def test_rows_of_several_machines_become_one_page(tmp_path):
    """Each machine's file; a row that is in two of them counts once. On request the seeds of a model are one row."""
    for name, seeds in (("one", (0, 1)), ("other", (1, 2))):
        rows = [row("dmd2", 10.0 + seed, seeds=[seed], model_hash="h", hardware=f"machine {seed}") for seed in seeds]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    paths = (tmp_path / "one.json", tmp_path / "other.json")
    build_page(paths, tmp_path / "page")
    assert [one["seeds"] for one in json.loads((tmp_path / "page" / "rows.json").read_text())] == [[0], [1], [2]]
    build_page(paths, tmp_path / "page", mean=True)
    (mean,) = json.loads((tmp_path / "page" / "rows.json").read_text())
    assert mean["seeds"] == [0, 1, 2] and mean["metrics"]["fid"]["value"] == 11.0 and mean["metrics"]["fid"]["n"] == 3
    assert (tmp_path / "page" / "paper" / "p-aa11-e1-2000.csv").is_file()
    (tmp_path / "other.json").write_text(json.dumps([row("dmd2", 9.0, seeds=[1], model_hash="h")]))
    with pytest.raises(ValueError, match="dmd2 has two rows of seed 1: remove one"):
        build_page(paths, tmp_path / "page", mean=True)
