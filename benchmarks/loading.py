"""Peak memory and time of loading a checkpoint, ours beside transformers', and of loading each rank's share of it. Each
load is a fresh process.

    python benchmarks/loading.py [--gigabytes 2] [--dtype float16] [--world-sizes 1 2 4 8] [--rounds 3]

Writes a random LLaMA checkpoint (two shards; that size without its embeddings) into a temporary directory, which is
removed at the end. The figures to keep, both of peak resident memory: a whole checkpoint takes at most its size x 1.1 +
300 MB, imports included; a rank takes at most its share, one piece and what was resident before loading, x 1.02.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MB = 1e6
VOCAB = 128256  # Llama 3: one tensor that is large beside the rest
TOLERANCE = 1.02  # of a rank's budget: Python's own objects


def write_checkpoint(folder: Path, gigabytes: float, dtype: str) -> None:
    """A LLaMA of 8 layers whose width gives the size asked for."""
    import torch
    from safetensors.torch import save_file

    hidden = max(256, int((gigabytes * 1e9 / 2 / 8 / 12) ** 0.5) // 64 * 64)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4 // 32 * 32, "num_hidden_layers": 8, "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64, "vocab_size": VOCAB, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": dtype,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    ffn, t = config["intermediate_size"], getattr(torch, dtype)
    shapes = {
        "model.embed_tokens.weight": (VOCAB, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (VOCAB, hidden),
    }
    for i in range(8):
        p = f"model.layers.{i}."
        shapes |= {f"{p}self_attn.{n}_proj.weight": (hidden, hidden) for n in "qkvo"}
        shapes |= {f"{p}mlp.{n}_proj.weight": (ffn, hidden) for n in ("gate", "up")}
        shapes |= {f"{p}mlp.down_proj.weight": (hidden, ffn)}
        shapes |= {f"{p}{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
    needed = sum(math.prod(shape) for shape in shapes.values()) * t.itemsize
    if (free := shutil.disk_usage(folder).free) < needed * 1.1:
        sys.exit(f"{folder}: {free / MB:.0f} MB are free, the checkpoint has {needed / MB:.0f} MB; TMPDIR says where")
    names = list(shapes)
    index = {}
    for part, chosen in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"model-{part:05}-of-00002.safetensors"
        save_file({n: torch.randn(shapes[n]).to(t) for n in chosen}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(chosen, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def load_ours(folder: Path) -> None:
    from llmc.runtime.weights import load_weights

    load_weights(compiled(folder)["weights"], folder, progress=False)


def compiled(folder: Path, **options: Any) -> dict[str, Any]:
    """Manifest of the checkpoint's model."""
    from llmc.compiler.artifact import make_manifest
    from llmc.compiler.language.checkpoint import read_config, variant_from_config
    from llmc.compiler.options import Options
    from llmc.compiler.pipeline import compile_model

    graph = folder / "variant.yaml"
    graph.write_text(variant_from_config(read_config(folder), "benchmark"))
    return make_manifest(compile_model(str(graph), Options(**options)))


def load_share(folder: Path, world_size: int, rank: int) -> dict[str, float]:
    """Bytes and seconds of load_weights alone, on the clock and of the CPU."""
    from llmc.runtime.weights import CHUNK_BYTES, load_weights

    manifest = json.loads((folder / f"manifest-{world_size}.json").read_text())
    before = resident("VmRSS")
    start, cpu = time.perf_counter(), time.process_time()
    weights = load_weights(manifest["weights"], folder, splits=manifest["splits"], rank=rank, progress=False)
    times = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    share = sum({t.data_ptr(): t.numel() * t.itemsize for t in weights.values()}.values())
    return {**times, "before": before, "share": share, "piece": CHUNK_BYTES, "peak": resident("VmHWM")}


def compile_for(folder: Path, world_sizes: list[int]) -> None:
    for world_size in world_sizes:
        manifest = compiled(folder, device="host", world_size=world_size)
        (folder / f"manifest-{world_size}.json").write_text(json.dumps(manifest))


def resident(key: str) -> int:
    """Bytes, of this program: getrusage also counts the parent's before exec."""
    found = re.search(rf"{key}:\s*(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def load_transformers(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    dtype = json.loads((folder / "config.json").read_text())["torch_dtype"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), trust_remote_code=False)
    for parameter in model.parameters():  # it keeps the files mapped: read a value of every 4096-byte page
        parameter.detach().flatten()[::2048].sum()


LOADERS = {"llmc": load_ours, "transformers": load_transformers}


def child(folder: Path, what: str, *more: str) -> dict[str, float]:
    """What a process of its own measured: a child's peak starts from what its parent had in memory."""
    command = [sys.executable, __file__, "--load", what, "--folder", str(folder), *more]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def compare_whole(folder: Path, size: int) -> None:
    limit = size * 1.1 + 300 * MB
    print(f"checkpoint {size / MB:.0f} MB; limit {limit / MB:.0f} MB")
    for loader in LOADERS:
        found = child(folder, loader)
        print(
            f"{loader:<14} peak {found['peak'] / MB:6.0f} MB   {found['peak'] / size:4.2f} x checkpoint   "
            f"{found['peak'] / limit:4.2f} x limit   {found['seconds']:5.1f} s"
        )


def compare_ranks(folder: Path, size: int, world_sizes: list[int], rounds: int) -> None:
    """A line a world size: the rank nearest to its budget, and times (the best round of each rank). Rounds take turns
    over the world sizes, so that a slow minute of the machine falls on all of them."""
    compile_for(folder, world_sizes)
    runs: dict[tuple[int, int], list[dict[str, float]]] = {}
    for _ in range(rounds):
        for world_size in world_sizes:
            for rank in range(world_size):
                found = child(folder, "share", "--rank", str(rank), "--world-sizes", str(world_size))
                runs.setdefault((world_size, rank), []).append(found)
    print("\nranks: one after the other, files in the page cache; budget = share + one piece + resident before loading")
    print(
        f"{'ranks':>5} {'share':>8} {'of whole':>8} {'before':>8} {'peak':>8} {'budget':>8} {'peak/budget':>11}", end=""
    )
    print(f" {'slowest rank':>12} {'CPU, all ranks':>14} {'per GB':>6}")
    worst = 0.0
    for world_size in world_sizes:
        mine = [runs[world_size, rank] for rank in range(world_size)]
        full = max((found for rank in mine for found in rank), key=lambda f: f["peak"] / budget(f))
        ratio = full["peak"] / budget(full)
        worst = max(worst, ratio)
        slowest = max(min(found["seconds"] for found in rank) for rank in mine)
        cpu = sum(min(found["cpu"] for found in rank) for rank in mine)
        loaded = sum(rank[0]["share"] for rank in mine)
        print(
            f"{world_size:>5} {full['share'] / MB:>5.0f} MB {full['share'] / size:>8.3f} {full['before'] / MB:>5.0f} MB"
            f" {full['peak'] / MB:>5.0f} MB {budget(full) / MB:>5.0f} MB {ratio:>11.3f}"
            f" {slowest:>10.2f} s {cpu:>12.2f} s {cpu / loaded * 1e9:>4.2f} s"
        )
    verdict = "holds" if worst <= TOLERANCE else "EXCEEDED"
    print(f"verdict: a rank's peak is at most {worst:.3f} x its budget (limit {TOLERANCE}): {verdict}")


def budget(found: dict[str, float]) -> float:
    return found["share"] + found["piece"] + found["before"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--world-sizes", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--load", choices=[*LOADERS, "share", "write"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load == "write":
        write_checkpoint(args.folder, args.gigabytes, args.dtype)
        return
    if args.load == "share":
        print(json.dumps(load_share(args.folder, args.world_sizes[0], args.rank)))
        return
    if args.load:
        start = time.perf_counter()
        LOADERS[args.load](args.folder)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": time.perf_counter() - start, "peak": peak}))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = ["--gigabytes", str(args.gigabytes), "--dtype", args.dtype]
        command = [sys.executable, __file__, "--load", "write", "--folder", name, *sizes]
        if subprocess.run(command).returncode:
            sys.exit("no checkpoint was written")
        size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
        compare_whole(folder, size)
        if args.world_sizes:
            compare_ranks(folder, size, args.world_sizes, args.rounds)


if __name__ == "__main__":
    main()
