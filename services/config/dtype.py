"""Whether this machine's processor has instructions for bfloat16. Without them it takes a hundred times as long."""

from pathlib import Path

from sdft.actors.config import Dtype

# oneDNN's kernels need AVX-512 (or what came after it) on x86, the bf16 extension on ARM: flags that Linux lists.
ENOUGH = {"avx512bw", "avx512_bf16", "amx_bf16", "bf16"}


def has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """As the processor's flags say; no where there are none to be read."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return False
    flags = {flag for line in lines if line.lower().startswith(("flags", "features")) for flag in line.split()}
    return bool(flags & ENOUGH)


def native_dtype(device: str) -> Dtype:
    """The narrowest that the device computes at its full speed."""
    return "bfloat16" if device == "cuda" or has_bfloat16() else "float32"
