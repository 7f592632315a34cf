"""A folder is whole or absent, and a damaged file is found and named."""

import errno
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from whalefall.errors import UserError
from whalefall.integrity import atomic_folder, verify_manifest, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files under a manifest."""
    folder = tmp_path / "folder"
    (folder / "train").mkdir(parents=True)
    (folder / "train" / "tokens.bin").write_bytes(bytes(range(256)) * 20)
    (folder / "dataset.json").write_text("{}")
    write_manifest(folder, ["train/tokens.bin", "dataset.json"])
    return folder


def test_manifest_lists_bytes_and_checksum(folder: Path) -> None:
    verify_manifest(folder)
    assert json.loads((folder / "manifest.json").read_text()) == {
        "dataset.json": {"bytes": 2, "crc32": f"{zlib.crc32(b'{}'):08x}"},
        "train/tokens.bin": {"bytes": 5120, "crc32": f"{zlib.crc32(bytes(range(256)) * 20):08x}"},
    }


def test_checksum_of_a_file_larger_than_a_chunk_is_that_of_its_bytes(tmp_path: Path) -> None:
    content = os.urandom((9 << 20) + 1)
    (tmp_path / "big").write_bytes(content)
    write_manifest(tmp_path, [tmp_path / "big"])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["big"]["crc32"] == f"{zlib.crc32(content):08x}"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 5119), flip=st.integers(1, 255))
def test_any_changed_byte_is_found(folder: Path, position: int, flip: int) -> None:
    path = folder / "train" / "tokens.bin"
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[position] ^= flip
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"train/tokens\.bin is damaged: its crc32 is "):
        verify_manifest(folder)
    path.write_bytes(whole)
    verify_manifest(folder)


def test_truncated_long_and_missing_files_are_named(folder: Path) -> None:
    path = folder / "train" / "tokens.bin"
    os.truncate(path, 5000)
    with pytest.raises(UserError, match=r"tokens\.bin is truncated: 5000 bytes instead of 5120"):
        verify_manifest(folder)
    os.truncate(path, 6000)
    with pytest.raises(UserError, match=r"tokens\.bin is too long: 6000 bytes instead of 5120"):
        verify_manifest(folder)
    path.unlink()
    with pytest.raises(UserError, match=r"tokens\.bin is missing"):
        verify_manifest(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1}', '{"a": {"bytes": 1}}', "\x00"])
def test_damaged_manifest_is_named(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        verify_manifest(folder)


def test_folder_without_a_manifest_is_no_whole_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        verify_manifest(tmp_path)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_target_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "parents" / "too" / "step-1"
    with atomic_folder(target) as partial:
        assert partial.parent == target.parent
        (partial / "a").write_text("new")
        assert not target.exists()
    assert (target / "a").read_text() == "new"
    assert names(target.parent) == ["step-1"]


def test_old_target_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "step-1"
    target.mkdir()
    (target / "old").write_text("old")
    with atomic_folder(target) as partial:
        (partial / "new").write_text("new")
        assert names(target) == ["old"]
    assert names(target) == ["new"]
    assert names(tmp_path) == ["step-1"]


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_failure_leaves_the_old_target_and_nothing_else(
    tmp_path: Path, stop: type[BaseException]
) -> None:
    target = tmp_path / "step-1"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(stop), atomic_folder(target) as partial:
        (partial / "new").write_text("new")
        raise stop
    assert names(target) == ["old"]
    assert names(tmp_path) == ["step-1"]


def test_old_target_comes_back_when_the_new_one_cannot_be_renamed(tmp_path: Path) -> None:
    target = tmp_path / "step-1"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(FileNotFoundError), atomic_folder(target) as partial:
        partial.rmdir()
    assert names(target) == ["old"]


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    target = tmp_path / "step-1"
    killed = f"""
import os, pathlib
from whalefall.integrity import atomic_folder
with atomic_folder(pathlib.Path({str(target)!r})) as partial:
    (partial / "half").write_text("half")
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", killed]).returncode == -9
    assert names(tmp_path) == [".step-1.partial"]
    with atomic_folder(target) as partial:
        (partial / "whole").write_text("whole")
    assert names(target) == ["whole"]
    assert names(tmp_path) == ["step-1"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_full_disk_is_told_with_the_folder_and_the_free_bytes(tmp_path: Path) -> None:
    target = tmp_path / "step-1"
    with (
        pytest.raises(UserError, match=r"the disk is full: \d+ bytes were free writing .*/step-1"),
        atomic_folder(target) as partial,
    ):
        (partial / "big").symlink_to("/dev/full")
        (partial / "big").write_bytes(b"x")
    assert names(tmp_path) == []


def test_full_disk_told_in_words_by_a_library_is_understood(tmp_path: Path) -> None:
    message = f"I/O error: No space left on device (os error {errno.ENOSPC})"
    with pytest.raises(UserError, match="the disk is full"), atomic_folder(tmp_path / "step-1"):
        raise Exception(message)
