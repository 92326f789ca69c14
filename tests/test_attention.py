"""Laws of attention: every kernel computes what the plain formula does, in values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pretrain.encoders.attention import (
    Banded,
    Dense,
    Grouped,
    Rows,
    Split,
    Varlen,
    banded,
    dense,
    grouped,
    run_lengths,
    sight,
    varlen,
)

B, N, H, D = 2, 50, 3, 8
DOCUMENTS = torch.tensor([[0] * 17 + [1] * 1 + [2] * 32, [4] * 50])


def rows(documents: bool, causal: bool, reach: int | None, dtype: torch.dtype = torch.float32) -> Rows:
    return Rows(B, N, DOCUMENTS if documents else None, causal, reach, dtype, torch.device("cpu"))


def inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, N, H, D, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def reference(chosen: Rows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One score at a time, by the definition."""
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / D**0.5
    for i in range(N):
        for j in range(N):
            hidden = chosen.causal and j > i
            hidden |= chosen.reach is not None and abs(i - j) > chosen.reach
            for b in range(B):
                apart = chosen.documents is not None and DOCUMENTS[b, i] != DOCUMENTS[b, j]
                if hidden or apart:
                    scores[b, :, i, j] = -torch.inf
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)


@pytest.mark.parametrize("reach", [None, 7])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("documents", [True, False])
def test_every_kernel_is_the_formula(documents: bool, causal: bool, reach: int | None) -> None:
    chosen, ours = rows(documents, causal, reach), inputs()
    expected = reference(chosen, *ours)
    slope = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad(expected, ours, slope)
    groups = [(17, 1), (1, 1), (32, 1), (50, 1)] if documents else [(50, 2)]
    kernels = [dense(chosen), sight(chosen), grouped(chosen, groups)]
    kernels += [banded(chosen)] if reach else [Split(run_lengths(DOCUMENTS if documents else DOCUMENTS * 0), causal)]
    for kernel in kernels:
        found = kernel(*ours)
        assert_close(found, expected)
        for gradient, right in zip(torch.autograd.grad(found, ours, slope), wanted, strict=True):
            assert_close(gradient, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reach", [None, 7])
def test_bfloat16_stays_near(reach: int | None) -> None:
    exact = dense(rows(True, True, reach))(*inputs())
    for kernel in (dense(rows(True, True, reach, torch.bfloat16)), sight(rows(True, True, reach, torch.bfloat16))):
        rough = kernel(*inputs(torch.bfloat16))
        assert rough.dtype == torch.bfloat16
        assert ((rough.float() - exact).norm() / exact.norm()).item() < 0.02


def test_the_kernel_follows_the_documents() -> None:
    short = torch.repeat_interleave(torch.arange(4), torch.tensor([90, 110, 95, 105])).expand(2, -1)
    alike = torch.arange(400).div(100, rounding_mode="floor").expand(2, -1)
    cpu = torch.device("cpu")
    for reach in (None, 16, 64):
        chosen = sight(Rows(2, 400, alike, True, reach, torch.float32, cpu))
        assert isinstance(chosen, Grouped)
        [(length, count, attend)] = chosen.groups
        assert (length, count) == (100, 8)
        assert isinstance(attend, Banded if reach == 16 else Dense)
    assert isinstance(sight(Rows(2, 400, short, True, None, torch.float32, cpu)), Split)
    assert isinstance(sight(Rows(2, 400, short, True, 64, torch.float32, cpu)), Banded)
    assert isinstance(sight(Rows(2, 400, short * 0, True, None, torch.float32, cpu)), Dense)
    pairs = torch.arange(400).div(2, rounding_mode="floor")
    mixed = torch.where(torch.arange(400) % 6 == 0, 400 + torch.arange(400), pairs).expand(2, -1)
    assert isinstance(sight(Rows(2, 400, mixed, True, None, torch.float32, cpu)), Dense), "too many, too short"
    assert sight(Rows(2, 400, None, True, None, torch.float32, cpu)) == Dense(None, True)


def test_bounds_of_documents() -> None:
    assert run_lengths(DOCUMENTS) == [17, 1, 32, 50]
    assert run_lengths(torch.zeros(3, 5)) == [5, 5, 5], "a document ends with its row"
    bounds = varlen(rows(True, False, 7))
    assert isinstance(bounds, Varlen)
    assert bounds.starts.tolist() == [0, 17, 18, 50, 100]
    assert (bounds.starts.dtype, bounds.longest, bounds.window) == (torch.int32, N, (7, 7))
    assert varlen(rows(False, True, None)).starts.tolist() == [0, 50, 100]
    assert varlen(rows(False, True, None)).window == (-1, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("reach", [None, 7])
@pytest.mark.parametrize("causal", [True, False])
def test_varlen_on_a_gpu(causal: bool, reach: int | None) -> None:
    exact = dense(rows(True, causal, reach))(*inputs())
    cuda = torch.device("cuda")
    chosen = Rows(B, N, DOCUMENTS.to(cuda), causal, reach, torch.bfloat16, cuda)
    leaves = [x.detach().to(cuda).requires_grad_() for x in inputs(torch.bfloat16)]
    kernel = sight(chosen)
    assert isinstance(kernel, Varlen)
    found = kernel(*leaves)
    found.sum().backward()
    assert ((found.float().cpu() - exact).norm() / exact.norm()).item() < 0.02
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)
