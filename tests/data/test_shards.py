from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from whalefall.data.shards import ShardWriter, TokenShards
from whalefall.errors import UserError

LENGTHS = [3, 1, 7, 7, 2, 30, 1, 5]


def write(folder: Path, dtype: str = "uint16", shard_tokens: int = 10) -> np.ndarray:
    """Documents of ``LENGTHS`` tokens; returns all tokens."""
    writer = ShardWriter(folder, dtype=dtype, shard_tokens=shard_tokens)
    tokens = np.arange(sum(LENGTHS)).astype(dtype)
    for number, ids in enumerate(np.split(tokens, np.cumsum(LENGTHS)[:-1])):
        writer.add(f"Dokument № {number}", ids)
    shards = writer.close()
    assert sum(shard.tokens for shard in shards) == sum(LENGTHS)
    return tokens


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> TokenShards:
    folder = tmp_path_factory.mktemp("shards")
    write(folder)
    assert len(list(folder.glob("*.tokens"))) == 3
    return TokenShards.open(folder)


@given(bounds=st.lists(st.integers(0, sum(LENGTHS)), min_size=2, max_size=2).map(sorted))
def test_any_range_is_read_across_shards(several, bounds):
    start, stop = bounds
    assert several.tokens(start, stop).tolist() == list(range(start, stop))
    owners = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    assert several.documents(start, stop).tolist() == owners[start:stop].tolist()


def test_documents_are_counted_and_named(several):
    assert several.num_tokens == sum(LENGTHS)
    assert several.num_documents == len(LENGTHS)
    names = [several.name(document) for document in range(several.num_documents)]
    assert names == [f"Dokument № {number}" for number in range(len(LENGTHS))]


@pytest.mark.parametrize("bounds", [(-1, 3), (5, 4), (0, sum(LENGTHS) + 1)])
def test_ranges_outside_are_refused(several, bounds):
    with pytest.raises(IndexError):
        several.tokens(*bounds)


@pytest.mark.parametrize(("dtype", "largest"), [("uint16", 2**16 - 1), ("uint32", 2**32 - 1)])
def test_the_largest_id_is_kept(tmp_path, dtype, largest):
    writer = ShardWriter(tmp_path, dtype=dtype, shard_tokens=10)
    writer.add("a", np.array([0, largest], dtype=dtype))
    writer.close()
    assert TokenShards.open(tmp_path).tokens(0, 2).tolist() == [0, largest]
    assert (tmp_path / "00000.tokens").stat().st_size == 2 * np.dtype(dtype).itemsize


def test_no_documents_make_an_empty_split(tmp_path):
    ShardWriter(tmp_path, dtype="uint16", shard_tokens=10).close()
    empty = TokenShards.open(tmp_path)
    assert (empty.num_tokens, empty.num_documents) == (0, 0)
    assert empty.tokens(0, 0).tolist() == []


FILES = ["00001.tokens", "00002.index", "00000.names"]


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("file", FILES)
def test_a_truncated_file_is_named_with_both_sizes(tmp_path, file, verify):
    write(tmp_path)
    raw = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(raw[:-1])
    with pytest.raises(UserError, match=f"{file}.* {len(raw) - 1} bytes instead of {len(raw)}"):
        TokenShards.open(tmp_path, verify=verify)


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_bit_is_found(tmp_path, file):
    write(tmp_path)
    raw = bytearray((tmp_path / file).read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / file).write_bytes(raw)
    with pytest.raises(UserError, match=f"{file} is damaged"):
        TokenShards.open(tmp_path)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("file", ["00001.tokens", "shards.json"])
def test_a_missing_file_is_named(tmp_path, file, verify):
    write(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(UserError, match=file):
        TokenShards.open(tmp_path, verify=verify)


def test_a_damaged_listing_is_named(tmp_path):
    write(tmp_path)
    (tmp_path / "shards.json").write_text('{"dtype": "uint16", "shards": [{}]}')
    with pytest.raises(UserError, match=r"shards\.json is damaged"):
        TokenShards.open(tmp_path, verify=False)


def test_more_shards_than_stay_open_are_read(tmp_path):
    writer = ShardWriter(tmp_path, dtype="uint16", shard_tokens=1)
    for number in range(200):
        writer.add(str(number), np.array([number], dtype=np.uint16))
    writer.close()
    shards = TokenShards.open(tmp_path)
    for _ in range(2):
        assert shards.tokens(0, 200).tolist() == list(range(200))
