"""Laws of text sharding: nothing lost, nothing half-written, equal documents on one side."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
import tarfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from data.dataset import ShardedDataset
from data.documents import DocumentUnit, ReadCounts, read_pieces
from data.encoding import Encoded
from data.errors import UserError
from data.inspect import inspect
from data.loader import sequential
from data.text import read_documents, shard_text, split_exactly, training_sample
from data.tokenizer import SPECIAL_TOKENS, load, train

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "<|eos|>", "naïve", "東京", "trains", "🚂"]


def document(seed: int) -> str:
    random = np.random.default_rng(seed)
    return " ".join(random.choice(WORDS, size=random.integers(5, 200))) + "\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    (source / "b").mkdir(parents=True)
    for number in range(60):
        (source / ("b" if number % 2 else ".") / f"{number:03d}.txt").write_text(document(number % 50))
    return source


def stream(dataset: Path) -> tuple[dict[str, Any], list[list[int]]]:
    """Manifest and token ids of each shard, read from the tars as plain WebDataset would."""
    manifest = json.loads((dataset / "dataset.json").read_text())
    shards = []
    for shard in manifest["shards"]:
        with tarfile.open(dataset / shard["name"]) as tar:
            blocks = [np.load(io.BytesIO(tar.extractfile(member).read())) for member in tar]  # type: ignore[union-attr]
        assert all(len(block) == manifest["block_tokens"] for block in blocks[:-1])
        assert {block.dtype.str for block in blocks} == {manifest["dtype"]}
        assert sum(map(len, blocks)) == shard["tokens"]
        shards.append([int(token) for block in blocks for token in block])
    return manifest, shards


def documents_in(dataset: Path) -> list[str]:
    manifest, shards = stream(dataset)
    tokenizer = load(dataset)
    tokens = [token for shard in shards for token in shard]
    assert tokens[0] == manifest["bos"]
    starts = [place for place, token in enumerate(tokens) if token == manifest["bos"]] + [len(tokens)]
    pieces = [tokens[a:b] for a, b in pairwise(starts)]
    assert all(piece[-1] == manifest["eos"] for piece in pieces)
    assert len(tokens) == manifest["tokens"]
    return [tokenizer.decode(piece[1:-1], skip_special_tokens=False) for piece in pieces]


def test_every_document_is_in_the_shards_once_and_unchanged(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    summary = shard_text([folder], out, vocab_size=400, validation=0.3, tokens_per_shard=2048, block_tokens=128)
    train_side, valid_side = documents_in(out), documents_in(out / "validation")
    assert sorted(train_side + valid_side) == sorted(read_documents([folder]))
    assert not set(train_side) & set(valid_side)
    assert (summary["documents"], summary["validation"]["documents"]) == (len(train_side), len(valid_side))
    assert summary["bytes"] == sum(len(text.encode()) for text in train_side)
    assert (out / "tokenizer.json").read_bytes() == (out / "validation" / "tokenizer.json").read_bytes()


def test_short_texts_still_make_several_shards(folder: Path, tmp_path: Path) -> None:
    summary = shard_text([folder], tmp_path / "shards", vocab_size=400, validation=0, block_tokens=128)
    assert summary["shards"] >= 8
    assert summary["validation"] is None
    assert not (tmp_path / "shards" / "validation").exists()


def test_the_loader_reads_rows_of_the_stream(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    shard_text([folder], out, vocab_size=400, validation=0, tokens_per_shard=1024, block_tokens=128)
    dataset = ShardedDataset(out, context=50)
    rows = [row for batch in sequential(dataset, 7) for row in batch.tokens.tolist()]
    _, shards = stream(out)
    assert rows == [s[i : i + 51] for s in shards for i in range(0, len(s) - 50, 50)]


def test_the_same_input_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    for name in "ab":
        shard_text([folder], tmp_path / name, vocab_size=400, block_tokens=128)
    manifests = [json.loads((tmp_path / name / "dataset.json").read_text()) for name in "ab"]
    assert manifests[0] == manifests[1]


def test_an_interruption_leaves_nothing_behind(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data.blocks import Side

    original, calls = Side.add, []

    def interrupted(self: Side, document: Encoded) -> None:
        calls.append(document)
        if len(calls) == 40:
            raise KeyboardInterrupt
        original(self, document)

    monkeypatch.setattr(Side, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shard_text([folder], tmp_path / "shards", vocab_size=400, validation=0.4, block_tokens=64)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_given_tokenizer_is_used_and_kept(folder: Path, tmp_path: Path) -> None:
    train([document(1)], 300).save(str(tmp_path / "own.json"))
    shard_text([folder], tmp_path / "shards", tokenizer=tmp_path / "own.json", block_tokens=128)
    assert load(tmp_path / "shards").to_str() == load(tmp_path / "own.json").to_str()


def test_the_tokenizer_is_trained_on_a_bounded_sample_of_all_documents() -> None:
    texts = [f"{number:04d}" + "é" * 48 for number in range(2000)]
    sample = list(training_sample(texts, share=0.1, limit=10_000))
    assert sum(len(text.encode()) for text in sample) <= 10_000
    assert sample == list(training_sample(texts, share=0.1, limit=10_000))
    places = [int(text[:4]) for text in sample]
    assert places[0] < 100
    assert places[-1] > 900
    assert list(training_sample(texts, share=1.0)) == texts


def test_large_vocabularies_need_wider_tokens(tmp_path: Path) -> None:
    tokens = [
        *SPECIAL_TOKENS,
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        *(f"z{n}" for n in range(70_000)),
    ]
    wide = Tokenizer(models.BPE({token: place for place, token in enumerate(reversed(tokens))}, []))
    wide.pre_tokenizer, wide.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    wide.add_special_tokens(list(SPECIAL_TOKENS))
    wide.save(str(tmp_path / "wide.json"))
    (tmp_path / "a.txt").write_text(document(3))
    shard_text([tmp_path / "a.txt"], tmp_path / "out", tokenizer=tmp_path / "wide.json", validation=0)
    manifest, shards = stream(tmp_path / "out")
    assert manifest["dtype"] == "<u4"
    assert min(shards[0]) > 2**16
    assert documents_in(tmp_path / "out") == [document(3)]
    assert next(iter(sequential(ShardedDataset(tmp_path / "out", context=8), 1))).tokens[0].tolist() == shards[0][:9]


@pytest.mark.parametrize("seed", range(5))
def test_pieces_of_a_long_text_encode_like_the_whole(seed: int) -> None:
    characters = np.random.default_rng(seed).choice(list("ab1!_' \n\t\u00a0\x1c\u2028é東'"), size=3000)
    text = "".join(characters)
    tokenizer = train([text], 300)
    pieces = list(split_exactly(text, 100))
    assert len(pieces) > 10
    assert [i for piece in pieces for i in tokenizer.encode(piece).ids] == tokenizer.encode(text).ids


def test_documents_by_line_paragraph_and_field(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("one\ntwo\n\n\n  \nthree\n")
    (tmp_path / "b.jsonl").write_text('{"body": "four\\n\\nstill four"}\n\n{"body": "five"}\n')
    (tmp_path / "c.bin").write_bytes(b"\x00")
    (tmp_path / ".hidden.txt").write_text("hidden")
    assert list(read_documents([tmp_path / "a.md"], "line")) == ["one", "two", "three"]
    assert list(read_documents([tmp_path], "paragraph", "body")) == [
        "one\ntwo",
        "three",
        "four\n\nstill four",
        "five",
    ]
    assert list(read_documents([tmp_path / "a.md"], "file")) == ["one\ntwo\n\n\n  \nthree\n"]


def test_undecodable_and_empty_documents_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfgood \xff bad \xc3 and \xef\xbf\xbd own")
    (tmp_path / "b.txt").write_text(" \n")
    (tmp_path / "c.jsonl").write_text('{"text": "half \\ud83d pair"}')
    counts = ReadCounts()
    texts = list(read_documents([tmp_path], counts=counts))
    assert texts == ["good \ufffd bad \ufffd and \ufffd own", "half \ufffd pair"]
    assert (counts.replaced, counts.empty) == (3, 1)
    assert counts.bytes_read == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_bad_sources_get_one_sentence(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"txt": "misspelt"}\n')
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    for source, message in [
        (bad, r"line 2: no string under 'text' \(found: txt\)"),
        (empty, "no text in there"),
        (nothing, "holds no text files"),
        (tmp_path / "missing", "does not exist"),
    ]:
        with pytest.raises(UserError, match=message):
            shard_text([source], tmp_path / "out", vocab_size=300)
        assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="no text was named"):
        shard_text([], tmp_path / "out")


def test_an_existing_dataset_is_replaced_only_when_asked(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    shard_text([folder], out, vocab_size=300, validation=0.3, block_tokens=128)
    with pytest.raises(UserError, match="already exists"):
        shard_text([folder], out, vocab_size=300)
    shard_text([folder], out, vocab_size=310, validation=0, block_tokens=128, overwrite=True)
    assert json.loads((out / "dataset.json").read_text())["vocab_size"] == 310
    assert not (out / "validation").exists()


def compressed(path: Path, suffix: str) -> None:
    """Replace a file by its compressed self."""
    raw = path.read_bytes()
    packed = gzip.compress(raw) if suffix == ".gz" else zstandard.ZstdCompressor().compress(raw)
    path.unlink()
    path.with_name(path.name + suffix).write_bytes(packed)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("unit", ["file", "line", "paragraph"])
def test_compressed_files_hold_the_same_documents(folder: Path, suffix: str, unit: DocumentUnit) -> None:
    (folder / "c.jsonl").write_text("".join(json.dumps({"text": document(n)}) + "\n" for n in range(9)))
    expected = list(read_documents([folder], unit))
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        compressed(path, suffix)
    counts, told = ReadCounts(), []
    assert sorted(read_documents([folder], unit, counts=counts, advance=told.append)) == sorted(expected)
    assert sum(told) == counts.bytes_read == sum(path.stat().st_size for path in folder.rglob(f"*{suffix}"))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_damaged_compressed_files_get_one_sentence(tmp_path: Path, suffix: str) -> None:
    whole = tmp_path / "a.txt"
    whole.write_bytes(np.random.default_rng(0).bytes(50_000))
    compressed(whole, suffix)
    path = tmp_path / f"a.txt{suffix}"
    packed = path.read_bytes()
    for damaged in (packed[: len(packed) // 2], b"\x00" * 20 + packed[20:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged or cut off"):
            list(read_documents([path]))


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = [document(number) for number in range(3000)] + ["", None]
    parquet.write_table(arrow.table({"id": range(len(texts)), "text": texts}), tmp_path / "a.parquet")
    counts = ReadCounts()
    assert list(read_documents([tmp_path], counts=counts)) == texts[:3000]
    assert counts.empty == 2
    assert counts.bytes_read == (tmp_path / "a.parquet").stat().st_size
    for field, message in (("body", r"no strings in a column 'body' \(found: id, text\)"), ("id", "no strings")):
        with pytest.raises(UserError, match=message):
            list(read_documents([tmp_path], field=field))
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + bytes(40))
    with pytest.raises(UserError, match=r"cannot read .*a\.parquet"):
        list(read_documents([tmp_path]))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_long_documents_are_streamed_and_stay_whole(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces, whatever their size, give the tokens of the whole, one beginning and one end a document."""
    texts = ["\ufeff" + " ".join(document(seed) for seed in range(20 * n, 20 * n + 20)) for n in range(4)]
    texts[3] += "\ufeff x"  # no mark of the encoding when it is not in front
    texts = [text.replace("\n", "\n \n\t ") for text in texts]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
        if suffix:
            compressed(tmp_path / f"{number}.txt", suffix)
    train(texts, 400).save(str(tmp_path / "tokenizer.json"))
    sources = [tmp_path / f"{number}.txt{suffix}" for number in range(4)]
    arguments = {"tokenizer": tmp_path / "tokenizer.json", "validation": 0, "block_tokens": 64}
    shard_text(sources, tmp_path / "whole", **arguments)
    monkeypatch.setattr("data.documents.PIECE", 100)
    pieces = list(read_pieces(sources))
    assert len(pieces) > 100
    assert sum(piece.first for piece in pieces) == sum(piece.last for piece in pieces) == 4
    shard_text(sources, tmp_path / "pieces", **arguments)
    found = documents_in(tmp_path / "pieces")
    assert found == documents_in(tmp_path / "whole") == [text.removeprefix("\ufeff") for text in texts]
    tokens = [[token for shard in stream(tmp_path / name)[1] for token in shard] for name in ("pieces", "whole")]
    assert tokens[0] == tokens[1]


NO_MAIN = """
from tokenizers import Tokenizer, models
from data.documents import Piece
from data.encoding import encode
words = {f"word{number}": number for number in range(9000)}  # more than a pipe holds
print(len(list(encode(Tokenizer(models.WordLevel(words, "word0")), [Piece("word1", True, True)], workers=2))))
"""


def test_workers_that_cannot_start_are_an_error_not_a_hang() -> None:
    """A script from standard input has no file that a fresh process could read."""
    done = subprocess.run([sys.executable, "-"], input=NO_MAIN, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "could not start" in done.stderr.splitlines()[-1]


def test_workers_change_nothing(folder: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        arguments = {"vocab_size": 400, "validation": 0.2, "block_tokens": 128, "workers": workers}
        shard_text([folder], tmp_path / f"{workers}", **arguments)
    manifests = [(tmp_path / f"{workers}" / "dataset.json").read_bytes() for workers in (1, 2)]
    assert manifests[0] == manifests[1]


def test_duplicates_and_tails_are_reported(folder: Path, tmp_path: Path) -> None:
    """Ten of the sixty documents are there twice."""
    shard_text([folder], tmp_path / "out", vocab_size=400, validation=0, tokens_per_shard=1024, block_tokens=128)
    report = inspect(tmp_path / "out")
    assert report["duplicates"] == 10
    manifest, shards = stream(tmp_path / "out")
    left = sum((len(shard) - 1) % 256 if len(shard) > 256 else len(shard) for shard in shards)
    assert report["tail_at_context"] == {"256": round(left / manifest["tokens"], 6)}
    assert "duplicates" not in inspect(tmp_path / "out", verify=False)
