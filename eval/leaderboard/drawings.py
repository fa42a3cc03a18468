"""A plot of the page as a file of its own: SVG with its colours inside, or PDF with Helvetica, which viewers have.

Of SVG, PDF is written for what `plots` draws: paths of M, H, V, L, l, h and z, polylines, circles, text and clips.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping
from xml.etree import ElementTree

Element = ElementTree.Element
SVG = "http://www.w3.org/2000/svg"
INK = "#1b1d21"
SOFT = "#5c626d"
COLOURS = {  # of the style sheet, on white
    "teacher": "#3d4350", "s0": "#2563c9", "s1": "#cf4a1c", "s2": "#12805c", "s3": "#8a3fbf", "s4": "#96690a",
    "s5": "#c22a6b",
}  # fmt: skip
STYLES: dict[tuple[str, str], dict[str, str]] = {  # (element, class): attributes; {c} is the colour of the point
    ("text", ""): {"font-family": "Helvetica, Arial, sans-serif", "font-size": "12", "fill": INK},
    ("text", "tick"): {"fill": SOFT, "font-size": "11"},
    ("text", "axis"): {"fill": SOFT},
    ("text", "label"): {"fill": "{c}", "stroke": "#ffffff", "stroke-width": "3", "paint-order": "stroke"},
    ("text", "reference"): {"fill": SOFT},
    ("path", ""): {"fill": "{c}"},
    ("path", "grid"): {"stroke": "#e3e5ea", "fill": "none"},
    ("path", "reference"): {"stroke": SOFT, "stroke-dasharray": "5 4", "fill": "none"},
    ("path", "front"): {"stroke": "#2563c9", "stroke-width": "7", "stroke-opacity": "0.2", "fill": "none"},
    ("path", "span"): {"stroke": "{c}", "stroke-width": "1.5", "stroke-opacity": "0.7", "fill": "none"},
    ("path", "leader"): {"stroke": "{c}", "stroke-width": "0.8", "stroke-opacity": "0.6", "fill": "none"},
    ("circle", ""): {"fill": "{c}"},
    ("polyline", "series"): {"stroke": "{c}", "stroke-width": "1.8", "stroke-opacity": "0.75", "fill": "none"},
}
NO_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # characters that XML cannot hold
SCALE = 0.75  # points of a unit of the plot
KAPPA = 0.5523  # of the Bezier curve of a quarter of a circle
WIDTHS = (  # of Helvetica's characters from the space on, in thousandths (Adobe's font metrics)
    "278 278 355 556 556 889 667 191 333 333 389 584 278 333 278 278 556 556 556 556 556 556 556 556 556 556 278 278 "
    "584 584 584 556 1015 667 667 722 722 667 611 778 722 278 500 667 556 833 722 778 667 778 722 667 611 722 667 944 "
    "667 667 611 278 278 278 469 556 333 556 556 500 556 556 278 556 556 222 222 500 222 833 556 556 556 556 333 500 "
    "278 556 500 722 500 500 500 334 260 334 584"
)
WIDTH_OF = {chr(32 + i): int(width) for i, width in enumerate(WIDTHS.split())}


def standalone_svg(drawing: str) -> str:
    """The text of an SVG file, with size, colours and fonts as attributes."""
    root = _parse(drawing)
    left, top, width, height = root.attrib["viewBox"].split()
    root.attrib |= {"width": width, "height": height}
    ElementTree.register_namespace("", SVG)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _parse(drawing: str) -> Element:
    """The tree of a plot, in SVG's namespace, with the attributes of its styles."""
    root = ElementTree.fromstring(NO_XML.sub("?", drawing))
    _style(root, INK)
    for element in root.iter():
        element.tag = f"{{{SVG}}}{element.tag}"
    return root


def _style(element: Element, colour: str) -> None:
    """Write the attributes of an element's class, and of all elements below it."""
    classes = element.attrib.get("class", "").split()
    colour = next((COLOURS[name] for name in classes if name in COLOURS), colour)
    for name in ("", *classes):
        for key, value in STYLES.get((element.tag, name), {}).items():
            element.attrib[key] = value.format(c=colour)
    for child in element:
        _style(child, colour)


def pdf(drawing: str) -> bytes:
    """A PDF file of one page, of the plot's size."""
    root = _parse(drawing)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    alphas: dict[str, str] = {}
    lines = [f"{SCALE} 0 0 -{SCALE} 0 {height * SCALE:g} cm", *_draw(root, alphas)]
    states = " ".join(f"/{name} << /CA {alpha} >>" for alpha, name in alphas.items())
    content = zlib.compress("\n".join(lines).encode("cp1252", "replace"))
    font = "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>"
    resources = f"<< /Font << /F {font} >> /ExtGState << {states} >> >>"
    box = f"[0 0 {width * SCALE:g} {height * SCALE:g}]"
    return _write_objects(
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        f"<< /Type /Page /Parent 2 0 R /MediaBox {box} /Contents 4 0 R /Resources {resources} >>".encode(),
        f"<< /Length {len(content)} /Filter /FlateDecode >>\nstream\n".encode() + content + b"\nendstream",
    )


def _write_objects(*contents: bytes) -> bytes:
    """The objects 1, 2 ... of a PDF file with their table of places; the first is the catalogue."""
    file = b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n"
    places = []
    for number, content in enumerate(contents, 1):
        places.append(len(file))
        file += f"{number} 0 obj\n".encode() + content + b"\nendobj\n"
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    count = len(contents) + 1
    trailer = f"trailer\n<< /Size {count} /Root 1 0 R >>\nstartxref\n{len(file)}\n%%EOF\n"
    return file + f"xref\n0 {count}\n0000000000 65535 f \n{table}{trailer}".encode()


def _draw(element: Element, alphas: dict[str, str]) -> Iterator[str]:
    """The operators of the elements below one. alphas: {opacity: its name}, filled here."""
    for child in element:
        kind = child.tag.rpartition("}")[2]
        if kind == "svg":  # it clips its content
            x, y, width, height = (child.attrib[key] for key in ("x", "y", "width", "height"))
            yield from ("q", f"{x} {y} {width} {height} re W n", *_draw(child, alphas), "Q")
        elif kind == "g":
            yield from _draw(child, alphas)
        elif kind == "text":
            yield from _draw_text(child)
        elif kind in ("path", "polyline", "circle"):
            shape = {"path": _path, "polyline": _polyline, "circle": _circle}[kind](child.attrib)
            yield from ("q", *_paint(child.attrib, alphas), *shape, _finish(child.attrib), "Q")


def _paint(attributes: Mapping[str, str], alphas: dict[str, str]) -> Iterator[str]:
    """Set the colours, the width, the dashes and the opacity of lines."""
    if attributes.get("fill", "none") != "none":
        yield f"{_rgb(attributes['fill'])} rg"
    if "stroke" in attributes:
        yield f"{_rgb(attributes['stroke'])} RG {attributes.get('stroke-width', '1')} w"
    if "stroke-dasharray" in attributes:
        yield f"[{attributes['stroke-dasharray']}] 0 d"
    if "stroke-opacity" in attributes:
        yield f"/{alphas.setdefault(attributes['stroke-opacity'], f'A{len(alphas)}')} gs"


def _finish(attributes: Mapping[str, str]) -> str:
    """The operator that fills or strokes the path."""
    return "S" if attributes.get("fill", "none") == "none" else "f"


def _rgb(colour: str) -> str:
    """#rrggbb as three numbers from 0 to 1."""
    return " ".join(f"{int(colour[i : i + 2], 16) / 255:.4f}" for i in (1, 3, 5))


def _path(attributes: Mapping[str, str]) -> Iterator[str]:
    """The operators of an SVG path."""
    x = 0.0
    y = 0.0
    for command, numbers in re.findall(r"([MHVLlhz])([^MHVLlhz]*)", attributes["d"]):
        values = [float(number) for number in re.findall(r"-?\d*\.?\d+", numbers)]
        if command == "z":
            yield "h"
        elif command in "HVh":
            x = {"H": values[0], "h": x + values[0], "V": x}[command]
            y = values[0] if command == "V" else y
            yield f"{x:g} {y:g} l"
        else:
            for dx, dy in zip(values[::2], values[1::2], strict=True):
                x = x + dx if command == "l" else dx
                y = y + dy if command == "l" else dy
                yield f"{x:g} {y:g} {'m' if command == 'M' else 'l'}"


def _polyline(attributes: Mapping[str, str]) -> Iterator[str]:
    for i, point in enumerate(attributes["points"].split()):
        yield f"{point.replace(',', ' ')} {'l' if i else 'm'}"


def _circle(attributes: Mapping[str, str]) -> Iterator[str]:
    x, y, r = (float(attributes[key]) for key in ("cx", "cy", "r"))
    k = KAPPA * r
    yield f"{x + r:g} {y:g} m"
    for cos, sin in ((1, 0), (0, 1), (-1, 0), (0, -1)):
        start = x + r * cos - k * sin, y + r * sin + k * cos
        end = x - r * sin, y + r * cos
        yield f"{start[0]:g} {start[1]:g} {end[0] + k * cos:g} {end[1] + k * sin:g} {end[0]:g} {end[1]:g} c"


def _draw_text(element: Element) -> Iterator[str]:
    """The operators of a text: its halo, if it has one, then its letters."""
    attributes = element.attrib
    words = "".join(element.itertext())
    size = float(attributes["font-size"])
    width = sum(WIDTH_OF.get(letter, 556) for letter in words) * size / 1000
    shift = {"end": width, "middle": width / 2}.get(attributes.get("text-anchor", ""), 0.0)
    if move := re.match(r"translate\((\S+) (\S+)\) rotate\(-90\)", attributes.get("transform", "")):
        place = f"0 -1 -1 0 {move[1]} {float(move[2]) + shift:g} Tm"
    else:
        place = f"1 0 0 -1 {float(attributes['x']) - shift:g} {attributes['y']} Tm"
    written = re.sub(r"([\\()])", r"\\\1", words)
    for mode in (1, 0) if "stroke" in attributes else (0,):
        yield from ("q", *_paint({**attributes, "stroke": attributes.get("stroke", attributes["fill"])}, {}))
        yield from ("1 j", "BT", f"/F {size:g} Tf {mode} Tr", place, f"({written}) Tj", "ET", "Q")
