"""Rows of cells as text."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Table:
    """Rows of cells, printed as lines with aligned columns."""

    rows: list[list[str]] = field(default_factory=list)

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(*self.rows, strict=True)]
        number = lambda column: any(row[column][:1].isdigit() for row in self.rows[1:])
        right = [i > 0 and number(i) for i in range(len(widths))]
        pad = lambda row: [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        return "\n".join("  " + "  ".join(pad(row)).rstrip() for row in self.rows) + "\n"
