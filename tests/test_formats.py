"""Laws of what is found in the world: huge offsets, every kind of picture, things beside pictures."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import picture
from PIL import Image
from test_foreign_tars import write_tar

from data.dataset import ShardedDataset
from data.errors import DamagedData, UserError
from data.index import index_tar
from data.loader import sequential

HUGE = 9 * 2**30


def huge_tar(path: Path, format: int) -> Path:
    """A member of 9 GiB that takes no room on disk, and pictures before and behind it."""

    def member(name: str, size: int) -> bytes:
        info = tarfile.TarInfo(name)
        info.size = size
        return info.tobuf(format)

    with open(path, "wb") as file:
        for name in ("a", "b"):
            payload = picture(ord(name))
            file.write(member(f"{name}.png", len(payload)) + payload.ljust(-(-len(payload) // 512) * 512, b"\0"))
            if name == "a":
                file.write(member("a.bin", HUGE))
                file.seek(HUGE, 1)
        file.write(bytes(1024))
    return path


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_beyond_eight_gibibytes(tmp_path: Path, format: int) -> None:
    tar = huge_tar(tmp_path / "huge.tar", format)
    if tar.stat().st_blocks * 512 > 2**24:
        tar.unlink()
        pytest.skip("this file system knows no sparse files")
    index = index_tar(tar)
    assert index.sizes[0, index.parts.index("bin")] == HUGE
    assert index.offsets[1, index.parts.index("png")] > HUGE
    with tarfile.open(tar) as opened:
        places = {info.name: (info.offset_data, info.size) for info in opened}
    column = index.parts.index("png")
    assert places["b.png"] == (index.offsets[1, column], index.sizes[1, column])
    dataset = ShardedDataset(tar)
    assert [dataset.image(n)[0] for n in range(2)] == [picture(ord("a")), picture(ord("b"))]
    with open(tar, "r+b") as file:
        file.truncate(HUGE)
    with pytest.raises(UserError, match="is cut off: the member at byte"):
        index_tar(tar)


def encoded(image: Image.Image, format: str, **arguments: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **arguments)
    return buffer.getvalue()


def every_kind() -> dict[str, bytes]:
    """Pictures whose upper half is about (200, 200, 200) and whose lower half is black, 16 wide and 8 high."""
    grey = np.zeros((8, 16), dtype=np.uint8)
    grey[:4] = 200
    flat, deep = Image.fromarray(grey), Image.fromarray(grey.astype(np.uint16) * 257)
    ink = Image.fromarray(np.stack([np.zeros_like(grey)] * 3 + [255 - grey], axis=2), "CMYK")
    upright = flat.convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 8  # stored lying on its side; upright after a quarter turn
    lying = upright.transpose(Image.Transpose.ROTATE_270)
    return {
        "grey.jpg": encoded(flat, "JPEG", quality=95),
        "grey.png": encoded(flat, "PNG"),
        "deep.png": encoded(deep, "PNG"),
        "deep.tif": encoded(deep, "TIFF"),
        "ink.jpg": encoded(ink, "JPEG", quality=95),
        "ink.tiff": encoded(ink, "TIFF"),
        "colour.webp": encoded(upright, "WEBP", lossless=True),
        "colour.bmp": encoded(upright, "BMP"),
        "palette.gif": encoded(upright.quantize(4), "GIF"),
        "palette.png": encoded(upright.quantize(4), "PNG"),
        "seethrough.png": encoded(upright.convert("RGBA"), "PNG"),
        "two.png": encoded(flat.convert("1", dither=Image.Dither.NONE), "PNG"),
        "lying.jpg": encoded(lying, "JPEG", quality=95, exif=exif),
        "lying.webp": encoded(lying, "WEBP", lossless=True, exif=exif),
    }


def test_every_kind_of_picture_is_read_alike(tmp_path: Path) -> None:
    """Grey, 16 bits, CMYK, palettes, transparency, EXIF rotation: the same upright RGB, from a tar made elsewhere."""
    kinds = every_kind()
    files = [(f"{n}.{name.split('.')[1]}", payload) for n, (name, payload) in enumerate(kinds.items())]
    tar = write_tar(tmp_path / "t.tar", files)
    batch = next(sequential(ShardedDataset(tar), len(kinds), canvas=16))
    for number, name in enumerate(kinds):
        assert batch.sizes[number].tolist() == [8, 16], name
        pixels = batch.images[number, :, :8].float()
        bright = 255 if name == "two.png" else 200
        assert (pixels[:, :3] - bright).abs().max() < 16, name
        assert pixels[:, 5:].max() < 16, name


def test_what_lies_beside_a_picture_is_read_too(tmp_path: Path) -> None:
    """Captions and JSON, by their part's name; parts that one sample lacks are not there."""
    about = {"caption": "a cat", "boxes": [[1, 2, 3, 4]]}
    files = [("a.png", picture(0)), ("a.txt", "ein Bär".encode()), ("a.json", json.dumps(about).encode())]
    files += [("b.png", picture(1)), ("b.seg.png", picture(2)), ("b.cls", b"4")]
    dataset = ShardedDataset(write_tar(tmp_path / "t.tar", files))
    first, second = dataset.sample(0), dataset.sample(1)
    assert first["txt"].decode() == "ein Bär"
    assert json.loads(first["json"]) == about
    assert second == {"png": picture(1), "seg.png": picture(2), "cls": b"4"}
    assert dataset.image(1) == (picture(1), 4)


def test_one_odd_picture_part_is_the_picture(tmp_path: Path) -> None:
    """`KEY.image.jpg`, as some tools write; with two such parts nobody can tell."""
    body = picture(0, format="JPEG")
    dataset = ShardedDataset(write_tar(tmp_path / "1.tar", [("a.image.jpg", body), ("a.json", b"{}")]))
    assert dataset.image(0)[0] == body
    two = write_tar(tmp_path / "2.tar", [("a.left.jpg", body), ("a.right.jpg", body)])
    with pytest.raises(UserError, match=r"holds no pictures, only left\.jpg, right\.jpg"):
        ShardedDataset(two)
    with pytest.raises(UserError, match="two parts 'jpg'"):
        ShardedDataset(write_tar(tmp_path / "3.tar", [("a.jpg", body), ("a.jpg", body)]))


def test_a_tar_that_goes_away_under_a_reader_is_named(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", [("a.png", picture(0)), ("b.png", picture(1))])
    dataset = ShardedDataset(tar)
    tar.unlink()
    with pytest.raises(DamagedData, match=r"t\.tar is missing|cannot read .*t\.tar"):
        dataset.image(0)
