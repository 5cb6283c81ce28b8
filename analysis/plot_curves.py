"""Draw a study's accuracy or mIoU by epoch, and how local its kernels are, from its records.

python analysis/plot_curves.py locality_cifar100        # -> results/locality_cifar100/curves.png
"""

from __future__ import annotations

import leftovers
from options import Parser, no_records
from plots.curves import draw
from records import with_setup
from study_tables.settings import settings

from repmlp import branches
from repmlp.runs.record import MEASURED, load_records


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__, "one", ("figures",))
    options = parser.parse_args(argv)
    # in one line, so that Python's filter of warnings shows once what both reads say of a damaged record
    by_task = {task: load_records(options.results, options.study, task) for task in MEASURED}
    there = [task for task, records in by_task.items() if len(records)]
    if not there:
        no_records(options.study, options.results)
    made = set()
    for task in there:
        records = with_setup(by_task[task]) if task == "segmentation" else by_task[task]
        records = records.sort_values("kernels", key=lambda column: column.map(branches.order))
        beside = "_segmentation" if task == "segmentation" and len(there) > 1 else ""
        for suffix, words, runs in settings(records):
            stem = options.results / options.study / f"curves{beside}{suffix}"
            made.add(stem.name)
            for path in draw(runs, f"study {options.study}{words}", stem, task, options.pdf):
                print(f"wrote {path}")
    if leftovers.whole(options.results / options.study, sum(map(len, by_task.values()))):
        leftovers.remove(options.results / options.study, [leftovers.CURVES], made)


if __name__ == "__main__":
    main()
