"""Our kernels meet the vendor's numeric test vectors within the vendor's own thresholds, on every chip a case names.

One test a file. The format of the data is described in its README; thresholds are stored beside each expected output.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from torch import Tensor
from vendor_cases import GOLDEN, known_param

from llmc.compiler.atb import OPS
from llmc.compiler.atb.core import AtbError, AtbOp
from llmc.runtime import hostatb
from llmc.runtime.hostatb.collective import run_ranks
from llmc.runtime.hostatb.numeric import nd_to_nz
from llmc.runtime.hostatb.operation import Operation, Single

FILES = sorted(GOLDEN.glob("*.jsonl"))
LISTED = yaml.safe_load(Path(__file__).with_name("disagreements.yaml").read_text(encoding="utf-8"))["golden"]
CHIPS = {"Ascend910B2": "Ascend910B", "Ascend310P3": "Ascend310P"}
UNSIGNED = {"uint32": torch.uint32, "uint64": torch.uint64}  # stored as signed


def stored_input(file: Any, spec: Mapping[str, Any], name: str) -> Tensor:
    tensor = file.get_tensor(name)
    if spec["dtype"] in UNSIGNED:
        tensor = tensor.view(UNSIGNED[spec["dtype"]])
    if spec["format"] != "fractal_nz":
        return tensor
    if len(spec.get("op_shape", ())) == 4 and tensor.dim() < 4:  # padded logical matrix of a 4-D weight
        tensor = nd_to_nz(tensor).reshape(spec["op_shape"])
    elif "op_shape" in spec:
        tensor = tensor.reshape(spec["op_shape"])
    return hostatb.set_format(tensor, "nz")


def _run_alone(op: AtbOp, case: Mapping[str, Any], file: Any, chip: str) -> list[Tensor]:
    """Outputs, or for `in_place_of` the inputs as they are afterwards: those cases run in a graph of one node."""
    core = Single(op, op.param(known_param(op.fields, case["param"])), chip)
    inputs = [stored_input(file, spec, spec["tensor"]) for spec in case["inputs"]]
    targets = [spec.get("in_place_of") for spec in case["outputs"]]
    if all(target is None for target in targets):
        return Operation.of(core).forward(inputs)
    names = [f"in{i}" for i in range(len(inputs))]
    outs = [f"in{target}" for target in targets][: core.output_num]
    graph = hostatb.GraphBuilder("golden").set_input_output(names, [])
    graph.add_operation(Operation.of(core), names, outs).build().forward(inputs)
    return [inputs[target] for target in targets]


def _run_ranks(op: AtbOp, case: Mapping[str, Any], file: Any, chip: str) -> list[list[Tensor]]:
    """Outputs of every rank, all ranks as threads of this process."""
    values = known_param(op.fields, case["param"])

    def rank(r: int) -> Callable[[], list[Tensor]]:
        inputs = [
            stored_input(file, spec, spec["tensors_per_rank"][r] if "tensors_per_rank" in spec else spec["tensor"])
            for spec in case["inputs"]
        ]
        operation = Operation.of(Single(op, op.param({**values, "rank": r}), chip))
        return lambda: operation.forward(inputs)

    return run_ranks([rank(r) for r in range(values["rankSize"])])


def _difference(actual: Tensor, expected: Tensor, threshold: Mapping[str, Any]) -> str:
    """Empty, or how the threshold is missed (README of the data, "Thresholds")."""
    if tuple(actual.shape) != tuple(expected.shape):
        return f"shape {list(actual.shape)} instead of {list(expected.shape)}"
    if actual.dtype != expected.dtype and actual.dtype not in UNSIGNED.values():
        return f"dtype {actual.dtype} instead of {expected.dtype}"
    a, e = actual.double(), expected.double()
    scale = e.abs().clamp(min=1)
    error = (a - e).abs()
    if threshold["precision"] == 0:
        return "" if torch.equal(a, e) else f"{int((a != e).sum())} elements differ, at most by {error.max():.4g}"
    if not bool((error <= threshold["precision"] * scale).all()):
        worst = int((error / scale).argmax())
        return f"element {worst}: {a.flatten()[worst]:.6g} instead of {e.flatten()[worst]:.6g}"
    bias = float(((a - e) / scale).mean().abs())
    return f"mean error {bias:.3g} over {threshold['eb']:.3g}" if threshold["eb"] and bias > threshold["eb"] else ""


def _sorted_ties(op: AtbOp, outputs: Sequence[Tensor], case: Mapping[str, Any], file: Any) -> list[Tensor]:
    """Sort: 16-bit values may tie, so any index whose element equals the value counts as the expected one."""
    if op.name != "Sort":
        return list(outputs)
    values, indices = outputs
    x = file.get_tensor(case["inputs"][0]["tensor"])
    expected = file.get_tensor(case["outputs"][1]["tensor"])
    same = x.gather(-1, indices.long()) == values
    return [values, torch.where(same, expected.to(indices.dtype), indices)]


def _case_differences(case: Mapping[str, Any], file: Any, chip: str) -> str:
    op = OPS[case["op"].removesuffix("Operation")]
    try:
        if collective_case := any("tensors_per_rank" in spec for spec in case["inputs"]) or "rankSize" in case["param"]:
            per_rank = _run_ranks(op, case, file, chip)
        else:
            per_rank = [_sorted_ties(op, _run_alone(op, case, file, chip), case, file)]
    except AtbError as error:
        return f"refused: {error}"
    texts = []
    for rank, outputs in enumerate(per_rank):
        if len(outputs) != len(case["outputs"]):
            return f"{len(outputs)} outputs instead of {len(case['outputs'])}"
        for index, (actual, spec) in enumerate(zip(outputs, case["outputs"], strict=True)):
            names = spec.get("tensors_per_rank")
            if collective_case and not names and not spec.get("same_on_every_rank") and rank != case["param"]["rank"]:
                continue  # the vectors hold what the row's own rank gets
            expected = file.get_tensor(names[rank] if names else spec["tensor"])
            if text := _difference(actual, expected, spec["threshold"]):
                texts.append(f"{f'rank {rank} ' if collective_case else ''}output {index}: {text}")
    return "; ".join(texts)


@pytest.mark.skipif(not FILES, reason=f"no test vectors in {GOLDEN}; set LLMC_ATB_GOLDEN")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_kernels_meet_the_vendors_thresholds(path: Path) -> None:
    cases = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert cases
    failures: dict[str, str] = {}
    with safe_open(path.with_suffix(".safetensors"), "pt") as file:
        for case in cases:
            for soc in case["soc"] if case["op"].removesuffix("Operation") in OPS else ():
                if text := _case_differences(case, file, CHIPS[soc]):
                    failures[case["source"]] = f"{case['id']} on {CHIPS[soc]} ({case['source']}): {text}"
    listed = {entry["source"] for entry in LISTED if entry["file"] == path.name}
    unlisted = [text for source, text in failures.items() if source not in listed]
    assert not unlisted, "\n".join(unlisted)
    agreeing = sorted(listed & {case["source"] for case in cases} - set(failures))
    assert not agreeing, f"{agreeing} are listed as disagreements but agree; remove them"
