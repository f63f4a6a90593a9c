"""Tables of numbers as Markdown."""

from __future__ import annotations


def markdown(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A Markdown table; the first `left` columns are text, the others numbers."""
    lines = [header, [*["---"] * left, *["--:"] * (len(header) - left)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float, error: float | None = None) -> str:
    """Three digits, with the standard error where there is one."""
    return f"{value:.3f}" + ("" if error is None else f" ± {error:.3f}")


def interval(value: float, bounds: list[float], digits: int = 3) -> str:
    """A number with its bootstrap interval."""
    return f"{value:.{digits}f} [{bounds[0]:.{digits}f}, {bounds[1]:.{digits}f}]"


def folded(title: str, parts: list[str]) -> list[str]:
    """Paragraphs and tables that a reader of the page opens by a click on `title`; none if there are none."""
    return [f"<details>\n<summary>{title}</summary>", *parts, "</details>"] if parts else []
