"""Set the records beside the paper's figures: Tables 1 to 6, and one table for every other study.

    python analysis/make_tables.py                  # the paper's -> results/tables/, a study's -> results/<study>/
    python analysis/make_tables.py --study demo     # one study

Every table is written as Markdown and CSV (the paper's as LaTeX too, a study's with --latex) and printed as Markdown.
A study is the folder of its records; tables of it that no longer have records go away. Figures of ours come from
records alone; 'difference' is filled only where a record was made by the paper's full recipe. Parameters and MACs are
counted here.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import leftovers
import pandas as pd
import paper_tables.classification
import paper_tables.older
import paper_tables.segmentation
import study_tables.classification
import study_tables.segmentation
from options import SWEEPS, Parser, no_records
from significance import analyse, contrasts_note, contrasts_numbers, contrasts_table, pairs_of
from study_tables.reading import reading
from study_tables.settings import runs_table, settings, settings_table
from table_parts import emit, emit_runs

from repmlp.runs.contrasts import named_by
from repmlp.runs.key import by_setting
from repmlp.runs.record import MEASURED, load_records


def write_paper(records: pd.DataFrame, masks: pd.DataFrame, results: Path, folder: Path) -> None:
    """Write the tables of both papers; Table 6 is left out, with a word, where what counts its networks is missing.

    records: of classification. masks: of segmentation.
    """
    found = paper_tables.classification.tables(records, results)
    try:
        found |= paper_tables.segmentation.tables(masks)
    except ModuleNotFoundError as error:
        if error.name != "segmentation_models_pytorch":  # it is there and broken
            raise
        print(f"Table 6 is left out: {error}", file=sys.stderr)
    found |= paper_tables.older.tables(results)
    for name, (title, note, table) in found.items():
        emit(name, title, note, table, folder, latex=True)


def write_study(study: str, records: pd.DataFrame, masks: pd.DataFrame, options: argparse.Namespace) -> None:
    """Write the tables of one study. records: its runs of classification. masks: of segmentation."""
    folder = options.out or options.results / study

    made: set[str] = set()

    def write(
        name: str, words: str, note: str, table: pd.DataFrame, numbers: pd.DataFrame | None = None, below: str = ""
    ) -> None:
        emit(name, f"Study {study}{words}", note, table, folder, options.latex, numbers, below)
        made.add(name)

    def stem(name: str) -> str:
        return f"{name}_{study}" if options.out else name

    name = f"study_{study}" if options.out else "table"
    for suffix, words, runs in settings(records):
        of_cells = study_tables.classification
        write(name + suffix, words, of_cells.study_note(runs), of_cells.study_table(runs), below=reading(runs))
    if len(records):
        scale = study_tables.classification.scale_line(records)
        if len(by_setting(records)) > 1:
            note = f"{scale} Settings that differ, one row a configuration; last epoch."
            write(stem("settings"), ": settings", note, settings_table(records))
        named = named_by(set(records["sweep"]), SWEEPS)
        pairs = pairs_of(records, named)
        for contrast in named:
            if contrast not in [pair.contrast for pair in pairs]:
                print(f"study {study}: no two runs for the contrast {contrast} yet", file=sys.stderr)
        tests = analyse(records, pairs)
        if tests:
            note = f"{scale} {contrasts_note(tests)}"
            write(stem("contrasts"), ": contrasts", note, contrasts_table(tests), contrasts_numbers(tests))
    for suffix, words, runs in settings(masks):
        beside = "_segmentation" if len(records) else ""  # the other kind has its table in the same folder
        of_cells = study_tables.segmentation
        note, table = of_cells.study_note(runs), of_cells.study_table(runs)
        write(name + beside + suffix, f": segmentation{words}", note, table)
    emit_runs(stem("runs"), runs_table(pd.concat([records, masks], ignore_index=True)), folder)
    if options.out is None and leftovers.whole(folder, len(records) + len(masks)):
        leftovers.remove(folder, [leftovers.TABLES], {*made, "runs"})


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__, "optional", ("tables",))
    parser.add_argument(
        "--out", type=Path, help="folder for all tables (default: RESULTS/tables, a study's in its own)"
    )
    options = parser.parse_args(argv)
    # in one line, so that Python's filter of warnings shows once what both reads say of a damaged record
    records, masks = (load_records(options.results, options.study, task) for task in MEASURED)
    if options.study and not len(records) and not len(masks):
        no_records(options.study, options.results)
    if not options.study:
        write_paper(records, masks, options.results, options.out or options.results / "tables")
    by_study = [dict(list(found.groupby("study"))) if len(found) else {} for found in (records, masks)]
    for study in sorted({*by_study[0], *by_study[1]}):
        write_study(study, *(found.get(study, pd.DataFrame()) for found in by_study), options)
    if not options.study and not options.out:
        for folder in sorted(options.results.glob("*/")):
            if leftovers.whole(folder, 0):
                leftovers.remove(folder, (leftovers.TABLES, leftovers.CURVES, leftovers.GAINS, leftovers.STEPS))


if __name__ == "__main__":
    main()
