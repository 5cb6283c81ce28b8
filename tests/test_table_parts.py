"""Tables as files: numbers in a CSV are numbers."""

import pandas as pd
from table_parts import as_numbers, emit


def test_numbers_in_a_csv_are_numbers(tmp_path, capsys):
    table = pd.DataFrame(
        {
            "net": ["a", "b", "c"],
            "params": ["1,234,567", "12", ""],
            "more": ["+7,864,320", "-", "-3"],
            "top-1": ["61.25 ± 0.30 (n=2)", "60.00 (n=1) in bf16", ""],
            "ms": ["12.50 (12.10 to 13.00)", "1,200.00 (9.00 to 1,300.00)", ""],
            "interval": ["-0.50 to +1.25", "", "(+1.00 to +2.00)"],
            "error": ["3.1e-07", "1e-12", ""],
            "printed": ["1812M", "+786K", ""],
            "sets": ["[4, 16]", "8", "1"],
        }
    )
    emit("t", "A table", "A note.", table, tmp_path)
    found = pd.read_csv(tmp_path / "t.csv")
    assert list(found.columns) == [
        "net", "params", "more", "top-1", "top-1 std", "top-1 n", "top-1 of", "ms", "ms low", "ms high",
        "interval low", "interval high", "error", "printed", "sets",
    ]  # fmt: skip
    text = {"net", "top-1 of", "printed", "sets"}
    assert all(pd.api.types.is_numeric_dtype(found[name]) for name in found if name not in text)
    assert found["params"].iloc[0] == 1_234_567 and found["more"].tolist()[::2] == [7_864_320, -3]
    assert found.loc[0, ["top-1", "top-1 std", "top-1 n"]].tolist() == [61.25, 0.3, 2]
    assert found["top-1 of"].iloc[1] == "in bf16" and found["ms high"].iloc[1] == 1300
    assert found["interval low"].tolist()[::2] == [-0.5, 1.0]
    assert found["printed"].tolist()[:2] == ["1812M", "+786K"] and found["sets"].iloc[0] == "[4, 16]"
    assert "1,234,567" in (tmp_path / "t.md").read_text(), "people read thousands"
    assert f"wrote {tmp_path / 't'}.md, .csv" in capsys.readouterr().out


def test_a_column_of_one_run_each_has_no_deviation():
    table = as_numbers(pd.DataFrame({"top-1": ["60.00 (n=1)", ""]}))
    assert list(table.columns) == ["top-1", "top-1 n"]
