"""What the vendor's library refuses in the second collection, the table refuses at the same stage with the same code.

refusals.yaml says how each refused operation differs from one that the library accepted, which is checked first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from vendor_cases import DTYPES, LAYERS2

from llmc.compiler.atb import OPS, AtbError
from llmc.compiler.atb.core import Desc
from llmc.compiler.atb.paged_attention import check_lengths, inputs
from llmc.compiler.atb.self_attention import PREFIX_ENCODER, check_prefix_lengths

PATH = LAYERS2 / "refusals.json"
REFUSALS = json.loads(PATH.read_text(encoding="utf-8"))["refusals"] if PATH.exists() else []
MODELLED = [entry for entry in REFUSALS if entry["node"].partition(":")[2] in OPS]
CHANGES: list[dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "refusals.yaml").read_text(encoding="utf-8"))
CHIPS = {"910B": "Ascend910B", "310P": "Ascend310P"}


def _descs(ins: list[list[Any]], changes: Mapping[str, Any]) -> list[Desc]:
    source, target = changes.get("every_dtype", ("", ""))
    found = []
    for i, (dtype, layout, shape) in enumerate(ins):
        dtype = changes.get("dtypes", {}).get(i, target if dtype == source else DTYPES.get(dtype, dtype))
        layout = changes.get("formats", {}).get(i, layout)
        found.append(Desc(dtype=dtype, format=layout, shape=tuple(changes.get("shapes", {}).get(i, shape))))
    return [desc for i, desc in enumerate(found) if i not in changes.get("drop", ())]


def _check(
    name: str, values: Mapping[str, Any], ins: list[Desc], chip: str, new: list[int], context: list[int]
) -> None:
    """Create, InferShape and Setup, with the lengths where attention is told them."""
    op = OPS[name]
    param = op.param(values)
    op.create(param, chip)
    op.setup(param, ins, op.infer(param, ins, chip), chip)
    try:
        if name == "PagedAttention" and param.calcType == 1:
            check_lengths(param, dict(zip(inputs(param), ins, strict=True)), context, new, chip)
        if name == "SelfAttention" and param.calcType == PREFIX_ENCODER:
            check_prefix_lengths(new, context, chip)
    except AtbError as error:
        raise error.at(stage="setup") from None


@pytest.mark.skipif(not REFUSALS, reason=f"no {PATH}; set LLMC_ATB_LAYERS2")
@pytest.mark.parametrize("theirs", MODELLED, ids=lambda entry: entry["combination"])
def test_a_refused_operation_is_refused_at_the_same_stage_with_the_same_code(theirs: dict[str, Any]) -> None:
    name, chip = theirs["node"].partition(":")[2], CHIPS[theirs["chip"]]
    entry = next(entry for entry in CHANGES if re.search(entry["match"], theirs["combination"]))
    new, context = [], []
    if "like" in entry:
        graph = json.loads((LAYERS2 / f"{entry['like']}.json").read_text(encoding="utf-8"))
        node, dims = graph["nodes"][entry["at"]], graph["dims"]
        new, context = (dims.get(key, []) for key in ("new_tokens", "context"))
        assert node["op"] == name
        _check(name, node["param"], _descs(node["in_desc"], {}), CHIPS[graph["chip"]], new, context)
        ins, values = node["in_desc"], {**node["param"], **entry.get("param", {})}
    else:
        assert entry["op"] == name
        ins, values = entry["ins"], entry["param"]
    new, context = entry.get("new", new), entry.get("context", context)
    with pytest.raises(AtbError) as refused:
        _check(name, values, _descs(ins, entry), entry.get("chip", chip), new, context)
    assert (refused.value.stage, refused.value.code) == (theirs["stage"], theirs["code"])


@pytest.mark.skipif(not REFUSALS, reason=f"no {PATH}; set LLMC_ATB_LAYERS2")
def test_every_entry_is_a_refusal_of_the_library() -> None:
    names = [entry["combination"] for entry in MODELLED]
    for entry in CHANGES:
        assert any(re.search(entry["match"], name) for name in names), entry["match"]
