"""`headwater plan`: what a recipe needs on a cluster, and what it will run into first, on paper.

Memory and arithmetic are counted (`pretrain.cost`); time comes from a roofline, or from rates measured on the spot
for `--gpu cpu`. A step takes as long as the slowest of what goes on side by side: the device, the host that starts
its kernels, the loader, and the part of the gradients' way that the backward pass does not cover.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import psutil
import torch

from data.errors import UserError
from launch.plan_data import Source, look_at
from launch.plan_devices import CORES, LINKS, PUBLISHED, STORAGE, accelerator
from launch.plan_rates import Measured, Rates, Roofline, Seconds, measure_cpu
from pretrain.cost import StepCost, count_step
from pretrain.precision import best
from pretrain.recipe import Recipe

_RESERVED = 0.08
"""Share of a device's memory that the driver, NCCL and fragments take; an assumption."""


@dataclass(frozen=True)
class Cluster:
    """What there is."""

    gpu: str = "h200"
    """A name of `launch.plan_devices.ACCELERATORS`, or cpu."""
    gpus: int = 1
    """Over all nodes."""
    nodes: int = 1
    link: str = "ndr"
    """Between nodes; a name of `launch.plan_devices.LINKS`."""
    cores: int | None = None
    """CPU cores of a node; 14 for each GPU by default."""

    def check(self) -> None:
        """Raises `UserError` where this is no cluster."""
        if self.gpus < 1 or self.nodes < 1 or self.gpus % self.nodes:
            raise UserError(f"{self.gpus} GPUs do not lie evenly on {self.nodes} nodes; change --gpus or --nodes")
        if self.link not in LINKS:
            raise UserError(f"--link {self.link!r} is not in the table; use {', '.join(LINKS)}")
        if self.gpu != "cpu":
            accelerator(self.gpu)


@dataclass
class Plan:
    """What was found; sizes in bytes, times in seconds, everything for one step unless it says otherwise."""

    recipe: str
    cluster: Cluster
    source: Source
    steps: int
    cost: StepCost
    memory: dict[str, float]
    """Of one device, by what takes it."""
    capacity: float
    """Of one device, less what is reserved."""
    largest_microbatch: int
    seconds: Seconds
    """Of the device."""
    network: float
    """Of the gradients, if nothing covered it."""
    exposed: float
    """What of it the backward pass does not cover."""
    loading: dict[str, float]
    """What a node must read (`bytes` a second), the `cores` it needs to decode, and seconds of reading and decoding."""
    checkpoint: dict[str, float]
    """Bytes of one, bytes a second over the run, and bytes staged in each process's host memory."""
    step: float = 0.0
    bottleneck: str = ""
    published: list[str] = field(default_factory=list)
    rates: str = ""
    """Where the rates come from."""

    @property
    def days(self) -> float:
        """Of the whole run, evaluations and checkpoints left out."""
        return self.step * self.steps / 86400

    @property
    def samples_per_second(self) -> float:
        """Over all devices."""
        return self.cost.microbatch * self.cost.accumulation * self.cluster.gpus / self.step

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        tree = asdict(self)
        del tree["cost"]["work"]
        tree["cost"] |= {"flops": self.cost.flops, "launches": self.cost.launches}
        return tree | {"days": self.days, "samples_per_second": self.samples_per_second}


def plan(recipe: Recipe, cluster: Cluster, samples: int | None = None, rates: Rates | None = None) -> Plan:
    """What `recipe` takes on `cluster`.

    Args:
        samples: of the training set; those of `data.train` by default, or of the set that the recipe is named after.
            A recipe that counts steps is planned for one pass over so many, in place of its steps.
        rates: of this machine, where they have been measured already.

    Raises:
        UserError: no such device or link; a batch that does not split; nobody knows how many samples there are.
    """
    cluster.check()
    if samples and recipe.train.steps is not None:  # else they would change nothing
        once = recipe.train.model_copy(update={"steps": None, "epochs": 1.0})
        recipe = recipe.model_copy(update={"train": once})
    recipe, source = look_at(recipe, samples)
    recipe = recipe.with_precision(best(torch.device("cpu")) if cluster.gpu == "cpu" else "bf16")
    microbatch, accumulation = _split(recipe, cluster.gpus)
    kind = "cpu" if cluster.gpu == "cpu" else "cuda"
    cost = count_step(recipe, microbatch, accumulation, kind)  # type: ignore[arg-type]
    if rates is None:
        rates = measure_cpu() if cluster.gpu == "cpu" else Roofline(accelerator(cluster.gpu))
    seconds = rates.seconds(cost.work, recipe.train.compile)
    capacity = _capacity(cluster)
    memory = device_memory(cost, cluster.gpus if recipe.train.shard else 1)
    network = gradient_seconds(cost, cluster, recipe.train.shard)
    found = Plan(
        recipe=recipe.name,
        cluster=cluster,
        source=source,
        steps=recipe.steps(source.samples),
        cost=cost,
        memory=memory,
        capacity=capacity,
        largest_microbatch=_largest(recipe, cost, memory, capacity, kind),
        seconds=seconds,
        network=network,
        exposed=max(0.0, network - 2 / 3 * seconds.busy / (1 if recipe.train.shard else accumulation)),
        loading={},
        checkpoint={},
        published=[p.source for p in PUBLISHED if (p.recipe, p.device) == (recipe.name, cluster.gpu)],
        rates="measured on this machine just now" if isinstance(rates, Measured) else accelerator(cluster.gpu).source,
    )
    _time(found, recipe)
    return found


def device_memory(cost: StepCost, shards: int) -> dict[str, float]:
    """Bytes that one device holds, weights, gradients and optimiser cut over `shards` devices."""
    gathered = 0.0 if shards == 1 else 2.0 * cost.largest_block
    return {
        "weights": cost.weights / shards,
        "gradients": cost.gradients / shards,
        "optimizer": cost.optimizer / shards,
        "average": cost.average / shards,
        "gathered": gathered,
        "activations": float(cost.activations),
        "canvases": 2.0 * cost.canvases,
    }


def gradient_seconds(cost: StepCost, cluster: Cluster, sharded: bool) -> float:
    """A ring's all-reduce, 2 (n - 1) / n of the gradients; sharded, two gathers and a scatter a microbatch."""
    if cluster.gpus == 1 or cluster.gpu == "cpu":
        return 0.0
    link = accelerator(cluster.gpu).link
    if cluster.nodes > 1:  # as many rings as ports, so that a node's ports work together
        link = min(link, LINKS[cluster.link].bandwidth)
    passes = 3 * cost.accumulation if sharded else 2
    return passes * (cluster.gpus - 1) / cluster.gpus * cost.gradients / link


def _split(recipe: Recipe, gpus: int) -> tuple[int, int]:
    size = recipe.train.batch_size
    if size % gpus:
        raise UserError(f"a global batch of {size} does not split over {gpus} GPUs; change train.batch_size or --gpus")
    share = size // gpus
    wanted = min(share, recipe.train.microbatch or share)
    microbatch = next(size for size in range(wanted, 0, -1) if share % size == 0)
    return microbatch, share // microbatch


def _capacity(cluster: Cluster) -> float:
    if cluster.gpu == "cpu":
        return float(psutil.virtual_memory().available) / cluster.gpus
    return accelerator(cluster.gpu).memory * (1 - _RESERVED)


def _largest(recipe: Recipe, cost: StepCost, memory: dict[str, float], capacity: float, kind: Any) -> int:
    """The largest microbatch that fits, activations growing in proportion, between two counts."""
    small = max(2, cost.microbatch // 2)
    other = cost if small == cost.microbatch else count_step(recipe, small, 1, kind)
    fixed = sum(size for name, size in memory.items() if name not in ("activations", "canvases"))
    slope = cost.activations / cost.microbatch
    if other is not cost and cost.accumulation == 1:
        slope = max(1.0, (cost.activations - other.activations) / (cost.microbatch - small))
    constant = max(0.0, cost.activations - slope * cost.microbatch)
    each = slope + 2 * cost.canvases / cost.microbatch
    return max(0, int((capacity - fixed - constant) // each))


def _time(found: Plan, recipe: Recipe) -> None:
    """The step, what limits it, and what must be read, decoded and saved meanwhile."""
    cluster, cost, loading = found.cluster, found.cost, found.source.loading
    node = cost.microbatch * cost.accumulation * cluster.gpus / cluster.nodes
    here = cluster.gpu == "cpu"
    cores = cluster.cores or (psutil.cpu_count(logical=False) or 1 if here else CORES * cluster.gpus // cluster.nodes)
    decoding, reading = node / loading.decoded / cores, node * loading.bytes / STORAGE
    seconds = found.seconds
    device = seconds.busy + seconds.launch if here else max(seconds.busy, seconds.launch)
    limits = {
        "arithmetic": device if seconds.compute >= seconds.memory else 0.0,
        "device memory's bandwidth": device if seconds.memory > seconds.compute else 0.0,
        "starting kernels": 0.0 if here or seconds.launch < seconds.busy else seconds.launch,
        "the network between nodes" if cluster.nodes > 1 else "the links within the node": (
            device + found.exposed if found.exposed > device else 0.0
        ),
        "decoding on the CPU cores": decoding,
        "reading from storage": reading,
    }
    found.step = max(device + found.exposed, decoding, reading)
    found.bottleneck = max(limits, key=lambda name: limits[name])
    if seconds.launch > seconds.busy and not here and found.bottleneck.startswith(("arith", "device")):
        found.bottleneck = "starting kernels"
    if sum(found.memory.values()) > found.capacity:
        found.bottleneck = "the memory of a device"
    rate = node / found.step
    found.loading = {"bytes": rate * loading.bytes, "cores": rate / loading.decoded, "seconds": max(decoding, reading)}
    size = float(cost.weights + cost.optimizer + cost.average)
    shards = cluster.gpus if recipe.train.shard else 1
    every = recipe.watch.checkpoint_every * found.step
    found.checkpoint = {"bytes": size, "bytes_per_second": size / every, "staged": size / shards}
