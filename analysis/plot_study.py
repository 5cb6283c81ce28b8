"""Draw a study's accuracy over what it varies, and what branches gain there.

    python analysis/plot_study.py sharing_cifar100       # -> results/sharing_cifar100/gains.png, gains.md and .csv
    python analysis/plot_study.py stronger_cifar100 --steps        # -> steps.png and so on

A study that varies branches alone has them on the axis, a line a network. Any other has its other settings on the axis,
those that change together (images and epochs of `fractions`) as one, and a line a set of branches. Beside it stand the
differences that the sweep named before the runs; where it named none, gains over the fewest branches. With --steps
every configuration is compared with the one that is most like all others: a study of one change at a time.
"""

from __future__ import annotations

from options import SWEEPS, Parser, no_records
from plots.differences import differences
from plots.gains import Axis, as_numbers, as_shown, cells, draw, note, steps
from significance import analyse, pairs_of
from table_parts import emit

from repmlp.runs.contrasts import named_by
from repmlp.runs.record import load_records


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__, "one", ("tables", "figures"))
    parser.add_argument("--steps", action="store_true", help="compare every configuration with the most common one")
    options = parser.parse_args(argv)
    records = load_records(options.results, options.study)
    if not len(records):
        no_records(options.study, options.results, "records of classification")
    table, axis = (steps(records), Axis("what is changed", False)) if options.steps else cells(records)
    tests = [] if options.steps else analyse(records, pairs_of(records, named_by(set(records["sweep"]), SWEEPS)))
    over = (
        "the configuration that is most like all others (reference)"
        if options.steps
        else "the same network and settings with the fewest branches"
    )
    folder = options.results / options.study
    name = "steps" if options.steps else "gains"
    words = f"Study {options.study}: {name}"
    shown, numbers = as_shown(table, axis.title), as_numbers(table, axis.title)
    emit(name, words, note(table, over), shown, folder, options.latex, numbers)
    named = differences(records, tests)
    for path in draw(table, axis, f"study {options.study}", over, folder / name, named, options.pdf):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
