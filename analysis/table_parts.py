"""What the scripts that make tables share: the paper's figures, how a mean is written, and the three formats."""

from __future__ import annotations

import re
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
    name: str,
    title: str,
    note: str,
    table: pd.DataFrame,
    folder: Path,
    latex: bool = False,
    numbers: pd.DataFrame | None = None,
    below: str = "",
) -> None:
    """Write one table as Markdown and CSV, as LaTeX where asked, print it and say where it is.

    numbers: what the CSV holds, where that is more than the table shows; else `as_numbers` of the table.
    below: what it shows, under it in Markdown.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = f"## {title}\n\n{note}\n\n{table.to_markdown(index=False, disable_numparse=True)}\n"
    text += f"\n{below}\n" if below else ""
    (folder / f"{name}.md").write_text(text)
    (as_numbers(table) if numbers is None else numbers).to_csv(folder / f"{name}.csv", index=False)
    if latex:
        style = table.astype(str).style.format(escape="latex").format_index(escape="latex", axis="columns")
        caption = title.replace("_", r"\_")
        (folder / f"{name}.tex").write_text(style.hide(axis="index").to_latex(hrules=True, caption=caption))
    print(text)
    print(f"wrote {folder / name}.md, .csv{', .tex' if latex else ''}\n")


def emit_runs(name: str, runs: pd.DataFrame, folder: Path) -> None:
    """Write the list of a study's runs as CSV, print it with the keys of their records and folders, and say where."""
    folder.mkdir(parents=True, exist_ok=True)
    runs.to_csv(folder / f"{name}.csv", index=False)
    print(f"{runs.to_markdown(index=False, disable_numparse=True)}\n\nwrote {folder / name}.csv\n")


NUMBER = r"[+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?"
# how cells write more than one number: pattern, and what the columns of a CSV are called behind the column's own name
WRITTEN = (
    (re.compile(rf"({NUMBER})"), ("",)),
    (re.compile(rf"({NUMBER})(?: ± ({NUMBER}))? \(n=(\d+)\)(.*)"), ("", " std", " n", " of")),
    (re.compile(rf"({NUMBER}) \(({NUMBER}) to ({NUMBER})\)"), ("", " low", " high")),
    (re.compile(rf"\(?({NUMBER}) to ({NUMBER})\)?"), (" low", " high")),
)
MISSING = ("", "-")


def as_numbers(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table whose numbers are written as numbers alone: no thousands marks, one a cell.

    A column of "61.2 ± 0.3 (n=2)" becomes it, "std" and "n"; "1.2 (1.1 to 1.4)" and "1.1 to 1.4" get "low" and "high".
    Columns that hold anything else stay as they are.
    """
    columns: dict[str, list] = {}
    for name, column in table.items():
        cells = [None if cell is None or cell != cell or str(cell) in MISSING else str(cell) for cell in column]
        for pattern, ends in WRITTEN:
            found = [None if cell is None else pattern.fullmatch(cell) for cell in cells]
            if any(found) and all(match or cell is None for match, cell in zip(found, cells, strict=True)):
                for number, end in enumerate(ends, 1):
                    parts = [match[number] if match else None for match in found]
                    if end in ("", " n") or any(parts):  # nothing but empty cells: no such column
                        columns[f"{name}{end}"] = [_number(part) for part in parts]
                break
        else:
            columns[str(name)] = list(column)
    return pd.DataFrame(columns, dtype=object)


def _number(text: str | None) -> str:
    """Write a number without thousands marks and plus sign; what is none stays as it is."""
    if text is None or not re.fullmatch(NUMBER, text):
        return (text or "").lstrip(" ,")
    return text.replace(",", "").removeprefix("+")
