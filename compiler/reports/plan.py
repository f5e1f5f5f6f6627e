"""How a model fits on a device: bytes, traffic, FLOPs and best-case times of one rank, for every world size.

    facts = plan("llama2-70b", Options(device="atlas-800i-a2"), Workload(batch=8), memory=parse_size("64GiB"))
    facts["sizes"][-1]["largest_batch"]
    print(show_plan(facts))

Everything is read off the compiled graphs of one rank, so padding of uneven sizes and copies of kv heads are in the
numbers. Times are a roofline: no operation is faster than its FLOPs, its bytes of memory and its bytes on the wire
allow, and operations follow one another. What they rest on is in `assumptions`; the rates are in graphs/hardware.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any

from llmc.compiler.atb.collective import DEVICE_COUNT
from llmc.compiler.compiled import Compiled
from llmc.compiler.diagnostics import DiagnosticError, UserError
from llmc.compiler.language.build import load_model
from llmc.compiler.memory import PREFILL_TOKENS, last_true, needed
from llmc.compiler.ops.attention import BLOCK_SIZE
from llmc.compiler.options import Options, check_support
from llmc.compiler.pipeline import compile_model
from llmc.compiler.reports.roofline import step_facts
from llmc.compiler.reports.show import show_bytes
from llmc.compiler.target.device import UNITS, Board, Device, Link, device, held_bytes
from llmc.compiler.terminal import table

MOST_SEQUENCES = 1 << 16  # where the search for the largest batch ends


@dataclass(frozen=True, kw_only=True)
class Workload:
    """`batch` sequences, each a prompt and an answer. None: 1024 tokens, less where the model has fewer positions.
    `prefill_tokens`: most prompt tokens in one step (a longer prompt is a step of its own)."""

    batch: int = 1
    prompt: int | None = None
    answer: int | None = None
    prefill_tokens: int | None = None

    @property
    def context(self) -> int:
        return (self.prompt or 0) + (self.answer or 0)

    @property
    def prompts_a_step(self) -> int:
        return min(self.batch, max(1, (self.prefill_tokens or 1) // (self.prompt or 1)))


def plan(
    graph: str,
    options: Options,
    workload: Workload | None = None,
    *,
    memory: int | None = None,
    reserve: int | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Facts of every world size at which the model compiles (of `options.world_size` alone where it is given), as plain
    data in bytes, seconds and counts. `memory` of one rank: default the device's first board; `reserve`: of it;
    `environment`: the user's, which says how much some libraries hold."""
    model = load_model(graph, options.allow_extends)
    target = device(options.device)
    work = decide(workload or Workload(), int(model.graph.sizes["max_positions"]))
    lines = reserve_lines(target, options, environment)
    budget = budget_of(target, memory, reserve, sum(line["bytes"] for line in lines))
    board = nearest_board(target, memory)
    rows: list[dict[str, Any]] = []
    refused: list[dict[str, Any]] = []
    compiled: Compiled | None = None
    first: DiagnosticError | None = None
    for size in range(1, DEVICE_COUNT + 1) if options.world_size is None else [options.world_size]:
        try:
            compiled = compile_model(graph, replace(options, world_size=size, allow_unsupported=True))
        except DiagnosticError as error:
            first = first or error
            refused.append({"world_size": size, "reason": error.diagnostics[0].message})
            continue
        rows.append(size_facts(compiled, work, budget["usable_bytes"], board, target.link))
    if compiled is None:
        assert first is not None
        raise first
    return {
        "model": model.graph.name,
        "device": target.name,
        "dtype": compiled.dtype,
        "attention": options.attention,
        "logits": options.logits,
        "memory": budget,
        "reserve": with_rest(lines, budget["reserve_bytes"] or 0),
        "workload": {
            **asdict(work),
            "context": work.context,
            "prefill_step_tokens": work.prompts_a_step * (work.prompt or 0),
        },
        "rates": {
            "flops_per_second": board and board.flops,
            "memory_bytes_per_second": board and board.bandwidth,
            "link_bytes_per_second": target.link and target.link.bandwidth,
            "link_to_each_rank": target.link and target.link.each_peer,
        },
        "assumptions": list(assumptions(board, target.link, options.attention)),
        "sizes": rows,
        "refused": refused,
    }


def decide(work: Workload, max_positions: int) -> Workload:
    """The workload with every number; UserError for what the model or arithmetic does not allow."""
    for name, value in asdict(work).items():
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected a whole number of at least 1")
    answer = work.answer
    prompt = work.prompt or max(1, min(1024, max_positions - (answer or max_positions // 2)))
    answer = answer or max(1, min(1024, max_positions - prompt))
    if prompt + answer > max_positions:
        raise UserError(
            f"a prompt of {prompt} tokens and an answer of {answer} are {prompt + answer} positions; "
            f"the model has {max_positions}",
            hint="a smaller --prompt or --answer",
        )
    tokens = work.prefill_tokens or max(PREFILL_TOKENS, prompt + answer)
    return replace(work, prompt=prompt, answer=answer, prefill_tokens=tokens)


def reserve_lines(target: Device, options: Options, environment: Mapping[str, str]) -> list[dict[str, Any]]:
    """What is known of a rank's reserve; buffers of collectives unless it is alone."""
    backend = options.backend or next(iter(target.backends), "")
    alone = options.world_size == 1
    found = held_bytes(target, options.attention, "" if alone else backend, environment)
    held = {line.name: line for line in target.held}
    return [
        {"name": name, "bytes": size, "several_ranks": bool(held[name].backend), "source": held[name].source}
        for name, size in found.items()
    ]


def with_rest(lines: list[dict[str, Any]], reserve: int) -> list[dict[str, Any]]:
    """The lines, and a last one for what they leave of the reserve."""
    rest = max(0, reserve - sum(line["bytes"] for line in lines))
    if not rest:
        return lines
    return [*lines, {"name": "the rest", "bytes": rest, "several_ranks": False, "source": ""}]


def budget_of(target: Device, memory: int | None, reserve: int | None, held: int = 0) -> dict[str, int | None]:
    """Bytes that a rank may use. Nobody says how much memory there is, and the device does not know: None. `held`: the
    sum of the reserve's lines, which it is never less than, unless the user says so."""
    kept = max(target.reserve, held) if reserve is None else reserve
    there = memory if memory is not None else target.boards[0].memory if target.boards else None
    if there is None:
        return {"memory_bytes": None, "reserve_bytes": kept, "usable_bytes": None}
    usable = there - kept
    if memory is None and reserve is None and target.ceiling is not None:
        usable = min(usable, target.ceiling)
    if usable <= 0:
        raise UserError(
            f"of {gib(there)} of memory {gib(kept)} are reserved: nothing is left", hint="--memory, --reserve"
        )
    return {"memory_bytes": there, "reserve_bytes": there - usable, "usable_bytes": usable}


def nearest_board(target: Device, memory: int | None) -> Board | None:
    """The board whose rates are meant by a size of memory."""
    if memory is None:
        return target.boards[0] if target.boards else None
    return min(target.boards, key=lambda board: abs(board.memory - memory), default=None)


def size_facts(
    compiled: Compiled, work: Workload, usable: int | None, board: Board | None, link: Link | None
) -> dict[str, Any]:
    """One row: the rank's memory, what fits, and what the steps cost."""
    memory = compiled.memory
    size, positions = compiled.options.world_size or 1, int(compiled.graph.sizes["max_positions"])

    def bytes_for(one: Workload) -> int:
        return memory_needed(memory, one, positions)["total"]

    parts = memory_needed(memory, work, positions)
    return {
        "world_size": size,
        "offered": is_offered(compiled),
        "cards": size / compiled.device.ranks_per_card,
        "backend": compiled.options.backend,
        "weight_bytes": memory["weight_bytes"],
        "cache_bytes_per_token": memory["cache_bytes_per_token"],
        "needed_bytes": parts,
        "activation_bytes_per_token": memory["activation_bytes_per_token"],
        "fits": None if usable is None else parts["total"] <= usable,
        **(largest(bytes_for, work, usable, positions) if usable is not None else {}),
        "prefill": prefill_facts(compiled, work, board, link),
        "decode": decode_facts(compiled, work, board, link),
    }


def is_offered(compiled: Compiled) -> bool:
    try:
        check_support(compiled.model, compiled.options, compiled.dtype)
    except UserError:
        return False
    return True


def memory_needed(memory: Mapping[str, Any], work: Workload, positions: int) -> dict[str, int]:
    tokens = work.prompts_a_step * (work.prompt or 0)
    return needed(memory, tokens=tokens, batch=work.batch, context=work.context, positions=positions)


def largest(bytes_for: Callable[[Workload], int], work: Workload, usable: int, positions: int) -> dict[str, int]:
    """The largest batch at this context, the longest context at this batch (0: not even one, not even the prompt)."""

    def fits(**changes: int) -> bool:
        return bytes_for(replace(work, **changes)) <= usable

    prompt = work.prompt or 0
    return {
        "largest_batch": last_true(lambda batch: fits(batch=batch), 1, MOST_SEQUENCES),
        "largest_context": last_true(lambda context: fits(answer=context - prompt), prompt + 1, positions),
    }


# ---- what steps cost


def prefill_facts(compiled: Compiled, work: Workload, board: Board | None, link: Link | None) -> dict[str, Any]:
    """All prompts of the batch, in as many steps as they need."""
    prompt, each = work.prompt or 0, work.prompts_a_step
    full, rest = divmod(work.batch, each)
    steps = [(full, each), *([(1, rest)] if rest else [])]
    found = [(n, step_facts(compiled, "prefill", count, prompt, board, link)) for n, count in steps]
    facts = added(found)
    return {"steps": sum(n for n, _ in found), **facts, **per_token(facts, work.batch * prompt)}


def decode_facts(compiled: Compiled, work: Workload, board: Board | None, link: Link | None) -> dict[str, Any]:
    """One step of the whole batch, when every sequence has its last token to read: the slowest."""
    facts = step_facts(compiled, "decode", work.batch, work.context, board, link)
    rate = work.batch / facts["seconds"] if facts["seconds"] else None
    return {**facts, **per_token(facts, work.batch), "tokens_per_second": rate}


def per_token(facts: Mapping[str, Any], tokens: int) -> dict[str, float]:
    return {
        "wire_bytes_per_token": facts["wire_bytes"] / tokens,
        "wire_bytes_per_token_and_layer": facts["wire_bytes_per_layer"] / tokens,
    }


def added(steps: Sequence[tuple[int, Mapping[str, Any]]]) -> dict[str, Any]:
    """The sum of steps, each `n` times; what is not known stays so."""
    keys = [key for key in steps[0][1] if key != "bound_seconds"]
    sums = {key: None if steps[0][1][key] is None else sum(n * facts[key] for n, facts in steps) for key in keys}
    bounds = steps[0][1]["bound_seconds"]
    return {**sums, "bound_seconds": bounds and {k: sum(n * f["bound_seconds"][k] for n, f in steps) for k in bounds}}


def assumptions(board: Board | None, link: Link | None, attention: str) -> Iterator[str]:
    """What the numbers rest on, in words."""
    yield "a workspace name keeps its place from the first node that writes it to the last that uses it in a segment"
    yield (
        "the rest of the reserve stands for code, fragmentation and holes in workspaces; its lines were read or seen, "
        "and nothing was measured on an NPU"
    )
    if attention == "paged":
        yield f"each sequence fills its last cache block of {BLOCK_SIZE} tokens"
    yield "an all-reduce sends 2 (W - 1) / W of the tensor from each rank, an all-gather the share to each other rank"
    if board is None:
        yield "no times: nothing is known of this device's speed"
        return
    yield (
        f"times are the best that {board.flops / 1e12:.0f} TFLOP/s and {board.bandwidth / 1e9:.0f} GB/s of memory allow"
        + (f", and links of {link.bandwidth / 1e9:.0f} GB/s {_peers(link)}" if link else "")
        + "; kernels reach a part of it"
    )
    yield "operations follow one another; only LinearParallel sends while it computes; no launch or link latency"
    yield "attention skips what the causal mask hides; decode is the step at the end of the context"


def _peers(link: Link) -> str:
    return "to each other rank" if link.each_peer else "to all other ranks together"


# ---- as text


def show_plan(facts: Mapping[str, Any]) -> str:
    """Tables of memory and of time, the assumptions, and one closing line."""
    memory, work = facts["memory"], facts["workload"]
    budget = "not known; --memory says it"
    if memory["usable_bytes"] is not None:
        there, kept, usable = (gib(memory[f"{what}_bytes"]) for what in ("memory", "reserve", "usable"))
        budget = f"{there}, {kept} reserved, {usable} usable"
    return "\n".join(
        [
            f"{facts['model']} on {facts['device']}, {facts['dtype']}, {facts['attention']} attention"
            f"{', logits of every token' if facts['logits'] == 'all' else ''}",
            f"memory of a rank: {budget}",
            *([reserve_line(facts["reserve"], memory["reserve_bytes"])] if facts["reserve"] else []),
            f"workload: batch {work['batch']}, prompt {work['prompt']}, answer {work['answer']} tokens: context "
            f"{work['context']}; prefill steps of up to {work['prefill_step_tokens']} tokens",
            *_memory_table(facts),
            *_work_table(facts),
            *(f"world size {entry['world_size']}: {entry['reason']}" for entry in facts["refused"]),
            "",
            "assumptions:",
            *(f"  - {line}" for line in facts["assumptions"]),
            closing_line(facts),
        ]
    )


def reserve_line(lines: Sequence[Mapping[str, Any]], reserve: int) -> str:
    """`reserved: kernel scratch 188.00 MiB, ..., lccl buffers 200.00 MiB (several ranks), the rest 2.53 GiB`"""
    parts = [
        f"{line['name']} {show_bytes(line['bytes'])}{' (several ranks)' * line['several_ranks']}" for line in lines
    ]
    known = sum(line["bytes"] for line in lines)
    more = f", which is {show_bytes(known - reserve)} more than that" if known > reserve else ""
    return f"reserved: {', '.join(parts)}{more}"


def _memory_table(facts: Mapping[str, Any]) -> Iterator[str]:
    unit, sizes = table_unit(facts), facts["sizes"]
    cards = any(row["cards"] != row["world_size"] for row in sizes)
    step = ("constants", "step_tensors", "workspace")
    yield from ["", f"one rank's memory in {unit} (* offered by the model)"]
    yield from table(
        ["tp", *(["cards"] if cards else []), "weights", "cache", "step", "needed", "fits", "a token's\ncache, KiB",
         "largest\nbatch", "largest\ncontext"],
        [
            [
                _size(row),
                *([f"{row['cards']:g}"] if cards else []),
                *(
                    f"{size / UNITS[unit.lower()]:.2f}"
                    for size in (
                        row["weight_bytes"],
                        row["needed_bytes"]["cache"],
                        sum(row["needed_bytes"][key] for key in step),
                        row["needed_bytes"]["total"],
                    )
                ),
                {None: "?", True: "yes", False: "no"}[row["fits"]],
                f"{row['cache_bytes_per_token'] / 2**10:.1f}",
                *(str(row.get(key) or "-") for key in ("largest_batch", "largest_context")),
            ]
            for row in sizes
        ],
    )  # fmt: skip


def _work_table(facts: Mapping[str, Any]) -> Iterator[str]:
    yield from ["", "one rank's work"]
    yield from table(
        ["tp", "prefill\nTFLOP", "time", "bound\nby", "decode\nGFLOP", "time", "bound\nby", "tokens/s",
         "a token\nsends, KiB", "in a\nlayer"],
        [
            [
                _size(row),
                _short(row["prefill"]["flops"] / 1e12),
                *_time(row["prefill"]),
                _short(row["decode"]["flops"] / 1e9),
                *_time(row["decode"]),
                f"{row['decode']['tokens_per_second']:.0f}" if row["decode"]["tokens_per_second"] else "?",
                _short(row["decode"]["wire_bytes_per_token"] / 2**10),
                _short(row["decode"]["wire_bytes_per_token_and_layer"] / 2**10),
            ]
            for row in facts["sizes"]
        ],
    )  # fmt: skip


def _size(row: Mapping[str, Any]) -> str:
    return f"{row['world_size']}{'*' if row['offered'] else ' '}"


def _short(number: float) -> str:
    """`1.40`, `285.9`, `14676`"""
    return f"{number:.{2 if number < 100 else 1 if number < 1000 else 0}f}"


def _time(facts: Mapping[str, Any]) -> tuple[str, str]:
    if facts["seconds"] is None:
        return "?", "?"
    bounds = facts["bound_seconds"]
    seconds = facts["seconds"]
    return f"{_short(seconds)} s" if seconds >= 1 else f"{_short(seconds * 1e3)} ms", max(
        bounds, key=lambda kind: bounds[kind]
    )


def closing_line(facts: Mapping[str, Any]) -> str:
    """`llama2-70b: batch 1 x context 2048 fits at --tp 5, 6, 7, 8 (offered: 8)`"""
    work, rows = facts["workload"], facts["sizes"]
    what = f"{facts['model']}: batch {work['batch']} x context {work['context']}"
    offered = ", ".join(str(row["world_size"]) for row in rows if row["offered"]) or "none"
    if facts["memory"]["usable_bytes"] is None:
        least = min(rows, key=lambda row: row["needed_bytes"]["total"])
        size = gib(least["needed_bytes"]["total"], table_unit(facts))
        return f"{what} needs {size} a rank at --tp {least['world_size']}"
    fits = ", ".join(str(row["world_size"]) for row in rows if row["fits"])
    planned = ", ".join(str(row["world_size"]) for row in rows)
    verdict = f"fits at --tp {fits}" if fits else f"does not fit at --tp {planned}"
    return f"{what} {verdict} (offered: {offered})"


def gib(size: int, unit: str = "GiB") -> str:
    return f"{size / UNITS[unit.lower()]:.2f} {unit}"


def table_unit(facts: Mapping[str, Any]) -> str:
    """One for all rows, so that they compare at a glance."""
    most = max(row["needed_bytes"]["total"] for row in facts["sizes"])
    return "GiB" if most >= 1 << 30 else "MiB"
