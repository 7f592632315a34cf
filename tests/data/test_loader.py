import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whalefall.config.train import SourceConfig
from whalefall.data.loader import Loader
from whalefall.data.prepare import prepare
from whalefall.data.shards import TokenShards
from whalefall.data.sources import Document
from whalefall.data.tokenizer import Tokenizer
from whalefall.errors import UserError

LENGTH, EXTRA = 32, 3


def loader(*folders: Path, weights: tuple[float, ...] = (1, 1, 1), **options) -> Loader:
    sources = [SourceConfig(path=f, weight=w) for f, w in zip(folders, weights, strict=False)]
    return Loader(
        sources, **{"sequence_length": LENGTH, "extra_tokens": EXTRA, "seed": 0} | options
    )


def rows_in_order(folder: Path, split: str) -> list[list[int]]:
    shards = TokenShards.open(folder / split)
    tokens = shards.tokens(0, shards.num_tokens).tolist()
    starts = range(0, len(tokens) - LENGTH - EXTRA + 1, LENGTH)
    return [tokens[start : start + LENGTH + EXTRA] for start in starts]


@pytest.fixture(scope="module")
def second(tmp_path_factory, tokenizer) -> Path:
    """Another data set, of other tokens than the first."""
    folder = tmp_path_factory.mktemp("second") / "set"
    texts = [Document(f"snow/{number}", "雪" * 200) for number in range(20)]
    prepare(texts, folder, tokenizer=tokenizer, heldout_fraction=0.1)
    return folder


def test_an_epoch_reads_every_row_once_in_another_order_each_time(prepared):
    expected = rows_in_order(prepared, "train")
    stream = loader(prepared)
    size = len(expected)
    epochs = [stream.batch(epoch * size, size).tokens.tolist() for epoch in range(2)]
    assert all(sorted(epoch) == sorted(expected) for epoch in epochs)
    assert expected != epochs[0] != epochs[1] != expected
    assert stream.tokens_per_epoch == size * LENGTH


def test_targets_of_a_row_continue_in_the_next(prepared):
    rows = loader(prepared, split="heldout").held_out(4).tokens
    assert torch.equal(rows[:-1, LENGTH:], rows[1:, :EXTRA])


@settings(max_examples=25)
@given(first=st.integers(0, 5000), rows=st.integers(1, 40), world=st.integers(1, 8))
def test_ranks_share_a_batch_out(prepared, first, rows, world):
    stream = loader(prepared, verify=False)
    whole = stream.batch(first, rows).tokens
    parts = [stream.batch(first, rows, rank=rank, world=world).tokens for rank in range(world)]
    assert sum(len(part) for part in parts) == rows
    for rank, part in enumerate(parts):
        assert torch.equal(part, whole[rank::world])


@settings(max_examples=25)
@given(first=st.integers(0, 5000), middle=st.integers(0, 20), rows=st.integers(20, 40))
def test_a_batch_is_a_function_of_its_rows_alone(prepared, first, middle, rows):
    whole = loader(prepared, verify=False).batch(first, rows).tokens
    again = loader(prepared, verify=False)
    late = again.batch(first + middle, rows - middle).tokens
    early = again.batch(first, middle).tokens
    assert torch.equal(torch.cat([early, late]), whole)


def test_seeds_give_other_orders(prepared):
    assert not torch.equal(
        loader(prepared, seed=1).batch(0, 20).tokens, loader(prepared, seed=2).batch(0, 20).tokens
    )


def test_sources_are_mixed_by_weight(prepared, second, tokenizer):
    batch = loader(prepared, second, weights=(3, 1)).batch(0, 400)
    snow = set(tokenizer.encode("雪"))
    from_second = sum(bool(snow & set(row)) for row in batch.tokens.tolist())
    assert from_second == 100


def test_sample_masks_number_the_documents(prepared):
    assert loader(prepared).batch(0, 4).documents is None
    stream = loader(prepared, sample_masks=True)
    batch = stream.batch(0, 60)
    assert batch.documents.shape == batch.tokens.shape
    assert batch.documents.dtype == torch.int64
    begins = batch.tokens[:, 1:] == stream.tokenizer.bos_id
    changes = batch.documents[:, 1:] != batch.documents[:, :-1]
    assert begins.any()
    assert torch.equal(begins, changes)


def test_documents_of_a_batch_are_named(prepared, corpus):
    stream = loader(prepared)
    [row] = stream.batch(7, 1).tokens.tolist()
    names = stream.batch(7, 1).document_ids
    assert names == tuple(sorted(set(names)))
    assert set(names) <= {document.name for document in corpus}
    assert len(names) == row[1:].count(stream.tokenizer.bos_id) + 1


def test_held_out_rows_come_in_order_and_end_where_the_split_ends(prepared, second):
    expected = rows_in_order(prepared, "heldout")
    assert loader(prepared).held_out(3).tokens.tolist() == expected[:3]
    assert loader(prepared).held_out(10**6).tokens.tolist() == expected
    both = loader(prepared, second).held_out(10**6).tokens.tolist()
    assert sorted(both) == sorted(expected + rows_in_order(second, "heldout"))


def test_tokenizer_and_vocabulary_come_with_the_data(prepared, tokenizer):
    stream = loader(prepared)
    assert stream.tokenizer.fingerprint == tokenizer.fingerprint
    assert stream.vocab_size == tokenizer.vocab_size
    stream.check_vocabulary(tokenizer.vocab_size)
    with pytest.raises(UserError, match=r"599.* 600"):
        stream.check_vocabulary(599)


def test_too_little_data_is_told(prepared, tmp_path, tokenizer):
    with pytest.raises(UserError, match="one row takes 1000003"):
        loader(prepared, sequence_length=1_000_000)
    one = prepare([Document("only", "text " * 100)], tmp_path / "one", tokenizer=tokenizer)
    assert one.heldout.documents == 0
    with pytest.raises(UserError, match="heldout has 0 tokens"):
        loader(tmp_path / "one").held_out(1)


def test_other_tokenizers_are_refused(prepared, tmp_path, corpus):
    prepare(corpus, tmp_path / "set", vocab_size=500)
    with pytest.raises(UserError, match="different tokenizers"):
        loader(prepared, tmp_path / "set")


def test_folders_that_are_no_data_sets_are_named(prepared, tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} is no prepared data set"):
        loader(tmp_path)
    with pytest.raises(UserError, match=r"data\.sources is empty"):
        loader()


@pytest.mark.parametrize(
    "file", ["dataset.json", "tokenizer.json", "train/00001.tokens", "train/00000.index"]
)
def test_damage_is_found_when_opening(prepared, tmp_path, file):
    shutil.copytree(prepared, tmp_path / "set")
    raw = bytearray((tmp_path / "set" / file).read_bytes())
    raw[len(raw) // 2] ^= 4
    (tmp_path / "set" / file).write_bytes(raw)
    with pytest.raises(UserError, match=f"{Path(file).name} is damaged"):
        loader(tmp_path / "set")


def test_the_tokenizer_of_the_data_is_the_one_it_was_written_with(prepared, tokenizer):
    assert Tokenizer.load(prepared).fingerprint == tokenizer.fingerprint
