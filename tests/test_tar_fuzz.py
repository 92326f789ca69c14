"""Laws of damaged tars: never a crash, never a hang, never a wrong sample that nobody notices.

Tars of every kind are mutated: bytes flipped and set, blocks moved, doubled, dropped and zeroed, sizes forged
(with checksums made right again), ends cut. Python's `tarfile` is the judge of foreign ones, the originals are
the judge of ours.
"""

from __future__ import annotations

import io
import random
import shutil
import signal
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import picture

from data.dataset import ShardedDataset
from data.errors import UserError
from data.index import index_tar
from data.shards import DatasetWriter
from data.tar import BLOCK, walk

SEEDS_FAST, SEEDS_SLOW = 600, 12_000
FORGED_SIZES = [b"-0000000512\0", b"77777777777\0", b"0o000000017\0", b"0000_000_12\0", b" 0000000777 ", b"\xff" * 12]
FORGED_SIZES += [bytes(12)]
FORGED_RECORDS = [b"18 path=../x.png\n", b"9999 path=a\n", b"-1 path=a\n", b"13 size=9999\n", b"0 a=b\n", bytes(12)]
FORGED_RECORDS += [b"13 size=-512\n", b"511 size=" + b"9" * 501 + b"\n", b"22 GNU.sparse.major=1\n", b"11 path=\0x\n"]


def whole_tars() -> list[bytes]:
    """Small tars of three formats, with long names, folders, links and labels."""
    made = []
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
            for number in range(4):
                folder = tarfile.TarInfo(f"folder{number}")
                folder.type = tarfile.DIRTYPE
                tar.addfile(folder)
                long = format != tarfile.USTAR_FORMAT and number == 2
                key = "n" * 150 + "/" + "k" * 120 if long else f"folder{number}/a"
                for extension, payload in (("png", bytes([number + 1]) * (300 * number)), ("cls", b"%d" % number)):
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size, info.mtime = len(payload), 1700000000.25
                    tar.addfile(info, io.BytesIO(payload))
            link = tarfile.TarInfo("link")
            link.type, link.linkname = tarfile.SYMTYPE, "t" * (300 if format != tarfile.USTAR_FORMAT else 50)
            tar.addfile(link)
        made.append(buffer.getvalue())
    return made


def seal(tar: bytearray, block: int) -> None:
    """Make the checksum of a header right again."""
    header = tar[block : block + BLOCK]
    if len(header) == BLOCK:
        header[148:156] = b" " * 8
        tar[block + 148 : block + 156] = f"{sum(header):06o}\0 ".encode()


def mutate(whole: bytes, draw: random.Random) -> bytes:
    tar = bytearray(whole)
    for _ in range(draw.randint(1, 3)):
        blocks = max(1, len(tar) // BLOCK)
        block, other = draw.randrange(blocks) * BLOCK, draw.randrange(blocks) * BLOCK
        kind = draw.randrange(11)
        if kind == 0 and tar:
            tar[draw.randrange(len(tar))] ^= 1 << draw.randrange(8)
        elif kind == 1 and tar:
            tar[draw.randrange(len(tar))] = draw.choice([0, 32, 45, 48, 55, 95, 128, 255])
        elif kind == 2:
            del tar[draw.randrange(len(tar) + 1) :]
        elif kind == 3:
            del tar[block : block + BLOCK]
        elif kind == 4:
            tar[block:block] = tar[other : other + BLOCK]
        elif kind == 5:
            tar[block : block + BLOCK] = tar[other : other + BLOCK]
        elif kind == 6:
            tar[block : block + BLOCK] = bytes(BLOCK)
        elif kind == 7:  # a forged size
            wide = b"\x80" + draw.getrandbits(draw.choice([8, 40, 88])).to_bytes(11, "big")
            tar[block + 124 : block + 136] = draw.choice([*FORGED_SIZES, wide, b"%011o\0" % draw.randrange(3000)])
            seal(tar, block)
        elif kind == 8:  # a forged type
            tar[block + 156 : block + 157] = draw.choice([b"%c" % letter for letter in b"xgLKS1570?\0"])
            seal(tar, block)
        elif kind == 9:  # a forged pax record
            body = draw.choice(FORGED_RECORDS)[:BLOCK]
            tar[block : block + len(body)] = body
        else:
            tar += draw.randbytes(draw.choice([1, 511, 512, 1024]))
    return bytes(tar)


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """A hang becomes a failure."""

    def late(*_: object) -> None:
        raise AssertionError("still busy")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def listed(tar: bytes) -> list[tuple[str, int, int]] | None:
    """What `tarfile` lists, None where it gives up."""
    try:
        with tarfile.open(fileobj=io.BytesIO(tar), mode="r:") as opened:
            return [(member.name, member.offset_data, member.size) for member in opened if member.isreg()]
    except (tarfile.TarError, ValueError, EOFError, OverflowError, UnicodeError):
        return None


def check_foreign(seeds: range) -> int:
    """Walk mutated tars; returns how many were still accepted."""
    tars, accepted, named = whole_tars(), 0, 0
    for seed in seeds:
        draw = random.Random(seed)
        tar = mutate(draw.choice(tars), draw)
        with at_most(10):
            try:
                ours = [tuple(member) for member in walk(io.BytesIO(tar), len(tar), "the.tar")]
            except UserError as error:
                named += "the.tar" in str(error)
                continue
        accepted += 1
        assert ours == listed(tar), seed
        assert all(0 <= offset <= offset + size <= len(tar) for _, offset, size in ours), seed
    assert accepted + named == len(seeds)
    return accepted


def check_index(seeds: range, path: Path) -> None:
    """The whole way from a file to an index: whatever is wrong is one sentence."""
    tars = whole_tars()
    for seed in seeds:
        draw = random.Random(seed)
        path.write_bytes(mutate(draw.choice(tars), draw))
        try:
            with at_most(10):
                index = index_tar(path)
        except UserError:
            continue
        assert index.offsets.min() >= 0, seed
        assert (index.offsets + index.sizes).max() <= path.stat().st_size
        assert len(index.keys) == len(index) == len(set(zip(index.keys, index.offsets[:, 0].tolist(), strict=True)))


def check_ours(seeds: range, folder: Path) -> tuple[int, int]:
    """Mutate a tar or an index of ours; every sample is as it was written or an error.

    Returns how many reads were right and how many were refused.
    """
    with DatasetWriter(folder, "images", 10) as writer:
        for number in range(6):
            writer.add(f"k/{number}", {"png": picture(number)}, number)
    tar, index = folder / "shard-000000.tar", folder / "shard-000000.index"
    originals = {path: path.read_bytes() for path in (tar, index)}
    expected, right, refused = [(picture(number), number) for number in range(6)], 0, 0
    for seed in seeds:
        draw = random.Random(seed)
        victim = draw.choice([tar, tar, index])
        victim.write_bytes(mutate(originals[victim], draw))
        with at_most(20):
            try:
                dataset = ShardedDataset(folder, tolerance=draw.randrange(2))
            except UserError:
                dataset = None
            for number in range(6):
                try:
                    assert dataset is None or dataset.image(number) == expected[number], seed
                    assert dataset is None or dataset.key(number) == f"k/{number}", seed
                    right += dataset is not None
                except UserError:
                    refused += 1
        victim.write_bytes(originals[victim])
    return right, refused


def test_mutated_foreign_tars_are_listed_as_tarfile_lists_them_or_refused() -> None:
    accepted = check_foreign(range(SEEDS_FAST))
    assert SEEDS_FAST // 20 < accepted < SEEDS_FAST  # the mutations are neither harmless nor hopeless


def test_mutated_foreign_tars_are_indexed_or_refused_in_one_sentence(tmp_path: Path) -> None:
    check_index(range(SEEDS_FAST // 2), tmp_path / "t.tar")


def test_mutated_shards_of_ours_give_the_right_sample_or_none(tmp_path: Path) -> None:
    right, refused = check_ours(range(SEEDS_FAST // 2), tmp_path / "ours")
    assert min(right, refused) > SEEDS_FAST // 20


@pytest.mark.slow
def test_more_than_ten_thousand_mutations(tmp_path: Path) -> None:
    """Of foreign tars, their indexes, and ours: 12,000 + 6,000 + 3,000 inputs that the default tests do not use."""
    assert check_foreign(range(SEEDS_FAST, SEEDS_FAST + SEEDS_SLOW)) > SEEDS_SLOW // 20
    check_index(range(SEEDS_FAST, SEEDS_FAST + SEEDS_SLOW // 2), tmp_path / "t.tar")
    check_ours(range(SEEDS_FAST, SEEDS_FAST + SEEDS_SLOW // 4), tmp_path / "ours")
    shutil.rmtree(tmp_path / "ours")
