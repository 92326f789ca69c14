"""A plan as a table to read, with one sentence to remember at its end."""

from __future__ import annotations

import math

from launch.plan import Plan
from launch.plan_devices import ACCELERATORS, LINKS, PUBLISHED

_NAMES = {
    "weights": "weights, teachers included",
    "gradients": "gradients",
    "optimizer": "optimiser's state",
    "average": "average of the weights",
    "gathered": "blocks gathered for use",
    "activations": "activations and scratch",
    "canvases": "pictures or tokens",
}


def describe(plan: Plan, days: float | None = None) -> str:
    """Lines of `name value`, then a sentence."""
    cost, cluster, gpu = plan.cost, plan.cluster, ACCELERATORS.get(plan.cluster.gpu)
    where = f"{cluster.gpus} {cluster.gpu}" + (f" on {cluster.nodes} nodes" if cluster.nodes > 1 else "")
    batch = cost.microbatch * cost.accumulation * cluster.gpus
    per_gpu = plan.samples_per_second / cluster.gpus
    rows = [
        ("recipe", f"{plan.recipe} on {where}; rates: {plan.rates}"),
        ("data", f"{plan.source.samples:,} samples, {plan.source.about}"),
        ("parameters", f"{_count(cost.parameters)}, {_count(cost.encoder_parameters)} of them in the encoder"),
        ("global batch", f"{batch:,}: {cluster.gpus} x {cost.accumulation} x {cost.microbatch} a microbatch"),
        ("", ""),
        *((_NAMES[name], size_of(size)) for name, size in plan.memory.items() if size),
        ("memory of a device", f"{size_of(sum(plan.memory.values()))} of {size_of(plan.capacity)}"),
        ("largest microbatch", f"{plan.largest_microbatch:,} would fit"),
        ("staged on the host", f"{size_of(plan.checkpoint['staged'])} a process, for checkpoints"),
        ("", ""),
        ("arithmetic", f"{cost.flops * cluster.gpus / 1e12:,.3g} TFLOP a step, {cost.launches:,} kernels a device"),
        ("waiting for arithmetic", duration(plan.seconds.compute)),
        ("waiting for memory", duration(plan.seconds.memory)),
        ("starting kernels", duration(plan.seconds.launch)),
    ]
    if cluster.gpus > 1 and gpu is not None:
        over = LINKS[cluster.link].about if cluster.nodes > 1 else "NVLink"
        rows.append(("gradients on the way", f"{duration(plan.network)}, {duration(plan.exposed)} uncovered; {over}"))
    rows += [
        ("a step", duration(plan.step)),
        ("throughput", f"{plan.samples_per_second:,.0f} samples/s, {per_gpu:,.0f} a device{_share(plan)}"),
        *(("published nearby", text) for text in _published(plan)),
        ("loader of a node", f"{size_of(plan.loading['bytes'])}/s and {plan.loading['cores']:,.1f} cores that decode"),
        ("", plan.source.loading.source),
        ("checkpoints", f"{size_of(plan.checkpoint['bytes'])} each, {size_of(plan.checkpoint['bytes_per_second'])}/s"),
        ("whole run", f"{plan.steps:,} steps, {plan.days:,.3g} days{_energy(plan)}"),
    ]
    table = "\n".join(f"{name:<28}{value}".rstrip() for name, value in rows)
    return f"{table}\n\n{_sentence(plan, days)}"


def _sentence(plan: Plan, days: float | None) -> str:
    needed, memory = sum(plan.memory.values()), plan.capacity
    if needed > memory:
        how = f"set train.microbatch={plan.largest_microbatch}" if plan.largest_microbatch else "set train.shard=true"
        return f"It does not fit: {size_of(needed)} on a device that has {size_of(memory)}; {how}, or use more memory."
    text = f"It fits, takes {plan.days:,.3g} days, and first runs into {plan.bottleneck}."
    if days is not None:
        gpus = math.ceil(plan.cluster.gpus * plan.days / days)
        enough = "that is in time" if plan.days <= days else f"{days:g} days would take about {gpus:,} of these"
        text = f"{text[:-1]}; {enough}."
    return text


def _published(plan: Plan) -> list[str]:
    near = [p for p in PUBLISHED if (p.recipe, p.device) == (plan.recipe, plan.cluster.gpu)]
    return [f"{p.samples:,.0f} samples/s a device ({p.source})" for p in near]


def _share(plan: Plan) -> str:
    gpu = ACCELERATORS.get(plan.cluster.gpu)
    return "" if gpu is None else f", {plan.cost.flops / plan.step / gpu.half:.0%} of its peak"


def _energy(plan: Plan) -> str:
    gpu = ACCELERATORS.get(plan.cluster.gpu)
    if gpu is None:
        return ""
    energy = gpu.watts * plan.cluster.gpus * 24 * plan.days / 1e3
    return f", {energy:,.3g} kWh at {gpu.watts:.0f} W a GPU, the rest of the nodes left out"


def size_of(size: float) -> str:
    """Bytes in decimal units."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}" if size < 1000 * scale else f"{size / scale:,.0f} {unit}"
    return f"{size / 1e3:.3g} kB"


def duration(seconds: float) -> str:
    """Seconds or milliseconds."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.2f}M"
