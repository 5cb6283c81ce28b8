"""The kernel heatmap: one scale, the row's own share, marks where they belong, both kinds of layer."""

import json

import numpy as np
import pytest
import torch
from conftest import randomise_norms
from plot_kernels import find_checkpoint, trained_on

from repmlp import SetSharingFC, kernels
from repmlp.heatmap import heatmap
from repmlp.repmlp_block import PartitionPerceptron
from repmlp.runs.record import MEASURED, REQUIRED, record_path, write_json

DENSE = randomise_norms(SetSharingFC((5, 6), 2, (1, 3))).eval()
GROUPED = randomise_norms(PartitionPerceptron(4, 6, (5, 6), 2, (1, 3))).eval()


@pytest.mark.parametrize(("layer", "grouped"), [(DENSE, False), (GROUPED, True)])
def test_a_view_is_the_row_of_the_matrix_on_one_scale(layer, grouped):
    shown = kernels.view(layer, 1, (4, 1), (2, 3))
    weights = [layer.merged(branches=injected)[0].detach() for injected in (False, True)]
    smallest = min(float((weight if grouped else weight[1]).abs().min()) for weight in weights)
    for row, picture, weight in zip(shown.rows, shown.pictures, weights, strict=True):
        # output channel 4 is the second of group 1; rows and columns in the order (channel, y, x)
        expected = weight[1, 30 + 2 * 6 + 3, 30:60] if grouped else weight[1, 2 * 6 + 3]
        assert torch.equal(row, expected)
        torch.testing.assert_close(picture.flatten(), (expected.double().abs() / smallest).log(), atol=1e-9, rtol=0)
    assert torch.nonzero(shown.seen).tolist() == [[y, x] for y in (1, 2, 3) for x in (2, 3, 4)]
    changed = (shown.rows[0] - shown.rows[1]).abs().view(5, 6) > 1e-6
    assert torch.equal(changed, shown.seen)
    words = "output channel 4, input channel 1 of its group" if grouped else "share-set 1 of 2"
    assert shown.words == words


def test_shares_are_those_of_the_row_shown():
    row = torch.arange(1.0, 13.0)
    assert kernels.near_share(row, (3, 4), (0, 0), 1) == pytest.approx((1 + 2 + 5 + 6) / 78)
    assert kernels.near_share(-row, (3, 4), (1, 1), 0) == pytest.approx(6 / 78)
    assert kernels.near_share(torch.zeros(12), (3, 4), (1, 1), 0) == 0


def test_what_is_not_there_is_named():
    for layer, share_set, channels, point, words in (
        (DENSE, 9, (0, 0), (0, 0), "share-set 9 does not exist"),
        (GROUPED, 0, (6, 0), (0, 0), "output channel 6, input channel 0: there are 6 output channels"),
        (GROUPED, 0, (0, 0), (5, 0), "lies outside the 5x6 map"),
    ):
        with pytest.raises(ValueError, match=words):
            kernels.view(layer, share_set, channels, point)


def test_marks_of_the_branches_stand_on_the_merged_panel_alone():
    figure = heatmap(DENSE, kernels.view(DENSE, 0, (0, 0), (2, 3)), (2, 3), "a net", "block 1")
    before, after = figure.axes[:2]
    assert not before.collections and not before.patches and len(after.collections) == 1
    assert before.images[0].get_clim() == after.images[0].get_clim()
    colours = [before.images[0].cmap(value)[0] for value in (0.0, 1.0)]
    assert colours[1] < colours[0], "darker is larger"
    assert np.ravel(before.lines[0].get_data()).tolist() == np.ravel(after.lines[0].get_data()).tolist() == [3, 2]


def test_networks_and_data_are_named_as_people_do(tmp_path):
    assert kernels.network_words({"name": "repmlpnet_small"}) == "RepMLPNet small"
    assert kernels.network_words({"arch": "timm", "variant": "resmlp_12_224"}) == "ResMLP 12 224"
    path = record_path(tmp_path, "s", "k")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"data": "cifar100"}))
    assert trained_on({"study": "s", "key": "k", "num_classes": "100"}, tmp_path) == "CIFAR-100"
    assert trained_on({"study": "s", "key": "gone", "num_classes": "100"}, tmp_path) == "100 classes"
    assert trained_on({}, tmp_path) == ""


def test_a_study_shows_the_branch_rather_than_its_control(tmp_path):
    """Of as many branches, those on the map itself; more of them before that."""
    record = dict.fromkeys(REQUIRED | MEASURED["classification"], 0) | {"model": "repmlpnet_tiny", "study": "s"}
    for number, branches in enumerate(([], ["3s"], [3], [1, "3s"], [1, 3])):
        key = f"{number:012d}"
        path = record_path(tmp_path / "results", "s", key)
        write_json(path, {**record, "kernels": branches})
        weights = tmp_path / "outputs/s" / key / "model.safetensors"
        weights.parent.mkdir(parents=True)
        weights.touch()
        best = 3 if number == 3 else max(n for n in (0, 1, 2, 4) if n <= number)
        found = find_checkpoint("s", tmp_path / "results", tmp_path / "outputs")
        assert found.parent.name == f"{best:012d}"
