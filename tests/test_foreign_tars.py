"""Laws of tars made elsewhere: indexed as `tarfile` and WebDataset see them, or refused in one sentence."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import tarfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import pytest
import webdataset
from conftest import picture
from hypothesis import given, settings
from hypothesis import strategies as st

import data.foreign
from data.dataset import ShardedDataset
from data.errors import UserError
from data.index import index_tar
from data.inspect import inspect
from data.tar import members

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def write_tar(path: Path, files: Iterable[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, payload in files:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            info.mtime = 1.5  # a float: a pax header for every member, as many writers leave
            tar.addfile(info, io.BytesIO(payload))
    return path


def seen_by_tarfile(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar if member.isreg()]  # type: ignore[union-attr]


def seen_by_us(path: Path) -> list[tuple[str, bytes]]:
    raw = path.read_bytes()
    return [(member.name, raw[member.offset : member.offset + member.size]) for member in members(path)]


@pytest.mark.parametrize("format", FORMATS)
def test_the_header_walk_agrees_with_tarfile(tmp_path: Path, format: int) -> None:
    path = tmp_path / "mixed.tar"
    with tarfile.open(path, "w", format=format) as tar:
        for number, name in enumerate(
            ["a.png", "p" * 60 + "/" + "q" * 90 + ".png", "ж/日本.png", "x.seg.png", "e.txt"]
        ):
            info = tarfile.TarInfo(name)
            payload = b"x" * (number * 511)
            info.size, info.mtime, info.uname = len(payload), 1700000000.5, "someone"
            tar.addfile(info, io.BytesIO(payload))
            for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
                other = tarfile.TarInfo(f"other-{number}-{kind.decode()}")
                other.type, other.linkname = kind, "a.png"
                tar.addfile(other)
    assert seen_by_us(path) == seen_by_tarfile(path)
    assert len(seen_by_us(path)) == 5


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_links_to_long_names(tmp_path: Path, format: int) -> None:
    path = tmp_path / "long.tar"
    with tarfile.open(path, "w", format=format) as tar:
        for number in range(3):
            link = tarfile.TarInfo("l" * 200)
            link.type, link.linkname = tarfile.SYMTYPE, "t" * 300
            tar.addfile(link)
            info = tarfile.TarInfo(f"{number}/" + "n" * 300 + ".png")
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
        short = tarfile.TarInfo("short.png")  # the long name before it must not stick
        tar.addfile(short, io.BytesIO(b""))
    assert seen_by_us(path) == seen_by_tarfile(path)
    assert len(seen_by_us(path)) == 4


def test_sizes_in_base_256_and_in_pax_records(tmp_path: Path) -> None:
    # As for members above 8 GiB, which no test should write.
    info = tarfile.TarInfo("big.png")
    info.size = 5
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\x80" + (5).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    path = tmp_path / "big.tar"
    path.write_bytes(bytes(header) + b"hello".ljust(512, b"\0") + bytes(1024))
    assert seen_by_us(path) == seen_by_tarfile(path) == [("big.png", b"hello")]
    info.pax_headers = {"size": "5"}
    raw = bytearray(info.tobuf(tarfile.PAX_FORMAT))
    last = bytearray(raw[-512:])
    last[124:136] = b"00000000000\0"
    last[148:156] = b" " * 8
    last[148:156] = f"{sum(last):06o}\0 ".encode()
    path.write_bytes(bytes(raw[:-512] + last) + b"hello".ljust(512, b"\0") + bytes(1024))
    assert seen_by_us(path) == seen_by_tarfile(path) == [("big.png", b"hello")]


def test_a_hard_link_that_names_a_size_has_no_bytes(tmp_path: Path) -> None:
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname, link.size = tarfile.LNKTYPE, "a.png", 700
    after = tarfile.TarInfo("b.png")
    after.size = 2
    path = tmp_path / "links.tar"
    path.write_bytes(link.tobuf() + after.tobuf() + b"ok".ljust(512, b"\0") + bytes(1024))
    assert seen_by_us(path) == seen_by_tarfile(path) == [("b.png", b"ok")]


@given(
    names=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=150), max_size=6
    ),
    format=st.sampled_from(FORMATS[1:]),
    sizes=st.lists(st.integers(0, 1300), min_size=6, max_size=6),
)
@settings(max_examples=60, deadline=None)
def test_any_names_and_sizes_are_found_as_tarfile_finds_them(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], format: int, sizes: list[int]
) -> None:
    path = tmp_path_factory.mktemp("any") / "any.tar"
    files = [(name, os.urandom(size)) for name, size in zip(names, sizes, strict=False) if not name.endswith("/")]
    write_tar(path, files, format)
    assert seen_by_us(path) == [(name, payload) for name, payload in files]


@pytest.mark.parametrize("format", FORMATS)
def test_samples_are_grouped_as_webdataset_groups_them(tmp_path: Path, format: int) -> None:
    files = []
    for number in range(4):
        key = f"set.v1/img_{number}"
        parts = [("jpg", picture(number, format="JPEG")), ("cls", str(number * 10).encode()), ("json", b"{}")]
        parts.append(("seg.png", picture(number + 50)))
        files += [(f"{key}.{extension.upper() if number == 3 else extension}", body) for extension, body in parts]
    path = write_tar(tmp_path / "wds.tar", files, format)
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
    dataset = ShardedDataset(path)
    assert [dataset.key(n) for n in range(len(dataset))] == [sample["__key__"] for sample in samples]
    for number, sample in enumerate(samples):
        assert dataset.image(number) == (sample["jpg"], int(sample["cls"]))
    assert dataset.labels().tolist() == [0, 10, 20, 30]
    report = inspect(path)
    assert report["labels"] == {"0": 1, "10": 1, "20": 1, "30": 1}
    assert report["problems"] == []


def test_things_without_a_picture_are_passed_over(tmp_path: Path) -> None:
    files = [("README.md", b"hello"), ("noext", b""), (".hidden", b""), ("a.png", picture(0)), ("meta.json", b"{}")]
    path = write_tar(tmp_path / "t.tar", [*files, ("b.jpg", picture(1, format="JPEG")), ("b.cls", b" 7\n")])
    dataset = ShardedDataset([path])
    assert [dataset.key(n) for n in range(len(dataset))] == ["a", "b"]
    assert dataset.labels().tolist() == [-1, 7]
    text = write_tar(tmp_path / "text.tar", [("a.txt", b"hello")])
    with pytest.raises(UserError, match=r"text\.tar holds no pictures, only txt"):
        ShardedDataset(text)


@pytest.mark.parametrize("label", [b"cat", b"--5", b"1.5", b"", b"9" * 30, "²".encode()])
def test_a_label_that_is_no_number_is_named(tmp_path: Path, label: bytes) -> None:
    path = write_tar(tmp_path / "t.tar", [("a.png", picture(0)), ("a.cls", label)])
    with pytest.raises(UserError, match=r"t\.tar: the label of sample 'a' is"):
        ShardedDataset(path)


def test_huge_class_numbers_do_not_fill_the_memory(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar", [("a.png", picture(0)), ("a.cls", b"999999999999")])
    assert inspect(path)["labels"] == {"999999999999": 1}


def test_compressed_truncated_and_other_files_are_refused(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", [(f"{n}.png", picture(n, 30, 30)) for n in range(3)])
    payload = whole.read_bytes()
    last = list(members(whole))[-1]
    cases = {
        "zipped": (gzip.compress(payload), r"gzip-compressed.*`headwater shard convert .*zipped\.tar OUT`"),
        "bz2": (bz2.compress(payload), "bzip2-compressed"),
        "xz": (lzma.compress(payload), "xz-compressed"),
        "between": (payload[: last.offset - 512], r"without an end marker.*convert --salvage .*between\.tar OUT"),
        "joined": (payload + payload, r"goes on behind its end marker.*convert --salvage .*joined\.tar OUT"),
        "in_bytes": (payload[: last.offset + 10], "the member at byte .* runs past its end"),
        "in_header": (payload[: last.offset - 100], "cut off"),
        "in_padding": (payload[: last.offset + last.size + 1], "cut off"),
        "nothing": (b"", "cut off"),
        "random": (os.urandom(4096), "not a tar or is damaged"),
        "blank": (bytes(10240), "no samples"),
        "damaged": (payload[: last.offset - 500] + b"?" + payload[last.offset - 499 :], "damaged: bad header"),
    }
    for name, (damaged, message) in cases.items():
        path = tmp_path / f"{name}.tar"
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=message) as caught:
            ShardedDataset(path)
        assert f"{name}.tar" in str(caught.value)
    with pytest.raises(UserError, match=r"gone\.tar does not exist"):
        ShardedDataset([whole, tmp_path / "gone.tar"])


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_no_damage_makes_a_traceback(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("damage") / "t.tar"
    format = data.draw(st.sampled_from(FORMATS))
    files = [("a" * 90 + f"{n}.png", b"x" * 600) for n in range(2)] + [("b.cls", b"3")]
    payload = bytearray(write_tar(path, files, format).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, 5000))] = data.draw(st.integers(0, 255))
    path.write_bytes(payload[: data.draw(st.integers(0, len(payload)))])
    with suppress(UserError):
        index_tar(path)


def test_a_folder_a_glob_and_a_list_open_the_same_dataset(tmp_path: Path) -> None:
    tars = [write_tar(tmp_path / f"{n}.tar", [(f"{n}-{i}.png", picture(i)) for i in range(n + 1)]) for n in range(3)]
    opened = [ShardedDataset(source) for source in (tmp_path, str(tmp_path / "*.tar"), tars)]
    assert {dataset.fingerprint for dataset in opened} == {opened[0].fingerprint}
    assert all(dataset.counts.tolist() == [1, 2, 3] for dataset in opened)


def test_an_index_that_cannot_lie_beside_its_tar_goes_to_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    tar = write_tar(shards / "t.tar", [("a.png", picture(0))])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    original = data.foreign.ShardIndex.save

    def save(self: data.foreign.ShardIndex, path: Path) -> None:
        if path.parent == shards:  # permissions would not stop a superuser
            raise PermissionError(13, "Permission denied")
        original(self, path)

    monkeypatch.setattr(data.foreign.ShardIndex, "save", save)
    assert ShardedDataset(tar).image(0) == (picture(0), -1)
    assert [path.name for path in shards.iterdir()] == ["t.tar"]
    (cached,) = (tmp_path / "cache" / "headwater" / "index").iterdir()
    monkeypatch.setattr(data.foreign, "index_tar", None)  # would fail if it were walked again
    assert ShardedDataset(tar).image(0) == (picture(0), -1)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cached.write_bytes(b"damaged")
    assert ShardedDataset(tar).image(0) == (picture(0), -1)  # walked again


def test_a_foreign_tar_that_changes_while_open_is_noticed(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", [("a.png", picture(0)), ("b.png", picture(1))])
    dataset = ShardedDataset(tar)
    write_tar(tar, [("a.png", picture(0))] + [(f"x{n}.png", picture(n, 60, 60)) for n in range(3)])
    with pytest.raises(UserError, match="has changed since it was indexed"):
        dataset.image(1)
