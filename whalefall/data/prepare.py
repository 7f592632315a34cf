"""Text to a prepared data set: a tokenizer and the token shards of two splits.

The folder holds ``dataset.json`` (what is in it and how it was made), ``tokenizer.json``,
``tokenizer_config.json``, and the shards of ``train/`` and ``heldout/``.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from whalefall.config.explain import validated
from whalefall.data.dataset import PreparedSummary, Recipe, Split, SplitSummary
from whalefall.data.encode import Encoded, Encoder
from whalefall.data.selection import Text, assign_splits, sample_texts
from whalefall.data.shards import ShardWriter
from whalefall.data.sources import Document, Skipped, documents
from whalefall.data.tokenizer import Tokenizer
from whalefall.errors import UserError
from whalefall.integrity import atomic_folder, write_manifest

_DEFAULT_VOCABULARY = 32768
_SAMPLE_CHARACTERS = 2**27


def prepare(
    inputs: Iterable[Path | str | Document],
    output: Path,
    *,
    tokenizer: Tokenizer | Path | None = None,
    vocab_size: int | None = None,
    heldout_fraction: float = 0.01,
    fim_rate: float = 0.1,
    split_rate: float = 0.1,
    text_field: str = "text",
    seed: int = 0,
    workers: int | None = None,
    shard_tokens: int = 2**26,
    progress: bool = False,
) -> PreparedSummary:
    """Turn texts into the folder that ``Loader`` reads (paper 4.1).

    The result depends on the documents, the tokenizer and the settings alone, not on the number of
    workers. ``output`` appears when all is written, or not at all.

    Args:
        inputs: files, folders or documents at hand, as ``sources.documents`` takes them.
        output: the folder to write; it must not exist yet, or be empty.
        tokenizer: one to use, or its file or folder; None trains one on a sample of the texts.
        vocab_size: of the tokenizer to train; None is 32768.
        heldout_fraction: share of the documents kept out of training, at least one of two.
        fim_rate: share of the training documents rearranged for fill-in-the-middle.
        split_rate: share of the tokens joining punctuation and line breaks that is split.
        text_field: the key or column of JSON lines and Parquet that holds the text.
        seed: decides the splits, the sample for the tokenizer, the holes and the split tokens.
        workers: threads that encode; None is one a CPU core.
        shard_tokens: size at which a shard is closed; one of each split is held in memory.
        progress: show on the standard error what is going on.

    Raises:
        UserError: an input is missing or holds no usable document, a setting is out of range,
            ``output`` is in use, or the tokenizer does not fit the settings.
    """
    settings = {
        "text_field": text_field, "heldout_fraction": heldout_fraction, "fim_rate": fim_rate,
        "split_rate": split_rate, "seed": seed,
    }  # fmt: skip
    recipe = validated(Recipe, settings)
    if tokenizer is not None and vocab_size is not None:
        raise UserError("give a tokenizer, or a vocab_size to train one with, not both")
    if workers is not None and workers < 1:
        raise UserError(f"workers is {workers}; must be at least 1")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"{output} exists already: name another folder or remove it")
    with _progress_bar(shown=progress) as bar:
        corpus = _Corpus(inputs, recipe, bar)
        if tokenizer is None:
            size = _DEFAULT_VOCABULARY if vocab_size is None else vocab_size
            tokenizer = corpus.train_tokenizer(size)
        elif isinstance(tokenizer, Path):
            tokenizer = Tokenizer.load(tokenizer)
        encoder = Encoder(tokenizer, recipe)
        with atomic_folder(output) as folder:
            encoded = encoder.encode_all(corpus.texts("encoding"), workers)
            sizes = _write_shards(folder, encoded, encoder.dtype, shard_tokens)
            summary = PreparedSummary(
                vocab_size=tokenizer.vocab_size,
                dtype=encoder.dtype,
                tokenizer=tokenizer.fingerprint,
                recipe=recipe,
                train=sizes["train"],
                heldout=sizes["heldout"],
                skipped=dict(sorted(corpus.skipped.items())),
            )
            tokenizer.save(folder)
            summary.save(folder)
            write_manifest(folder, [path.name for path in folder.iterdir() if path.is_file()])
    return summary


class _Corpus:
    """The usable documents with their splits, read as often as they are asked for."""

    def __init__(
        self, inputs: Iterable[Path | str | Document], recipe: Recipe, bar: Progress
    ) -> None:
        self._inputs = list(inputs)
        self._recipe = recipe
        self._bar = bar
        self._task = bar.add_task("", total=None)
        self.skipped: Counter[str] = Counter()
        """Documents left out in the last reading, counted by reason."""

    def texts(self, activity: str) -> Iterator[Text]:
        self.skipped.clear()
        self._bar.reset(self._task, description=activity)
        return assign_splits(self._usable(), self._recipe.heldout_fraction, self._recipe.seed)

    def train_tokenizer(self, vocab_size: int) -> Tokenizer:
        texts = self.texts("reading a sample for the tokenizer")
        sample = sample_texts(texts, _SAMPLE_CHARACTERS, self._recipe.seed)
        self._bar.update(self._task, description="training the tokenizer")
        return Tokenizer.train(sample, vocab_size)

    def _usable(self) -> Iterator[Document]:
        found = documents(self._inputs, self._recipe.text_field)
        for document in self._bar.track(found, task_id=self._task):
            if isinstance(document, Skipped):
                self.skipped[document.reason] += 1
            else:
                yield document


def _write_shards(
    folder: Path, encoded: Iterable[Encoded], dtype: str, shard_tokens: int
) -> dict[Split, SplitSummary]:
    """Write each document to the shards of its split, and count."""
    splits: tuple[Split, ...] = ("train", "heldout")
    writers = {
        split: ShardWriter(folder / split, dtype=dtype, shard_tokens=shard_tokens)
        for split in splits
    }
    utf8_bytes: Counter[Split] = Counter()
    for document in encoded:
        writers[document.split].add(document.name, document.ids)
        utf8_bytes[document.split] += document.utf8_bytes
    sizes = {}
    for split, writer in writers.items():
        shards = writer.close()
        sizes[split] = SplitSummary(
            tokens=sum(shard.tokens for shard in shards),
            documents=sum(shard.documents for shard in shards),
            utf8_bytes=utf8_bytes[split],
        )
    return sizes


def _progress_bar(*, shown: bool) -> Progress:
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(),
        TimeElapsedColumn(),
    )  # fmt: skip
    return Progress(*columns, console=Console(stderr=True), disable=not shown)
