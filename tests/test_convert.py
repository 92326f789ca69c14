"""Laws of converting: every whole sample of a foreign tar once, nothing else, and never a path from inside one."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import pickle
import random
import tarfile
from pathlib import Path

import pytest
from conftest import picture
from test_foreign_tars import write_tar
from test_tar_fuzz import at_most, mutate, whole_tars

from data.convert import Reading, convert
from data.dataset import ShardedDataset
from data.errors import UserError
from data.index import load_index
from data.inspect import inspect
from data.tar import members
from launch.cli import main

FILES = [(f"c/{n}.{e}", b) for n in range(5) for e, b in (("png", picture(n)), ("cls", b"%d" % n), ("json", b"{}"))]


def held(out: Path) -> dict[str, tuple[bytes, int]]:
    dataset = ShardedDataset(out)
    return {dataset.key(n): dataset.image(n) for n in range(len(dataset))}


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress], ids=["as is", "gz", "bz2", "xz"])
def test_compressed_tars_become_shards(tmp_path: Path, pack: object) -> None:
    """By the very command that their refusal names."""
    tar = tmp_path / "t.tar"
    tar.write_bytes(pack(write_tar(tmp_path / "plain", FILES).read_bytes()))  # type: ignore[operator]
    if pack is not bytes:
        with pytest.raises(UserError) as caught:
            ShardedDataset(tar)
        command = str(caught.value).split("`")[1].split()
        assert command[:3] == ["headwater", "shard", "convert"]
        assert main([word.replace("OUT", str(tmp_path / "out")) for word in command[1:]]) == 0
    else:
        convert([str(tar)], tmp_path / "out", samples_per_shard=2, progress=False)
    assert held(tmp_path / "out") == {f"c/{n}": (picture(n), n) for n in range(5)}
    dataset = ShardedDataset(tmp_path / "out")
    assert dataset.sample(2) == {"png": picture(2), "json": b"{}"}
    assert inspect(tmp_path / "out")["problems"] == []


def test_zstd(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    raw = write_tar(tmp_path / "plain", FILES).read_bytes()
    (tmp_path / "t.tar.zst").write_bytes(zstandard.ZstdCompressor().compress(raw))
    assert convert([str(tmp_path / "t.tar.zst")], tmp_path / "out", progress=False).samples == 5


def test_a_folder_of_packed_tars_names_the_command(tmp_path: Path) -> None:
    (tmp_path / "packed").mkdir()
    for number in range(3):
        raw = write_tar(tmp_path / "plain", [(f"{number}.png", picture(number))]).read_bytes()
        (tmp_path / "packed" / f"{number}.tar.gz").write_bytes(gzip.compress(raw))
    with pytest.raises(UserError, match=r"`headwater shard convert .*/packed OUT`"):
        ShardedDataset(tmp_path / "packed")
    assert convert([str(tmp_path / "packed")], tmp_path / "out", progress=False).samples == 3


def test_what_is_left_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [
        ("a.png", picture(0)),
        ("a.pickle", pickle.dumps(1)),
        ("a.pyd", b"MZ"),
        ("b.txt", b"words"),
        ("README", b""),
    ]
    files += [("c.jpg", b"broken"), ("d.png", picture(1)), ("d.seg.png", picture(2))]
    first = write_tar(tmp_path / "1.tar", files)
    second = write_tar(tmp_path / "2.tar", [("a.png", picture(3))])
    done = convert([str(first), str(second)], tmp_path / "out", progress=False)
    assert (done.samples, done.without_picture, done.renamed) == (3, 1, 1)
    assert done.other_parts == {"pickle": 1, "pyd": 1}
    assert done.unreadable == [("c", "not a picture")]
    assert sorted(held(tmp_path / "out")) == ["a", "a~2", "d"]
    names = [member.name for tar in (tmp_path / "out").glob("*.tar") for member in members(tar)]
    assert not [name for name in names if name.endswith(("pickle", "pyd"))]
    assert main(["shard", "convert", str(first), str(tmp_path / "again")]) == 0
    assert "left out 1 parts named .pickle" in capsys.readouterr().out


@pytest.mark.parametrize("cut", ["in bytes", "between", "gzip"])
def test_salvage_takes_the_whole_samples(tmp_path: Path, cut: str) -> None:
    tar = write_tar(tmp_path / "t.tar", FILES)
    raw, found = tar.read_bytes(), list(members(tar))
    if cut == "in bytes":
        tar.write_bytes(raw[: found[9].offset + 5])
    elif cut == "between":  # two members of the fourth sample are there
        tar.write_bytes(raw[: found[11].offset - 512 * 3])
    else:
        packed = gzip.compress(raw[: found[9].offset + 5], mtime=0)
        tar.write_bytes(packed[: len(packed) - 30])
    with pytest.raises(UserError, match=r"t\.tar (is|goes)"):
        convert([str(tar)], tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    done = convert([str(tar)], tmp_path / "out", Reading(salvage=True), progress=False)
    assert len(done.damaged) == 1
    assert held(tmp_path / "out") == {f"c/{n}": (picture(n), n) for n in range(done.samples)}
    assert done.samples in (2, 3)  # the last one before the damage may lack parts, so it stays out


def test_joined_tars_are_taken_whole(tmp_path: Path) -> None:
    first = write_tar(tmp_path / "1", FILES[:6]).read_bytes()
    second = write_tar(tmp_path / "2", FILES[6:]).read_bytes()
    tar = tmp_path / "t.tar"
    tar.write_bytes(first + second)
    with pytest.raises(UserError, match="goes on behind its end marker"):
        convert([str(tar)], tmp_path / "out", progress=False)
    done = convert([str(tar)], tmp_path / "out", Reading(salvage=True), progress=False)
    assert (done.samples, done.damaged) == (5, [])
    assert held(tmp_path / "out") == {f"c/{n}": (picture(n), n) for n in range(5)}


def test_keys_with_dots(tmp_path: Path) -> None:
    """WebDataset ends them at the first dot; who means the last one says so."""
    files = [(f"set.v1/img.{n}.png", picture(n)) for n in range(3)]
    tar = write_tar(tmp_path / "t.tar", files)
    with pytest.raises(UserError, match=r"`headwater shard convert --last-dot .*t\.tar OUT`"):
        ShardedDataset(tar)
    convert([str(tar)], tmp_path / "out", Reading(last_dot=True), progress=False)
    assert held(tmp_path / "out") == {f"set.v1/img_{n}": (picture(n), -1) for n in range(3)}


EVIL = [
    "../../evil",
    "/abs/evil",
    "..",
    "a/../../b",
    "C:\\evil",
    "x\ny",
    "nul\0",
    "~/evil",
    "$(touch evil)",
    "-rf",
    "é" * 200,
]


def test_evil_names_are_keys_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading and converting make no file but the index and the dataset; links point nowhere."""
    work = tmp_path / "deep" / "er"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    tar = work / "t.tar"
    with tarfile.open(tar, "w", format=tarfile.PAX_FORMAT) as opened:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo("out")
            link.type, link.linkname = kind, "/etc"
            opened.addfile(link)
        for number, name in enumerate(EVIL):
            info = tarfile.TarInfo(f"{name}.png")
            payload = picture(number)
            info.size = len(payload)
            opened.addfile(info, io.BytesIO(payload))
    before = set(tmp_path.rglob("*"))
    dataset = ShardedDataset(tar)
    payloads = {dataset.image(n)[0] for n in range(len(dataset))}
    assert payloads <= {picture(n) for n in range(len(EVIL))}
    assert len(dataset) >= len(EVIL) - 3  # `..` and a zero byte make no keys
    assert {path.name[:6] for path in set(tmp_path.rglob("*")) - before} == {".t.tar"}
    done = convert([str(tar)], work / "made", progress=False)
    assert done.samples == len(dataset)
    new = set(tmp_path.rglob("*")) - before
    assert all(path.name.startswith(".t.tar") or "made" in path.parts for path in new)
    for shard in (work / "made").glob("*.index"):
        assert load_index(shard).key(0)


def test_bad_calls_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    text = write_tar(tmp_path / "text.tar", [("a.txt", b"hello")])
    for source, message in (
        (tmp_path / "none.tar", "does not exist"),
        (tmp_path / "empty", "holds neither"),
        (text, "holds a picture"),
    ):
        assert main(["shard", "convert", str(source), str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_mutated_tars_are_converted_in_part_or_refused(tmp_path: Path) -> None:
    tars = whole_tars()
    for seed in range(150):
        draw = random.Random(seed)
        tar = mutate(draw.choice(tars), draw)
        tar = gzip.compress(tar, 1) if seed % 3 == 0 else tar
        (tmp_path / "t.tar").write_bytes(tar[: len(tar) - draw.randrange(20)] if seed % 6 == 0 else tar)
        out = tmp_path / str(seed)
        with at_most(10):
            try:
                convert([str(tmp_path / "t.tar")], out, Reading(salvage=seed % 2 == 0), progress=False)
            except UserError:
                assert not out.exists()
    assert os.listdir(tmp_path)
