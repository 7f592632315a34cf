"""Documents from text files, folders, JSON lines and Parquet, one at a time."""

import codecs
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from whalefall.errors import UserError

TEXT_SUFFIXES = frozenset(
    """.txt .md .rst .tex .org .html .css .xml .json .yaml .yml .toml .ini .cfg .py .pyi .pyx .ipynb
    .c .h .cc .cpp .cxx .hh .hpp .cu .cuh .m .mm .java .kt .scala .swift .cs .fs .go .rs .zig .js
    .jsx .ts .tsx .vue .rb .php .pl .lua .r .jl .hs .ml .clj .ex .erl .sh .bash .ps1 .sql .proto
    .cmake .tf .v .vhd .s .asm .f90 .lean""".split()
)
"""Files of a folder that are read as one document each; a file given by itself always is."""

_JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_ROWS = (*_JSON_LINES, ".parquet")


class Document(NamedTuple):
    """One text, with a name that stays the same from run to run."""

    name: str
    text: str


class Skipped(NamedTuple):
    """A document that cannot be used, and why."""

    name: str
    reason: Literal["not UTF-8", "empty", "malformed", "unreadable", "unknown file type"]


def documents(
    inputs: Iterable[Path | str | Document], text_field: str = "text"
) -> Iterator[Document | Skipped]:
    """Read the documents of files and folders in a fixed order, holding one at a time.

    Args:
        inputs: text files (one document each); ``.jsonl`` (plain, ``.gz`` or ``.zst``) and
            ``.parquet`` (one document a row); folders of any of these, walked in sorted order
            without hidden entries; or documents at hand.
        text_field: the key or column that holds the text of a row.

    Yields:
        Every document, or why it is left out.

    Raises:
        UserError: a path does not exist, or not one document is usable.
    """
    items = [item if isinstance(item, Document) else Path(item).resolve() for item in inputs]
    for item in items:
        if isinstance(item, Path) and not item.exists():
            raise UserError(f"{item} does not exist: a text, JSON lines or Parquet file, or folder")
    skipped: Counter[str] = Counter()
    found = False
    for document in _read_all(items, text_field):
        if isinstance(document, Skipped):
            skipped[document.reason] += 1
        else:
            found = True
        yield document
    if not found:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        raise UserError(
            f"no usable document among the inputs ({reasons or 'nothing there'}); "
            f"a row of JSON lines or Parquet needs a string in {text_field!r}"
        )


def _read_all(items: Iterable[Path | Document], text_field: str) -> Iterator[Document | Skipped]:
    uses: Counter[str] = Counter()
    for item in items:
        if isinstance(item, Document):
            yield _checked(*item)
            continue
        # Not the whole path, which differs between machines; inputs of one name are numbered.
        name = _printable(item.name)
        uses[name] += 1
        name += f" ({uses[name]})" if uses[name] > 1 else ""
        yield from (_read_folder if item.is_dir() else _read_file)(item, name, text_field)


def _read_folder(root: Path, name: str, text_field: str) -> Iterator[Document | Skipped]:
    for path in _walk(root):
        file_name = f"{name}/{_printable(path.relative_to(root).as_posix())}"
        if path.name.endswith(_ROWS) or path.suffix.lower() in TEXT_SUFFIXES:
            yield from _read_file(path, file_name, text_field)
        else:
            yield Skipped(file_name, "unknown file type")


def _walk(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        paths = (Path(folder, name) for name in sorted(files) if not name.startswith("."))
        yield from (path for path in paths if path.is_file())


def _read_file(path: Path, name: str, text_field: str) -> Iterator[Document | Skipped]:
    try:
        if path.name.endswith(_JSON_LINES):
            yield from _read_json_lines(path, name, text_field)
        elif path.suffix == ".parquet":
            yield from _read_parquet(path, name, text_field)
        else:
            yield _decoded(name, path.read_bytes().removeprefix(codecs.BOM_UTF8))
    except (OSError, pa.ArrowException):
        yield Skipped(name, "unreadable")


def _read_json_lines(path: Path, name: str, text_field: str) -> Iterator[Document | Skipped]:
    with io.BufferedReader(pa.input_stream(path, compression="detect")) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _parsed(f"{name}:{number}", line, text_field)


def _parsed(name: str, line: bytes, text_field: str) -> Document | Skipped:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Skipped(name, "not UTF-8")
    except (ValueError, RecursionError):
        return Skipped(name, "malformed")
    text = row.get(text_field) if isinstance(row, dict) else None
    return _checked(name, text) if isinstance(text, str) else Skipped(name, "malformed")


def _read_parquet(path: Path, name: str, text_field: str) -> Iterator[Document | Skipped]:
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        kind = schema.field(text_field).type if text_field in schema.names else None
        if kind not in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary()):
            yield Skipped(name, "malformed")
            return
        number = 0
        for batch in file.iter_batches(batch_size=256, columns=[text_field]):
            # As bytes, so that one broken row does not spoil its batch.
            for value in batch.column(0).cast(pa.large_binary()).to_pylist():
                number += 1
                row = f"{name}:{number}"
                yield Skipped(row, "malformed") if value is None else _decoded(row, value)


def _decoded(name: str, raw: bytes) -> Document | Skipped:
    try:
        return _checked(name, raw.decode())
    except UnicodeDecodeError:
        return Skipped(name, "not UTF-8")


def _checked(name: str, text: str) -> Document | Skipped:
    if not text.strip():
        return Skipped(name, "empty")
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return Skipped(name, "not UTF-8")
    return Document(name, text)


def _printable(path: str) -> str:
    """A file name as text, also where the file system holds bytes that are not UTF-8."""
    return os.fsencode(path).decode(errors="backslashreplace")
