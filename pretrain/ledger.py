"""Every kernel of a computation over tensors without numbers, and the bytes that are held meanwhile."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

Kind = Literal["matmul", "convolution", "attention", "other"]
_FREE = {
    "_unsafe_view",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "lift_fresh",
    "set_",
    "_local_scalar_dense",
    "device",
}
"""Change no byte, though they are no views to torch."""
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}


Shape = tuple[int, ...]


def _cpu_attention(query: Shape, key: Shape, value: Shape, p: float = 0.0, causal: bool = False, **_: Any) -> int:
    """Operations of a CPU's fused attention, which torch does not count; it leaves out what a causal mask hides."""
    return sdpa_flop_count(query, key, value) // (2 if causal else 1)


def _cpu_attention_backward(
    grad: Shape, query: Shape, key: Shape, value: Shape, out: Shape, sums: Shape, p: float, causal: bool, **_: Any
) -> int:
    return sdpa_backward_flop_count(grad, query, key, value) // (2 if causal else 1)


for _name, _formula in (("", _cpu_attention), ("_backward", _cpu_attention_backward)):
    _packet = getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{_name}")
    if _packet not in flop_registry:  # a newer torch may count it
        register_flop_formula(_packet)(_formula)


class Work(NamedTuple):
    """One kernel."""

    kind: Kind
    flops: int
    bytes: int
    """Read and written, had every argument to be fetched from memory."""
    half: bool
    """Whether it multiplies numbers of 16 bits."""


class Ledger(TorchDispatchMode):
    """While it is entered, notes kernels, and the most bytes that were held at once.

    Operations of which no argument is without numbers run for real, and are noted as well.
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake
        self.work: Counter[Work] = Counter()
        self.held = 0
        self.peak = 0
        """Of `held`, gradients of parameters left out."""
        self.statistics: dict[str, Tensor] = {}
        self._sizes: dict[int, int] = {}
        """Bytes of what is held, by the storage's address."""

    def take(self) -> Counter[Work]:
        """What was noted since the last call."""
        work, self.work = self.work, Counter()
        return work

    @contextmanager
    def gradients_of(self, parameters: Iterable[Tensor]) -> Iterator[None]:
        """Leave the gradients of `parameters` out of what is held, from when they are complete."""
        hooks = [each.register_post_accumulate_grad_hook(lambda p: self._forget(p.grad)) for each in parameters]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._overloadpacket.__name__
        inputs = [each for each in tree_iter((args, kwargs)) if isinstance(each, Tensor)]
        if any(isinstance(each, FakeTensor) for each in inputs):
            if name in _INDEXING:  # which rows a real mask takes is known
                args = (args[0], _places(args[1]), *args[2:])
            with self.fake:
                out = func(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        outputs = [each for each in tree_iter(out) if isinstance(each, Tensor)]
        if name not in _FREE and not _is_view(func):
            half = any(each.dtype in (torch.bfloat16, torch.float16) for each in inputs)
            count = flop_registry.get(func._overloadpacket)
            flops = int(count(*args, **kwargs, out_val=out)) if count else 0
            moved = sum(_bytes(each) for each in (*inputs, *outputs))
            self.work[Work(_kind(name, flops), flops, moved, half)] += 1
        for each in outputs:
            if isinstance(each, FakeTensor):
                self._hold(each)
        return out

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._sizes:
            return
        self._sizes[address] = storage.nbytes()
        self.held += storage.nbytes()
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._drop, address)

    def _drop(self, address: int) -> None:
        self.held -= self._sizes.pop(address, 0)

    def _forget(self, tensor: Tensor | None) -> None:
        if tensor is not None:
            address = tensor.untyped_storage()._cdata
            self.held -= self._sizes.get(address, 0)
            self._sizes[address] = 0


def _places(indices: Any) -> Any:
    """Real masks as the places that they choose."""
    found: list[Any] = []
    for each in indices:
        real = isinstance(each, Tensor) and not isinstance(each, FakeTensor)
        found += each.nonzero(as_tuple=True) if real and each.dtype == torch.bool else [each]
    return found


def _bytes(tensor: Tensor) -> int:
    """What there is to read of it: an expanded tensor is no larger than its memory."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return any(each.alias_info is not None and not each.alias_info.is_write for each in returns)


def _kind(name: str, flops: int) -> Kind:
    if not flops:
        return "other"
    if "conv" in name:
        return "convolution"
    return "attention" if "attention" in name else "matmul"
