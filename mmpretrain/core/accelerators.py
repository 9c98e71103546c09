"""What GPUs can do at best, by the names their drivers give them; the one table of it. Never imports torch.

Enter: a device's name, a precision. Leave: FLOP/s of matrix products without sparsity, as the maker's data sheets tell
them; None for a device that is not in the table, since a guess would make every share of it a lie.
"""

import re
from dataclasses import dataclass
from typing import Literal

Precision = Literal["fp32", "bf16", "fp16"]
TERA = 1e12


@dataclass(frozen=True)
class Accelerator:
    """One kind of GPU, in TFLOP/s."""

    pattern: str
    """Of the driver's name, as a regular expression."""
    half: float
    """bf16 and fp16 products summed in fp32."""
    single: float
    """fp32 products without TF32."""
    has_bf16: bool = True


ACCELERATORS = (
    Accelerator(r"\bGB200\b|\bGB300\b", 2500.0, 80.0),
    Accelerator(r"\bB200\b|\bB300\b", 2250.0, 75.0),
    Accelerator(r"\bGH200\b|\bH200\b(?! NVL)", 989.4, 66.9),
    Accelerator(r"\bH200 NVL\b", 835.5, 60.0),
    Accelerator(r"\bH100 PCIe\b", 756.0, 51.2),
    Accelerator(r"\bH100 NVL\b", 835.5, 60.0),
    Accelerator(r"\bH100\b|\bH800\b", 989.4, 66.9),
    Accelerator(r"\bA100\b|\bA800\b", 312.0, 19.5),
    Accelerator(r"\bA40\b", 149.7, 37.4),
    Accelerator(r"\bA30\b", 165.0, 10.3),
    Accelerator(r"\bA10\b", 125.0, 31.2),
    Accelerator(r"\bA10G\b", 70.0, 35.0),
    Accelerator(r"\bL40S\b", 362.0, 91.6),
    Accelerator(r"\bL40\b", 181.0, 90.5),
    Accelerator(r"\bL4\b", 121.0, 30.3),
    Accelerator(r"RTX 6000 Ada", 364.2, 91.1),
    Accelerator(r"RTX 4090\b", 165.2, 82.6),
    Accelerator(r"RTX 3090\b", 71.0, 35.6),
    Accelerator(r"\bV100\b", 125.0, 15.7, has_bf16=False),
    Accelerator(r"\bT4\b", 65.0, 8.1, has_bf16=False),
    Accelerator(r"\bMI300X\b|\bMI325X\b", 1307.4, 163.4),
    Accelerator(r"\bMI250X\b", 383.0, 47.9),
)
"""More particular names first."""


def peak_flops(name: str, precision: Precision) -> float | None:
    """FLOP/s of one device; None where the table does not know it, or it has no units for that precision."""
    found = next((one for one in ACCELERATORS if re.search(one.pattern, name)), None)
    if found is None or (precision == "bf16" and not found.has_bf16):
        return None
    return TERA * (found.single if precision == "fp32" else found.half)
