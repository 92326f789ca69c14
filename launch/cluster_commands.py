"""`headwater launch …`: jobs for clusters; heavy imports wait until a command runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from launch.kubernetes import KINDS
from launch.parsers import add_command


def add(sub: argparse._SubParsersAction) -> None:
    """Put `launch` and its kinds into the command line."""
    parser = sub.add_parser("launch", help="jobs for clusters that requeue and resume")
    kinds = parser.add_subparsers(title="kinds", metavar="KIND", required=True)
    slurm = _kind(kinds, "slurm", run_slurm, "write and submit a SLURM job that requeues and resumes")
    slurm.add_argument("--processes", type=int, help="processes of each node (default: one for each GPU)")
    slurm.add_argument("--time", default="24:00:00", help="time limit of one job (default: 24:00:00)")
    slurm.add_argument("--lead", type=int, default=300, help="seconds before it to save and requeue (default: 300)")
    slurm.add_argument("--failures", type=int, default=3, help="requeues after a node failed (default: 3)")
    slurm.add_argument("--setup", action="append", default=[], metavar="LINE", help="shell line before the run")
    slurm.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="for sbatch: --sbatch=--qos=x")
    slurm.add_argument("--dry-run", action="store_true", help="check the recipe, print the script, submit nothing")
    slurm.add_argument("--follow", action="store_true", help="stay and pass on the job's log")
    _shard(kinds)
    kubernetes = _kind(kinds, "kubernetes", run_kubernetes, "print Kubernetes manifests of a run")
    kubernetes.add_argument(
        "--kind", choices=KINDS, default="job", help="plain Job, or Kubeflow's v1 or v2 (default: job)"
    )
    kubernetes.add_argument("--claim", default="headwater", help="volume claim for shards and runs")
    sky = _kind(kinds, "skypilot", run_skypilot, "print a SkyPilot task of a run, for sky jobs launch")
    sky.add_argument("--accelerator", default="H100", help="SkyPilot's name of the GPU (default: H100)")
    sky.add_argument("--bucket", help="URL of the bucket for shards and runs")
    sky.add_argument("--on-demand", action="store_true", help="no spot machines")
    for each in (kubernetes, sky):
        each.add_argument("--name", help="of the job (default: the recipe's)")
        each.add_argument("--image", default="", help="container image with headwater installed")
        each.add_argument("--memory", default="64Gi", help="main memory of a node (default: 64Gi)")
        each.add_argument("--mount", default="/mnt/headwater", help="where shards and runs are mounted")
        each.add_argument("--save-seconds", type=int, default=240, help="most that a step and a save take")


def _kind(kinds: argparse._SubParsersAction, name: str, command: Any, text: str) -> argparse.ArgumentParser:
    parser = add_command(kinds, name, command, text)
    parser.add_argument("recipe", help="recipe file, or the name of one of ours")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument("--output", type=Path, help="run folder that all nodes share (default: runs/NAME)")
    parser.add_argument("--nodes", type=int, default=1, help="nodes (default: 1)")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs of each node (default: 0, train on CPUs)")
    parser.add_argument("--cpus", type=int, help="CPU cores of each node")
    return parser


def _shard(kinds: argparse._SubParsersAction) -> None:
    text = "write and submit a SLURM array that shards a dataset in parts and then joins them"
    parser = add_command(kinds, "shard", run_shard, text)
    parser.add_argument("kind", choices=["images", "text"], help="as in headwater shard")
    parser.add_argument("source", nargs="+", type=Path, help="folder of pictures, or text files and folders")
    parser.add_argument("out", type=Path, help="folder to make, on a disk that all nodes share")
    parser.add_argument("--parts", type=int, required=True, help="jobs that share the work")
    parser.add_argument("--cpus", type=int, default=8, help="CPU cores of each job (default: 8)")
    parser.add_argument("--time", default="12:00:00", help="time limit of each job (default: 12:00:00)")
    parser.add_argument("--setup", action="append", default=[], metavar="LINE", help="shell line before each job")
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="for sbatch: --sbatch=--qos=x")
    parser.add_argument("--shard", action="append", default=[], metavar="OPTION", help="for headwater shard, likewise")
    parser.add_argument("--dry-run", action="store_true", help="print the scripts, write and submit nothing")


def run_shard(arguments: argparse.Namespace) -> int:
    """`headwater launch shard`."""
    from data.errors import UserError
    from launch import slurm_array

    missing = [str(each) for each in arguments.source if not each.exists()]
    if missing:
        raise UserError(f"{', '.join(missing)} does not exist; give what is to be sharded")
    out = arguments.out.resolve()
    words = [arguments.kind, *(str(each.resolve()) for each in arguments.source), str(out), *arguments.shard]
    array = slurm_array.Array(
        out, words, arguments.parts, arguments.cpus, arguments.time, arguments.setup, arguments.sbatch
    )
    if arguments.dry_run:
        for name, text in slurm_array.scripts(array).items():
            print(f"# {array.folder / name}\n{text}")
        return 0
    parts, merge = slurm_array.submit(slurm_array.write(array))
    print(
        f"job {parts}: {array.parts} parts; job {merge} joins them\nlogs: {array.folder}\nnext: headwater inspect {out}"
    )
    return 0


def run_slurm(arguments: argparse.Namespace) -> int:
    """`headwater launch slurm`: with --follow, exit status 1 when the job did not complete."""
    from launch import slurm

    run = (arguments.output or Path("runs") / _recipe(arguments).name).resolve()
    job = slurm.Job(
        run=run,
        words=[arguments.recipe, *arguments.settings],
        nodes=arguments.nodes,
        gpus=arguments.gpus,
        processes=arguments.processes,
        cpus=arguments.cpus,
        time=arguments.time,
        lead=arguments.lead,
        failures=arguments.failures,
        setup=arguments.setup,
        options=arguments.sbatch,
    )
    if arguments.dry_run:
        print(slurm.script(job), end="")
        return 0
    number = slurm.submit(slurm.write(job))
    log = run / "slurm" / f"{number}.log"
    print(f"job {number}: {run / 'slurm' / 'job.sh'}\nlog: {log}\nnext: headwater status {run}")
    return int(slurm.follow(run, print) != "COMPLETED") if arguments.follow else 0


def run_kubernetes(arguments: argparse.Namespace) -> int:
    """`headwater launch kubernetes`."""
    import yaml

    from data.errors import UserError
    from launch.kubernetes import manifests, preface

    if not arguments.image:
        raise UserError("give the container image that has headwater installed (--image)")
    trees = manifests(_cluster_job(arguments), arguments.kind)
    print(preface(arguments.kind) + yaml.safe_dump_all(trees, sort_keys=False), end="")
    return 0


def run_skypilot(arguments: argparse.Namespace) -> int:
    """`headwater launch skypilot`."""
    import yaml

    from launch.skypilot import task

    tree = task(_cluster_job(arguments), arguments.accelerator, arguments.bucket, spot=not arguments.on_demand)
    print(yaml.safe_dump(tree, sort_keys=False), end="")
    return 0


def _recipe(arguments: argparse.Namespace) -> Any:
    from pretrain.recipe_file import load_recipe

    return load_recipe(arguments.recipe, arguments.settings)


def _cluster_job(arguments: argparse.Namespace) -> Any:
    from launch.kubernetes import ClusterJob

    recipe = _recipe(arguments)
    name = arguments.name or recipe.name.lower().replace("_", "-").replace(".", "-")
    output = arguments.output or Path("runs") / recipe.name
    return ClusterJob(
        name=name,
        words=[arguments.recipe, *arguments.settings, "--output", str(output)],
        image=arguments.image,
        nodes=arguments.nodes,
        gpus=arguments.gpus,
        cpus=arguments.cpus or 16,
        memory=arguments.memory,
        mount=arguments.mount,
        save_seconds=arguments.save_seconds,
        **({"claim": arguments.claim} if hasattr(arguments, "claim") else {}),
    )
