"""Laws of optimisers: what decays, what is orthogonalised, and that each is the library's or the paper's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.optim
import torch
from pydantic import TypeAdapter
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from pretrain.encoders.text import TextConfig, TextEncoder
from pretrain.encoders.vision import VisionConfig
from pretrain.muon import Muon, orthogonalize
from pretrain.objectives.masked_image import MAEConfig, MaskedAutoencoder
from pretrain.objectives.next_token import NextToken, NextTokenConfig
from pretrain.optim import build_optimizer, set_lr, set_rates
from pretrain.optimizer_settings import AdamWConfig, AnyOptimizer, MuonConfig
from pretrain.optimizer_state import load_optimizer, optimizer_groups, optimizer_tensors
from pretrain.parameter_groups import layer_scales, matrix_parts, parameter_groups
from pretrain.tensors import Stored

NAMES = ["adamw", "lamb", "sgd", "lars", "muon"]


def config(name: str, **settings: Any) -> Any:
    return TypeAdapter(AnyOptimizer).validate_python({"name": name} | settings)


def mae() -> nn.Module:
    arguments = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "reg_tokens": 2}
    vision = VisionConfig(model="vit_tiny_patch16_224", image_size=16, model_args=arguments, positions="learned")
    return MaskedAutoencoder(MAEConfig(decoder_width=8, decoder_depth=1, decoder_heads=2), vision)


def next_token() -> nn.Module:
    text = TextConfig(vocab_size=20, width=16, depth=2, heads=2, intermediate_size=24, context=8)
    return NextToken(TextEncoder(text), NextTokenConfig())


OBJECTIVES: dict[str, Callable[[], nn.Module]] = {"mae": mae, "next_token": next_token}


def names_of(module: nn.Module, parameters: list[Tensor]) -> set[str]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {names[id(parameter)] for parameter in parameters}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_groups_cover_every_trainable_parameter_once(objective: str) -> None:
    module = OBJECTIVES[objective]()
    decayed, spared = parameter_groups(module, 0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    found = [id(p) for group in (decayed, spared) for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in module.parameters() if p.requires_grad)
    assert all(p.ndim >= 2 for p in decayed["params"])
    names = names_of(module, decayed["params"])
    assert not [name for name in names if "embed" in name and "proj" not in name and "decoder" not in name]
    assert not [name for name in names if "token" in name or "bias" in name or "norm" in name]


def test_a_frozen_parameter_is_in_no_group() -> None:
    module = nn.Linear(3, 3)
    module.weight.requires_grad_(False)
    (group,) = parameter_groups(module, 0.1)
    assert group["params"] == [module.bias]


@pytest.mark.parametrize("name", NAMES)
def test_the_rate_respects_each_group_s_scale_and_decay_what_is_spared(name: str) -> None:
    settings = config(name, lr=0.2, schedule="constant", warmup=0, weight_decay=0.0, weight_decay_end=0.4)
    optimizer = build_optimizer(nn.Linear(3, 3), settings)
    optimizer.param_groups[0]["lr_scale"] = 0.5
    set_rates(optimizer, settings, 1.0, batch_size=7)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.4, 0.0]


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "resnet18", "convnext_atto"])
def test_layer_decay_is_timm_s(model: str) -> None:
    with torch.device("meta"):
        module = nn.Module()
        module.encoder = timm.create_model(model, num_classes=10)
    ours = layer_scales(module, 0.7)
    groups = timm.optim.param_groups_layer_decay(module.encoder, layer_decay=0.7)
    theirs = {name: g["lr_scale"] for g in groups for name in names_of(module, g["params"])}
    # Their classifier may share the top group; ours stands above the whole encoder.
    ratios = {round(ours[name] / scale, 9) for name, scale in theirs.items()}
    assert ratios <= {1.0} or ratios <= {0.7}
    assert max(ours.values()) == 0.7
    assert {g["lr_scale"] for g in parameter_groups(module, 0.1, 0.7)} == {*ours.values()}


def test_layer_decay_of_text_and_what_is_around_the_encoder() -> None:
    module = next_token()
    scale = {
        name: group["lr_scale"]
        for group in parameter_groups(module, 0.1, 0.5)
        for name in names_of(module, group["params"])
    }
    assert scale["encoder.embeddings.tok_embeddings.weight"] == 0.125
    assert scale["encoder.layers.0.attn.Wqkv.weight"] == 0.25
    assert scale["encoder.layers.1.mlp.Wo.weight"] == scale["encoder.final_norm.weight"] == 0.5
    assert scale["head.dense.weight"] == 1.0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_muon_turns_hidden_matrices_and_leaves_the_rest_to_adamw(objective: str) -> None:
    module = OBJECTIVES[objective]()
    optimizer = build_optimizer(module, MuonConfig(adamw_scale=0.5))
    turned = {n for g in optimizer.param_groups if g["orthogonal"] for n in names_of(module, g["params"])}
    others = {n for g in optimizer.param_groups if not g["orthogonal"] for n in names_of(module, g["params"])}
    assert turned | others == {name for name, p in module.named_parameters() if p.requires_grad}
    if objective == "mae":
        assert {"encoder.blocks.0.attn.qkv.weight", "decoder.0.mlp.fc1.weight", "decoder_embed.weight"} <= turned
        assert {"encoder.patch_embed.proj.weight", "decoder_head.weight", "mask_token"} <= others
    else:
        assert {"encoder.layers.0.mlp.Wi.weight", "encoder.layers.1.attn.Wo.weight"} <= turned
        assert {"encoder.embeddings.tok_embeddings.weight", "head.dense.weight", "head.bias"} <= others
    assert {group["lr_scale"] for group in optimizer.param_groups if not group["orthogonal"]} == {0.5}
    parts = {n: g["parts"] for g in optimizer.param_groups for n in names_of(module, g["params"])}
    assert {part for name, part in parts.items() if "qkv" in name and name.endswith("weight")} == {3}
    assert {part for name, part in parts.items() if "Wi" in name} <= {2}


def test_a_depthwise_convolution_is_no_matrix_and_a_full_one_is() -> None:
    assert matrix_parts("encoder.conv.weight", nn.Conv2d(8, 8, 3, groups=8).weight) == 0
    assert matrix_parts("encoder.conv.weight", nn.Conv2d(8, 4, 3).weight) == 1


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5, 40), (1, 64, 16)])
def test_orthogonal_means_singular_values_near_one_and_the_same_vectors(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    turned = orthogonalize(matrices)
    values = torch.linalg.svdvals(turned)
    assert values.min() > 0.5
    assert values.max() < 1.3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    # In the singular vectors' own basis it is diagonal.
    inside = left.mT @ turned @ right.mT
    assert (inside - torch.diag_embed(inside.diagonal(dim1=1, dim2=2))).abs().max() < 1e-4


def steps(module: nn.Module, optimizer: torch.optim.Optimizer, count: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for parameter in module.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def test_muon_is_torch_s_on_plain_matrices() -> None:
    ours, theirs = (nn.Linear(12, 20, bias=False) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    for scaling, name in [("rms", "match_rms_adamw"), ("shape", "original")]:
        settings = MuonConfig.model_validate({"lr": 0.02, "weight_decay": 0.1, "scaling": scaling})
        steps(ours, build_optimizer(ours, settings), 5)
        steps(theirs, torch.optim.Muon(theirs.parameters(), lr=0.02, weight_decay=0.1, adjust_lr_fn=name), 5)
        torch.testing.assert_close(ours.weight, theirs.weight, atol=4e-3, rtol=0.0)  # theirs rounds to bfloat16


def test_fused_projections_move_like_separate_ones_and_the_rest_like_adamw() -> None:
    fused, apart = nn.Module(), nn.Module()
    fused.qkv, fused.norm = nn.Linear(8, 24), nn.LayerNorm(8)
    apart.q, apart.k, apart.v = (nn.Linear(8, 8, bias=False) for _ in range(3))
    for part, weight in zip((apart.q, apart.k, apart.v), fused.qkv.weight.detach().chunk(3), strict=True):
        part.weight.data.copy_(weight)
    optimizers = [build_optimizer(module, MuonConfig(lr=0.1)) for module in (fused, apart)]
    gradient = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    vector, plain = torch.randn(8), nn.LayerNorm(8)
    adamw = torch.optim.AdamW(plain.parameters(), lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(3):
        fused.qkv.weight.grad = gradient
        fused.norm.weight.grad = plain.weight.grad = vector
        for part, piece in zip((apart.q, apart.k, apart.v), gradient.chunk(3), strict=True):
            part.weight.grad = piece
        for optimizer in (*optimizers, adamw):
            optimizer.step()
    together = torch.cat([apart.q.weight, apart.k.weight, apart.v.weight])
    torch.testing.assert_close(fused.qkv.weight, together, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fused.norm.weight, plain.weight)


def test_lars_and_lamb_are_timm_s_with_vectors_left_alone() -> None:
    for name, theirs in {"lars": timm.optim.Lars, "lamb": timm.optim.Lamb}.items():
        ours, reference = nn.Linear(6, 4), nn.Linear(6, 4)
        reference.load_state_dict(ours.state_dict())
        settings = config(name, lr=0.05, weight_decay=0.0)
        extra = {"momentum": 0.9} if name == "lars" else {"max_grad_norm": None}
        groups = [{"params": [reference.weight], "always_adapt": True}, {"params": [reference.bias]}]
        steps(ours, build_optimizer(ours, settings), 4)
        steps(reference, theirs(groups, lr=0.05, weight_decay=0.0, **extra), 4)
        torch.testing.assert_close(ours.state_dict(), reference.state_dict())


def test_the_vectors_of_lars_may_have_a_rate_of_their_own() -> None:
    optimizer = build_optimizer(nn.Linear(3, 3), config("lars", vector_scale=0.25))
    assert [group["lr_scale"] for group in optimizer.param_groups] == [1.0, 0.25]


@pytest.mark.parametrize("name", NAMES)
def test_an_optimizer_from_a_checkpoint_takes_the_same_steps_bit_for_bit(name: str, tmp_path: Path) -> None:
    module, copy = mae(), mae()
    settings = config(name)
    optimizer = build_optimizer(module, settings)
    steps(module, optimizer, 3)
    save_file(optimizer_tensors(optimizer, module), tmp_path / "optimizer.safetensors")
    groups = json.loads(json.dumps(optimizer_groups(optimizer)))
    copy.load_state_dict(module.state_dict())
    resumed = build_optimizer(copy, settings)
    load_optimizer(resumed, copy, Stored([tmp_path / "optimizer.safetensors"]), groups)
    for each, its in ((module, optimizer), (copy, resumed)):
        set_lr(its, 0.03)
        steps(each, its, 2, seed=5)
    for (key, left), right in zip(module.state_dict().items(), copy.state_dict().values(), strict=True):
        assert torch.equal(left, right), key


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_descends(name: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    inputs, targets = torch.randn(64, 8), torch.randn(64, 4)
    rate = {"adamw": 0.01, "lamb": 0.02, "sgd": 0.1, "lars": 0.1, "muon": 0.02}[name]
    settings = config(name, lr=rate, weight_decay=0.0) if name != "lars" else config(name, lr=rate, trust=0.1)
    optimizer = build_optimizer(module, settings)
    losses = []
    for _ in range(60):
        loss = (module(inputs) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0], losses[::10]


def test_muon_takes_no_step_where_there_is_no_gradient() -> None:
    module = nn.Linear(4, 4)
    before = module.weight.detach().clone()
    optimizer = build_optimizer(module, MuonConfig())
    assert isinstance(optimizer, Muon)
    optimizer.step()
    assert torch.equal(module.weight, before)
    assert len(optimizer.param_groups) == 2


def test_the_default_is_adamw() -> None:
    optimizer = build_optimizer(nn.Linear(3, 3), AdamWConfig())
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["fused"]


def test_muon_turns_sharded_matrices_whole(tmp_path: Path) -> None:
    plain, sharded = nn.Linear(6, 9), nn.Linear(6, 9)
    sharded.load_state_dict(plain.state_dict())
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(parameter.shape, generator=generator) for parameter in plain.parameters()]
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
        for module in (plain, sharded):
            optimizer = build_optimizer(module, MuonConfig(lr=0.1))
            for parameter, gradient in zip(module.parameters(), gradients, strict=True):
                is_sharded = isinstance(parameter, DTensor)
                parameter.grad = distribute_tensor(gradient, parameter.device_mesh) if is_sharded else gradient
            optimizer.step()
        for left, right in zip(plain.parameters(), sharded.parameters(), strict=True):
            torch.testing.assert_close(left, right.full_tensor())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.gpu
def test_muon_on_a_gpu_is_muon_on_a_cpu_but_for_bfloat16() -> None:
    on_cpu, on_gpu = mae(), mae().cuda()
    on_gpu.load_state_dict(on_cpu.state_dict())
    before = {name: p.detach().clone() for name, p in on_cpu.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(0)
    gradients = {name: torch.randn(p.shape, generator=generator) for name, p in on_cpu.named_parameters()}
    for module in (on_cpu, on_gpu):
        optimizer = build_optimizer(module, MuonConfig(lr=0.01, weight_decay=0.0))
        for name, parameter in module.named_parameters():
            parameter.grad = gradients[name].to(parameter.device)
        optimizer.step()
    there = dict(on_gpu.named_parameters())
    for name, parameter in on_cpu.named_parameters():
        if name in before:
            moved, also = parameter - before[name], there[name].cpu() - before[name]
            assert (moved - also).norm() < 0.05 * moved.norm(), name
