"""Samples whose truth is a class for every pixel or every word."""

from __future__ import annotations

from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.crops import upright_size
from data.errors import UserError
from data.images import UnreadableImage
from finetune.encoder import Augmentation
from finetune.masks import UNKNOWN, Masked, read_mask, shrunk
from finetune.pictures import undecodable
from finetune.samples import ImageSamples, Ints, TextSamples
from finetune.targets import IGNORED, Target
from finetune.targets_dense import Segmentation
from finetune.text_encoder import DocumentEncoder
from pretrain.views import center_boxes, flips, random_resized_crop_boxes


class MaskSamples(ImageSamples):
    """Pictures and their masks; the truth is the mask as the encoder's view shows it."""

    target: Segmentation

    def __init__(self, source: Masked, canvas: int, size: int, target: Segmentation | None = None) -> None:
        """Reads every mask.

        Args:
            canvas: side in pixels that larger pictures, and their masks, are shrunk to.
            size: side of the encoder's view.
            target: known classes; without them those of the source, or as many as its largest number asks for.

        Raises:
            UserError: a mask that cannot be read, or with a class number that the target lacks; one class alone.
        """
        count = len(source.names)
        super().__init__(source.pictures, np.arange(count), np.zeros(count, dtype=np.int64), canvas)
        self._masks = [shrunk(read_mask(source.masks, i, self._size(i)), canvas) for i in range(count)]
        largest = [int(mask[mask != UNKNOWN].max(initial=0)) for mask in self._masks]
        worst = int(np.argmax(largest))
        if target is None:
            names = source.classes or [str(number) for number in range(max(largest) + 1)]
            if len(names) < 2:
                raise UserError(f"the masks of {source.masks.key(0)} and others have one class; two or more are needed")
            target = Segmentation(names, size)
        if largest[worst] >= target.outputs:
            raise UserError(
                f"mask {source.masks.key(worst)} has the class number {largest[worst]}, "
                f"but there are {target.outputs} classes ({', '.join(target.classes[:5])}, …)"
            )
        self.target = target

    def truth(self, positions: Ints, keys: Tensor | None = None, augment: Augmentation | None = None) -> Tensor:
        """int64 (b, size, size): the class at the middle of each pixel of the view, `IGNORED` where unknown."""
        masks = [torch.from_numpy(self._masks[i]) for i in self.ids[positions]]
        sizes = torch.tensor([mask.shape for mask in masks], dtype=torch.int64)
        flip = None
        if augment is None or keys is None:
            boxes = center_boxes(sizes)
        else:
            boxes = random_resized_crop_boxes(keys, sizes, augment.scale, augment.ratio)
            flip = flips(keys, augment.flip) if augment.flip else None
        return torch.stack(
            [
                _view(mask, box, self.target.size, flip is not None and bool(flip[i]))
                for i, (mask, box) in enumerate(zip(masks, boxes.tolist(), strict=True))
            ]
        )

    def _size(self, identity: int) -> tuple[int, int]:
        payload = self.dataset.pictures(np.array([identity]))[0][0]
        try:
            return upright_size(payload)
        except UnreadableImage as error:
            raise undecodable(self.dataset, [(identity, str(error))]) from None


def _view(mask: Tensor, box: list[int], size: int, mirrored: bool) -> Tensor:
    top, left, height, width = box
    steps = (torch.arange(size) + 0.5) / size
    rows, columns = (top + steps * height).long(), (left + steps * width).long()
    view = mask[rows[:, None], columns.flip(0) if mirrored else columns].long()
    return view.where(view != UNKNOWN, IGNORED)


class TagSamples(TextSamples):
    """Texts as rows of token ids, with a tag at the first token of each word."""

    def __init__(
        self,
        rows: list[NDArray[np.int64]],
        tags: list[NDArray[np.int64]],
        words: list[NDArray[np.int64]],
        owners: Ints,
        encoder: DocumentEncoder,
        target: Target,
    ) -> None:
        """`tags` are as long as `rows`, `IGNORED` where no word begins; so are `words`, the words' numbers in their
        text, -1 elsewhere; `owners` (n,) is the text of each row."""
        super().__init__(rows, np.zeros(len(rows), dtype=np.int64), encoder, target)
        self.tags, self.words, self.owners = tags, words, owners

    def select(self, positions: Ints) -> Self:
        chosen = super().select(positions)
        chosen.owners = self.owners[positions]
        return chosen

    def truth(self, positions: Ints, keys: Tensor | None = None, augment: Augmentation | None = None) -> Tensor:
        """int64 (b, n), as wide as `batch` gives the same rows."""
        ids = torch.from_numpy(self.ids[positions])
        width = self.encoder.batch([self.rows[i] for i in ids.tolist()], ids, ids).tokens.shape[1]
        truth = torch.full((len(ids), width), IGNORED)
        for place, i in enumerate(ids.tolist()):
            truth[place, : len(self.tags[i])] = torch.from_numpy(self.tags[i])
        return truth
