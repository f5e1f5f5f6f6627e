"""Collectives on the host: threads of one process against torch on the stacked inputs, and two processes over gloo."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from llmc.compiler.atb import OPS, AtbError
from llmc.runtime.hostatb.collective import run_ranks
from llmc.runtime.hostatb.numeric import desc_of
from llmc.runtime.hostatb.operation import KERNELS


def run(op: str, values: dict[str, Any], *tensors: Tensor) -> list[Tensor]:
    entry, param = OPS[op], OPS[op].param(values)
    entry.create(param, "host")
    descs = [desc_of(t) for t in tensors]
    inferred = entry.infer(param, descs, "host")
    entry.setup(param, descs, inferred, "host")
    outs = KERNELS[op](param, tensors, descs, "host")
    assert [(tuple(t.shape), desc_of(t).dtype) for t in outs] == [(d.shape, d.dtype) for d in inferred]
    return outs


def on_ranks(op: str, values: dict[str, Any], inputs: list[list[Tensor]]) -> list[list[Tensor]]:
    """The operation on every rank; `inputs`: the tensors of each rank. Result: the outputs of each rank."""

    def rank(r: int) -> Callable[[], list[Tensor]]:
        return lambda: run(op, {**values, "rank": r, "rankSize": len(inputs)}, *inputs[r])

    return run_ranks([rank(r) for r in range(len(inputs))])


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize(("kind", "oracle"), [("sum", torch.sum), ("max", torch.amax), ("min", torch.amin)])
def test_all_reduce_gives_every_rank_the_reduction_of_all(size: int, kind: str, oracle: Callable[..., Tensor]) -> None:
    x = torch.randint(-50, 50, (size, 3, 16)).float()
    for (out,) in on_ranks("AllReduce", {"allReduceType": kind}, [[part] for part in x]):
        assert torch.equal(out, oracle(x, 0))


def test_a_16_bit_sum_is_rounded_once() -> None:
    parts = [[torch.tensor([256.0]).bfloat16()], *([torch.ones(1).bfloat16()] for _ in range(7))]
    for (out,) in on_ranks("AllReduce", {}, parts):
        assert out == 264  # 263 between 262 and 264; rounded after each addition it would stay 256


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.int64])
def test_all_gather_stacks_and_reduce_scatter_cuts(dtype: torch.dtype) -> None:
    x = torch.randint(-9, 9, (4, 8, 3)).to(dtype)
    for (out,) in on_ranks("AllGather", {}, [[part] for part in x]):
        assert torch.equal(out, x)
    if dtype == torch.int64:  # ReduceScatter has no int64
        return
    outs = on_ranks("ReduceScatter", {}, [[part] for part in x])
    assert torch.equal(torch.cat([out for (out,) in outs]), x.sum(0).to(dtype))


def test_broadcast_writes_the_other_ranks_in_place() -> None:
    tensors = [torch.full((3,), float(r)) for r in range(4)]
    on_ranks("Broadcast", {"rankRoot": 2}, [[t] for t in tensors])
    assert all(torch.equal(t, torch.full((3,), 2.0)) for t in tensors)


@pytest.mark.parametrize("backend", ["hccl", "lcoc"])
@pytest.mark.parametrize("size", [2, 4])
def test_row_parallel_linear_equals_the_whole_product(size: int, backend: str) -> None:
    x, weight, bias = torch.randn(6, 64).double(), torch.randn(32, 64).double(), torch.randn(32).double()
    ranks = [
        [a.float().contiguous(), w.float().contiguous(), bias.float()]
        for a, w in zip(x.chunk(size, 1), weight.chunk(size, 1), strict=True)
    ]
    for (out,) in on_ranks("LinearParallel", {"backend": backend, "hasResidual": True}, ranks):
        torch.testing.assert_close(out.double(), x @ weight.t() + bias, rtol=1e-5, atol=1e-4)


def test_sequence_parallel_linears_compose_to_the_whole_product() -> None:
    """Column-parallel ALL_GATHER_LINEAR, then row-parallel LINEAR_REDUCE_SCATTER: rows in, rows out."""
    x, up, down = torch.randn(8, 16), torch.randn(32, 16), torch.randn(16, 32)
    wide = on_ranks(
        "LinearParallel", {"backend": "lcoc", "type": 2}, [[r, w] for r, w in zip(x.chunk(2), up.chunk(2), strict=True)]
    )
    parts = [[h[0], w.contiguous()] for h, w in zip(wide, down.chunk(2, 1), strict=True)]
    outs = on_ranks("LinearParallel", {"backend": "lcoc", "type": 1}, parts)
    torch.testing.assert_close(torch.cat([out for (out,) in outs]), x @ up.t() @ down.t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inner_is_ag", [0, 1])
def test_two_dim_linear_gathers_along_one_side_and_sums_along_the_other(inner_is_ag: int) -> None:
    """Four ranks, agDim 2 x rsDim 2: the k dim is cut over rs; rows are cut over ag before and over rs after."""
    x, weight = torch.randn(8, 16), torch.randn(4, 16)
    place = {r: (r % 2, r // 2) if inner_is_ag else (r // 2, r % 2) for r in range(4)}
    inputs = [
        [x.chunk(2)[ag].chunk(2, 1)[rs].contiguous(), weight.chunk(2, 1)[rs].contiguous()] for ag, rs in place.values()
    ]
    values = {"backend": "lcoc", "type": 4, "twoDimTPInfo": {"agDim": 2, "rsDim": 2, "innerDimIsAg": inner_is_ag}}
    for r, (out,) in enumerate(on_ranks("LinearParallel", values, inputs)):
        torch.testing.assert_close(out, (x @ weight.t()).chunk(2)[place[r][1]], rtol=1e-4, atol=1e-4)


def test_a_failing_rank_releases_the_others_with_its_error() -> None:
    def fails() -> list[Tensor]:
        raise ValueError("rank 1 ran out of luck")

    with pytest.raises(ValueError, match="out of luck"):
        run_ranks([lambda: run("AllReduce", {"rank": 0, "rankSize": 2}, torch.ones(2)), fails])


def test_a_process_that_is_alone_cannot_reduce_over_two_ranks() -> None:
    with pytest.raises(AtbError, match=r"ERROR_COMM_EMPTY[\s\S]*2 ranks"):
        run("AllReduce", {"rankSize": 2}, torch.ones(2))


def test_a_rank_that_claims_to_be_another_is_refused() -> None:
    with pytest.raises(AtbError, match=r"found: rank 0 of 2[\s\S]*expected: rank 1 of 2"):
        run_ranks([lambda: run("AllReduce", {"rank": 1, "rankSize": 2}, torch.ones(2))] * 2)


@pytest.mark.parametrize("domain", ["tp", "55469"])
def test_lccl_refuses_a_domain_that_is_text_or_gives_no_port_when_it_runs(domain) -> None:
    with pytest.raises(AtbError, match="ERROR_COMM_EMPTY at execute"):
        on_ranks("AllReduce", {"backend": "lccl", "commDomain": domain}, [[torch.ones(2)], [torch.ones(2)]])


def _process(rank: int, store: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        torch.manual_seed(rank)
        x = torch.randn(4, 6).bfloat16()
        values = {"rank": rank, "rankSize": 2}
        outs = {"x": x, "sum": run("AllReduce", values, x)[0], "all": run("AllGather", values, x)[0]}
        outs["part"] = run("ReduceScatter", values, x)[0]
        torch.save(outs, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.processes
def test_two_processes_over_gloo_agree_with_threads(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_process, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    inputs = [[outs["x"]] for outs in found]
    for op, name in {"AllReduce": "sum", "AllGather": "all", "ReduceScatter": "part"}.items():
        for outs, (expected,) in zip(found, on_ranks(op, {}, inputs), strict=True):
            assert torch.equal(outs[name], expected), op
    assert torch.equal(found[0]["sum"], found[1]["sum"])
    torch.testing.assert_close(found[0]["sum"].float(), inputs[0][0].float() + inputs[1][0].float(), rtol=2**-8, atol=0)
