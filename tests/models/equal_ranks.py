"""Every legal world size gives the numbers of world size 1: the whole proof, with one process a rank (torchrun, gloo).

    python tests/models/equal_ranks.py                                  # worlds 2, 3, 4 and 8, one after the other
    python tests/models/equal_ranks.py --worlds 3 --only mqa tied       # two of the cases
    torchrun --nproc-per-node 4 tests/models/equal_ranks.py             # one world, as a rank of it

Each case is a model with random weights: every model of the catalogue shrunk to test size, and small configurations.
Four sequences of unequal length are prefilled together and decoded to the end, in float32, with paged and contiguous
caches, plain and with all fusions. Rank 0 compares world 1 with transformers; every rank compares its logits with those
of world 1. A line says the largest error over the ranks, relative to the largest logit. Exit code 1 where one exceeds
2e-5.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from huggingface_hub.utils import disable_progress_bars
from tiny import LENGTHS, bind, build, reference, save_model, sequences

from llmc.compiler import artifact
from llmc.compiler.language.build import load_model
from llmc.compiler.language.source import catalogue

WORLDS = (2, 3, 4, 8)
ATTENTION = ("paged", "flash")
FUSIONS = {"plain": (), "fused": ("swiglu", "add_norm", "linear_all_reduce")}
TOLERANCE = 2e-5  # of the largest logit: float32 keeps 24 bits; sums of some hundred terms lose a few of them
RANDOM_CASES = 16

# Sizes that world sizes divide, and sizes that they do not.
BASE = {"heads": 8, "kv_heads": 8, "head_dim": 16, "ffn": 160, "vocab": 96, "layers": 2, "max_positions": 256}
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "mha": {},
    "mha-13-heads": {"heads": 13, "kv_heads": 13},
    "gqa": {"heads": 8, "kv_heads": 2},
    "gqa-28-over-4": {"heads": 28, "kv_heads": 4},
    "gqa-10-over-2": {"heads": 10, "kv_heads": 2},
    "mqa": {"heads": 7, "kv_heads": 1},
    "few-heads": {"heads": 2, "kv_heads": 2},
    "odd": {"heads": 5, "kv_heads": 5, "ffn": 83, "vocab": 101},
    "biases": {"heads": 6, "kv_heads": 3, "ffn": 99, "biases": True},
    "tied": {"heads": 6, "kv_heads": 2, "vocab": 97, "tied": True},
    "embedding": {"embedding": "hidden"},
    "everything": {"heads": 15, "kv_heads": 3, "ffn": 111, "vocab": 103,
                   "biases": True, "tied": True, "embedding": "hidden"},
}  # fmt: skip


def filled(sizes: Mapping[str, int]) -> dict[str, int]:
    """All sizes of a model. transformers wants a hidden size that the heads divide, RmsNorm one that 8 divides."""
    unit = math.lcm(8, sizes.get("heads", BASE["heads"]))
    return {**BASE, "hidden": unit * -(-64 // unit), **sizes}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model: what transformers' LlamaConfig says of it, and the same as YAML."""

    name: str
    config: Mapping[str, Any] = field(hash=False)
    text: str


def small(name: str, *, biases: bool = False, tied: bool = False, embedding: str = "replicate", **sizes: int) -> Case:
    """A model of the family with these sizes; `embedding`: how its table is split."""
    sizes = filled(sizes)
    said = {"attention_bias": biases, "mlp_bias": biases, "tie_word_embeddings": tied}
    model: dict[str, Any] = {
        "extends": "families/llama",
        "name": name,
        "sizes": sizes,
        "config": {key: {"is": value} for key, value in said.items()},
        "graph": {"embed": {"tp": embedding}},
    }
    if tied:
        model["graph"]["lm_head"] = {"weight": "model.embed_tokens.weight"}
    if biases:
        model["blocks"] = {
            "attention": {"nodes": {"qkv": _parts("self_attn", "q", "k", "v"), "o": _bias("self_attn.o")}},
            "mlp": {"nodes": {"gate_up": _parts("mlp", "gate", "up"), "down": _bias("mlp.down")}},
        }
    return Case(name=name, config=_config(sizes, said), text=yaml.safe_dump(model, sort_keys=False))


def _parts(module: str, *names: str) -> dict[str, Any]:
    return {"parts": {name: _bias(f"{module}.{name}") for name in names}}


def _bias(projection: str) -> dict[str, str]:
    return {"bias": f"model.layers.{{i}}.{projection}_proj.bias"}


def _config(sizes: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "hidden_size": sizes["hidden"],
        "intermediate_size": sizes["ffn"],
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["kv_heads"],
        "head_dim": sizes["head_dim"],
        "vocab_size": sizes["vocab"],
        **said,
    }


def shrunk(name: str) -> Case:
    """A model of the catalogue: its own head counts, everything else small."""
    described = load_model(name)
    whole = described.graph.sizes
    sizes = filled({"heads": whole["heads"], "kv_heads": whole["kv_heads"]})
    keys = ("attention_bias", "mlp_bias", "tie_word_embeddings")
    config = {
        **_config(sizes, {key: described.config[key].value for key in keys}),
        "rms_norm_eps": whole["eps"],
        "rope_parameters": {"rope_type": "default", "rope_theta": described.graph.rope["theta"]},
    }
    text = yaml.safe_dump({"extends": name, "name": "shrunk", "sizes": sizes}, sort_keys=False)
    return Case(name=name, config=config, text=text)


def drawn(seed: int) -> Case:
    """A configuration by chance, the same for every run."""
    chance = random.Random(seed)
    kv_heads = chance.randint(1, 6)
    return small(
        f"random-{seed}",
        heads=kv_heads * chance.choice([1, 1, 2, 3, 5, 7]),
        kv_heads=kv_heads,
        head_dim=chance.choice([16, 32]),
        ffn=chance.randint(17, 200),
        vocab=chance.randint(17, 130),
        biases=chance.random() < 0.5,
        tied=chance.random() < 0.3,
        embedding=chance.choice(["replicate", "hidden"]),
    )


def cases() -> list[Case]:
    return [
        *(shrunk(name) for name in catalogue()),
        *(small(name, **sizes) for name, sizes in SHAPES.items()),
        *(drawn(seed) for seed in range(RANDOM_CASES)),
    ]


def error(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The largest difference, relative to the largest logit; infinite where shapes differ or a number is none."""
    if [a.shape for a in found] != [b.shape for b in expected]:
        return math.inf
    scale = max(b.abs().max().item() for b in expected)
    differences = torch.cat([(a - b).flatten() for a, b in zip(found, expected, strict=True)])
    worst = differences.abs().max().item() / scale  # torch's max is NaN where a number is
    return worst if math.isfinite(worst) else math.inf


@dataclass(frozen=True, kw_only=True)
class Truth:
    """A case's checkpoint, and the logits of world 1 by attention."""

    folder: Path
    tokens: list[list[int]]
    logits: Mapping[str, list[torch.Tensor]] = field(hash=False)
    from_transformers: float  # largest error of world 1


def prepare(case: Case, folder: Path) -> Truth:
    """Write the case's checkpoint, run world 1, and compare that with transformers."""
    disable_progress_bars()
    model = save_model(folder, case.config)
    tokens = sequences(case.config["vocab_size"])
    alone = {}
    for attention in ATTENTION:
        found = build(folder, case.text, attention=attention, dtype="float32", fusions=(), world_size=1)
        alone[attention] = bind(found, folder).logits(tokens, LENGTHS)
    theirs = reference(model, tokens)
    worst = max(error(logits, theirs) for logits in alone.values())
    return Truth(folder=folder, tokens=tokens, logits=alone, from_transformers=worst)


# One rank of a world --------------------------------------------------------------------------------------------------


def run_world(only: Sequence[str]) -> int:
    """The cases, as one rank; rank 0 prints. The number of failures."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    failures = 0
    for case in cases():
        if not only or case.name in only:
            with tempfile.TemporaryDirectory() as name:
                (folder,) = _from_first([Path(name)])
                failures += run_case(case, folder, rank, world_size)
    dist.destroy_process_group()
    return failures


def run_case(case: Case, folder: Path, rank: int, world_size: int) -> int:
    (truth,) = _from_first([prepare(case, folder) if rank == 0 else None])
    failures = 0
    for attention in ATTENTION:
        for label, fusions in FUSIONS.items():
            options = {"attention": attention, "dtype": "float32", "fusions": fusions, "world_size": world_size}
            (path,) = _from_first([build(folder, case.text, **options).path if rank == 0 else None])
            ours = bind(artifact.read(path), folder, rank=rank).logits(truth.tokens, LENGTHS)
            worst = torch.tensor([error(ours, truth.logits[attention]), truth.from_transformers])
            dist.all_reduce(worst, dist.ReduceOp.MAX)
            failed = bool((worst > TOLERANCE).any())
            failures += failed
            if rank == 0:
                what = f"world {world_size}  {case.name:<16} {attention:<6} {label:<6}"
                print(f"{what} {worst[0]:.1e}  (world 1 against transformers {worst[1]:.1e})"
                      f"{'  FAILED' if failed else ''}", flush=True)  # fmt: skip
    return failures


def _from_first(values: list[Any]) -> list[Any]:
    """What rank 0 has, on every rank."""
    dist.broadcast_object_list(values)
    return values


# All worlds -----------------------------------------------------------------------------------------------------------


def start(worlds: Sequence[int], only: Sequence[str]) -> int:
    """torchrun for each world; the exit code."""
    failed = []
    for world_size in worlds:
        began = time.monotonic()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}",
                   __file__, "--only", *only]  # fmt: skip
        code = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode
        failed += [world_size] if code else []
        print(f"world {world_size}: {'FAILED' if code else 'equal'}, {time.monotonic() - began:.0f} s", flush=True)
    print(f"worlds {', '.join(map(str, failed))} differ from world 1" if failed else "all worlds equal world 1")
    return int(bool(failed))


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument(
        "--worlds", type=int, nargs="+", default=WORLDS, help="world sizes to start, one after the other"
    )
    parser.add_argument("--only", nargs="*", default=[], choices=[case.name for case in cases()], metavar="CASE",
                        help="run these cases (default: all)")  # fmt: skip
    args = parser.parse_args()
    if "RANK" in os.environ:  # torchrun started this process
        return int(bool(run_world(args.only)))
    return start(args.worlds, args.only)


if __name__ == "__main__":
    sys.exit(main())
