import json
from collections import Counter
from pathlib import Path

import pytest

from whalefall.data.dataset import PreparedSummary
from whalefall.data.fim import joined_tokens
from whalefall.data.prepare import prepare
from whalefall.data.shards import TokenShards
from whalefall.data.sources import Document
from whalefall.data.tokenizer import Tokenizer
from whalefall.errors import UserError


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def written(folder: Path, split: str) -> dict[str, list[int]]:
    """Name and tokens of each document of a split."""
    shards = TokenShards.open(folder / split)
    documents: dict[str, list[int]] = {}
    owners = shards.documents(0, shards.num_tokens).tolist()
    for owner, token in zip(owners, shards.tokens(0, shards.num_tokens).tolist(), strict=True):
        documents.setdefault(shards.name(owner), []).append(token)
    return documents


def original(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of a document, its hole filled again."""
    if ids[1] != tokenizer.fim_ids.begin:
        return tokenizer.decode(ids)
    hole, end = (ids.index(token) for token in tokenizer.fim_ids[1:])
    prefix, suffix, middle = ids[:hole], ids[hole:end], ids[end:]
    return "".join(map(tokenizer.decode, (prefix, middle, suffix)))


def test_every_document_is_written_once_and_whole(prepared, corpus, tokenizer):
    train, heldout = written(prepared, "train"), written(prepared, "heldout")
    texts = {name: original(tokenizer, ids) for name, ids in (train | heldout).items()}
    assert texts == {name: text for name, text in corpus if text.strip()}
    assert not train.keys() & heldout.keys()
    for ids in (train | heldout).values():
        assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)


def test_heldout_documents_stay_plain(prepared, corpus, tokenizer):
    texts = dict(corpus)
    heldout = written(prepared, "heldout")
    assert heldout
    for name, ids in heldout.items():
        assert ids == [tokenizer.bos_id, *tokenizer.encode(texts[name]), tokenizer.eos_id]


def test_rates_are_the_shares_of_the_training_documents(tmp_path, tokenizer):
    many = [Document(str(number), "f(x):\n" * 10) for number in range(1000)]
    prepare(many, tmp_path / "set", tokenizer=tokenizer, fim_rate=0.3, split_rate=0.2)
    parts = joined_tokens(tokenizer)
    train = written(tmp_path / "set", "train").values()
    rearranged = sum(ids[1] == tokenizer.fim_ids.begin for ids in train)
    assert abs(rearranged / len(train) - 0.3) < 0.08  # five standard deviations
    plain = [ids for ids in train if ids[1] != tokenizer.fim_ids.begin]
    joined = sum(token in parts for ids in plain for token in ids)
    assert abs(joined / (10 * len(plain)) - 0.8) < 0.03


def test_the_card_says_what_is_there(prepared, corpus, tokenizer):
    card = PreparedSummary.load(prepared)
    sizes = {document.name: len(document.text.encode()) for document in corpus}
    for split, size in (("train", card.train), ("heldout", card.heldout)):
        documents = written(prepared, split)
        assert size.documents == len(documents)
        assert size.tokens == sum(map(len, documents.values()))
        assert size.utf8_bytes == sum(sizes[name] for name in documents)
    assert (card.vocab_size, card.tokenizer) == (tokenizer.vocab_size, tokenizer.fingerprint)
    assert card.dtype == "uint16"
    assert card.recipe.heldout_fraction == 0.2


def test_the_result_does_not_depend_on_the_workers(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr("whalefall.data.encode._CHUNK_CHARACTERS", 500)
    for workers in (1, 3):
        prepare(corpus, tmp_path / str(workers), vocab_size=400, workers=workers, shard_tokens=999)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_the_seed_decides_everything_random(tmp_path, corpus, tokenizer):
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, seed in zip(folders, (1, 1, 2), strict=True):
        prepare(corpus, folder, tokenizer=tokenizer, heldout_fraction=0.2, seed=seed)
    first, second, third = (written(folder, "train") for folder in folders)
    assert contents(folders[0]) == contents(folders[1])
    assert first.keys() != third.keys()
    assert any(first[name] != third[name] for name in first.keys() & third.keys())
    assert second == first


def test_a_document_does_not_depend_on_its_neighbours(tmp_path, corpus, tokenizer):
    for name, part in (("all", corpus), ("some", corpus[::2])):
        prepare(part, tmp_path / name, tokenizer=tokenizer, fim_rate=0.5, heldout_fraction=0.0)
    everything, some = written(tmp_path / "all", "train"), written(tmp_path / "some", "train")
    assert some.items() <= everything.items()


def test_a_tokenizer_is_trained_when_none_is_given(tmp_path, corpus):
    summary = prepare(corpus, tmp_path / "set", vocab_size=500)
    assert summary.vocab_size == 500
    assert Tokenizer.load(tmp_path / "set").fingerprint == summary.tokenizer


def test_skipped_documents_are_counted(tmp_path, tokenizer):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.txt").write_text("good")
    (tmp_path / "in" / "bad.txt").write_bytes(b"\xff")
    (tmp_path / "in" / "rows.jsonl").write_text('{"text": "row"}\n{"text": ""}\n{\n')
    tokenizer.save(tmp_path / "tokenizer")
    summary = prepare([tmp_path / "in"], tmp_path / "out", tokenizer=tmp_path / "tokenizer")
    assert summary.skipped == {"empty": 1, "malformed": 1, "not UTF-8": 1}
    assert (
        Counter(summary.skipped)
        == json.loads((tmp_path / "out/dataset.json").read_text())["skipped"]
    )
    assert (summary.train.documents, summary.heldout.documents) == (1, 1)


def test_a_large_vocabulary_takes_wider_tokens(tmp_path, corpus, tokenizer):
    spec = json.loads(tokenizer._json)
    spec["model"]["vocab"] |= {f"unused{index}": index for index in range(600, 2**16 + 1)}
    wide = Tokenizer(json.dumps(spec))
    summary = prepare(corpus[:5], tmp_path / "set", tokenizer=wide)
    assert summary.dtype == "uint32"
    assert set(written(tmp_path / "set", "heldout")) < {document.name for document in corpus}


def test_an_interrupted_run_leaves_nothing(tmp_path, tokenizer, corpus, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("whalefall.data.shards.ShardWriter.close", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(corpus, tmp_path / "set", tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_bad_input_leaves_nothing(tmp_path, tokenizer):
    with pytest.raises(UserError, match="nowhere"):
        prepare([tmp_path / "nowhere"], tmp_path / "set", tokenizer=tokenizer)
    with pytest.raises(UserError, match="1 empty"):
        prepare([Document("a", " ")], tmp_path / "set", tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("setting", ["heldout_fraction", "fim_rate", "split_rate"])
@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_settings_out_of_range_are_named(tmp_path, corpus, setting, value):
    with pytest.raises(UserError, match=f"{setting} is {value}"):
        prepare(corpus, tmp_path / "set", **{setting: value})


def test_a_used_output_is_refused(prepared, corpus, tokenizer):
    before = contents(prepared)
    with pytest.raises(UserError, match="exists already"):
        prepare(corpus, prepared, tokenizer=tokenizer)
    assert contents(prepared) == before


def test_fim_without_its_tokens_is_refused(tmp_path, corpus, tokenizer):
    bare = Tokenizer(tokenizer._json)
    bare.fim_ids = None
    with pytest.raises(UserError, match=r"fim_rate is 0\.1"):
        prepare(corpus, tmp_path / "set", tokenizer=bare)
    prepare(corpus, tmp_path / "set", tokenizer=bare, fim_rate=0.0)


def test_a_tokenizer_and_a_vocabulary_size_are_one_too_many(tmp_path, corpus, tokenizer):
    with pytest.raises(UserError, match="not both"):
        prepare(corpus, tmp_path / "set", tokenizer=tokenizer, vocab_size=500)


@pytest.mark.parametrize(("setting", "value"), [("workers", 0), ("vocab_size", 0)])
def test_counts_below_the_least_are_named(tmp_path, corpus, setting, value):
    with pytest.raises(UserError, match=f"{setting} is {value}"):
        prepare(corpus, tmp_path / "set", **{setting: value})
