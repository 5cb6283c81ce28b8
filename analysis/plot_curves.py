"""Draw a study's accuracy or mIoU by epoch, and how local its kernels are, from its records.

python analysis/plot_curves.py locality_cifar100        # -> results/locality_cifar100/curves.png and .pdf
"""

from __future__ import annotations

from options import Parser, no_records
from plots.curves import draw
from records import with_setup

from repmlp import branches
from repmlp.runs.key import by_setting
from repmlp.runs.record import MEASURED, load_records


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__, "one", ("figures",))
    options = parser.parse_args(argv)
    # in one line, so that Python's filter of warnings shows once what both reads say of a damaged record
    by_task = {task: load_records(options.results, options.study, task) for task in MEASURED}
    there = [task for task, records in by_task.items() if len(records)]
    if not there:
        no_records(options.study, options.results)
    for task in there:
        records = with_setup(by_task[task]) if task == "segmentation" else by_task[task]
        records = records.sort_values("kernels", key=lambda column: column.map(branches.order))
        beside = "_segmentation" if task == "segmentation" and len(there) > 1 else ""
        for suffix, rows in by_setting(records):
            stem = options.results / options.study / f"curves{beside}{suffix}"
            for path in draw(rows, f"study {options.study}", stem, task, options.pdf):
                print(f"wrote {path}")


if __name__ == "__main__":
    main()
