"""Low-rank adapters: PEFT reads them, merging keeps the outputs, each has an effect, nothing else moves."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from peft import PeftModel
from test_finetune_kit import write_encoder, write_images, write_text_encoder
from torch import Tensor, nn
from transformers import AutoModel

from data.batch import ImageBatch
from data.errors import UserError
from finetune.adapters import adapt, adapted, merge, network, require_effect, targets
from finetune.encoder import Augmentation, Encoder, load_encoder
from finetune.features import accelerator_for
from finetune.heads import LinearHead
from finetune.image_encoder import ImageEncoder
from finetune.run import finetune
from finetune.samples import Samples, TextSamples
from finetune.settings import settings_from
from finetune.strategies import WAYS
from finetune.tasks import load_task
from finetune.train import Training

pytest_plugins = ["test_finetune_kit"]
QUICK = {"cpu": True, "min_steps": 8, "epochs": 1.0, "batch_size": 16}
KINDS = ("images", "text", "decoder", "resnet", "convnext")


def _silent(_: str) -> None:
    pass


def _encoder(kind: str, root: Path) -> Encoder:
    """A small encoder whose every branch matters."""
    if kind == "images":
        return load_encoder(write_encoder(root / "export"))
    if kind in ("text", "decoder"):
        return load_encoder(write_text_encoder(root / "export", causal=kind == "decoder"))
    torch.manual_seed(0)
    if kind == "resnet":
        # Its last normalisations begin at zero otherwise, and a gate of zero hides what lies behind it.
        model = timm.create_model("resnet10t", num_classes=0, zero_init_last=False)
    else:
        model = timm.create_model("convnext_atto", num_classes=0, conv_mlp=False, ls_init_value=1.0)
    return ImageEncoder(model, root, {"image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3})


def _batch(encoder: Encoder, count: int = 4) -> Any:
    keys = torch.arange(count)
    if encoder.kind == "text":
        return encoder.batch(encoder.tokenize([f"the film number {i} was good" for i in range(count)]), keys, keys)
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 16, 16), generator=draw, dtype=torch.uint8)
    return ImageBatch(images=images, sizes=torch.full((count, 2), 16), labels=keys, keys=keys, ids=keys)


class _Batches:
    """As much of `Samples` as `require_effect` asks for."""

    def __init__(self, encoder: Encoder) -> None:
        self.batch = _batch(encoder, 2)

    def batches(self, size: int) -> Any:
        yield np.arange(size), self.batch


def _adapted(encoder: Encoder, dora: bool = False, moved: bool = True, target: str | None = None) -> Encoder:
    """The encoder with adapters, whose B is no longer zero where they are `moved`."""
    torch.manual_seed(1)
    encoder = adapt(copy.deepcopy(encoder), 4, 8.0, 0.0, target, dora)
    for name, parameter in encoder.named_parameters():
        if moved and "lora_B" in name:
            parameter.data.normal_(std=0.2)
        if moved and "magnitude" in name:
            # About 1 on pictures: a ResNet's layers would multiply larger ones, and with them float32's rounding.
            low, width = (0.5, 1.0) if encoder.kind == "images" else (1.0, 2.0)
            parameter.data.mul_(low + width * torch.rand_like(parameter))
    return encoder.eval()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_adapters_give_the_same_outputs_and_plain_modules(kind: str, dora: bool, tmp_path: Path) -> None:
    plain = _encoder(kind, tmp_path).eval()
    batch = _batch(plain)
    with torch.no_grad():
        torch.testing.assert_close(_adapted(plain, dora, moved=False)(batch), plain(batch), rtol=0, atol=1e-5)
        encoder = _adapted(plain, dora)
        before = encoder(batch)
        merge(encoder)
        after = encoder(batch)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert (before - plain(batch)).abs().max() > 1e-3
    assert encoder.state_dict().keys() == plain.state_dict().keys()
    assert [type(module) for module in encoder.modules()] == [type(module) for module in plain.modules()]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_the_files_over_the_base_with_the_same_outputs(kind: str, dora: bool, tmp_path: Path) -> None:
    plain = _encoder(kind, tmp_path).eval()
    encoder = _adapted(plain, dora)
    merge(encoder).save(tmp_path / "adapter")
    if kind == "images":
        base = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True, num_classes=0)
    elif encoder.kind == "text":
        base = AutoModel.from_pretrained(tmp_path / "export", attn_implementation="eager")
    else:
        base = copy.deepcopy(network(plain))
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    batch = _batch(plain)
    with torch.no_grad():
        if encoder.kind == "text":
            real = (batch.documents == 0).long()
            hidden = model(input_ids=batch.tokens, attention_mask=real).last_hidden_state
            found = (hidden * real[:, :, None]).sum(dim=1) / real.sum(dim=1, keepdim=True)
        else:
            found = model(*encoder.inputs(batch))
        torch.testing.assert_close(found, encoder(batch), rtol=1e-4, atol=1e-4)
        assert (encoder(batch) - plain(batch)).abs().max() > 1e-2


def test_our_own_text_model_takes_an_encoder_s_adapter_too(tmp_path: Path) -> None:
    plain = _encoder("text", tmp_path).eval()
    encoder = _adapted(plain)
    merge(encoder).save(tmp_path / "adapter")
    PeftModel.from_pretrained(network(plain), tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(plain(_batch(plain)), encoder(_batch(plain)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_each_adapter_changes_the_output_in_evaluation(kind: str, tmp_path: Path) -> None:
    encoder = _adapted(_encoder(kind, tmp_path), moved=False)
    batch = _batch(encoder)
    layers = list(adapted(encoder))
    assert len(layers) >= 8
    with torch.no_grad():
        plain = encoder(batch)
        for name, layer in layers:
            weight = layer.lora_B["default"].weight
            weight.fill_(0.1)
            assert not torch.equal(encoder(batch), plain), name
            weight.zero_()
        require_effect(encoder, _Batches(encoder), torch.device("cpu"))
        assert torch.equal(encoder(batch), plain)


class _Deaf(ImageEncoder):
    """torch's own transformer layer on rows of pixels: its fast path, and attention's last product, call no module."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        torch.manual_seed(0)
        self.model = nn.ModuleDict({"layer": nn.TransformerEncoderLayer(48, 4, 64, batch_first=True)})
        self.features, self.folder, self.info = 48, None, {}

    def inputs(self, batch: ImageBatch, augment: Augmentation | None = None) -> tuple[Tensor, ...]:
        return (batch.images.float().permute(0, 2, 1, 3).flatten(2) / 255,)

    def pool(self, *inputs: Tensor) -> Tensor:
        return self.model["layer"](*inputs).mean(dim=1)


@pytest.mark.parametrize("module", ["layer.self_attn.out_proj", "layer.linear1", "layer.linear2"])
def test_an_adapter_that_nothing_calls_is_an_error_naming_it(module: str) -> None:
    encoder = _adapted(_Deaf(), moved=False, target=module.replace(".", r"\."))
    assert len(list(adapted(encoder))) == 1
    with pytest.raises(UserError, match=f"{module!r} does not change the encoder's output"):
        require_effect(encoder, _Batches(encoder), torch.device("cpu"))


def test_the_default_targets_are_all_linear_layers_but_the_patch_embedding(tmp_path: Path) -> None:
    vit, decoder = _encoder("images", tmp_path / "a"), _encoder("decoder", tmp_path / "b")
    of_a_block = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert targets(vit, None) == [f"blocks.{i}.{name}" for i in range(2) for name in of_a_block]
    of_a_layer = ("attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo")
    assert targets(decoder, None) == [f"layers.{i}.{name}" for i in range(2) for name in of_a_layer]
    resnet = _encoder("resnet", tmp_path / "c")
    assert all(name.startswith("layer") for name in targets(resnet, None))
    assert targets(vit, r".*\.proj") == ["patch_embed.proj", "blocks.0.attn.proj", "blocks.1.attn.proj"]
    assert targets(vit, r"blocks\.1\..*") == [f"blocks.1.{name}" for name in of_a_block]


@pytest.mark.parametrize("target", ["proj", "blocks[", "attn"])
def test_a_target_that_fits_nothing_says_what_there_is(target: str, export: Path) -> None:
    with pytest.raises(UserError, match=r"target_modules='.*(matches no module|no regular expression)"):
        adapt(load_encoder(export), 4, 8.0, 0.0, target, False)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_alone_get_gradients(kind: str, dora: bool, tmp_path: Path) -> None:
    encoder = _adapted(_encoder(kind, tmp_path), dora).train()
    head = LinearHead(encoder.features, 4, seed=0)
    nn.functional.cross_entropy(head(encoder(_batch(encoder))), torch.arange(4)).backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == ("lora_" in name), name


def _train(encoder: Encoder, samples: Samples, strategy: str, classes: int) -> Encoder:
    settings = settings_from(QUICK | {"lr": 1e-2})
    way = WAYS[strategy]
    training = Training(
        lambda: way.start(encoder, 0, settings), samples, classes, 0, settings, accelerator_for(settings)
    )
    return training.fit((1e-2,))[0]


@pytest.mark.parametrize("strategy", ["lora", "dora"])
@pytest.mark.parametrize("kind", ["images", "text"])
def test_frozen_weights_stay_bit_for_bit_and_adapters_move(
    strategy: str, kind: str, digit_shards: tuple[Path, Path], sentiment: tuple[Path, Path], tmp_path: Path
) -> None:
    encoder = _encoder(kind, tmp_path)
    task = load_task(*(digit_shards if kind == "images" else sentiment), encoder)
    before = copy.deepcopy(encoder.state_dict())
    trained = _train(encoder, task.train.select(np.arange(40)), strategy, len(task.classes))
    for name, module in list(adapted(trained)):
        assert module.lora_B["default"].weight.any(), name
        network(trained).set_submodule(name, module.get_base_layer())
    for state in (encoder.state_dict(), trained.state_dict()):
        assert state.keys() == before.keys()
        assert all(torch.equal(state[name], before[name]) for name in before)


def test_statistics_of_frozen_normalisation_stay_and_of_trained_move(tmp_path: Path) -> None:
    images = np.random.Generator(np.random.Philox(1)).integers(0, 256, (24, 16, 16)).astype(np.uint8)
    shards = write_images(tmp_path / "shards", images, np.arange(24) % 3, ["a", "b", "c"])
    encoder = _encoder("resnet", tmp_path)
    task = load_task(shards, shards, encoder)
    before = {name: tensor.clone() for name, tensor in encoder.named_buffers()}
    for strategy, same in (("lora", True), ("full", False)):
        after = dict(_train(encoder, task.train, strategy, 3).named_buffers())
        after = {name.replace(".base_layer", ""): tensor for name, tensor in after.items()}
        assert all(torch.equal(after[name], before[name]) for name in before) == same


@pytest.mark.parametrize("strategy", ["lora", "dora"])
def test_a_saved_model_holds_merged_weights_and_the_adapter(
    strategy: str, export: Path, digit_shards: tuple[Path, Path], tmp_path: Path
) -> None:
    options = {"strategy": strategy, "labels_per_class": 3, "rank": 2, "alpha": 4, "target_modules": r".*\.qkv"}
    results = finetune(export, *digit_shards, output=tmp_path / "m", report=_silent, **options, **QUICK)
    assert results["runs"][0]["chosen"]["adapters"] == 2
    base = timm.create_model(f"local-dir:{export}", pretrained=True, num_classes=0)
    peft = PeftModel.from_pretrained(base, tmp_path / "m" / "adapter").eval()
    assert peft.peft_config["default"].r == 2
    assert peft.peft_config["default"].use_dora == (strategy == "dora")
    merged = timm.create_model(f"local-dir:{tmp_path / 'm' / 'encoder'}", pretrained=True, num_classes=0).eval()
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(peft(pixels), merged(pixels), rtol=1e-5, atol=1e-5)


def test_texts_of_one_token_do_not_hide_an_adapter(tmp_path: Path) -> None:
    encoder = _adapted(_encoder("decoder", tmp_path), moved=False)
    rows = encoder.tokenize(["the", "good", "the film was good and the film was fine"])
    require_effect(encoder, TextSamples(rows, np.array([0, 1, 0]), encoder), torch.device("cpu"))
