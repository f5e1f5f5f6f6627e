"""Peak memory and time of loading a checkpoint, ours beside transformers'. Each load is a fresh process.

    python benchmarks/loading.py [--gigabytes 2] [--dtype float16]

Writes a random LLaMA checkpoint of about that size (two shards) into a temporary directory. The figure to keep: peak
resident memory while loading at most checkpoint size x 1.1 + 300 MB, imports included.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MB = 1e6
VOCAB = 128256  # Llama 3: one tensor that is large beside the rest


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
    names = list(shapes)
    index = {}
    for part, chosen in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"model-{part:05}-of-00002.safetensors"
        save_file({n: torch.randn(shapes[n]).to(t) for n in chosen}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(chosen, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def load_ours(folder: Path) -> None:
    from llmc.compiler.artifact import make_manifest
    from llmc.compiler.checkpoint import read_config, variant_from_config
    from llmc.compiler.pipeline import Options, compile_model
    from llmc.runtime.weights import load_weights

    graph = folder / "variant.yaml"
    graph.write_text(variant_from_config(read_config(folder), "benchmark"))
    manifest = make_manifest(compile_model(str(graph), Options()))
    load_weights(manifest["weights"], folder, progress=False)


def load_transformers(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    dtype = json.loads((folder / "config.json").read_text())["torch_dtype"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    for parameter in model.parameters():  # it keeps the files mapped: read a value of every 4096-byte page
        parameter.detach().flatten()[::2048].sum()


LOADERS = {"llmc": load_ours, "transformers": load_transformers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--load", choices=[*LOADERS, "write"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load == "write":
        write_checkpoint(args.folder, args.gigabytes, args.dtype)
        return
    if args.load:
        start = time.perf_counter()
        LOADERS[args.load](args.folder)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": time.perf_counter() - start, "peak": peak}))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # In a process of its own: a child's peak starts from what its parent had in memory.
        sizes = ["--gigabytes", str(args.gigabytes), "--dtype", args.dtype]
        subprocess.run([sys.executable, __file__, "--load", "write", "--folder", name, *sizes], check=True)
        size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
        limit = size * 1.1 + 300 * MB
        print(f"checkpoint {size / MB:.0f} MB; limit {limit / MB:.0f} MB")
        for loader in LOADERS:
            command = [sys.executable, __file__, "--load", loader, "--folder", name]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{loader:<14} peak {found['peak'] / MB:6.0f} MB   {found['peak'] / size:4.2f} x checkpoint   "
                f"{found['peak'] / limit:4.2f} x limit   {found['seconds']:5.1f} s"
            )


if __name__ == "__main__":
    main()
