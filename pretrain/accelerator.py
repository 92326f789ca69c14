"""Accelerate, set up the way the loop wants it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration, broadcast_object_list
from torch import nn
from torch.optim import Optimizer

from data.errors import UserError
from pretrain.objectives.protocol import JointObjective
from pretrain.preemption import elastic, launched
from pretrain.recipe import Recipe, RunRecipe
from pretrain.sharding import is_sharded, shard

T = TypeVar("T")
_DIE_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of Linux's prctl."""
_FSDP = "ACCELERATE_USE_FSDP"
"""What `accelerate launch` sets where its configuration names FSDP."""


class AgreedError(UserError):
    """Raised on all processes alike."""


def as_launched(recipe: Recipe) -> Recipe:
    """The recipe, with `train.shard` where Accelerate's configuration asks for FSDP; ours then takes its place."""
    if not _launched_for_fsdp():
        return recipe
    del os.environ[_FSDP]
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"shard": True})})


def _launched_for_fsdp() -> bool:
    return os.environ.get(_FSDP, "").lower() == "true"


def make_accelerator(recipe: Recipe, folder: Path) -> Accelerator:
    """An `Accelerator` for the devices at hand; accumulation and batch sizes stay ours.

    Raises:
        UserError: fp16 without a GPU, a configuration with FSDP for what is not sharded, or a tracker that does not
            exist or whose package is not installed.
    """
    if _launched_for_fsdp():
        raise UserError("this does not shard, and Accelerate's configuration asks for FSDP; launch it with ddp.yaml")
    if recipe.train.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("train.precision=fp16 needs a GPU; use bf16 or no")
    if recipe.train.shard and (recipe.train.precision == "fp16" or recipe.train.compile):
        raise UserError("train.shard goes with neither train.precision=fp16 (use bf16) nor train.compile=true")
    if recipe.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses
    torch.use_deterministic_algorithms(recipe.train.deterministic)
    # Buffers are equal on all ranks by construction; sending them at every step would only cost time.
    handler = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    used = AcceleratorState().mixed_precision if is_initialized() else recipe.train.precision
    if used != recipe.train.precision:
        raise UserError(
            f"this process computes with precision={used} already, and the recipe with train.precision="
            f"{recipe.train.precision}; give both the same one, or start another process"
        )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`log_with=.*` was passed but no supported trackers")
            accelerator = Accelerator(
                mixed_precision=recipe.train.precision,
                log_with=recipe.watch.trackers or None,
                project_config=ProjectConfiguration(str(folder), logging_dir=str(folder / "trackers")),
                kwargs_handlers=[handler],
            )
    except (ValueError, ImportError) as error:
        raise UserError(f"watch.trackers {recipe.watch.trackers}: {error}") from None
    missing = set(recipe.watch.trackers) - {"all"} - {getattr(t, "value", t) for t in accelerator.log_with}
    if missing:
        raise UserError(f"watch.trackers: {', '.join(sorted(missing))} is not installed; install it or leave it out")
    return accelerator


def place(module: nn.Module, recipe: Recipe, accelerator: Accelerator) -> None:
    """Put a module on the device, sharded over the processes where the recipe asks for it and there are several."""
    if recipe.train.shard and accelerator.num_processes > 1:
        shard(module, accelerator.device, ("embed", "observe", "compare") if isinstance(module, JointObjective) else ())
    else:
        module.to(accelerator.device)


def wrap(
    accelerator: Accelerator, objective: nn.Module, optimizer: Optimizer, changing: bool = False
) -> tuple[nn.Module, Optimizer]:
    """The objective and its optimiser, prepared for the devices, the precision and the processes at hand.

    Args:
        changing: which parameters get a gradient may change from step to step, or is not known before. Then there
            is no DistributedDataParallel, which expects all; the loop averages what gradients there are.
    """
    with warnings.catch_warnings():
        # Newer torch prefers `forward_sync_buffers`, which older ones and Accelerate do not know.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        # What is sharded needs no wrapper for several processes, only mixed precision.
        model = accelerator.prepare_model(objective, evaluation_mode=changing or is_sharded(objective))
    return model, accelerator.prepare_optimizer(optimizer)


def on_main(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """What `action` returns on the main process, on every process.

    Raises:
        AgreedError: what `action` raised as `UserError`, on every process, so that none waits for the others.
    """
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = action()
        except UserError as error:
            answer[1] = str(error)
    broadcast_object_list(answer)
    if answer[1] is not None:
        raise AgreedError(answer[1])
    return answer[0]


@contextlib.contextmanager
def heard(accelerator: Accelerator) -> Iterator[None]:
    """Let each process say what only it may have met, such as a damaged shard; else the main one speaks."""
    try:
        yield
    except AgreedError:
        raise
    except UserError as error:
        if not accelerator.is_main_process:
            print(f"headwater: process {accelerator.process_index}: {error}", file=sys.stderr, flush=True)
        raise


def start_trackers(accelerator: Accelerator, recipe: RunRecipe, extra: dict[str, Any]) -> None:
    """Open the recipe's trackers, with its settings as flat names.

    The ids of runs are kept in `extra`, part of the training state, so that a resumed run goes on in the same one
    (W&B and MLflow; TensorBoard goes on in the same folder).
    """
    if not recipe.watch.trackers:
        return
    known: dict[str, str] = extra.setdefault("trackers", {})
    options: dict[str, dict[str, Any]] = {}
    if "wandb" in recipe.watch.trackers:
        options["wandb"] = {"id": known.setdefault("wandb", secrets.token_hex(6)), "resume": "allow"}
    if "mlflow" in known:
        options["mlflow"] = {"run_id": known["mlflow"]}
    accelerator.init_trackers(recipe.name, config=_flat(recipe.model_dump(mode="json")), init_kwargs=options)
    if "mlflow" in recipe.watch.trackers and accelerator.is_main_process:
        known["mlflow"] = accelerator.get_tracker("mlflow").tracker.info.run_id


def end_with_launcher() -> None:
    """Ask Linux to end this process when the launcher that started it dies.

    The launcher puts its workers into sessions of their own, so a SIGKILL to it would leave them training
    into a folder where the same command is then started again. `accelerate launch` for a single process
    dies of a SIGTERM that it does not pass on: then this process gets it in its place.
    """
    if sys.platform == "linux" and launched():
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL if elastic() else signal.SIGTERM)


def _flat(tree: dict, prefix: str = "") -> dict[str, int | float | str | bool]:
    flat: dict[str, int | float | str | bool] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat
