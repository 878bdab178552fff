"""Peak memory so far, without importing torch."""

import sys
from pathlib import Path


def device_memory() -> int:
    """The peak memory of the first GPU so far, in bytes; 0 if none is used."""
    torch = sys.modules.get("torch")
    used = torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized()
    return int(torch.cuda.max_memory_allocated()) if torch is not None and used else 0


def peak_memory() -> int:
    """The peak memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would include the peak of the parent process
        lines = status.read_text(encoding="utf-8").splitlines()
        peaks = [line.split() for line in lines if line.startswith("VmHWM:")]
        if peaks:
            return int(peaks[0][1]) * 1024
    import psutil

    used = psutil.Process().memory_info()
    if hasattr(used, "peak_wset"):  # Windows
        return int(used.peak_wset)
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
