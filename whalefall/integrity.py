"""Folders that are whole or absent: checksummed manifests and atomic replacement."""

import errno
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from whalefall.errors import UserError

MANIFEST = "manifest.json"
_CHUNK_BYTES = 1 << 22


def write_manifest(folder: Path, files: Iterable[str | Path]) -> None:
    """Record the size and CRC-32 of ``files`` (paths in ``folder``) in its ``manifest.json``."""
    paths = sorted(folder / file for file in files)
    entries = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "crc32": _crc32(path)}
        for path in paths
    }
    (folder / MANIFEST).write_text(json.dumps(entries, indent=2) + "\n")


def verify_manifest(folder: Path) -> None:
    """Check every file that the manifest of ``folder`` lists.

    Raises:
        UserError: the manifest is missing or unreadable, or a file (the first found is named) is
            missing, has another size, or has another checksum.
    """
    manifest = folder / MANIFEST
    try:
        entries = json.loads(manifest.read_text())
        expected = {name: (int(entry["bytes"]), entry["crc32"]) for name, entry in entries.items()}
    except FileNotFoundError:
        raise UserError(f"{manifest} is missing: {folder} was not written whole") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{manifest} is damaged: it lists no file sizes and checksums") from None
    for name, (size, crc32) in expected.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing, though {manifest} lists it")
        if (found := path.stat().st_size) != size:
            fault = "truncated" if found < size else "too long"
            raise UserError(f"{path} is {fault}: {found} bytes instead of {size}")
        if (checksum := _crc32(path)) != crc32:
            raise UserError(f"{path} is damaged: its crc32 is {checksum} instead of {crc32}")


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Write a folder so that ``target`` is whole or absent, whatever stops the writer.

    Yields an empty sibling folder (same file system) to write into. When the block ends it is
    flushed to disk and renamed to ``target``; until then an existing ``target`` stays as it is.
    When the block raises, what was written is removed. What a killed writer left behind is removed
    by the next one, so one target has one writer at a time.

    Raises:
        UserError: the disk is full; the message says how many bytes were free.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        _flush(partial)
        _replace(target, partial)
    except BaseException as error:
        free = shutil.disk_usage(target.parent).free
        shutil.rmtree(partial, ignore_errors=True)
        if _is_disk_full(error):
            raise UserError(f"the disk is full: {free} bytes were free writing {target}") from error
        raise


def _crc32(path: Path) -> str:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
    return f"{checksum:08x}"


def _replace(target: Path, new: Path) -> None:
    """Rename ``new`` to ``target``. A full folder cannot be renamed over, so it steps aside."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        if old.exists():
            old.rename(target)
        raise
    _fsync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _flush(folder: Path) -> None:
    for parent, _, files in os.walk(folder):
        for file in files:
            _fsync(Path(parent, file))
        _fsync(Path(parent))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_disk_full(error: BaseException) -> bool:
    """ENOSPC or a spent quota. Rust libraries (safetensors, tokenizers) only tell it in words."""
    codes = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError):
        return error.errno in codes
    return any(f"(os error {code})" in str(error) for code in codes)
