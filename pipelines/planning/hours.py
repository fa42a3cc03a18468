"""The time of a run: its FLOPs over the rates of GPUs."""

from __future__ import annotations

TFLOP = 1e12
CHIPS = {  # dense bfloat16 matrix peak with float32 sums, TFLOP/s; the vendors' data sheets
    "A100": (312.0, "NVIDIA A100 data sheet"),
    "H100 SXM": (989.4, "NVIDIA H100 data sheet, half of the figure with sparsity"),
    "H200": (989.5, "NVIDIA H200 data sheet, half of the figure with sparsity"),
    "B200": (2250.0, "NVIDIA DGX B200 data sheet, an eighth of the system's, without sparsity"),
    "MI300X": (1307.4, "AMD Instinct MI300X data sheet"),
    "L40S": (362.05, "NVIDIA L40S data sheet"),
    "RTX 3090": (71.0, "NVIDIA GA102 white paper"),
    "RTX 4090": (165.2, "NVIDIA Ada white paper"),
    "RTX 5090": (209.5, "NVIDIA RTX Blackwell white paper"),
}
