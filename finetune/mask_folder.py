"""Predicted masks in a folder that appears whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from finetune.model import claim, publish


@contextmanager
def written_masks(
    folder: Path, classes: list[str], overwrite: bool = False
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that writes a row of `finetune.predict.stream` with its `mask`; the folder takes its name at the end.

    It holds `masks/NAME.png`, class numbers with a palette, NAME being the picture's (numbered where it occurs
    again); `predictions.jsonl`, a row a picture with the mask's path and each class's share; and `classes.txt`.

    Raises:
        UserError: the folder exists, or cannot be written.
    """
    folder = folder.expanduser()
    hidden = claim(folder, overwrite)
    names: set[str] = set()
    try:
        (hidden / "masks").mkdir()
        (hidden / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
        with open(hidden / "predictions.jsonl", "w", encoding="utf-8", errors="surrogateescape") as file:

            def write(row: dict[str, Any]) -> None:
                name = _free(Path(row["input"]).stem, names)
                image = Image.fromarray(row["mask"]).convert("L")
                image.putpalette(_palette())
                image.save(hidden / "masks" / f"{name}.png")
                print(json.dumps(row | {"mask": f"masks/{name}.png"}, ensure_ascii=False), file=file)

            yield write
        publish(hidden, folder)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _free(stem: str, taken: set[str]) -> str:
    """The stem, or with the first number that is free; file systems may not tell upper from lower case."""
    name, number = stem, 1
    while name.lower() in taken:
        number += 1
        name = f"{stem}-{number}"
    taken.add(name.lower())
    return name


def _palette() -> list[int]:
    """Red, green and blue of 256 classes: each colour has every third bit of the number, highest first, as PASCAL VOC's
    masks have them."""
    return [
        sum((number >> 3 * place + channel & 1) << 7 - place for place in range(8))
        for number in range(256)
        for channel in range(3)
    ]
