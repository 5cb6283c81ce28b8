"""Make every table and figure that comes out of records alone, of all studies.

    python analysis/make_all.py                     # -> results/, where they lie
    python analysis/make_all.py --results FOLDER    # of records elsewhere

Of kernels, those of the networks in results/weights/. What needs other weights (plot_kernels.py) or images
(experiments/borders.py's pictures) is not among them.
"""

from __future__ import annotations

import leftovers
import make_benchmark
import make_tables
import plot_borders
import plot_curves
import plot_kernels
import plot_locality
import plot_study
from options import Parser

from repmlp.checkpoints import open_checkpoint
from repmlp.runs.key import cell_key
from repmlp.runs.record import MEASURED, load_records


def main(argv: list[str] | None = None) -> None:
    options = Parser(__doc__, None, ("tables", "figures")).parse_args(argv)
    where = ["--results", str(options.results)]
    latex, pdf = ["--latex"] * options.latex, ["--pdf"] * options.pdf
    make_tables.main([*where, *latex])
    if any(options.results.glob("benchmark/measured/*.json")):
        make_benchmark.main([*where, *latex, *pdf])
    for study in sorted(path.parent.name for path in options.results.glob("*/records")):
        by_task = {task: load_records(options.results, study, task) for task in MEASURED}
        if any(len(records) for records in by_task.values()):
            plot_curves.main([study, *where, *pdf])
        classified = by_task["classification"]
        if len(classified) and len({cell_key(config) for config in classified["config"]}) > 1:
            plot_study.main([study, *where, *latex, *pdf])
        elif leftovers.whole(options.results / study, sum(map(len, by_task.values()))):
            leftovers.remove(options.results / study, [leftovers.GAINS])
        if any(options.results.glob(f"{study}/borders/*.json")):
            plot_borders.main([study, *where, *latex, *pdf])
    for weights in sorted(options.results.glob("weights/*/model.safetensors")):
        if open_checkpoint(weights).config.get("kernels"):
            plot_kernels.main([str(weights), "--block", "1", "--out", str(weights.parent), *where, *pdf])
    plot_locality.main([*where, *latex, *pdf])


if __name__ == "__main__":
    main()
