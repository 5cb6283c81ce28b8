"""The sentence under a table: what a control shows, from the numbers alone."""

import pandas as pd
import pytest
from conftest import tiny_config
from study_tables.reading import reading


def runs(tmp_path, cells: dict[str, tuple[float, float]], seeds=(0,), model: str = "net") -> pd.DataFrame:
    """Records of a network, a cell a set of branches with its top-1 and its training loss; seeds differ by a point."""
    rows = []
    for kernels, (top1, loss) in cells.items():
        for seed in seeds:
            config = tiny_config(tmp_path, f"model.kernels={kernels}", f"seed={seed}")
            rows.append(
                {
                    "model": model,
                    "kernels": config["model"]["kernels"],
                    "config": config,
                    "seed": seed,
                    "top1_pct": top1 + seed,
                    "texture_pct": top1 + 10,
                    "arrangement_pct": 90.0,
                    "n_eval": 2000,
                    "curve": [{"epoch": 0, "train_loss": 9.0}, {"epoch": 1, "train_loss": loss}],
                }
            )
    return pd.DataFrame(rows)


CELLS = {"[]": (20.0, 1.0), "[3]": (60.0, 0.9), "[3s]": (15.0, 1.1)}


def test_a_branch_and_its_control(tmp_path):
    text = reading(runs(tmp_path, CELLS))
    # sqrt(.2 * .8 / 2000 + .6 * .4 / 2000) = 1.41 points
    assert "net: a 3x3 branch brings +40.0 ± 1.4 points (texture +40.0, arrangement +0.0)" in text
    assert "shuffled grid -5.0 ± 1.2 points." in text and "One seed:" in text and "matter of time" not in text


def test_a_network_that_has_not_fitted_its_images(tmp_path):
    text = reading(runs(tmp_path, {**CELLS, "[]": (20.0, 2.5)}))
    assert "fitted its training images less (loss 2.50 against 0.90)" in text


def test_several_seeds(tmp_path):
    records = runs(tmp_path, CELLS, seeds=(0, 1, 2))
    # seeds move all cells alike: paired by seed, the difference has no error
    text = reading(records)
    assert "+40.0 ± 0.0 points" in text and "Means of 3 seeds" in text and "One seed" not in text
    # other seeds in each cell: each mean has 1 / sqrt(3), their difference sqrt(2 / 3) = 0.82
    records.loc[records["kernels"].map(len) == 0, "seed"] += 3
    assert "+40.0 ± 0.8 points" in reading(records)


@pytest.mark.parametrize("absent", CELLS)
def test_nothing_is_said_without_a_control(tmp_path, absent):
    assert reading(runs(tmp_path, {name: cell for name, cell in CELLS.items() if name != absent})) == ""


def test_nothing_is_said_where_cells_differ_in_more_than_branches(tmp_path):
    records = runs(tmp_path, CELLS)
    wider = runs(tmp_path, {"[3]": CELLS["[3]"]})
    wider.at[0, "config"]["model"]["share_sets"] = [8, 16]
    assert reading(pd.concat([records, wider], ignore_index=True)) == ""
