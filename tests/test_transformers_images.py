"""Picture models of transformers: features are those their own classifiers stand on; they train, save and go back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

from data.batch import ImageBatch
from data.errors import UserError
from finetune.encoder import fresh, load_encoder
from finetune.export_model import export_model
from finetune.model import load_model
from finetune.run import finetune
from finetune.settings import Settings
from finetune.tasks import load_test
from finetune.transformers_images import TransformersImages

pytest_plugins = ["test_finetune_kit"]
VIT = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViT", VIT),
    "deit": ("DeiT", VIT),
    "dinov2": ("Dinov2", VIT),
    "beit": ("Beit", VIT | {"use_relative_position_bias": True}),
    "convnext": (
        "ConvNext",
        {"image_size": 16, "patch_size": 2, "num_stages": 2, "hidden_sizes": [16, 24], "depths": [1, 2]},
    ),
    "swin": (
        "Swin",
        {"image_size": 16, "patch_size": 2, "embed_dim": 12, "depths": [1, 2], "num_heads": [2, 2], "window_size": 4},
    ),
    "resnet": ("ResNet", {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 2], "layer_type": "basic"}),
}
BLOCKS = {"convnext": 4, "swin": 4, "resnet": 3}
PROCESSOR = {
    "do_resize": True,
    "size": {"height": 16, "width": 16},
    "do_rescale": True,
    "do_normalize": True,
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.3, 0.25],
    "resample": 3,
    "image_processor_type": "ViTImageProcessor",
}


def write(folder: Path, kind: str, headless: bool = False) -> Path:
    """A small random model with an image processor."""
    name, arguments = SMALL[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        config = getattr(transformers, f"{name}Config")(**arguments, num_labels=3)
        model = getattr(transformers, f"{name}ForImageClassification")(config).eval()
        for parameter in model.parameters():  # biases and layer scales of 0 would hide what they do
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    (model.base_model if headless else model).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


@pytest.mark.parametrize("kind", SMALL)
def test_features_are_what_their_classifier_stands_on(kind: str, tmp_path: Path) -> None:
    """Their logits are their classifier's linear layer on our features, from pictures that their processor made."""
    folder = write(tmp_path / kind, kind)
    encoder = load_encoder(folder).eval()
    assert isinstance(encoder, TransformersImages)
    theirs = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    pictures = np.random.Generator(np.random.Philox(1)).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    pixels = processor([Image.fromarray(each) for each in pictures], return_tensors="pt")["pixel_values"]
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()
    numbers = torch.arange(3)
    batch = ImageBatch(images=images, sizes=torch.full((3, 2), 16), labels=numbers, keys=numbers, ids=numbers)
    weights = load_file(folder / "model.safetensors")
    weight = next(tensor for name, tensor in weights.items() if name.startswith("classifier") and tensor.ndim == 2)
    bias = next(tensor for name, tensor in weights.items() if name.startswith("classifier") and tensor.ndim == 1)
    with torch.no_grad():
        ours = encoder(batch) @ weight.T + bias
        torch.testing.assert_close(ours, theirs(pixels).logits, atol=1e-4, rtol=1e-4)
        dense = encoder(batch, dense=True)
    assert dense.shape[-1] == encoder.token_features
    assert dense.shape[1] == dense.shape[2] > 1


@pytest.mark.parametrize("kind", SMALL)
def test_depths_rise_and_untrained_weights_differ(kind: str, tmp_path: Path) -> None:
    encoder = load_encoder(write(tmp_path / kind, kind))
    depths, head = encoder.layers()
    assert set(depths) == {name for name, _ in encoder.named_parameters()}
    assert list(depths.values()) == sorted(depths.values())
    assert head == BLOCKS.get(kind, 2) + 1
    assert set(depths.values()) == set(range(head))
    one, two = fresh(encoder, 1), fresh(encoder, 1)
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), encoder.parameters(), strict=True))


@pytest.mark.parametrize(
    ("kind", "strategy"), [("vit", "full"), ("dinov2", "linear"), ("convnext", "lp-ft"), ("vit", "lora")]
)
def test_they_train_reload_and_go_back_to_transformers(
    kind: str, strategy: str, digit_shards: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = write(tmp_path / kind, kind, headless=True)
    options = {"cpu": True, "min_steps": 30, "lr": 3e-3, "labels_per_class": 10, "report": lambda _: None}
    results = finetune(folder, *digit_shards, strategy=strategy, output=tmp_path / "model", **options)
    assert results["interval"][0] > 0.1  # ten classes: better than chance
    model = load_model(tmp_path / "model")
    samples, _ = load_test(digit_shards[1], model.encoder, model.classes)
    said = model.probabilities(samples, Settings(cpu=True))
    assert float((said.argmax(1).numpy() == samples.labels).mean()) == results["accuracy"]
    export_model(tmp_path / "model", tmp_path / "out")
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    assert theirs.config.id2label[3] == model.classes[3]
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model.logits(model.encoder.cpu().eval().pool(pixels))
        torch.testing.assert_close(theirs(pixels).logits, wanted, atol=1e-4, rtol=1e-4)
        bare = transformers.AutoModel.from_pretrained(tmp_path / "model" / "encoder").eval()
        hidden = bare(pixel_values=pixels).last_hidden_state
    dense = model.encoder.tokens(pixels)
    flat = hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden[:, -dense[0, ..., 0].numel() :]
    torch.testing.assert_close(dense.flatten(1, 2), flat, atol=1e-4, rtol=1e-4)


def test_unfit_folders_are_one_sentence(tmp_path: Path) -> None:
    folder = write(tmp_path / "vit", "vit")
    config = json.loads((folder / "config.json").read_text())

    def refused(changed: dict[str, Any], message: str) -> None:
        (folder / "config.json").write_text(json.dumps(config | changed))
        with pytest.raises(UserError, match=message):
            load_encoder(folder)

    refused({"num_hidden_layers": 3}, r"lack .*of the model's")
    refused({"model_type": "vit_mae"}, "does not load as a picture model")
    refused({"model_type": "of_my_own", "auto_map": {"AutoConfig": "mine.Config"}}, "does not load as a picture model")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="timm holds timm's"):
        export_model(folder, tmp_path / "out", "timm")
    with pytest.raises(UserError, match="transformers folder already"):
        export_model(folder, tmp_path / "out", "transformers")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="preprocessor_config"):
        load_encoder(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="only safetensors"):
        load_encoder(folder)
