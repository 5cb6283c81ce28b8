"""The folder is the study: renamed folders, deleted runs, and what was made of them."""

import make_all
import make_tables
import pandas as pd
import plot_curves
import pytest
from test_tables_segmentation import write_classification

from repmlp.runs.record import load_records


@pytest.fixture
def light(monkeypatch):
    """Leave out what takes minutes of counting and is not about studies."""
    monkeypatch.setattr(make_tables, "write_paper", lambda *arguments: None)
    monkeypatch.setattr(make_all.plot_locality, "main", lambda arguments: None)


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"records"}


def test_a_renamed_folder_is_the_study_of_its_new_name(tmp_path, light, capsys):
    write_classification(tmp_path, "mine")
    make_all.main(["--results", str(tmp_path)])
    made = names(tmp_path / "mine")
    assert made == {"table.md", "table.csv", "runs.csv", "curves.png"}
    (tmp_path / "mine").rename(tmp_path / "renamed")
    assert set(load_records(tmp_path)["study"]) == {"renamed"}
    make_all.main(["--results", str(tmp_path)])
    assert "Study renamed" in (tmp_path / "renamed/table.md").read_text()
    assert not (tmp_path / "mine").exists() and names(tmp_path / "renamed") == made


def test_what_no_longer_has_records_goes_and_nothing_else(tmp_path, light, capsys):
    write_classification(tmp_path, "mine")
    folder = tmp_path / "mine"
    stale = ("table_0a1b2c.md", "table_0a1b2c.csv", "table.tex", "settings.csv", "contrasts.md", "curves_0a1b2c.png")
    own = ("notes.md", "table_of_mine.md", "kernel_0a1b2c_block1.png", "borders.md")
    for name in (*stale, *own, "gains.png"):
        (folder / name).write_text("old")
    make_tables.main(["mine", "--results", str(tmp_path)])
    assert set(stale) & names(folder) == {"table.tex", "curves_0a1b2c.png"}, "of a table that is there; not a table"
    plot_curves.main(["mine", "--results", str(tmp_path)])
    make_all.main(["--results", str(tmp_path)])
    assert names(folder) == {"table.md", "table.csv", "table.tex", "runs.csv", "curves.png", *own}
    assert f"removed {folder / 'settings.csv'}: no records of it any more" in capsys.readouterr().out
    # all runs deleted
    for record in (folder / "records").iterdir():
        record.unlink()
    make_tables.main(["--results", str(tmp_path)])
    assert names(folder) == set(own)


def test_nothing_goes_beside_a_damaged_record(tmp_path, light):
    write_classification(tmp_path, "mine")
    (tmp_path / "mine/records/broken.json").write_text("{")
    for name in ("contrasts.md", "curves_0a1b2c.png", "gains.md"):
        (tmp_path / "mine" / name).write_text("old")
    with pytest.warns(UserWarning, match="left out"):
        make_all.main(["--results", str(tmp_path)])
    assert {"contrasts.md", "curves_0a1b2c.png", "gains.md"} <= names(tmp_path / "mine")


def test_runs_are_listed_with_their_keys(tmp_path, light, capsys):
    write_classification(tmp_path, "mine")
    make_tables.main(["mine", "--results", str(tmp_path)])
    runs = pd.read_csv(tmp_path / "mine/runs.csv")
    shown = capsys.readouterr().out
    assert all(key in shown for key in runs["key"]) and f"wrote {tmp_path / 'mine/runs'}.csv" in shown
