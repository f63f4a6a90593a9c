"""Peak of this process's resident memory, counted anew from a moment on."""

from __future__ import annotations

import re
from pathlib import Path

STATUS, REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def forget_peak() -> int:
    """Starts counting anew, so that what loading took and gave back does not hide what follows.

    Returns the resident bytes of this moment. Linux only; `ValueError` elsewhere.
    """
    if not REFERENCES.exists():
        raise ValueError(f"{REFERENCES}: expected Linux, where the peak can be counted anew; found no such file")
    REFERENCES.write_text("5")
    return peak_bytes()


def peak_bytes() -> int:
    """Peak of the resident bytes since `forget_peak`, or since the process began."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise ValueError(f"{STATUS}: expected a line VmHWM, found none")
    return int(found[1]) * 1024
