"""Masks, a class number for every pixel: in a folder beside the pictures', or as a part of samples in shards."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.dataset import ShardedDataset
from data.errors import DamagedData, UserError
from data.images import UnreadableImage, check_pixels, inside
from data.picture_files import from_folders
from finetune.pictures import PictureFiles, PictureSource

UNKNOWN = 255
"""Class number of pixels that neither loss nor score counts."""
PICTURE_FOLDERS = ("images", "pictures", "image", "img")
MASK_FOLDERS = ("masks", "annotations", "labels", "mask", "segmentation")
MASK_PARTS = ("mask.png", "mask", "seg.png", "png")
"""Names of a sample's mask in shards, the first that is there; `png` beside a picture of another format."""


class MaskSource(Protocol):
    """Encoded masks by number."""

    def mask(self, identity: int) -> bytes:
        """One encoded mask."""

    def key(self, identity: int) -> str:
        """Its name."""


@dataclass(frozen=True)
class MaskFiles:
    """Masks in files."""

    paths: list[Path]

    def mask(self, identity: int) -> bytes:
        return self.paths[identity].read_bytes()

    def key(self, identity: int) -> str:
        return str(self.paths[identity])


@dataclass(frozen=True)
class ShardMasks:
    """Masks in shards, as one part of each sample."""

    dataset: ShardedDataset
    part: str

    def mask(self, identity: int) -> bytes:
        parts = self.dataset.sample(identity)
        if self.part not in parts:
            raise DamagedData(f"sample {self.key(identity)} has no part .{self.part}, where others have their mask")
        return parts[self.part]

    def key(self, identity: int) -> str:
        return f"{self.dataset.key(identity)!r} in {self.dataset.shard_name(identity)}"


class Masked(NamedTuple):
    """Pictures and masks of the same numbers."""

    pictures: PictureSource
    masks: MaskSource
    names: list[str]
    """Of the samples, the roots of held-out shares."""
    classes: list[str] | None
    """Of the class numbers in order, where the source names them."""
    fingerprint: str


def read_masked(source: str | Path) -> Masked:
    """Pictures with masks.

    A folder holds the folders `images` and `masks` (or others of `PICTURE_FOLDERS`, `MASK_FOLDERS`), with a
    PNG mask of the same name for every picture, and perhaps a `classes.txt` of names, one a line from number
    0. Shards hold a mask beside each picture, in a part of `MASK_PARTS`; their `classes` are the names.

    Raises:
        UserError: another layout, a picture without mask or a mask without picture.
    """
    path = Path(source)
    pictures = next((path / name for name in PICTURE_FOLDERS if (path / name).is_dir()), None)
    masks = next((path / name for name in MASK_FOLDERS if (path / name).is_dir()), None)
    if pictures is None and masks is None and (not path.is_dir() or any(path.glob("*.tar"))):
        return _from_shards(source)
    if pictures is None or masks is None:
        raise UserError(
            f"{path} has no folders 'images' and 'masks' side by side; a segmentation task needs pictures and masks"
        )
    named = {str(Path(name).with_suffix("")): name for name, _ in from_folders(pictures)}
    drawn = {str(Path(name).with_suffix("")): name for name, _ in from_folders(masks)}
    _refuse_unpaired(sorted(set(named) ^ set(drawn)), drawn, pictures, masks)
    keys = list(named)
    files = PictureFiles([pictures / named[key] for key in keys])
    drawings = MaskFiles([masks / drawn[key] for key in keys])
    digest = hashlib.sha256()
    for one, other in zip(files.paths, drawings.paths, strict=True):
        digest.update(f"{one.name} {one.stat().st_size} {other.stat().st_size}\n".encode("utf-8", "surrogateescape"))
    names = path / "classes.txt"
    classes = [line.strip() for line in names.read_text().splitlines() if line.strip()] if names.is_file() else None
    return Masked(files, drawings, keys, classes, digest.hexdigest())


def read_mask(source: MaskSource, identity: int, picture: tuple[int, int]) -> NDArray[np.uint8]:
    """Class numbers uint8 (height, width) of one mask.

    Args:
        picture: height and width of the sample's picture, which the mask must have too.

    Raises:
        DamagedData: no PNG, of another size, in colour, or with numbers above 255.
    """
    try:
        image = Image.open(BytesIO(source.mask(identity)), formats=("PNG",))
        check_pixels(image.height, image.width)
        if image.mode not in ("1", "L", "P", "I;16", "I"):
            raise UnreadableImage("it is in colour; masks have one channel of class numbers")
        numbers = np.asarray(image)
        if numbers.max(initial=0) > UNKNOWN:
            raise UnreadableImage(f"it has the class number {numbers.max()}; {UNKNOWN} is the largest")
    except UserError:
        raise
    except Exception as error:  # as in data.images: damaged files make Pillow raise nearly anything
        reason = str(error) or type(error).__name__
        raise DamagedData(f"mask {source.key(identity)} cannot be read: {reason}") from None
    if numbers.shape != picture:
        sizes = [f"{wide} x {tall}" for tall, wide in (numbers.shape, picture)]
        raise DamagedData(f"mask {source.key(identity)} has {sizes[0]} pixels, its picture {sizes[1]}")
    return numbers.astype(np.uint8)


def shrunk(mask: NDArray[np.uint8], canvas: int) -> NDArray[np.uint8]:
    """The mask at the size that its picture has on a canvas of that side: the nearest pixels' classes."""
    if max(mask.shape) <= canvas:
        return mask
    width, height = inside((mask.shape[1], mask.shape[0]), canvas)
    rows = (np.arange(height) + 0.5) * mask.shape[0] / height
    columns = (np.arange(width) + 0.5) * mask.shape[1] / width
    return mask[rows.astype(np.int64)[:, None], columns.astype(np.int64)]


def _from_shards(source: str | Path) -> Masked:
    dataset = ShardedDataset(source, context=1)
    if dataset.kind != "images":
        raise UserError(f"{source} holds {dataset.kind}; a segmentation task needs pictures and masks")
    parts = list(dataset.sample(int(dataset.all_ids()[0])))
    part = next((name for name in MASK_PARTS if name in parts and len(parts) > 1), None)
    if part is None:
        raise UserError(
            f"{source} has samples of {', '.join(parts)}, none of them a mask; store it as KEY.mask.png beside KEY.jpg"
        )
    names = [dataset.key(int(i)) for i in dataset.all_ids()]
    return Masked(dataset, ShardMasks(dataset, part), names, dataset.classes or None, dataset.fingerprint)


def _refuse_unpaired(odd: list[str], drawn: dict[str, str], pictures: Path, masks: Path) -> None:
    if odd:
        have, lack = (masks, pictures) if odd[0] in drawn else (pictures, masks)
        more = f" (and {len(odd) - 1} others)" if len(odd) > 1 else ""
        raise UserError(f"{odd[0]!r} is in {have} but not in {lack}{more}; every picture needs its mask")
    if not drawn:
        raise UserError(f"{pictures} holds no pictures")
