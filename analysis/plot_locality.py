"""Draw accuracy over a number for locality, for every run of this project, and say how well the one ranks the other.

    python analysis/plot_locality.py                          # -> results/locality.png, locality.md and .csv
    python analysis/plot_locality.py kernels_cifar100 sharing_cifar100

The number is `repmlp.locality.locality_index`, the mean over a network's spatial layers: 0 for a flat kernel, 1 where
all weight is on the output point itself. Once for the merged kernel, once for the FC alone. Runs are compared with runs
of the same network but for its branches, the same data and the same recipe only.
"""

from __future__ import annotations

import sys

import pandas as pd
from options import Parser
from plots.locality import NOTE, as_shown, correlations, draw, with_index
from records import layers_of
from table_parts import emit

from repmlp.runs.record import load_records


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__, None, ("tables", "figures"))
    parser.add_argument("studies", nargs="*", metavar="STUDY", help="these studies alone, folders under results/")
    parser.add_argument("--study", action="append", help="the same by name; may be given several times")
    options = parser.parse_args(argv)
    options.study = [*options.studies, *(options.study or [])]
    found = {study: load_records(options.results, study) for study in options.study or [None]}
    for study, of_study in found.items():
        if not len(of_study) or not layers_of(of_study).map(len).any():
            named = f"study {study!r}" if study else "any study"
            sys.exit(f"error: no records with spatial layers of {named} in {options.results}")
    records = with_index(pd.concat(found.values(), ignore_index=True))
    table = correlations(records)
    emit("locality", "Locality and accuracy", NOTE, as_shown(table), options.results, options.latex, table.round(6))
    for path in draw(records, table, options.results / "locality", options.pdf):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
