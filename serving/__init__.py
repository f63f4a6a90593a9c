"""Attribution as a service: bundles, the batch command, credit reports, the HTTP API and the page."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serving.attributor import Attributor

__all__ = ["Attributor"]


def __getattr__(name: str) -> Any:
    """`Attributor`, imported when asked for: `python -m serving.bundle` would find itself imported already."""
    if name != "Attributor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from serving.attributor import Attributor

    return Attributor
