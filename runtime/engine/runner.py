"""From scheduled sequences to the graph's inputs, and the step itself.

Enters a `Batch`; leaves logits [B, vocab], or of every token [T, vocab]. Names and places (host or device) of the
inputs are the manifest's; only those that a phase lists are passed.

    caches = make_caches(manifest, {"N": 64})
    runner = Runner(manifest, executor, caches)
    logits = runner.run(scheduler.schedule())
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol

import torch

from llmc.compiler.diagnostics import UserError
from llmc.runtime.engine.blocks import BLOCK_SIZE, slot
from llmc.runtime.engine.rows import Rows
from llmc.runtime.engine.scheduler import Batch
from llmc.runtime.engine.sequence import Sequence as Request
from llmc.runtime.formats import in_format
from llmc.runtime.hostatb.numeric import nd_to_nz
from llmc.runtime.rope import rope_tables
from llmc.runtime.stream import Upload


class Executes(Protocol):
    """What runs a phase: the executor of an artifact, or a stand-in."""

    def run(self, phase: str, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor: ...


def is_paged(manifest: Mapping[str, Any]) -> bool:
    """Paged caches are [N, block, heads, head_dim], contiguous ones [1, B, S, heads * head_dim]."""
    if not manifest["caches"]:
        raise UserError("a model without attention has no cache, and generating text needs one", code="E501")
    return next(iter(manifest["caches"].values()))["shape"][0] == "N"


def make_caches(
    manifest: Mapping[str, Any], sizes: Mapping[str, int], device: torch.device | str = "cpu"
) -> dict[str, torch.Tensor]:
    """Zeroed caches. `sizes`: {"N": blocks} when paged, {"B": rows, "S": tokens} when contiguous; S of nz caches is
    rounded up to whole blocks of 16, so that each row is whole blocks."""
    caches: dict[str, torch.Tensor] = {}
    for name, cache in manifest["caches"].items():
        dtype = getattr(torch, cache["dtype"])
        block = 16 if cache["format"] == "nz" else 1
        shape = _shape(cache["shape"], {**sizes, "S": -(-sizes.get("S", 0) // block) * block})
        try:
            caches[name] = in_format(torch.zeros(shape, dtype=dtype, device=device), cache["format"])
        except RuntimeError:  # torch.OutOfMemoryError on devices, a plain RuntimeError on the host
            each, count = math.prod(shape) * dtype.itemsize, len(manifest["caches"])
            raise UserError(
                f"the cache needs {count} tensors of {each / 2**20:.0f} MiB ({each * count / 2**30:.1f} GiB), and "
                f"{device} had room for {len(caches)} of them",
                hint="fewer or shorter prompts, a smaller --max-output-length or --num-blocks",
            ) from None
    return caches


def make_constants(
    manifest: Mapping[str, Any], positions: int, device: torch.device | str = "cpu"
) -> dict[str, torch.Tensor]:
    """Masks and rope tables. `positions`: the longest sequence that will run (P)."""
    try:
        return _make_constants(manifest, positions, device)
    except RuntimeError as error:  # as of caches
        raise UserError(
            f"the masks and rope tables of {positions} positions do not fit: {str(error).splitlines()[0]}",
            hint="a smaller --max-position-embeddings",
        ) from None


def _make_constants(manifest: Mapping[str, Any], positions: int, device: torch.device | str) -> dict[str, torch.Tensor]:
    made: dict[str, torch.Tensor] = {}
    tables: dict[tuple[int, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}
    for name, constant in manifest["constants"].items():
        shape, dtype = _shape(constant["shape"], {"P": positions}), getattr(torch, constant["dtype"])
        match constant["kind"]:
            case "causal_mask":
                made[name] = in_format(causal_mask(constant, shape, dtype).to(device), constant["format"])
            case "rope_cos" | "rope_sin" as kind:
                key = (shape[-1], dtype)
                if key not in tables:
                    tables[key] = rope_tables(
                        manifest["rope"], head_dim=shape[-1], positions=shape[0], dtype=dtype, device=device
                    )
                made[name] = tables[key][kind == "rope_sin"]
            case other:
                raise UserError(f"the artifact's constant {name!r} is of the unknown kind {other!r}", code="E501")
    return made


def causal_mask(constant: Mapping[str, Any], shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """`value` above the diagonal of [n, n]; as nz [1, n / 16, n, 16]."""
    n = shape[2] if constant["format"] == "nz" else shape[0]
    mask = torch.full((n, n), constant["value"], dtype=torch.float32).triu(diagonal=1).to(dtype)
    return nd_to_nz(mask) if constant["format"] == "nz" else mask


def cache_sizes(manifest: Mapping[str, Any], caches: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """What the symbols of the cache's shape are here: {"N": blocks}, or {"B": rows, "S": positions}."""
    if not caches:
        raise UserError(f"{manifest['model']} has no attention node, so no sequence can be continued")
    name, cache = next(iter(caches.items()))
    named = zip(manifest["caches"][name]["shape"], cache.shape, strict=True)
    return {symbol: size for symbol, size in named if isinstance(symbol, str)}


def block_size(manifest: Mapping[str, Any]) -> int:
    """Positions in a block of the paged cache: [N, block, heads, head_dim], as nz [N, columns / 16, block, 16]."""
    cache = next(iter(manifest["caches"].values()))
    return cache["shape"][2 if cache["format"] == "nz" else 1]


def _shape(shape: Sequence[int | str], sizes: Mapping[str, int]) -> list[int]:
    return [dim if isinstance(dim, int) else sizes[dim] for dim in shape]


class Runner:
    """Builds inputs and calls the executor. `caches` are the same tensors that the executor holds."""

    def __init__(
        self,
        manifest: Mapping[str, Any],
        executor: Executes,
        caches: Mapping[str, torch.Tensor],
        device: torch.device | str = "cpu",
    ) -> None:
        self.manifest, self.executor, self.caches = manifest, executor, caches
        self.paged = is_paged(manifest)
        self.block_size = block_size(manifest) if self.paged else BLOCK_SIZE
        self.rows = None if self.paged else Rows(caches)
        self.upload = None if torch.device(device).type == "cpu" else Upload(device)

    def run(self, batch: Batch) -> torch.Tensor:
        """Logits of each sequence's last token [B, vocab]; where the artifact has those of every token, of a prefill
        all of them [T, vocab], one sequence after the other."""
        inputs = self.inputs(batch)
        if self.rows:
            self.rows.move(batch.moves)
            inputs |= self.rows.of(batch.first_row, len(batch.sequences))
        return self.executor.run(batch.phase, inputs)

    def inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The inputs that the phase lists, by name: tensors of the host, but for those that a device reads."""
        values = _prefill(batch.sequences) if batch.phase == "prefill" else _decode(batch.sequences)
        if self.paged:
            values |= self._paged(batch.sequences, values["position_ids"], values["seq_len"])
        facts = self.manifest["inputs"]
        result = {}
        for name in self.manifest["phases"][batch.phase]["inputs"]:
            if name not in values:
                raise UserError(f"the artifact wants the input {name!r}, which this runtime does not make", code="E501")
            result[name] = torch.tensor(values[name], dtype=getattr(torch, facts[name]["dtype"]))
        if self.upload:
            result |= self.upload({name: tensor for name, tensor in result.items() if not facts[name]["host"]})
        return result

    def _paged(self, requests: Sequence[Request], positions: list[int], counts: list[int]) -> dict[str, Any]:
        width = max(len(r.block_table) for r in requests)
        owners = [r for r, count in zip(requests, counts, strict=True) for _ in range(count)]
        return {
            "slots": [slot(r.block_table, p, self.block_size) for r, p in zip(owners, positions, strict=True)],
            "block_tables": [r.block_table + [0] * (width - len(r.block_table)) for r in requests],
        }


def rows_of(logits: torch.Tensor, batch: Batch) -> Sequence[torch.Tensor]:
    """Each sequence's rows of a step's logits [n, vocab], the last of which says what follows it."""
    every = batch.phase == "prefill" and len(logits) != len(batch.sequences)
    return logits.split([len(r) for r in batch.sequences] if every else 1)


def last_rows(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Logits of each sequence's last token [B, vocab] out of a step's logits."""
    if len(logits) == len(batch.sequences):
        return logits
    return torch.cat([rows[-1:] for rows in rows_of(logits, batch)])


def _prefill(requests: Sequence[Request]) -> dict[str, Any]:
    """All tokens of all sequences, one after the other, without padding."""
    lengths = [len(r) for r in requests]
    return {
        "token_ids": [t for r in requests for t in r.token_ids],
        "position_ids": [p for n in lengths for p in range(n)],
        "last_rows": [end - 1 for end in accumulate(lengths)],
        **_lengths(lengths, lengths),
    }


def _decode(requests: Sequence[Request]) -> dict[str, Any]:
    """The last token of each sequence; everything before it is in the cache."""
    return {
        "token_ids": [r.token_ids[-1] for r in requests],
        "position_ids": [len(r) - 1 for r in requests],
        "last_rows": list(range(len(requests))),
        **_lengths([1] * len(requests), [len(r) for r in requests]),
    }


def _lengths(new: list[int], total: list[int]) -> dict[str, Any]:
    """seq_len and rope_len: tokens of this step; token_offset and context_lens: tokens in the cache after it."""
    return {"seq_len": new, "rope_len": new, "token_offset": total, "context_lens": total, "layer_id": [0]}
