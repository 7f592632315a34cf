from hypothesis import given
from hypothesis import strategies as st

from whalefall.data.selection import Text, assign_splits, sample_texts
from whalefall.data.sources import Document


def numbered(count: int) -> list[Document]:
    return [Document(f"d{number}", f"text {number}") for number in range(count)]


def split_of(documents: list[Document], fraction: float, seed: int = 0) -> dict[str, str]:
    return {name: split for name, _, split in assign_splits(documents, fraction, seed)}


@given(count=st.integers(2, 60), fraction=st.floats(0.001, 0.999), seed=st.integers(0, 1000))
def test_both_splits_have_documents_and_none_is_lost(count, fraction, seed):
    documents = numbered(count)
    splits = split_of(documents, fraction, seed)
    assert splits.keys() == {document.name for document in documents}
    assert set(splits.values()) == {"train", "heldout"}


def test_one_document_is_for_training():
    for seed in range(50):
        assert split_of(numbered(1), 0.9, seed) == {"d0": "train"}


def test_fraction_zero_holds_out_nothing():
    assert set(split_of(numbered(50), 0.0).values()) == {"train"}


def test_the_share_held_out_is_the_fraction():
    heldout = list(split_of(numbered(10_000), 0.1).values()).count("heldout")
    assert abs(heldout - 1000) < 150  # five standard deviations


def test_a_document_keeps_its_split_when_others_come_and_go():
    whole = split_of(numbered(1000), 0.2)
    part = split_of(numbered(1000)[::3], 0.2)
    assert all(whole[name] == split for name, split in part.items())


def test_the_sample_is_bounded_and_only_of_training_texts():
    texts = [
        Text(f"d{number}", f"{number:04}" * 10, "heldout" if number % 5 == 0 else "train")
        for number in range(1000)
    ]
    sample = sample_texts(texts, 4000, 0)
    assert len(sample) == 100
    assert not {text for _, text, split in texts if split == "heldout"} & set(sample)
    assert sorted(sample) == sorted(sample_texts(reversed(texts), 4000, 0))
    assert sorted(sample) != sorted(sample_texts(texts, 4000, 1))
    assert min(sample)[:4] < "0200" < "0800" < max(sample)[:4]


def test_one_long_text_is_cut():
    assert sample_texts([Text("d", "x" * 100, "train")], 10, 0) == ["x" * 10]
