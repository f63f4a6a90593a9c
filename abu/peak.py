"""Peak of this process's resident memory, counted anew from a moment on."""

from __future__ import annotations

import re
import resource
from pathlib import Path

STATUS, REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def forget_peak() -> int:
    """Starts counting anew, so that what loading took and gave back does not hide what follows.

    Returns the peak then, on Linux the resident bytes of this moment; elsewhere nothing is forgotten.
    """
    if REFERENCES.exists():
        REFERENCES.write_text("5")
    return peak_bytes()


def peak_bytes() -> int:
    """Peak of the resident bytes since `forget_peak`, or since the process began."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE) if STATUS.exists() else None
    # macOS counts bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if found is None else int(found[1]) * 1024
