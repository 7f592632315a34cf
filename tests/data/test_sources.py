import gzip
import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from whalefall.data.sources import Document, Skipped, documents
from whalefall.errors import UserError

TEXTS = ["first\r\nlines\n", "zweites Stück", "三", ' {"quoted": 1}']


def texts(*inputs, **options) -> list[str]:
    return [item.text for item in documents(inputs, **options) if isinstance(item, Document)]


def skipped(*inputs, **options) -> Counter[str]:
    return Counter(
        item.reason for item in documents(inputs, **options) if isinstance(item, Skipped)
    )


def json_lines(rows: list[str], field: str = "text") -> bytes:
    return b"".join(json.dumps({field: text}).encode() + b"\n" for text in rows)


def write_all_forms(folder):
    """The same texts as a folder of files, JSON lines (plain and packed) and Parquet."""
    (folder / "files").mkdir()
    for number, text in enumerate(TEXTS):
        (folder / "files" / f"{number}.txt").write_bytes(text.encode())
    (folder / "a.jsonl").write_bytes(json_lines(TEXTS))
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(json_lines(TEXTS)))
    with pa.output_stream(folder / "a.jsonl.zst", compression="zstd") as file:
        file.write(json_lines(TEXTS))
    pq.write_table(pa.table({"id": [1, 2, 3, 4], "text": TEXTS}), folder / "a.parquet")
    return [folder / name for name in "files a.jsonl a.jsonl.gz a.jsonl.zst a.parquet".split()]


def test_every_form_gives_the_same_texts(tmp_path):
    for path in write_all_forms(tmp_path):
        assert texts(path) == TEXTS, path
    assert texts(*(Document(str(n), text) for n, text in enumerate(TEXTS))) == TEXTS


def test_names_are_distinct_and_do_not_depend_on_the_place(tmp_path):
    names = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        inputs = write_all_forms(tmp_path / place)
        names.append([item.name for item in documents([*inputs, inputs[1]])])
    assert names[0] == names[1]
    assert len(set(names[0])) == len(names[0])
    assert {"files/0.txt", "a.jsonl:1", "a.jsonl (2):1", "a.parquet:4"} <= set(names[0])


def test_folders_are_walked_in_order_without_hidden_entries(tmp_path):
    for name in ("b.py", "a.md", "sub/c.rs", ".git/config.txt", ".hidden.txt", "sub/x.bin"):
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "root" / "sub" / "rows.jsonl").write_bytes(json_lines(["row"]))
    assert texts(tmp_path / "root") == ["a.md", "b.py", "sub/c.rs", "row"]
    assert skipped(tmp_path / "root") == {"unknown file type": 1}


def test_a_single_file_is_read_whatever_its_suffix(tmp_path):
    (tmp_path / "LICENSE").write_text("free")
    assert texts(tmp_path / "LICENSE") == ["free"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabc")
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + json_lines(["abc"]))
    assert texts(tmp_path / "a.txt", tmp_path / "a.jsonl") == ["abc", "abc"]


def test_unusable_files_are_counted_by_reason(tmp_path):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "blank.txt").write_bytes(b" \n\t\n")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "broken.jsonl.gz").write_bytes(gzip.compress(json_lines(["x"] * 999))[:-20])
    (tmp_path / "link.txt").symlink_to(tmp_path / "gone.txt")
    assert texts(tmp_path)[-1] == "good"
    assert skipped(tmp_path) == {"not UTF-8": 1, "empty": 2, "unreadable": 2}


def test_unusable_json_lines_are_counted_by_reason(tmp_path):
    lines = [
        b'{"text": "good"}', b"", b'{"text": "cut', b'{"other": "x"}', b'{"text": 3}', b"[1]",
        b'{"text": ""}', b'{"text": "\xff"}', b'{"text": "\\ud800"}', b"[" * 100_000,
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    assert texts(tmp_path / "a.jsonl") == ["good"]
    assert skipped(tmp_path / "a.jsonl") == {"malformed": 5, "empty": 1, "not UTF-8": 2}


def test_unusable_parquet_rows_are_counted_by_reason(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [b"good", None, b"", b"\xff"]}), path)
    assert texts(path) == ["good"]
    assert skipped(path) == {"malformed": 1, "empty": 1, "not UTF-8": 1}


def test_the_text_field_is_chosen(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines(["x"], field="content"))
    pq.write_table(pa.table({"content": ["y"]}), tmp_path / "a.parquet")
    assert texts(tmp_path, text_field="content") == ["x", "y"]
    with pytest.raises(UserError, match=r"2 malformed.*'text'"):
        texts(tmp_path)


def test_a_missing_path_is_named_before_any_reading(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match="nowhere"):
        next(documents([tmp_path / "a.txt", tmp_path / "nowhere"]))


def test_nothing_usable_is_an_error(tmp_path):
    with pytest.raises(UserError, match="nothing there"):
        texts(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="1 not UTF-8"):
        texts(tmp_path)
