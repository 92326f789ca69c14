"""Every loader as an iterator over batches, each set up as its documentation says, with its default shuffle.

`decode` turns the bytes of one picture into a tensor; None leaves them as they are. Without workers a peer is
iterated directly, which is its fastest way.
"""

from __future__ import annotations

import gc
import io
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2.functional import pil_to_tensor, resized_crop

from data.crops import CropDecoder
from data.dataset import ShardedDataset
from data.encoded import EncodedLoader
from data.loader import Loader
from loaders.sets import Pictures
from pretrain.views.crops import random_resized_crop_boxes

SIDE = 224
Decode = Callable[[bytes], Tensor]
Batches = Iterator[Any]
_CROP = torchvision.transforms.RandomResizedCrop(SIDE)


def pil_crop(payload: bytes) -> Tensor:
    """The default of every peer's examples: Pillow, then torchvision's RandomResizedCrop."""
    return pil_to_tensor(_CROP(Image.open(io.BytesIO(payload)).convert("RGB")))


def tensor_crop(payload: bytes) -> Tensor:
    """The faster way that torchvision offers: `decode_jpeg`, and an antialiased crop of the tensor."""
    picture = decode_jpeg(torch.frombuffer(bytearray(payload), dtype=torch.uint8), ImageReadMode.RGB)
    top, left, height, width = _CROP.get_params(picture, _CROP.scale, _CROP.ratio)
    return resized_crop(picture, top, left, height, width, [SIDE, SIDE], antialias=True)


def headwater(pictures: Pictures, workers: int, decode: Decode | None) -> Batches:
    """Ours; crops are drawn from the samples' keys."""
    dataset = ShardedDataset(pictures.shards)
    if decode is None:
        return iter(EncodedLoader(dataset, pictures.batch, workers=workers))
    boxes = partial(random_resized_crop_boxes, scale=_CROP.scale, ratio=_CROP.ratio)
    crops = CropDecoder(SIDE, boxes, "bilinear")
    return iter(Loader(dataset, pictures.batch, workers=workers, decode=crops))


def webdataset(pictures: Pictures, workers: int, decode: Decode | None) -> Batches:
    """Shards shuffled, then a buffer of 1,000 samples; batches made in the workers, as its documentation advises."""
    import webdataset as wds

    tars = sorted(str(path) for path in pictures.shards.glob("*.tar"))
    dataset = wds.WebDataset(tars, shardshuffle=100, nodesplitter=wds.split_by_node).shuffle(1000)
    found = (lambda s: s["jpg"]) if decode is None else (lambda s: decode(s["jpg"]))
    batches = dataset.map(found).batched(pictures.batch, collation_fn=_collate(decode), partial=False)
    return _endless(lambda: wds.WebLoader(batches, batch_size=None, num_workers=workers) if workers else batches)


def litdata(pictures: Pictures, workers: int, decode: Decode | None) -> Batches:
    """`StreamingDataset` on a local folder, shuffled."""
    from litdata import StreamingDataLoader, StreamingDataset

    class Decoded(StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            payload = super().__getitem__(index)["jpg"]
            if decode is not None:
                return decode(payload)
            return bytes(payload) if workers else payload  # a view of a chunk cannot leave its process

    dataset = Decoded(str(pictures.litdata), shuffle=True, drop_last=True)
    if not workers:
        return _grouped(_endless(lambda: dataset), pictures.batch, decode)
    collate = _collate(decode)
    arguments = {"batch_size": pictures.batch, "num_workers": workers, "collate_fn": collate}
    return _endless(lambda: StreamingDataLoader(dataset, **arguments))


def streaming(pictures: Pictures, workers: int, decode: Decode | None) -> Batches:
    """MosaicML's `StreamingDataset` on a local folder, shuffled by py1e, its default."""
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    class Decoded(StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            payload = super().__getitem__(index)["jpg"]
            return payload if decode is None else decode(payload)

    gc.collect()
    clean_stale_shared_memory()
    dataset = Decoded(local=str(pictures.mds), shuffle=True, batch_size=pictures.batch)
    if not workers:
        return _grouped(_endless(lambda: dataset), pictures.batch, decode)
    collate = _collate(decode)
    return _endless(lambda: DataLoader(dataset, pictures.batch, num_workers=workers, collate_fn=collate))


def image_folder(pictures: Pictures, workers: int, decode: Decode | None) -> Batches:
    """torchvision's `ImageFolder` under a shuffling DataLoader."""

    def loader(path: str) -> Any:
        with open(path, "rb") as file:
            payload = file.read()
        return payload if decode is None else decode(payload)

    dataset = torchvision.datasets.ImageFolder(str(pictures.files), loader=loader)
    first = _firsts(_collate(decode))
    return _endless(
        lambda: DataLoader(dataset, pictures.batch, shuffle=True, num_workers=workers, collate_fn=first, drop_last=True)
    )


CONTENDERS = {
    "headwater": headwater,
    "webdataset": webdataset,
    "litdata": litdata,
    "streaming": streaming,
    "ImageFolder": image_folder,
}


def _collate(decode: Decode | None) -> Callable[[list[Any]], Any]:
    return list if decode is None else default_collate


def _firsts(collate: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    return lambda samples: collate([sample for sample, _ in samples])


def _grouped(samples: Iterator[Any], size: int, decode: Decode | None) -> Batches:
    collate = _collate(decode)
    while True:
        yield collate(list(islice(samples, size)))


def _endless(epoch: Callable[[], Iterable[Any]]) -> Iterator[Any]:
    while True:
        yield from epoch()
