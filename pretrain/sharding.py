"""Parameters, gradients and optimiser state cut over the processes (FSDP2), through one door.

Accelerate ignores an FSDP plugin on a CPU, so both devices come here: torch's `fully_shard`, which turns each
parameter into a DTensor cut along its first dimension and leaves names and modules as they are.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

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
