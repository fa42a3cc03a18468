"""Rows, training logs and sample folders -> a table in the terminal, report.json and one self-contained page.

python -m eval.report --scores runs/scores.json --samples runs/samples/* --logs runs/dmd2/log.jsonl --out runs/report
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval import plots

if TYPE_CHECKING:
    from rich.table import Table

Row = Mapping[str, Any]
KEYS = (
    "model",
    "nfe",
    "fd_heldout",
    "fd_train",
    "accuracy",
    "precision",
    "recall",
    "train_seconds",
    "images_per_second",
)
COLUMNS = {  # key: heading, format
    "model": ("model", "{}"),
    "nfe": ("calls", "{:.0f}"),
    "fd_heldout": ("FD held-out", "{:.2f}"),
    "fd_train": ("FD train", "{:.2f}"),
    "accuracy": ("accuracy", "{:.3f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "train_seconds": ("training s", "{:.0f}"),
    "images_per_second": ("images/s", "{:.0f}"),
}
SHORT = {  # for the terminal
    "nfe": "\ncalls",
    "fd_heldout": "FD\nheld-out",
    "fd_train": "FD\ntrain",
    "accuracy": "\nacc.",
    "precision": "preci-\nsion",
    "train_seconds": "train\ns",
    "images_per_second": "images\n/s",
}


def cell(row: Row, key: str) -> str:
    """A figure as text, with its interval where the row has "<key>_ci": [low, high]; "-" where there is none."""
    value, form = row.get(key), COLUMNS[key][1]
    if value is None:
        return "-"
    interval = row.get(f"{key}_ci")
    return form.format(value) + (f" ({form.format(interval[0])} to {form.format(interval[1])})" if interval else "")


def floor_line(floor: Mapping[str, float], rows: Sequence[Row]) -> str:
    """One sentence: the floor, and the n that the figures were taken at."""
    counts = sorted({row["n"] for row in rows if row.get("n")})
    drawn = f"; n = {', '.join(f'{n:,}' for n in counts)} generated images" if counts else ""
    return (
        f"Floor: the training digits are {floor['fd_heldout']:.2f} from the held-out digits{drawn}. "
        f"The distance is biased by n: compare figures of the same n only."
    )


def table(rows: Sequence[Row], floor: Mapping[str, float]) -> Table:
    """The rows as a rich table, with the distance over the floor beside every figure."""
    from rich import box
    from rich.table import Table

    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)  # fits into 80 columns
    out.caption, out.caption_justify = floor_line(floor, rows), "left"
    for key in COLUMNS:
        out.add_column(SHORT.get(key, key), justify="left" if key == "model" else "right", vertical="top")
        if key == "fd_heldout":
            out.add_column("/\nfloor", justify="right", style="dim")
    for row in rows:
        cells = [cell(row, key) for key in COLUMNS]
        cells.insert(3, _over_floor(row, floor))
        out.add_row(*cells, style=None if plots.is_teacher(dict(row)) else "bold")
    out.add_section()
    out.add_row("real", "", f"{floor['fd_heldout']:.2f}", "1.00", style="dim")
    return out


def _over_floor(row: Row, floor: Mapping[str, float]) -> str:
    return "-" if row.get("fd_heldout") is None else f"{row['fd_heldout'] / floor['fd_heldout']:.2f}"


def markdown(rows: Sequence[Row], floor: Mapping[str, float]) -> str:
    """The same table in Markdown, for documents."""
    headings = [heading for heading, _ in COLUMNS.values()]
    headings.insert(3, "/ floor")
    lines = ["| " + " | ".join(headings) + " |", "|---|" + "---:|" * (len(headings) - 1)]
    for row in rows:
        cells = [cell(row, key) for key in COLUMNS]
        cells.insert(3, _over_floor(row, floor))
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    real = ["real digits (floor)", "", f"{floor['fd_heldout']:.2f}", "1.00", *[""] * (len(headings) - 4)]
    lines.append("| " + " | ".join(real) + " |")
    return "\n".join(lines) + "\n\n" + floor_line(floor, rows) + "\n"


def headline(rows: Sequence[Row], floor: Mapping[str, float]) -> str:
    """What the rows say, in one sentence: the student of fewest calls that is nearest, beside the slowest teacher."""
    scored = [r for r in rows if r.get("fd_heldout") is not None and r.get("nfe")]
    students = [r for r in scored if not plots.is_teacher(dict(r))]
    teachers = [r for r in scored if plots.is_teacher(dict(r))]
    if not students or not teachers:
        return f"Real digits are {floor['fd_heldout']:.1f} from real digits; every figure below is read against that."
    calls = min(r["nfe"] for r in students)
    fast = [r for r in students if r["nfe"] == calls]
    best = min(fast, key=lambda r: r["fd_heldout"])
    slow = max(teachers, key=lambda r: r["nfe"])
    among = f", the nearest of {len(fast)} students," if len(fast) > 1 else ""
    return (
        f"With {calls} network {'call' if calls == 1 else 'calls'} per image, {best['model']}{among} comes to a "
        f"Frechet distance of {best['fd_heldout']:.1f} from held-out digits; its teacher comes to "
        f"{slow['fd_heldout']:.1f} with {slow['nfe']}."
    )


def write(
    out: Path,
    rows: Sequence[Row],
    floor: Mapping[str, float] | float,
    runs: Mapping[str, Path],
    samples: Mapping[str, Path],
    seconds: float | None = None,
    title: str = "One-step distillation of handwritten digits",
) -> Path:
    """Write report.json and index.html to the folder `out`, and return the page's path.

    rows: as `score` makes them, with train_seconds where known, and "<key>_ci" for an interval; a row is a teacher's
    by "student": false, or by its name. floor: {"fd_heldout": distance of the two real splits}. runs: name ->
    log.jsonl. samples: name -> folder of images (`images.read`). seconds: wall time of everything. ValueError where
    there is no row, a figure is not finite, or a log or folder cannot be read.
    """
    floor = {"fd_heldout": float(floor)} if isinstance(floor, int | float) else dict(floor)
    if not rows:
        raise ValueError("there is no row to report; score at least one folder")
    for row in rows:
        bad = [k for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)]
        if bad:
            raise ValueError(f"row {row.get('model')!r}: {', '.join(bad)} is not finite; score that folder again")
    full = [{key: row.get(key) for key in KEYS} | dict(row) for row in rows]
    page = _page(full, floor, runs, samples, seconds, title)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    found = {"rows": full, "floor": floor, "seconds": seconds}
    (out / "report.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "index.html").write_text(page, encoding="utf-8")
    return out / "index.html"


def _page(
    rows: list[dict[str, Any]],
    floor: Mapping[str, float],
    runs: Mapping[str, Path],
    samples: Mapping[str, Path],
    seconds: float | None,
    title: str,
) -> str:
    text = html.escape
    spent = f" Made in {seconds / 60:.1f} minutes." if seconds else ""
    training = "".join(f"<h3>{text(name)}</h3>{plots.training(name, path)}" for name, path in runs.items())
    return "".join(
        [
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<style>{STYLE}</style></head><body><main>",
            f'<header><p class="kicker">{text(title)}</p><h1>{text(headline(rows, floor))}</h1>',
            f'<p class="lead">Two sets of real digits are {floor["fd_heldout"]:.1f} apart: that is the floor, and a '
            f"distance near it is as good as this measure can tell.{spent}</p></header>",
            f"<section><h2>Figures</h2>{_table(rows, floor)}</section>",
            "<section><h2>Quality against cost</h2>"
            f"<figure class=wide>{plots.quality(rows, floor['fd_heldout'])}</figure></section>",
            _samples(samples),
            f"<section><h2>Training</h2>{training}</section>" if training else "",
            f"<section><h2>How these figures were made</h2>{_protocol(rows)}</section>",
            "</main></body></html>\n",
        ]
    )


def _table(rows: list[dict[str, Any]], floor: Mapping[str, float]) -> str:
    head = [heading for heading, _ in COLUMNS.values()]
    head.insert(3, "/ floor")
    lines = [f"<tr>{''.join(f'<th scope=col>{h}</th>' for h in head)}</tr>"]
    for row in rows:
        cells = [html.escape(cell(row, key)).replace(" (", " <small>(").replace(")", ")</small>") for key in COLUMNS]
        cells[0] = html.escape(str(row["model"]))
        cells.insert(3, _over_floor(row, floor))
        kind = "teacher" if plots.is_teacher(row) else "student"
        body = "".join(f"<td>{c}</td>" for c in cells[1:])
        lines.append(f'<tr class="{kind}"><th scope=row>{cells[0]}</th>{body}</tr>')
    lines.append(
        f'<tr class="real"><th scope=row>real digits (floor)</th><td></td><td>{floor["fd_heldout"]:.2f}</td>'
        f"<td>1.00</td>{'<td></td>' * (len(head) - 4)}</tr>"
    )
    return (
        f'<div class="scroll"><table><thead>{lines[0]}</thead><tbody>{"".join(lines[1:])}</tbody></table></div>'
        f'<p class="note">{html.escape(floor_line(floor, rows))}</p>'
    )


def _samples(samples: Mapping[str, Path]) -> str:
    from eval import images as folders

    figures, seeds = [], set()
    for name, folder in samples.items():
        images, labels, manifest = folders.read(folder, first=200)
        if manifest.get("seed") is not None:
            seeds.add(manifest["seed"])
        nfe = manifest.get("nfe")
        cost = f"{nfe} network {'call' if nfe == 1 else 'calls'}" if nfe else f"{manifest.get('n', len(images))} images"
        picture = plots.grid(images, labels)
        figures.append(
            f'<figure><figcaption><b>{html.escape(name)}</b><span>{cost}</span></figcaption><img src="{picture}" '
            f'alt="sample images of {html.escape(name, quote=True)}, one column per class"></figure>'
        )
    if not figures:
        return ""
    same = (
        f"The same noise (seed {next(iter(seeds))}) and the same labels for every model, not selected. "
        if len(seeds) == 1
        else "Not selected. "
    )
    return (
        f'<section><h2>Samples</h2><p class="note">{same}Column by column: the classes 0 to 9.</p>'
        f'<div class="grids">{"".join(figures)}</div></section>'
    )


def _protocol(rows: list[dict[str, Any]]) -> str:
    nets = sorted({str(r["extractor"]) for r in rows if r.get("extractor")})
    manifolds = sorted({r["n_manifold"] for r in rows if r.get("n_manifold")})
    points = [
        "<b>FD</b>: Frechet distance of Gaussians fitted to 64 features of a small digits classifier"
        + (f" (weights {html.escape(', '.join(nets))})" if nets else "")
        + ", in float64. It depends on n and on the classifier: compare it within this page, and with the floor.",
        "<b>held-out</b>: 597 scans that neither the models nor the classifier were trained on; <b>train</b>: the "
        "1,200 others. The floor is the distance of these two sets; more generated images than 1,200 "
        "have less bias, so a perfect sampler may come out a little below it.",
        "<b>accuracy</b>: images that the classifier reads as the class that was asked for. Blurred class means also "
        "score high, so it says nothing alone.",
        "<b>precision, recall</b>: Kynkaanniemi et al. 2019, k = 3, against the training digits"
        + (f", {', '.join(map(str, manifolds))} samples on both sides" if manifolds else "")
        + ". A lost mode lowers recall, noise lowers precision.",
        "<b>calls</b>: network evaluations per image. <b>images/s</b>: measured on the machine that made this page.",
    ]
    return f'<ul class="note">{"".join(f"<li>{p}</li>" for p in points)}</ul>'


STYLE = """
:root{color-scheme:light dark;--paper:#fcfcfb;--card:#fff;--ink:#1b1d21;--soft:#5c626d;--rule:#e1e3e8;--accent:#2563c9;
--floor:#7a7f89;--teacher:#3d4350;--s0:#2563c9;--s1:#cf4a1c;--s2:#12805c;--s3:#8a3fbf;--s4:#a87400;--s5:#c22a6b}
@media (prefers-color-scheme:dark){:root{--paper:#121417;--card:#1a1d22;--ink:#e7e9ed;--soft:#9aa1ad;--rule:#30343c;
--accent:#7db0ff;--floor:#9097a3;--teacher:#c3c9d4;--s0:#7db0ff;--s1:#ff8f66;--s2:#4fcf9f;--s3:#cf96ff;--s4:#e6b84a;
--s5:#ff86b5}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif}
main{max-width:1080px;margin:0 auto;padding:48px 24px 72px}
.kicker{margin:0 0 10px;color:var(--soft);font-size:14px;letter-spacing:.02em}
h1{margin:0;font-size:clamp(23px,3.4vw,34px);line-height:1.22;font-weight:650;letter-spacing:-.015em;text-wrap:balance}
.lead{margin:16px 0 0;max-width:62ch;color:var(--soft);font-size:17px}
section{margin-top:48px}
h2{margin:0 0 14px;font-size:19px;font-weight:650}
h3{margin:22px 0 6px;font-size:15px;font-weight:600}
.note{color:var(--soft);font-size:14px;max-width:80ch;margin:12px 0 0}
ul.note{padding-left:18px}ul.note li{margin:6px 0}.note b{color:var(--ink);font-weight:600}
.scroll{overflow-x:auto;border:1px solid var(--rule);border-radius:10px;background:var(--card)}
table{border-collapse:collapse;width:100%;font-size:14.5px;font-variant-numeric:tabular-nums}
th,td{padding:9px 14px;text-align:right;white-space:nowrap;border-top:1px solid var(--rule)}
thead th{border-top:0;color:var(--soft);font-weight:500;font-size:13px}
th:first-child{text-align:left;position:sticky;left:0;background:var(--card)}
tbody th{font-weight:400}tr.student th,tr.student td:nth-child(3){font-weight:650}
td:nth-child(4),tr.real>*{color:var(--soft)}small{color:var(--soft);font-weight:400}
figure{margin:0}.wide{overflow-x:auto}.wide svg{min-width:min(680px,var(--w))}
svg{display:block;width:100%;height:auto}
svg text{font-family:inherit}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(230px,46%),1fr));gap:10px 14px}
.grids{display:grid;grid-template-columns:repeat(auto-fill,minmax(300px,1fr));gap:22px;margin-top:16px}
figcaption{display:flex;justify-content:space-between;gap:12px;font-size:14px;margin-bottom:7px}
figcaption b{font-weight:600}figcaption span{color:var(--soft)}
img{display:block;width:100%;height:auto;image-rendering:pixelated;border-radius:6px}
@media (max-width:600px){main{padding:28px 16px 48px}section{margin-top:36px}th,td{padding:8px 10px}}
@media print{body{background:#fff}section{break-inside:avoid}}
""".replace("\n", "")


def report(
    scores: Path,
    out: Path,
    samples: tuple[Path, ...] = (),
    logs: tuple[Path, ...] = (),
    title: str = "One-step distillation of handwritten digits",
) -> Path:
    """Make the report page of scored folders.

    Args:
        scores: the JSON that `eval.score` wrote.
        out: folder of report.json and index.html.
        samples: folders of images to show, called as in their manifests.
        logs: log.jsonl files, each called by the folder that it lies in.
        title: of the page.
    """
    from eval.images import manifest_of

    if not scores.is_file():
        raise ValueError(f"there is no file {scores}; make it with python -m eval.score")
    try:
        rows = json.loads(scores.read_text())
        floor = rows[0]["floor_fd_heldout"]
    except (ValueError, KeyError, IndexError, TypeError):
        raise ValueError(f"{scores} does not hold the rows that python -m eval.score writes") from None
    runs, shown = {path.parent.name: path for path in logs}, {}
    for path in samples:
        name = manifest_of(path).get("name", path.name)
        shown[path.name if name in shown else name] = path
    return write(out, rows, floor, runs, shown, None, title)


def main() -> None:
    """Command line of `report`."""
    from rich.console import Console

    from eval.cli import run

    page = run(report)
    found = json.loads((page.parent / "report.json").read_text())
    console = Console()
    console.print(table(found["rows"], found["floor"]))
    console.print(f"open {page}")


if __name__ == "__main__":
    main()
