"""Accuracy over throughput: every network in the frame, no name over another or over a point."""

import json

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from conftest import ROOT
from matplotlib.text import Text
from plots import throughput


@pytest.fixture
def records() -> pd.DataFrame:
    """The committed ones, of one setting."""
    found = [json.loads(path.read_text()) for path in (ROOT / "results/benchmark/measured").glob("*.json")]
    found = [r for r in found if r["kind"] == "inference" and (r["dtype"], r["engine"]) == ("float32", "eager")]
    return pd.DataFrame(found)


@pytest.mark.parametrize("batch", [1, 8])
def test_names_are_whole_and_hide_nothing(records, batch, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(throughput, "save", lambda figure, stem, pdf=False: figures.append(figure) or [stem])
    rows = records[records["batch_size"] == batch]
    assert throughput.draw(rows, "", tmp_path / "x") == [tmp_path / "x"]
    (figure,) = figures
    axis = figure.axes[0]
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    names = {text.get_text(): Text.get_window_extent(text, renderer) for text in axis.texts}
    points = [axis.transData.transform(at) for marks in axis.collections for at in marks.get_offsets()]
    frame = axis.get_window_extent()
    for name, box in names.items():
        assert frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1, name
        assert not any(box.overlaps(other) for text, other in names.items() if text != name), name
        assert not any(box.contains(*point) for point in points), name
    assert all(frame.contains(*point) for point in points)
    deployed = throughput.points_of(rows, "deployed")
    assert {point.name for point in deployed} <= names.keys() and len(deployed) >= 6
    assert len(points) == sum(len(throughput.points_of(rows, form)) for form in throughput.FORMS)
    plt.close(figure)


def test_what_was_trained_for_longer_says_so():
    rows = pd.DataFrame(
        [
            {"model": "gmlp_b16_224", "img_size": 224, "form": "fused", "images_per_second": 9.0},
            {"model": "resmlp_24_224", "img_size": 224, "form": "fused", "images_per_second": 25.0},
            {"model": "resnet101", "img_size": 224, "form": "fused", "images_per_second": 16.0},
            {"model": "mixer_b16_224", "img_size": 256, "form": "fused", "images_per_second": 10.0},
        ]
    )
    found = {point.name: point.longer for point in throughput.points_of(rows, "fused")}
    assert found == {
        "gMLP-B, 300 epochs": True,
        "ResMLP-S24, 400 epochs and distilled": True,
        "ResNet-101": False,
        "MLP-Mixer-B/16 (256 px)": False,
    }
