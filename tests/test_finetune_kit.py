"""Small encoders and data that the fine-tuning tests share."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from data.shards import DatasetWriter
from data.tokenizer import special_ids
from data.tokenizer import train as train_tokenizer
from pretrain.encoders.modernbert import to_modernbert
from pretrain.encoders.text import TextConfig, TextEncoder
from pretrain.objectives.next_token import NextToken, NextTokenConfig

VIT = {
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
    "global_pool": "avg",
    "fc_norm": False,
}


def write_encoder(folder: Path, seed: int = 0, **model_args: object) -> Path:
    """A small untrained ViT in timm's layout, with an export's metadata."""
    arguments = VIT | model_args
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, **arguments)
    folder.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    preset = {
        "input_size": [3, 16, 16],
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "num_classes": 0,
    }
    preset |= {"mean": [0.5] * 3, "std": [0.5] * 3}
    preset |= {"classifier": "head", "first_conv": "patch_embed.proj"}
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 0,
        "num_features": model.num_features,
        "global_pool": "avg",
        "model_args": arguments,
        "pretrained_cfg": preset,
    }
    (folder / "config.json").write_text(json.dumps(config))
    about = {"format": 1, "kind": "images", "objective": "none", "step": 0, "features": model.num_features}
    about |= {"mean": [0.5] * 3, "std": [0.5] * 3, "image_size": 16, "interpolation": "bicubic"}
    (folder / "headwater").mkdir()
    (folder / "headwater" / "export.json").write_text(json.dumps(about))
    return folder


def write_text_encoder(folder: Path, seed: int = 0, vocabulary: int = 300, causal: bool = True) -> Path:
    """A small untrained text encoder, causal or not, in transformers' layout, with a tokenizer."""
    config = TextConfig(vocab_size=vocabulary, width=32, depth=2, heads=2, intermediate_size=48, context=32)
    tokenizer = train_tokenizer(["the good and the bad, a fine dull film"] * 20, vocabulary)
    config = config.model_copy(update={"vocab_size": tokenizer.get_vocab_size()})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = NextToken(TextEncoder(config), NextTokenConfig()).state_dict()
    described, tensors = to_modernbert(state, config, special_ids(tokenizer), causal)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(described))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def sentences(count: int, seed: int) -> tuple[list[str], list[str]]:
    """Texts of random filler around one word that decides the label (`neg`, `pos`)."""
    draw = np.random.Generator(np.random.Philox(seed))
    filler = ["the", "film", "and", "a", "that", "was", "of", "it"]
    words = {"neg": ["bad", "dull", "awful"], "pos": ["good", "fine", "great"]}
    labels = [("neg", "pos")[i % 2] for i in range(count)]
    texts = []
    for label in labels:
        words_here = list(draw.choice(filler, draw.integers(2, 6)))
        words_here.insert(int(draw.integers(0, len(words_here))), str(draw.choice(words[label])))
        texts.append(" ".join(words_here))
    return texts, labels


def write_tsv(path: Path, texts: list[str], labels: list[str], header: str = "") -> Path:
    """Lines of text, tab, label."""
    path.write_text(header + "".join(f"{t}\t{label}\n" for t, label in zip(texts, labels, strict=True)))
    return path


def write_images(folder: Path, images: np.ndarray, labels: np.ndarray, classes: list[str]) -> Path:
    """Shards of grey uint8 images (n, height, width)."""
    with DatasetWriter(folder, "images", samples_per_shard=500) as writer:
        writer.extra = {"classes": classes}
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            payload = io.BytesIO()
            Image.fromarray(image).convert("RGB").save(payload, "PNG")
            writer.add(f"{i:06d}", {"png": payload.getvalue()}, label=int(label))
    return folder


def digits(shuffled: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits: uint8 (1797, 8, 8) and labels; `shuffled` takes the labels' meaning away."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    if shuffled:
        labels = labels[np.random.Generator(np.random.Philox(3)).permutation(len(labels))]
    return (images.reshape(-1, 8, 8) * 15.9).astype(np.uint8), labels.astype(np.int64)


NAMES = [str(number) for number in range(10)]


@pytest.fixture(scope="session")
def digit_shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Training and test shards of the digits."""
    images, labels = digits()
    root = tmp_path_factory.mktemp("digits")
    train = write_images(root / "train", images[:1200], labels[:1200], NAMES)
    return train, write_images(root / "test", images[1200:], labels[1200:], NAMES)


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder's folder."""
    return write_encoder(tmp_path_factory.mktemp("encoder") / "export")


@pytest.fixture(scope="session")
def text_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text encoder's folder."""
    return write_text_encoder(tmp_path_factory.mktemp("text") / "export")


@pytest.fixture(scope="session")
def sentiment(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Training and test files of labelled sentences."""
    root = tmp_path_factory.mktemp("sentiment")
    return write_tsv(root / "train.tsv", *sentences(80, 1)), write_tsv(root / "test.tsv", *sentences(120, 2))
