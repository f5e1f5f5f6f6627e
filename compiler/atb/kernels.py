"""Names under which the kernels of ATB operations stand in a profile of an NPU.

libatb tells the profiler the name of the kernel that it has chosen (hicann/ascend-transformer-boost, ops_runner.cpp:
ReportMsprofInfo gets node.GetName(), which is kernel_->GetName()), never that of the graph or of the node. So a kernel
says what kind of operation it belongs to, and only the order says which one. The words are of the REG_KERNEL_BASE lists
in its src/kernels; older versions end in Tactic what newer ones end in Kernel. Collectives: src/kernels/lcal, and HCCL.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

KERNELS: Mapping[str, re.Pattern[str]] = {
    operation: re.compile(words)
    for operation, words in {
        "Activation": r"SwiGlu|Swish|Gelu|Relu|Sigmoid|Tanh|Log|Mul[A-Z]|Split",
        "AllGather": r"(?i)all_?gather|lccl|lcal|hcom",
        "AllReduce": r"(?i)all_?reduce|lccl|lcal|hcom",
        "Concat": r"Concat",
        "Elewise": r"Add|Sub|Mul|RealDiv|Cast|Neg|Cos|Sin|Tanh|Quant|Logical|Less|Greater|Equal",
        "Gather": r"^Gather",
        "KvCache": r"KVCache",
        "LayerNorm": r"(?i)LayerNorm",
        "Linear": r"(?i)matmul|Transdata|^Add",
        "LinearParallel": r"(?i)matmul|all_?reduce|all_?gather|lccl|lcal|lcoc|hcom|^Add",
        "PagedAttention": r"PagedAttention|PagedMultiLatentAttention",
        "ReshapeAndCache": r"ReshapeAndCache",
        "RmsNorm": r"RmsNorm|^Add",
        "Rope": r"Rope",
        "SelfAttention": r"FlashAttention|KVCache",
        "Slice": r"Slice",
        "Softmax": r"Soft[Mm]ax",
        "Split": r"^Split|Slice",
        "Transdata": r"Transdata",
        "Transpose": r"Transpose",
    }.items()
}
