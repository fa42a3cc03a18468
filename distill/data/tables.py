"""Rows of texts in files: .txt, .csv, .tsv, .json, .jsonl and .parquet. Every message names the file and the row."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from io import StringIO
from itertools import chain
from pathlib import Path

TABLES = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet")
COLUMNS = ("text", "caption", "prompt")  # looked for, in this order, where no column is named
LARGEST = 1 << 32  # bytes of a table that is read whole
LONGEST = 20_000  # characters of a text: encoders read a few hundred tokens, and a tokenizer takes a minute for 10^6
SURROGATE = re.compile("[\ud800-\udfff]")
SHOWN = 60  # characters of a wrong value in a message

Row = tuple[str, str | dict[str, object]]  # where it is; a text or its cells


def text_of(path: str | Path) -> str:
    """The text of a file in UTF-8, without a byte order mark. Every line ends with a line feed."""
    try:
        status = os.stat(path)
    except OSError:
        status = None
    if status is None or not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is not a regular file, or it is a broken link: remove or replace it")
    if status.st_size > LARGEST:
        raise ValueError(
            f"{path} has {status.st_size:,} bytes; at most {LARGEST:,} of text are read: write it as .parquet"
        )
    with open(path, "rb") as file:
        content = file.read()
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}): save it in UTF-8") from None


def column(names: Iterable[str], wanted: str | None, where: str) -> str:
    """The name of the column of texts among `names`."""
    for name in [wanted] if wanted else COLUMNS:
        if name in names:
            return name
    looked = repr(wanted) if wanted else f"called {', '.join(COLUMNS)}"
    flags = "--prompt_column or --caption_column (--data.prompt_column, --data.caption_column in training)"
    raise ValueError(
        f"{where} has no column {looked}; it has {sorted(map(str, names))}: name its column of text by {flags}"
    )


def caption(value: object, where: str) -> str | None:
    """The text of a cell; None for an empty one. Of a list of texts, a hash of the list selects one."""
    if value is None:
        return None
    if isinstance(value, list | tuple):
        if not value:
            return None
        number = int.from_bytes(hashlib.blake2b(repr(value).encode(errors="replace"), digest_size=8).digest(), "big")
        return caption(value[number % len(value)], f"{where}, of its list")
    if not isinstance(value, str):
        raise ValueError(f"{where}: {_shorten(value)} is not text, as prompts and captions are: correct or remove it")
    if SURROGATE.search(value):
        raise ValueError(f"{where}: {_shorten(value)} holds half of a character (a surrogate): correct or remove it")
    if len(value) > LONGEST:
        raise ValueError(f"{where}: a text of {len(value):,} characters; at most {LONGEST:,} are read: shorten it")
    return value


def texts(path: Path, wanted: str | None = None) -> Iterator[str | None]:
    """The prompts of a table: its lines, its strings, or its column of text."""
    for where, row in rows(path, (wanted,) if wanted else COLUMNS):
        yield caption(row if isinstance(row, str) else row[column(row, wanted, where)], where)


def rows(path: Path, wanted: Sequence[str]) -> Iterator[Row]:
    """The rows of a table, each a string or a dict. Of a .parquet file, only the columns `wanted` are read."""
    suffix = path.suffix.lower()
    if suffix == ".txt":
        return ((f"{path}, line {i}", line.strip()) for i, line in enumerate(text_of(path).split("\n"), 1))
    if suffix in (".csv", ".tsv"):
        return _csv(path, "\t" if suffix == ".tsv" else ",")
    if suffix == ".parquet":
        return _parquet(path, wanted)
    return _check_rows(_json(path) if suffix == ".json" else _jsonl(path))


def loads(content: str, where: str) -> object:
    """JSON from a string."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # too deep
        raise ValueError(f"{where}, is not JSON: {error}") from None


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _check_rows(rows: Iterator[tuple[str, object]]) -> Iterator[Row]:
    """The same rows. ValueError for a row that is neither a string nor an object."""
    for where, row in rows:
        if not isinstance(row, str | dict):
            raise ValueError(f'{where}: {_shorten(row)} is not a row: write {{"text": "a red fox"}}, or a string')
        yield where, row


def _jsonl(path: Path) -> Iterator[tuple[str, object]]:
    for i, line in enumerate(text_of(path).split("\n"), 1):
        if line.strip():
            yield f"{path}, line {i}", loads(line, f"{path}, line {i}")


def _json(path: Path) -> Iterator[tuple[str, object]]:
    """The rows of a .json file: a list of rows, an object of columns, or one row on each line."""
    content = text_of(path)
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        yield from _jsonl(path)
        return
    if isinstance(tree, dict) and all(isinstance(cells, list) for cells in tree.values()):
        lengths = {name: len(cells) for name, cells in tree.items()}
        if len({*lengths.values()}) > 1:
            raise ValueError(f"{path} has columns of several lengths, {lengths}: give each a value for every row")
        n = next(iter(lengths.values()), 0)
        tree = [{name: cells[i] for name, cells in tree.items()} for i in range(n)]
    if isinstance(tree, dict):
        tree = [tree]
    if not isinstance(tree, list):
        raise ValueError(f"{path} is {_shorten(tree)}: it must be a list of prompts, or of objects with one each")
    yield from ((f"{path}, row {i}", row) for i, row in enumerate(tree, 1))


def _csv(path: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # a long text is refused by its row
    reader = csv.DictReader(StringIO(text_of(path)), delimiter=delimiter, strict=True)
    while True:
        where = f"{path}, line {reader.line_num + 1}"
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{where}, is not CSV: {error}") from None
        if row is None:
            return
        where = f"{path}, line {reader.line_num}"
        if None in row:
            raise ValueError(f'{where} has more cells than the first line: put texts that hold a comma into "quotes"')
        yield where, {name: value or None for name, value in row.items()}


def _parquet(path: Path, wanted: Sequence[str]) -> Iterator[Row]:
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.ParquetFile(path)
        names = table.schema_arrow.names
        kept = [name for name in names if name in wanted]
        if not kept:
            column(names, wanted[0] if len(wanted) == 1 else None, str(path))
        batches = (batch.to_pylist() for batch in table.iter_batches(columns=kept))
        yield from ((f"{path}, row {i}", row) for i, row in enumerate(chain.from_iterable(batches), 1))
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a Parquet file: {error}") from None
