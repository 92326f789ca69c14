"""Laws of plans: what is counted is what a step does and holds, whatever the recipe; what does not fit is said."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from pretrain_kit import write_recipe
from torch.utils.flop_counter import FlopCounterMode

from data.errors import UserError
from data.loader import Loader
from launch.cli import main
from launch.plan import Cluster, Plan, device_memory, gradient_seconds, plan
from launch.plan_devices import ACCELERATORS, LINKS, PUBLISHED
from pretrain.build import build_objective, open_data, resolve
from pretrain.cost import count_step
from pretrain.optim import build_optimizer
from pretrain.recipe_file import FOLDER, load_recipe

NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def planned(name: str, gpus: int = 8, settings: list[str] | None = None, **cluster: object) -> Plan:
    nodes = max(1, gpus // 8)
    return plan(load_recipe(name, settings), Cluster(gpus=gpus, nodes=nodes, **cluster))  # type: ignore[arg-type]


@pytest.mark.parametrize("case", ["mae", "simclr", "next_token", "masked_language"])
def test_operations_weights_and_state_are_those_of_a_real_step(
    case: str, digits: Path, sentences: Path, tmp_path: Path
) -> None:
    data = sentences if case in ("next_token", "masked_language") else digits / "train"
    recipe = load_recipe(write_recipe(tmp_path / "tiny.yaml", case, data))
    opened = open_data(recipe)
    recipe = resolve(recipe, opened)
    cost = count_step(recipe, 8, 1, "cpu")
    objective = build_objective(recipe)
    objective.read(opened.train)
    batch = next(iter(Loader(opened.train, 8, canvas=recipe.data.canvas)))
    optimizer = build_optimizer(objective, recipe.optimizer)
    with FlopCounterMode(display=False) as counter:
        objective(batch, 0.5).loss_sum.backward()
    optimizer.step()
    assert cost.flops == counter.get_total_flops() > 0
    tensors = [*objective.parameters(), *objective.buffers()]
    assert cost.weights == sum(each.numel() * each.element_size() for each in tensors)
    state = [value for each in optimizer.state.values() for value in each.values() if torch.is_tensor(value)]
    assert cost.optimizer == sum(each.numel() * each.element_size() for each in state)
    assert cost.gradients == sum(p.grad.numel() * 4 for p in objective.parameters() if p.grad is not None)


def test_activations_are_what_backward_keeps() -> None:
    recipe = load_recipe("next_token_small", ["encoder.vocab_size=512"])
    objective = build_objective(recipe)
    from data.batch import TextBatch

    tokens = torch.arange(129).expand(8, -1).contiguous()
    batch = TextBatch(tokens, torch.zeros_like(tokens), torch.arange(8), torch.arange(8))
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in objective.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = objective(batch, 0.5)
    assert output.loss_sum.requires_grad
    counted = count_step(recipe, 8, 1, "cpu").activations
    assert sum(kept.values()) <= counted < 1.6 * sum(kept.values())


def test_microbatches_do_not_change_the_operations_of_a_loss_that_compares_nothing() -> None:
    recipe = load_recipe("mae_cifar10")
    whole, halves = count_step(recipe, 16, 1, "cpu"), count_step(recipe, 8, 2, "cpu")
    assert halves.flops == whole.flops
    assert halves.activations < 0.6 * whole.activations


def test_gradient_caching_costs_a_second_forward_pass() -> None:
    recipe = load_recipe("simclr_cifar10")
    whole, halves = count_step(recipe, 16, 1, "cpu"), count_step(recipe, 8, 2, "cpu")
    assert 1.25 * whole.flops < halves.flops < 1.4 * whole.flops


def test_a_sharded_model_takes_its_share_of_each_device() -> None:
    cost = count_step(load_recipe("next_token_350m"), 1, 1, "cuda")
    alone, shared = device_memory(cost, 1), device_memory(cost, 8)
    for name in ("weights", "gradients", "optimizer"):
        assert shared[name] == alone[name] / 8
    assert shared["activations"] == alone["activations"]


def test_a_ring_sends_twice_the_gradients_less_one_share() -> None:
    cost = count_step(load_recipe("mae_cifar10"), 2, 1, "cuda")
    gpu = ACCELERATORS["h200"]
    assert gradient_seconds(cost, Cluster(gpus=1), False) == 0
    assert gradient_seconds(cost, Cluster(gpus=8), False) == pytest.approx(2 * 7 / 8 * cost.gradients / gpu.link)
    slow = gradient_seconds(cost, Cluster(gpus=16, nodes=2, link="ethernet25"), False)
    assert slow == pytest.approx(2 * 15 / 16 * cost.gradients / LINKS["ethernet25"].bandwidth)


def test_a_slow_network_becomes_the_bottleneck() -> None:
    fast, slow = (planned("next_token_10m", 16, link=link) for link in ("ndr", "ethernet25"))
    assert slow.bottleneck == "the network between nodes"
    assert fast.bottleneck != slow.bottleneck
    assert slow.step > fast.step


def test_few_cores_become_the_bottleneck() -> None:
    assert planned("mae_cifar10", cores=1).bottleneck == "decoding on the CPU cores"


@pytest.mark.slow
@pytest.mark.parametrize("entry", PUBLISHED, ids=lambda entry: entry.recipe)
def test_published_runs_are_within_a_factor_of_two(entry: object) -> None:
    assert isinstance(entry, type(PUBLISHED[0]))
    found = planned(entry.recipe, gpu=entry.device)
    assert 0.5 < found.samples_per_second / found.cluster.gpus / entry.samples < 2


@pytest.mark.slow
def test_what_does_not_fit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "next_token_10m", "train.batch_size=8192", "train.microbatch=4096", "--gpu", "a100", "--gpus", "2"]
    assert main(words) == 1
    assert "It does not fit" in capsys.readouterr().out


def test_the_command_prints_a_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "mae_cifar10", "--gpus", "8", "--days", "1"]) == 0
    text = capsys.readouterr().out
    assert "largest microbatch" in text
    assert text.strip().splitlines()[-1].endswith("that is in time.")
    assert main(["plan", "mae_cifar10", "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["bottleneck"]
    assert tree["cost"]["parameters"] == 1_315_888


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mae_cifar10", "--gpu", "tpu"], "--gpu 'tpu'"),
        (["mae_cifar10", "--gpus", "3"], "does not split over 3"),
        (["mae_cifar10", "--gpus", "8", "--nodes", "3"], "--nodes"),
        (["mae_cifar10", "--link", "string"], "--link 'string'"),
        (["mae_cifar10", "--days", "-1"], "--days -1"),
    ],
)
def test_what_makes_no_sense_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    assert message in capsys.readouterr().err


def test_epochs_of_nobody_knows_how_many_samples_are_refused() -> None:
    recipe = load_recipe("mae_cifar10").model_copy(update={"name": "mine"})
    with pytest.raises(UserError, match="--samples"):
        plan(recipe, Cluster())
    assert plan(recipe, Cluster(), samples=10**10).steps == 12 * 10**10 // 256


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_planned_in_seconds(name: str) -> None:
    found = planned(name, 8 if load_recipe(name).train.batch_size % 8 == 0 else 1)
    assert found.cost.flops > 0
    assert found.step > 0
    assert found.bottleneck


@pytest.mark.slow
def test_samples_take_the_place_of_steps() -> None:
    recipe = load_recipe("next_token_small")
    assert recipe.train.steps is not None
    size = recipe.train.batch_size
    assert plan(recipe, Cluster()).steps == recipe.train.steps
    assert plan(recipe, Cluster(), samples=1000 * size).steps == 1000


def test_a_thousand_gpus_and_ten_billion_samples() -> None:
    recipe = load_recipe("mae_vitl16_imagenet22k", ["train.batch_size=16384"])
    found = plan(recipe, Cluster(gpus=1024, nodes=128), samples=10**10)
    assert found.samples_per_second > 100_000
    assert found.days > 1


@pytest.mark.slow
def test_predictions_hold_on_this_machine(sentences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a factor of two for seconds and for memory, of which an idle machine shows much less."""
    # With one thread processor time is counted, which other work on the machine stretches least.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    sys.path.insert(0, str(Path(__file__).parent / "bench"))
    import importlib

    bench = importlib.import_module("plan")

    text = tmp_path / "text"
    text.symlink_to(sentences)
    for row in bench.compare("", str(text), ["next_token_small"]):
        for name in ("seconds", "bytes"):
            assert 0.5 < row["predicted"][name] / row["measured"][name] < 2, (name, row)
