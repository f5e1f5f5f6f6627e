"""Tiny random LLaMA checkpoints made by transformers, and our runtime over one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmc.compiler import artifact
from llmc.compiler.language.checkpoint import read_config, variant_from_config
from llmc.compiler.options import Options
from llmc.compiler.pipeline import compile_model
from llmc.runtime import hostatb
from llmc.runtime.engine.blocks import BlockManager, RowManager
from llmc.runtime.engine.runner import Runner, make_caches, make_constants
from llmc.runtime.engine.sampling import SamplingParams
from llmc.runtime.engine.scheduler import Scheduler
from llmc.runtime.engine.sequence import Sequence as Request
from llmc.runtime.executor import Executor
from llmc.runtime.hostatb.collective import run_ranks
from llmc.runtime.weights import load_weights

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}

# What each adds to the base: heads, tied embeddings, head sizes, vocabularies, biases, rope.
CONFIGS = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "wide-heads": {"head_dim": 32},
    "narrow-heads": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
    "odd-vocab": {"vocab_size": 101},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "linear-rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    "llama3-rope": {"rope_parameters": LLAMA3},
    "yarn-rope": {"rope_parameters": YARN},
}

# What a variant with biases on every matmul says beyond its sizes.
BIASES = """
config: {attention_bias: {is: true}, mlp_bias: {is: true}}
blocks:
  attention:
    nodes:
      qkv:
        parts:
          q: {bias: "model.layers.{i}.self_attn.q_proj.bias"}
          k: {bias: "model.layers.{i}.self_attn.k_proj.bias"}
          v: {bias: "model.layers.{i}.self_attn.v_proj.bias"}
      o: {bias: "model.layers.{i}.self_attn.o_proj.bias"}
  mlp:
    nodes:
      gate_up:
        parts:
          gate: {bias: "model.layers.{i}.mlp.gate_proj.bias"}
          up: {bias: "model.layers.{i}.mlp.up_proj.bias"}
      down: {bias: "model.layers.{i}.mlp.down_proj.bias"}
"""


LENGTHS = [5, 13, 19, 1]  # prompt lengths of one batch
STEPS = [6, 9, 3, 9]  # tokens fed one by one afterwards


def sequences(vocab: int) -> list[list[int]]:
    """A batch of unequal lengths: prompts of LENGTHS tokens, each with its STEPS further ones."""
    generator = torch.Generator().manual_seed(7)
    return [
        torch.randint(0, vocab, (n + m,), generator=generator).tolist() for n, m in zip(LENGTHS, STEPS, strict=True)
    ]


@torch.no_grad()
def reference(model: LlamaForCausalLM, tokens: list[list[int]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Logits of transformers at the positions that `Ours.logits` gives, each sequence alone."""
    model = model.to(dtype)
    return [model(torch.tensor([t])).logits[0, n - 1 :].float() for t, n in zip(tokens, LENGTHS, strict=True)]


def save_checkpoint(folder: Path, name: str, seed: int = 0) -> LlamaForCausalLM:
    """A float32 model of two layers with weights large enough that every part shows in the logits."""
    return save_model(folder, CONFIGS[name], seed)


def save_model(folder: Path, differences: Mapping[str, Any], seed: int = 0) -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM  # seconds, which ranks that only read need not wait

    base = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }  # fmt: skip
    config = {**base, **differences}
    # Variance of a sum of `hidden` terms stays that of width 64, so that scores do not saturate as models widen.
    config["initializer_range"] = 0.3 * (64 / config["hidden_size"]) ** 0.5
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    for parameter_name, parameter in model.named_parameters():  # norms and biases start as ones and zeros
        if "norm" in parameter_name or "bias" in parameter_name:
            torch.nn.init.normal_(parameter, mean=float("norm" in parameter_name), std=0.3)
    model.save_pretrained(folder)
    return model


@dataclass
class Ours:
    """The runtime of one artifact, for teacher-forced steps."""

    runner: Runner
    scheduler: Scheduler

    def logits(self, tokens: Sequence[Sequence[int]], prompt_lengths: Sequence[int]) -> list[Tensor]:
        """Feeds the prompts in one prefill, then the given tokens one by one, all sequences together, and a shorter
        sequence leaves when it ends. Returns per sequence the logits after its prompt and after each further token."""
        requests = [
            Request(prompt_ids=list(t[:n]), params=SamplingParams(max_tokens=len(t)))
            for t, n in zip(tokens, prompt_lengths, strict=True)
        ]
        found: dict[int, list[Tensor]] = {r.id: [] for r in requests}
        rest = {r.id: list(t[n:]) for r, t, n in zip(requests, tokens, prompt_lengths, strict=True)}
        for request in requests:
            self.scheduler.add(request)
        while self.scheduler.busy:
            batch = self.scheduler.schedule()
            rows = self.runner.run(batch)
            done = []
            for request, row in zip(batch.sequences, rows, strict=True):
                found[request.id].append(row.clone())
                if rest[request.id]:
                    request.append(rest[request.id].pop(0), 0.0)
                else:
                    done.append(request)
            self.scheduler.finish(done)
        return [torch.stack(found[r.id]) for r in requests]


def variant(checkpoint: Path) -> str:
    """YAML for the checkpoint, as `llmc init` prints it; biases are the author's to add."""
    config = read_config(checkpoint)
    biases = BIASES if config.get("attention_bias") else ""
    return variant_from_config({**config, "attention_bias": False, "mlp_bias": False}, "tiny") + biases


def load(checkpoint: Path, work: Path, text: str = "", positions: int = 256, **options) -> Ours:
    """Compile the checkpoint's variant (or the YAML `text`) for the host and bind its weights."""
    return bind(build(work, text or variant(checkpoint), **options), checkpoint, positions=positions)


def load_ranks(checkpoint: Path, work: Path, text: str, *, world_size: int, **options) -> list[Ours]:
    """As `load`, for each rank of a tensor-parallel group: one artifact, and each rank's share of the weights."""
    found = build(work, text, world_size=world_size, **options)
    return [bind(found, checkpoint, rank=rank) for rank in range(world_size)]


def logits_of_ranks(ranks: Sequence[Ours], tokens: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[Tensor]:
    """What rank 0 gives, after a look that every rank gives the same bits. The ranks are threads of this process."""
    first, *others = run_ranks([partial(ours.logits, tokens, lengths) for ours in ranks])
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    return first


def build(work: Path, text: str, **options) -> artifact.Artifact:
    """The artifact of a YAML text for the host, in a folder named after the options."""
    graph = work / "variant.yaml"
    graph.write_text(text)
    path = work / "-".join(map(str, options.values()))
    artifact.write(compile_model(str(graph), Options(device="host", **options)), path)
    return artifact.read(path)


def bind(found: artifact.Artifact, checkpoint: Path, *, rank: int = 0, positions: int = 256) -> Ours:
    """One rank of an artifact with its weights, caches for up to eight sequences, and what feeds it."""
    manifest = found.manifest
    paged = manifest["attention"] == "paged"
    caches = make_caches(manifest, {"N": 32} if paged else {"B": 8, "S": positions})
    executor = Executor(
        found,
        hostatb,
        weights=load_weights(manifest["weights"], checkpoint, splits=manifest["splits"], rank=rank, progress=False),
        constants=make_constants(manifest, positions),
        caches=caches,
        rank=rank,
    )
    room = BlockManager(num_blocks=32) if paged else RowManager(rows=8, length=positions)
    return Ours(Runner(manifest, executor, caches), Scheduler(room, max_batch=8, max_prefill_tokens=4096))
