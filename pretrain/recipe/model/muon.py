"""Muon's orthogonalisation: of matrices in batches on a GPU, and of matrices that ranks share."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from recipe.hardware import detect

# Of each iteration's polynomial a x + b x^3 + c x^5: Polar Express (Amsel et al., 2025, arXiv:2505.16932,
# algorithm 1) for singular values from 0.01 to 1, all but the last made 2 % safer against rounding. They
# leave 0.7 to 1.27, and make smaller ones up to 75 times as large.
COEFFICIENTS = (
    (7.8332, -21.44, 15.1099),
    (3.5719, -2.5696, 0.4865),
    (2.6712, -1.9853, 0.4535),
)
EPSILON = 1e-7
# Numbers of a batch: enough to keep a GPU busy, while its copies stay below 1 GiB (in bfloat16).
BATCH = 2**26
# On a CPU, a batch spreads over the cores what is too small to divide: 28 matrices of up to 192 x 576 need
# 32 ms instead of 41 on 2 cores, in float32. A larger matrix is divided itself, and a batch would only cost
# copies: 35 of up to 512 x 1,536 take 920 ms instead of 860.
SMALL = 2**17

# The part of a matrix that a rank holds: its shape, and where it begins in the whole matrix.
Part = tuple[tuple[int, ...], tuple[int, ...]]


@functools.cache
def precision() -> torch.dtype:
    """What the iteration computes in: bfloat16, which is enough for it, or float32 without fast units for it.

    A CPU without any (AVX2 alone) needs a hundred times as long for products in bfloat16. Ranks use bfloat16
    only if all of them have fast units; they must make the first call together.
    """
    units = [detect().fast_bf16]
    if dist.is_initialized():
        units *= dist.get_world_size()
        dist.all_gather_object(units, units[0])
    return torch.bfloat16 if all(units) else torch.float32


def orthogonalise(matrices: Tensor) -> Tensor:
    """The matrices with singular values of about 1 and rows of equal length: of `precision`, same shape.

    matrices: [rows, columns], or [number, rows, columns] for several at once, such as a layer's experts.
    First the rows, or the columns of a tall matrix, are scaled so that no singular value is above 1 and most
    are nearer to it: the AOL scaling of Turbo-Muon (Boissin et al., 2025, arXiv:2512.04632), which saves
    iterations. The iterations leave rows of unequal length, so that some neurons would learn faster than
    others. NorMuon (Li et al., 2025, arXiv:2510.05491) divides a row by a running average of its length. Here
    it is the length itself, which needs no state. tests/bench/ledger.md has what both are worth. A row of
    zeros stays one.
    """
    x = matrices.to(precision())
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPSILON)
    gram = x @ x.mT
    scale = gram.abs().sum(-1, keepdim=True).clamp(min=EPSILON).rsqrt()
    x, gram = scale * x, scale * gram * scale.mT
    wide = x.shape[-1] >= 2 * x.shape[-2]
    x = _iterate_small(x, gram) if wide and x.dtype == torch.float32 else _iterate(x, gram)
    return even_rows(x.mT if tall else x)


def _iterate(x: Tensor, gram: Tensor) -> Tensor:
    """The iterations on matrices [..., rows, columns], rows <= columns. gram: x @ x.mT."""
    add = torch.baddbmm if x.ndim == 3 else torch.addmm
    for number, (a, b, c) in enumerate(COEFFICIENTS):
        gram = x @ x.mT if number else gram
        x = add(x, add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _iterate_small(x: Tensor, gram: Tensor) -> Tensor:
    """`_iterate` by products of the small side alone, which is faster for wide matrices.

    All polynomials of gram commute, so that the next x @ x.mT is p @ gram @ p. It takes float32: gram has the
    squares of the singular values, of which bfloat16 would lose the smaller ones.
    """
    p = product = _polynomial(gram, *COEFFICIENTS[0])
    for coefficients in COEFFICIENTS[1:]:
        gram = p @ (p @ gram)
        p = _polynomial(gram, *coefficients)
        product = p @ product
    return product @ x


def _polynomial(gram: Tensor, a: float, b: float, c: float) -> Tensor:
    """a + b gram + c gram^2."""
    p = b * gram + c * (gram @ gram)
    p.diagonal(dim1=-2, dim2=-1).add_(a)
    return p


def even_rows(matrices: Tensor) -> Tensor:
    """The matrices with rows of the length that they have in a matrix whose singular values are all 1."""
    rows, columns = matrices.shape[-2:]
    lengths = torch.linalg.vector_norm(matrices, dim=-1, keepdim=True, dtype=torch.float32)
    return (matrices * (math.sqrt(min(1, columns / rows)) / lengths.clamp(min=EPSILON))).to(matrices.dtype)


def orthogonalised(updates: list[Tensor]) -> list[Tensor]:
    """`orthogonalise` of each matrix; of a DTensor the part that this rank holds.

    All ranks must call it with the same matrices in the same order.
    """
    alike: dict[object, list[int]] = {}
    for index, update in enumerate(updates):
        layout = (update.device_mesh, update.placements) if isinstance(update, DTensor) else None
        alike.setdefault((update.shape, layout), []).append(index)
    results: list[Tensor] = list(updates)
    for indices in alike.values():
        group = [updates[index] for index in indices]
        compute = _orthogonalise_shards if isinstance(group[0], DTensor) else _orthogonalise_all
        for index, result in zip(indices, compute(group), strict=True):
            results[index] = result
    return results


def own_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor; it shares the memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _orthogonalise_all(matrices: list[Tensor]) -> list[Tensor]:
    """Matrices of one shape, or parameters that hold several."""
    if matrices and matrices[0].ndim > 2:
        size = max(1, BATCH // matrices[0][0].numel())
        return [torch.cat([orthogonalise(part) for part in several.split(size)]) for several in matrices]
    if not matrices or (matrices[0].device.type == "cpu" and matrices[0].numel() > SMALL):
        return [orthogonalise(matrix) for matrix in matrices]
    size = max(1, BATCH // matrices[0].numel())
    batches = [torch.stack(matrices[i : i + size]) for i in range(0, len(matrices), size)]
    return [matrix for batch in batches for matrix in orthogonalise(batch)]


def _orthogonalise_shards(updates: list[Tensor]) -> list[Tensor]:
    """DTensors of one shape and layout: each is gathered on one rank in turn, and its parts are sent back."""
    mesh: DeviceMesh = updates[0].device_mesh
    # A mesh of two dimensions (FSDP2 x tensor parallelism) holds all ranks.
    group = mesh.get_group() if mesh.ndim == 1 else dist.group.WORLD
    parts = _parts(updates[0].shape, mesh, updates[0].placements)
    ranks, me = len(parts), dist.get_rank(group)
    width = max(math.prod(shape) for shape, _ in parts)  # all ranks send as much as the largest part takes
    like = updates[0].to_local().new_empty(width, dtype=precision())

    def exchange(send: Callable[[int], list[dist.Work]]) -> None:
        works = [work for index in range(len(updates)) for work in send(index)]
        for work in works:
            work.wait()

    received: dict[int, list[Tensor]] = {}

    def gather(index: int) -> list[dist.Work]:
        owner, own = index % ranks, like.new_zeros(width)
        flat = updates[index].to_local().flatten()
        own[: len(flat)] = flat
        if owner == me:
            received[index] = [torch.empty_like(like) for _ in range(ranks)]
        return [dist.gather(own, received.get(index), group=group, group_dst=owner, async_op=True)]

    exchange(gather)
    mine = list(received)
    whole = _orthogonalise_all([_assemble(received[index], parts, updates[0].shape) for index in mine])
    finished = dict(zip(mine, whole, strict=True))
    results = [torch.empty_like(like) for _ in updates]

    def scatter(index: int) -> list[dist.Work]:
        out = [_cut(finished[index], part, like) for part in parts] if index in finished else None
        return [dist.scatter(results[index], out, group=group, group_src=index % ranks, async_op=True)]

    exchange(scatter)
    shape = parts[me][0]
    return [result[: math.prod(shape)].view(shape) for result in results]


@functools.cache
def _parts(shape: torch.Size, mesh: DeviceMesh, placements: tuple) -> list[Part]:
    """The part of every rank of the mesh, by its rank in the group; these ranks must all call it."""
    group = mesh.get_group() if mesh.ndim == 1 else dist.group.WORLD
    own = tuple(map(tuple, compute_local_shape_and_global_offset(shape, mesh, placements)))
    parts: list[Part] = [own] * dist.get_world_size(group)
    dist.all_gather_object(parts, own, group=group)
    return parts


def _assemble(flat: list[Tensor], parts: list[Part], shape: torch.Size) -> Tensor:
    """The whole matrix of the flat parts of all ranks."""
    whole = flat[0].new_empty(shape)
    for numbers, part in zip(flat, parts, strict=True):
        whole[_slices(part)] = numbers[: math.prod(part[0])].view(part[0])
    return whole


def _cut(whole: Tensor, part: Part, like: Tensor) -> Tensor:
    """A rank's part of a whole matrix, flat, as long as `like`."""
    flat = torch.zeros_like(like)
    numbers = whole[_slices(part)].flatten()
    flat[: len(numbers)] = numbers
    return flat


def _slices(part: Part) -> tuple[slice, ...]:
    return tuple(slice(begin, begin + size) for size, begin in zip(*part, strict=True))
