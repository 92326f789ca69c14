"""The data that all loaders read, in each one's own format: CIFAR-10, and synthetic larger JPEGs."""

from __future__ import annotations

import io
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data.image_shards import Choices, shard_images


@dataclass(frozen=True)
class Pictures:
    """One set of pictures in every format."""

    name: str
    home: Path
    batch: int
    """Samples of a batch in the measurements."""

    @property
    def files(self) -> Path:
        """Files in class folders, for ImageFolder."""
        return self.home / "files"

    @property
    def shards(self) -> Path:
        """Our tars and indexes; webdataset reads the same tars."""
        return self.home / "shards"

    @property
    def litdata(self) -> Path:
        """litdata's chunks."""
        return self.home / "litdata"

    @property
    def mds(self) -> Path:
        """MosaicML streaming's shards."""
        return self.home / "mds"

    def describe(self) -> str:
        """Count and median size, for the table's caption."""
        sizes = [path.stat().st_size for path in sorted(self.files.rglob("*.jpg"))]
        return f"{self.name}: {len(sizes):,} JPEGs, {np.median(sizes) / 1000:.1f} kB (median), batches of {self.batch}"


def cifar(work: Path, source: Path) -> Pictures:
    """The CIFAR-10 training pictures, from the archive or a folder of class folders."""
    found = Pictures("CIFAR-10", work / "cifar", 256)
    if not found.home.exists():
        partial = work / "cifar.partial"
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "files").mkdir(parents=True)
        if source.is_dir():
            for folder in sorted(path for path in source.iterdir() if path.is_dir()):
                shutil.copytree(folder, partial / "files" / folder.name)
        else:
            with tarfile.open(source) as tar:
                tar.extractall(partial, [m for m in tar if m.name.split("/")[0] == "train"], filter="data")
            (partial / "files").rmdir()
            (partial / "train").rename(partial / "files")
        partial.rename(found.home)
    return _converted(found, samples_per_shard=5000)


def enlarged(work: Path, base: Pictures, name: str, size: tuple[int, int], count: int, noise: float) -> Pictures:
    """Synthetic JPEGs of `size` (height, width): CIFAR pictures enlarged, with noise that grows with brightness.

    The noise, as a sensor's, brings the files to a realistic size; a smooth enlargement would be a tenth of it.
    """
    found = Pictures(name, work / name.replace(" ", "-"), 64 if size[0] < 1000 else 16)
    if not found.home.exists():
        partial = work / (found.home.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        sources = sorted(base.files.rglob("*.jpg"))
        draw = np.random.Generator(np.random.Philox(0))
        grain = draw.standard_normal((size[0] + 64, size[1] + 64, 3), dtype=np.float32)
        for number in range(count):
            source = sources[number * len(sources) // count]
            large = np.asarray(
                Image.open(source).resize((size[1], size[0]), Image.Resampling.BICUBIC), dtype=np.float32
            )
            top, left = draw.integers(0, 64, 2)
            own = grain[top : top + size[0], left : left + size[1]]
            noisy = np.clip(large + noise * (0.5 + large / 255) * own, 0, 255).astype(np.uint8)
            path = partial / "files" / source.parent.name / f"{number:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            buffer = io.BytesIO()
            Image.fromarray(noisy).save(buffer, "JPEG", quality=88)
            path.write_bytes(buffer.getvalue())
        partial.rename(found.home)
    return _converted(found, samples_per_shard=max(1, count // 8))


def _converted(pictures: Pictures, samples_per_shard: int) -> Pictures:
    if not pictures.shards.exists():
        shard_images(pictures.files, pictures.shards, Choices(samples_per_shard=samples_per_shard), progress=False)
    items = [(str(path), path.parent.name) for path in sorted(pictures.files.rglob("*.jpg"))]
    classes = {name: number for number, name in enumerate(sorted({name for _, name in items}))}
    inputs = [(path, classes[name]) for path, name in items]
    if not pictures.litdata.exists():
        import torch.multiprocessing as mp
        from litdata import optimize

        partial = pictures.home / "litdata.partial"
        shutil.rmtree(partial, ignore_errors=True)
        optimize(litdata_item, inputs, str(partial), chunk_bytes="64MB", num_workers=1, verbose=False)
        mp.set_start_method("fork", force=True)  # it leaves "spawn" behind, for every loader after it
        partial.rename(pictures.litdata)
    if not pictures.mds.exists():
        from streaming import MDSWriter

        partial = pictures.home / "mds.partial"
        shutil.rmtree(partial, ignore_errors=True)
        with MDSWriter(out=str(partial), columns={"jpg": "bytes", "cls": "int", "number": "int"}) as writer:
            for number, (path, label) in enumerate(inputs):
                writer.write({"jpg": Path(path).read_bytes(), "cls": label, "number": number})
        partial.rename(pictures.mds)
    return pictures


def litdata_item(item: tuple[str, int]) -> dict[str, object]:
    """One sample as litdata stores it; a name that ended in .jpg would be stored, and decoded, as a picture."""
    path = Path(item[0])
    return {"jpg": path.read_bytes(), "cls": item[1], "name": f"{path.parent.name}/{path.stem}"}
