"""How fast GPUs are by their makers' data sheets, and the share of it that is assumed to be reached."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# an assumption, to be replaced by --utilisation, or by a measured rate
UTILISATION = 0.3

# TFLOP/s of dense matrix products, by --dtype: tensor cores in half precision, and fp32 outside of them
PEAKS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "A100": {"bf16": 312.0, "fp16": 312.0, "fp32": 19.5},
        "H100": {"bf16": 989.0, "fp16": 989.0, "fp32": 67.0},
        "H200": {"bf16": 989.0, "fp16": 989.0, "fp32": 67.0},
        "L40S": {"bf16": 362.0, "fp16": 362.0, "fp32": 91.6},
        "RTX4090": {"bf16": 165.0, "fp16": 165.0, "fp32": 82.6},
    }
)


def sustained(gpu: str, dtype: str, utilisation: float) -> float:
    """TFLOP/s that one GPU is assumed to reach.

    Raises ValueError for an unknown GPU or a utilisation that is not in (0, 1].
    """
    if gpu not in PEAKS:
        raise ValueError(f"gpu={gpu!r} must be one of {', '.join(PEAKS)}; or give --tflops")
    if not 0 < utilisation <= 1:
        raise ValueError(f"utilisation={utilisation} must be above 0, and 1 at most")
    return PEAKS[gpu][dtype] * utilisation
