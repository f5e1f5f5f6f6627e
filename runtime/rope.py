"""Rotary position tables: one function per scaling type, one function that makes cos and sin.

Enters the manifest's rope object and a head size; leaves `cos, sin`, each [positions, head_dim].

    rope = {"theta": 500000.0, "pairing": "half", "scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_positions": 8192}}
    cos, sin = rope_tables(rope, head_dim=128, positions=8192, dtype=torch.float16)

Frequencies are computed in float64 and rounded once to float32; angles, cos and sin are float32; the cast to the
model's dtype is last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from llmc.compiler.diagnostics import UserError, did_you_mean

# (theta, head_dim, scaling, positions) -> inverse frequencies [head_dim / 2] in float64, factor on cos and sin
Rule = Callable[[float, int, Mapping[str, Any], int], tuple[torch.Tensor, float]]


def rope_tables(
    rope: Mapping[str, Any], *, head_dim: int, positions: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, [positions, head_dim]. Pairing "half" repeats the row of frequencies, "interleaved" doubles each."""
    inv_freq, factor = rope_frequencies(rope, head_dim=head_dim, positions=positions)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), inv_freq)
    match rope.get("pairing", "half"):
        case "half":
            angles = torch.cat((angles, angles), dim=-1)
        case "interleaved":
            angles = angles.repeat_interleave(2, dim=-1)
        case other:
            raise UserError(f"rope pairing {other!r} is unknown; expected half or interleaved")
    cos, sin = ((f(angles) * factor).to(device=device, dtype=dtype) for f in (torch.cos, torch.sin))
    return cos, sin


def rope_frequencies(rope: Mapping[str, Any], *, head_dim: int, positions: int) -> tuple[torch.Tensor, float]:
    """Inverse frequencies [head_dim / 2] in float32 and the factor that cos and sin are multiplied with."""
    if head_dim < 2 or head_dim % 2:
        raise UserError(f"rope needs an even head_dim; found {head_dim}")
    scaling = rope.get("scaling") or {"type": "default"}
    kind = scaling.get("type", "default")
    if kind not in RULES:
        raise UserError(f"rope scaling type {kind!r} is unknown", hint=did_you_mean(str(kind), RULES))
    try:
        inv_freq, factor = RULES[kind](float(rope.get("theta", 10000.0)), head_dim, scaling, positions)
    except KeyError as missing:
        raise UserError(
            f"rope scaling {kind!r} needs the setting {missing.args[0]!r}; found {sorted(scaling)}"
        ) from None
    return inv_freq.to(torch.float32), factor


def default(theta: float, dim: int, scaling: Mapping[str, Any], positions: int) -> tuple[torch.Tensor, float]:
    """1 / theta^(2i/d)"""
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim), 1.0


def linear(theta: float, dim: int, scaling: Mapping[str, Any], positions: int) -> tuple[torch.Tensor, float]:
    """Positions shrunk by `factor`."""
    return default(theta, dim, scaling, positions)[0] / scaling["factor"], 1.0


def dynamic(theta: float, dim: int, scaling: Mapping[str, Any], positions: int) -> tuple[torch.Tensor, float]:
    """The default up to the trained length. Beyond it transformers makes a new base for each length that a sequence
    outgrows, so that cached keys disagree with new ones, and none of its bases is right for a table: UserError."""
    trained = scaling["original_max_positions"]
    if positions > trained:
        raise UserError(
            f"rope scaling 'dynamic' is offered up to the trained length, {trained} positions; asked for: {positions}",
            hint=f"--max-position-embeddings {trained}, or a scaling that does not depend on the sequence's length",
        )
    return default(theta, dim, scaling, positions)


def llama3(theta: float, dim: int, scaling: Mapping[str, Any], positions: int) -> tuple[torch.Tensor, float]:
    """Long wavelengths divided by `factor`, short ones kept, a linear blend between where there is a between."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    inv_freq = default(theta, dim, scaling, positions)[0]
    turns = scaling["original_max_positions"] * inv_freq / (2 * math.pi)  # full turns within the trained context
    keep = ((turns - low) / (high - low)).clamp(0, 1) if high > low else (turns >= low).double()
    return inv_freq * (keep + (1 - keep) / factor), 1.0


def yarn(theta: float, dim: int, scaling: Mapping[str, Any], positions: int) -> tuple[torch.Tensor, float]:
    """NTK by parts: dimensions that turn over beta_fast times are kept, under beta_slow times divided by `factor`."""
    factor, original = scaling["factor"], scaling["original_max_positions"]
    if theta == 1:
        raise UserError("rope scaling 'yarn' needs a theta other than 1: with it all dimensions turn alike")
    inv_freq = default(theta, dim, scaling, positions)[0]

    def dimension(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / ((high - low) or 0.001)).clamp(0, 1)
    return inv_freq * ((1 - ramp) + ramp / factor), _yarn_attention_factor(scaling)


def _yarn_attention_factor(scaling: Mapping[str, Any]) -> float:
    def scale(weight: float) -> float:
        return 1.0 if scaling["factor"] <= 1 else 0.1 * weight * math.log(scaling["factor"]) + 1.0

    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    mscale, over = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return scale(mscale) / scale(over) if mscale and over else scale(1.0)


RULES: Mapping[str, Rule] = {"default": default, "linear": linear, "dynamic": dynamic, "llama3": llama3, "yarn": yarn}
