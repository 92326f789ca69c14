"""Parameters, gradients and optimiser state cut over the processes (FSDP2), through one door.

Accelerate ignores an FSDP plugin on a CPU, so both devices come here: torch's `fully_shard`, which turns each
parameter into a DTensor cut along its first dimension and leaves names and modules as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from data.errors import UserError
from pretrain.tensors import Piece


def piece(tensor: Tensor) -> Piece:
    """What this process holds of a tensor: some of its rows where it is sharded, all of it elsewhere."""
    if not isinstance(tensor, DTensor):
        return Piece(tensor.detach())
    start, _ = local_rows(tensor)
    return Piece(tensor.to_local().detach(), (start, tensor.shape[0]))


def local_rows(tensor: DTensor) -> tuple[int, int]:
    """First row and number of rows that this process holds."""
    assert tensor.placements == (Shard(0),), tensor.placements
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return offset[0], shape[0]


def like(local: Tensor, other: Tensor) -> Tensor:
    """This process's rows as a tensor that is cut, and placed, as `other` is."""
    if not isinstance(other, DTensor):
        return local.to(other.device)
    return DTensor.from_local(
        local.to(other.device), other.device_mesh, other.placements, shape=other.shape, stride=other.stride()
    )


def local(tensor: Tensor) -> Tensor:
    """The memory that this process holds of a tensor; changing it changes the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard(module: nn.Module, device: torch.device, methods: tuple[str, ...] = ()) -> None:
    """Cut the module's parameters over all processes, in place; each call of it gathers them block by block.

    Blocks are the composite members of lists and sequences of modules: what repeats in transformers and ResNets.
    What lies outside of them is gathered when `module` itself is called. Sums and rounding are those of
    DistributedDataParallel: parameters, gradients and their reduction keep their dtype (mixed precision is autocast).

    Args:
        methods: of `module`, which gather its parameters as calling it does.

    Raises:
        UserError: a parameter is a scalar, which has no rows.
    """
    scalars = [name for name, parameter in module.named_parameters() if parameter.ndim == 0]
    if scalars:
        raise UserError(f"{', '.join(scalars)} cannot be sharded, being a single number; set train.shard=false")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in _blocks(module):
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    for method in methods:
        register_fsdp_forward_method(module, method)


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` has cut this module."""
    return isinstance(module, FSDPModule)


@torch.no_grad()
def fill(module: nn.Module, given: Mapping[str, Tensor], device: torch.device) -> None:
    """Send the main process's tensors to all, one after the other, each of which keeps its rows; on all processes.

    Args:
        module: sharded or not, its memory on `device`.
        given: by the names of the module's parameters and buffers, whole; read on the main process alone.
    """
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if torch.distributed.get_rank() == 0:
            whole = given[name].detach().to(device).contiguous()
        else:
            whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        torch.distributed.broadcast(whole, src=0)
        if isinstance(tensor, DTensor):
            local(tensor).copy_(whole.narrow(0, *local_rows(tensor)))
        else:
            tensor.copy_(whole)


@torch.no_grad()
def copy_whole(source: nn.Module, target: nn.Module | None) -> None:
    """Give `target`, a plain module of the same kind, the sharded one's parameters and buffers.

    All processes call this together; one without a `target` only takes part. Tensors are gathered one after the
    other, so no device holds more than one of them whole on behalf of this.
    """
    for one, other in (
        (source.named_parameters(), {} if target is None else dict(target.named_parameters())),
        (source.named_buffers(), {} if target is None else dict(target.named_buffers())),
    ):
        for name, tensor in one:
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if target is not None:
                other[name].copy_(whole)


def total_norm(gradients: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, a scalar; of sharded ones over all processes."""
    norm = nn.utils.get_total_norm([local(gradient) for gradient in gradients])
    if any(isinstance(gradient, DTensor) for gradient in gradients):
        squared = norm.double().square()
        torch.distributed.all_reduce(squared)
        return squared.sqrt()
    return norm


def _blocks(module: nn.Module) -> list[nn.Module]:
    """Inner ones first."""
    found = []
    for parent in module.modules():
        if isinstance(parent, nn.ModuleList | nn.Sequential):
            found += [child for child in parent if any(True for _ in child.children()) and _has_parameters(child)]
    return [block for block in reversed(list(dict.fromkeys(found))) if not isinstance(block, nn.ModuleList)]


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
