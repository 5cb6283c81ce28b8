"""Sizes of images as people give them, and every place that takes one."""

import numpy as np
import pytest
import timm
from conftest import tiny_config

from repmlp import RepMLPNet, resize
from repmlp.cost import count_macs
from repmlp.models.build import build_model
from repmlp.sizes import height_width

BAD = ["32", (32, "32"), 32.0, None, (32, 32, 32), (32,), True, (True, 32), 0, -32, (32, 0)]


@pytest.mark.parametrize(
    ("given", "meant"),
    [(32, (32, 32)), ((32, 64), (32, 64)), ([32, 64], (32, 64)), (np.int64(32), (32, 32)), ((np.int64(1), 2), (1, 2))],
)
def test_one_side_or_both(given, meant):
    assert height_width(given) == meant and all(type(side) is int for side in height_width(given))


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_anything_else_is_one_line(tmp_path, bad):
    small = {**tiny_config(tmp_path)["model"], "kernels": []}
    net = RepMLPNet(kernels=())
    takers = [
        lambda: height_width(bad),
        lambda: build_model({**small, "img_size": bad}, 10),
        lambda: timm.create_model("repmlpnet_t224", img_size=bad, num_classes=3),
        lambda: timm.create_model("repmlp_res50_224", img_size=bad, num_classes=3),
        lambda: count_macs(net, bad),
        lambda: resize(net, bad),
    ]
    for number, take in enumerate(takers):
        if bad is None and number in (2, 3):  # timm leaves out what is None
            continue
        with pytest.raises(ValueError, match=r"^img_size=.*: use a whole number of pixels, or \(height, width\)$"):
            take()
