"""What the scripts that make tables share: the paper's figures, how a mean is written, and the three formats."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd


def read_paper() -> pd.DataFrame:
    """Read the printed figures; kernels and share_sets as tuples, global_perceptron as True, False or None.

    top1_pct and miou_pct are NaN in rows of tables that have none.
    """
    paper = pd.read_csv(Path(__file__).parent / "paper_tables/paper.csv", dtype=str, keep_default_na=False)
    for column in ("kernels", "share_sets"):
        paper[column] = [tuple(int(n) for n in text.split()) for text in paper[column]]
    paper["global_perceptron"] = [{"yes": True, "no": False, "": None}[text] for text in paper["global_perceptron"]]
    for column in ("top1_pct", "miou_pct"):
        paper[column] = pd.to_numeric(paper[column])
    return paper


def mean_std(values: pd.Series) -> str:
    """Write mean ± standard deviation, and n; no deviation for one value."""
    if len(values) == 0:
        return ""
    deviation = f" ± {values.std():.2f}" if len(values) > 1 else ""
    return f"{values.mean():.2f}{deviation} (n={len(values)})"


def listed(numbers: Iterable[float]) -> str:
    """Write the different ones of some numbers: "8", or "8, 16"."""
    return ", ".join(f"{n:,}" for n in sorted(set(numbers)))


def emit(
    name: str, title: str, note: str, table: pd.DataFrame, folder: Path, latex: bool = False, below: str = ""
) -> None:
    """Write one table as Markdown and CSV, as LaTeX where asked, print it and say where it is.

    note: stands above it. below: what it shows, in Markdown alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = f"## {title}\n\n{note}\n\n{table.to_markdown(index=False, disable_numparse=True)}\n"
    text += f"\n{below}\n" if below else ""
    (folder / f"{name}.md").write_text(text)
    table.to_csv(folder / f"{name}.csv", index=False)
    if latex:
        style = table.astype(str).style.format(escape="latex").format_index(escape="latex", axis="columns")
        caption = title.replace("_", r"\_")
        (folder / f"{name}.tex").write_text(style.hide(axis="index").to_latex(hrules=True, caption=caption))
    print(text)
    print(f"wrote {folder / name}.md, .csv{', .tex' if latex else ''}\n")
