"""Detection of bfloat16 instructions on this processor. Without them bfloat16 takes a hundred times as long."""

from pathlib import Path

from sdft.actors.config import Dtype

# CPU flags, as Linux lists them, that oneDNN's kernels need: AVX-512 or a successor on x86, the bf16 extension on ARM.
BFLOAT16_FLAGS = {"avx512bw", "avx512_bf16", "amx_bf16", "bf16"}


def has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether the flags in `cpuinfo` include one of BFLOAT16_FLAGS; False if the file cannot be read."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return False
    flags = {flag for line in lines if line.lower().startswith(("flags", "features")) for flag in line.split()}
    return bool(flags & BFLOAT16_FLAGS)


def native_dtype(device: str) -> Dtype:
    """Return the narrowest dtype that the device computes at full speed."""
    return "bfloat16" if device == "cuda" or has_bfloat16() else "float32"
