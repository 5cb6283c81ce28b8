"""Write a figure as PNG, and as PDF where asked, the same bytes for the same figure."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

MARKERS = "os^DvP*X"  # told apart without colours


def style_of(number: int) -> tuple[str, str]:
    """Return colour and marker of the n-th line of a figure."""
    return f"C{number % 10}", MARKERS[number % len(MARKERS)]


def save(figure: Figure, stem: Path, pdf: bool = False) -> list[Path]:
    """Write STEM.png, and STEM.pdf without a date where asked, and close the figure."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_suffix(".png"), *([stem.with_suffix(".pdf")] if pdf else [])]
    for path in paths:
        figure.savefig(path, dpi=110, metadata={"CreationDate": None} if path.suffix == ".pdf" else None)
    plt.close(figure)
    return paths
