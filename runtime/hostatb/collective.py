"""Kernels of the collective family; the contract is in `numeric.py`, the facts in `llmc.compiler.atb.collective`.

Who the ranks are: the threads of `run_ranks` (one process, for tests), else the process group given as `hcclComm`, else
the default group of torch.distributed. With rankSize 1 nothing is sent.

    def rank(r):
        return all_reduce(Param of rank r, [x], [desc], "host")[0]
    run_ranks([lambda: rank(0), lambda: rank(1)])            # both return the sum

Every collective gathers the inputs of all ranks and reduces them locally in rank order: floats in fp32, rounded once.
So all ranks hold the same bits, and threads and processes give what a loop over a list of tensors gives.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from llmc.compiler.atb.collective import (
    ALL_GATHER_LINEAR,
    ALL_GATHER_LINEAR_REDUCE_SCATTER,
    LINEAR_ALL_REDUCE,
    LINEAR_PER_GROUP,
    LINEAR_PER_TOKEN,
    LINEAR_REDUCE_SCATTER,
    MOE_TYPES,
    domain_problem,
    fused,
    is_quant,
    lccl_port,
    linear_parallel_inputs,
)
from llmc.compiler.atb.core import AtbError, Desc, Param
from llmc.runtime.hostatb.linear import oriented_weight
from llmc.runtime.hostatb.numeric import ACL_TORCH, Kernel, refuse, round_to, scale_values

T = TypeVar("T")
_thread = threading.local()


class ThreadGroup:
    """The ranks of `run_ranks`: each puts a tensor into its slot, waits for the others, and reads all slots."""

    def __init__(self, size: int) -> None:
        self.size, self._slots, self._barrier = size, [torch.empty(0)] * size, threading.Barrier(size)

    def gather(self, rank: int, tensor: Tensor) -> Tensor:
        self._slots[rank] = tensor
        self._barrier.wait()
        everyone = torch.stack(self._slots)
        self._barrier.wait()  # from here on owners may write their tensors again
        return everyone

    def abort(self) -> None:
        self._barrier.abort()


def run_ranks(ranks: Sequence[Callable[[], T]]) -> list[T]:
    """Runs one function per rank, each in a thread, as one communicator; their results in rank order.

    When a rank fails the others are released, and its error is raised here."""
    group, results, errors = ThreadGroup(len(ranks)), {}, {}

    def work(rank: int) -> None:
        _thread.group, _thread.rank = group, rank
        try:
            results[rank] = ranks[rank]()
        except BaseException as error:
            errors[rank] = error
            group.abort()

    threads = [threading.Thread(target=work, args=(rank,), name=f"rank {rank}") for rank in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:  # a broken barrier is only how the others learn of it
        raise min(errors.items(), key=lambda item: (isinstance(item[1], threading.BrokenBarrierError), item[0]))[1]
    return [results[rank] for rank in range(len(ranks))]


def gather_ranks(param: Param, tensor: Tensor) -> Tensor:
    """The tensors of all ranks, stacked in rank order: [rankSize, ...]."""
    if param.rankSize == 1:
        return tensor.unsqueeze(0)
    listens = param.backend in ("lccl", "lcoc") and param.commMode == 0
    if listens and (why := domain_problem(param.commDomain, lccl_port(os.environ))):
        raise AtbError("ERROR_COMM_EMPTY", f"commDomain of {param.backend}", found=repr(param.commDomain),
                       expected=why, stage="execute")  # fmt: skip
    group: ThreadGroup | None = getattr(_thread, "group", None)
    if group:
        _require_member(param, group.size, _thread.rank)
        return group.gather(_thread.rank, tensor)
    return _gather_processes(param, tensor)


def _gather_processes(param: Param, tensor: Tensor) -> Tensor:
    if not (dist.is_available() and dist.is_initialized()):
        raise AtbError(
            "ERROR_COMM_EMPTY", f"{param.rankSize} ranks are to exchange data, but this process is alone",
            found="no process group", expected="torch.distributed.init_process_group, as torchrun's ranks do",
            stage="execute",
        )  # fmt: skip
    group: Any = param.hcclComm
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    _require_member(param, size, rank)
    # Bytes travel, since gloo does not know every dtype; and it cannot send CUDA tensors.
    sent = tensor.contiguous().cpu() if dist.get_backend(group) == "gloo" else tensor.contiguous()
    received = sent.new_empty((size, *sent.shape))
    received[rank] = sent
    slots, peers = received.view(size, -1).view(torch.uint8), [peer for peer in range(size) if peer != rank]
    # Straight to each peer: for two ranks, half the latency of gloo's all_gather and all_reduce.
    jobs = [dist.P2POp(dist.irecv, slots[peer], group=group, group_peer=peer) for peer in peers]
    jobs += [dist.P2POp(dist.isend, slots[rank], group=group, group_peer=peer) for peer in peers]
    try:
        for work in dist.batch_isend_irecv(jobs):
            work.wait(dist.default_pg_timeout)  # else the time that the ranks had to connect
    except RuntimeError as error:
        raise AtbError(
            "ERROR_HCCL_FAIL", "a rank did not answer", found=str(error).splitlines()[0],
            expected=f"{size} ranks in the same operation", stage="execute",
        ) from error  # fmt: skip
    return received.to(tensor.device)


def _require_member(param: Param, size: int, rank: int) -> None:
    """With a communicator given the library does not look at rank and rankSize."""
    wanted = f"rank {param.rank} of {param.rankSize}"
    if size != param.rankSize or (rank != param.rank and param.hcclComm is None):
        raise AtbError("ERROR_HCCL_FAIL", "the parameter and the group disagree on who this is",
                       found=f"rank {rank} of {size}", expected=wanted, stage="execute")  # fmt: skip


def rank_of(param: Param) -> int:
    return dist.get_rank(param.hcclComm) if param.hcclComm is not None else int(param.rank)


def reduce_ranks(parts: Tensor, kind: str) -> Tensor:
    """[ranks, ...] -> [...], in rank order; floats in fp32 (not rounded yet), integers in their own dtype."""
    total = parts[0].float() if parts.is_floating_point() else parts[0]
    for part in parts[1:]:
        if kind == "sum":
            total = total + part
        elif kind == "prod":
            total = total * part
        else:
            total = torch.maximum(total, part) if kind == "max" else torch.minimum(total, part)
    return total


def all_reduce(param: Param, tensors: Sequence[Tensor], descs: Sequence[Desc], chip: str) -> list[Tensor]:
    x = tensors[0]
    if param.quantType:  # (sum + offset * ranks) * scale, with the scale and offset of this rank
        scale, offset = tensors[1].float(), tensors[2].float()
        total = reduce_ranks(gather_ranks(param, x).float(), "sum")
        return [round_to((total + offset * param.rankSize) * scale, ACL_TORCH[param.outDataType], chip)]
    if param.rankSize == 1:
        return [x.clone()]
    return [round_to(reduce_ranks(gather_ranks(param, x), param.allReduceType), x.dtype, chip)]


def all_gather(param: Param, tensors: Sequence[Tensor], descs: Sequence[Desc], chip: str) -> list[Tensor]:
    everyone = gather_ranks(param, tensors[0])
    return [everyone.clone() if param.rankSize == 1 else everyone]


def reduce_scatter(param: Param, tensors: Sequence[Tensor], descs: Sequence[Desc], chip: str) -> list[Tensor]:
    x = tensors[0]
    if param.rankSize == 1:
        return [x.clone()]
    own = gather_ranks(param, x).chunk(param.rankSize, 1)[rank_of(param)]
    return [round_to(reduce_ranks(own, param.reduceType), x.dtype, chip)]


def broadcast(param: Param, tensors: Sequence[Tensor], descs: Sequence[Desc], chip: str) -> list[Tensor]:
    """No output: ranks other than rankRoot are written in place."""
    root = gather_ranks(param, tensors[0])[param.rankRoot]
    if rank_of(param) != param.rankRoot:
        tensors[0].copy_(root)
    return []


# LinearParallel -------------------------------------------------------------------------------------------------------


def linear_parallel(param: Param, tensors: Sequence[Tensor], descs: Sequence[Desc], chip: str) -> list[Tensor]:
    """x @ weight with a collective before or after. Partial products travel in the dtype of the output."""
    kind = param.type if fused(param) else LINEAR_ALL_REDUCE
    if kind in MOE_TYPES:
        raise AtbError("ERROR_OPERATION_NULL_RUNNER", f"hostatb cannot execute LinearParallel of type {kind}",
                       expected="types 0 to 4", stage="execute")  # fmt: skip
    named = dict(zip(linear_parallel_inputs(param), tensors, strict=True))
    x, rank, dtype = named["x"], rank_of(param), ACL_TORCH.get(param.outDataType, named["x"].dtype)
    if kind == ALL_GATHER_LINEAR:
        x = gather_ranks(param, x).flatten(0, 1)
    if kind == ALL_GATHER_LINEAR_REDUCE_SCATTER:
        return [_two_dim(param, named, rank, chip)]
    product = round_to(_product(param, x, named), dtype, chip)
    if kind in (LINEAR_ALL_REDUCE, LINEAR_REDUCE_SCATTER):
        total = reduce_ranks(gather_ranks(param, product), "sum")
        if kind == LINEAR_REDUCE_SCATTER:
            cut = 1 if total.shape[0] == 1 else 0
            total = total.chunk(param.rankSize, cut)[rank]
    else:
        total = product.float()
    if "residual" in named:
        # One kernel adds before it rounds; hccl and lccl are a chain of operations, each of which rounds.
        total = total if fused(param) else round_to(total, dtype, chip).float()
        total = total + named["residual"].float()
    out = round_to(total, dtype, chip).contiguous()
    if not param.keepIntermediate:
        return [out]
    if kind != ALL_GATHER_LINEAR:
        raise AtbError("ERROR_INVALID_PARAM", "keepIntermediate keeps the gathered x, and this gathers nothing",
                       found=f"backend {param.backend}, type {param.type}", expected="lcoc, ALL_GATHER_LINEAR (2)",
                       stage="execute")  # fmt: skip
    return [out, x.clone() if param.rankSize == 1 else x]


def _two_dim(param: Param, named: dict[str, Tensor], rank: int, chip: str) -> Tensor:
    """Ranks form a grid agDim x rsDim: x is gathered along one side of it, the products are summed along the other.

    innerDimIsAg: neighbouring ranks gather, rank = rs * agDim + ag; otherwise rank = ag * rsDim + rs."""
    grid, x = param.twoDimTPInfo, named["x"]
    if grid.innerDimIsAg:
        place = {(r % grid.agDim, r // grid.agDim): r for r in range(param.rankSize)}
    else:
        place = {(r // grid.rsDim, r % grid.rsDim): r for r in range(param.rankSize)}
    ag, rs = next(key for key, r in place.items() if r == rank)
    everyone = gather_ranks(param, x)
    x = everyone[[place[i, rs] for i in range(grid.agDim)]].flatten(0, 1)
    products = gather_ranks(param, round_to(_product(param, x, named), x.dtype, chip))
    total = reduce_ranks(products[[place[ag, j] for j in range(grid.rsDim)]], "sum").chunk(grid.rsDim)[rs]
    if "residual" in named:
        total = total + named["residual"].float()
    return round_to(total, x.dtype, chip).contiguous()


def _product(param: Param, x: Tensor, named: dict[str, Tensor]) -> Tensor:
    """x [.., k] @ weight [k, n], summed in fp32."""
    weight = oriented_weight(named["weight"], param.transWeight)
    weight = (weight[0] if weight.dim() == 3 else weight).t()
    if not is_quant(param):  # one dtype; torch sums 16-bit products in fp32 and rounds once, as the caller would
        return x @ weight
    bias, scale = named["bias"], scale_values(named["scale"])
    for vector in (bias, scale):  # the table lets quantGroupSize shape them whatever quantType is
        if vector.dim() == 2 and vector.shape[0] > 1 and param.quantType != LINEAR_PER_GROUP:
            raise refuse("rows of bias and scale", list(vector.shape), "1 unless QUANT_TYPE_PER_GROUP")
    if x.dtype == torch.int8:  # exact in fp64: |sum| < 2^53
        total = x.double() @ weight.double()
        total = (total + bias if bias.numel() else total).float() * scale
        return total * named["perTokenScale"].reshape(-1, 1) if param.quantType == LINEAR_PER_TOKEN else total
    # A float x with an int8 weight: the weight is made float first, (w + bias) * scale, group by group along k.
    wide = weight.float()
    if param.quantType == LINEAR_PER_GROUP and param.quantGroupSize:
        scale, bias = (
            t.repeat_interleave(param.quantGroupSize, 0)[: len(wide)] if t.numel() else t for t in (scale, bias)
        )
    wide = ((wide + bias.float() if bias.numel() else wide) * scale).to(x.dtype)
    return x.float() @ wide.float()


KERNELS: dict[str, Kernel] = {
    "AllReduce": all_reduce,
    "AllGather": all_gather,
    "ReduceScatter": reduce_scatter,
    "Broadcast": broadcast,
    "LinearParallel": linear_parallel,
}
