"""Forms side by side: the numbers against a computation on everything at once."""

import math

import pytest
import torch
from torch import nn

from repmlp.compare import Comparer, compare, random_batches


def test_batches_give_what_all_at_once_gives():
    torch.manual_seed(0)
    one, other = nn.Linear(4, 3), nn.Linear(4, 3)
    images = torch.randn(11, 4)
    found = compare(one, other, images.split(4))
    a, b = one(images).detach().double(), other(images).detach().double()
    assert found.relative == pytest.approx(float((b - a).norm() / a.norm()), rel=1e-6)
    assert found.maximum == pytest.approx(float((b - a).abs().max()), rel=1e-6)
    assert found.changed == int((a.argmax(1) != b.argmax(1)).sum()) > 0
    assert found.guesses == 11
    assert compare(one, one, [images]) == (0, 0, 0, 11)


def test_maps_nan_and_zeros():
    comparer = Comparer()
    maps = torch.randn(2, 3, 4, 5)
    comparer.update(maps, maps.flip(1))
    assert comparer.result().guesses == 40
    for broken in (torch.full((2, 3, 4, 5), math.nan), maps):
        comparer.update(maps, broken)
    result = comparer.result()
    assert math.isnan(result.relative) and math.isnan(result.maximum)
    zeros = Comparer()
    zeros.update(torch.zeros(2, 3), torch.zeros(2, 3))
    assert zeros.result().relative == 0
    zeros.update(torch.zeros(2, 3), torch.ones(2, 3))
    assert zeros.result().relative == math.inf
    with pytest.raises(ValueError, match=r"shapes \(2, 3\) and \(2, 4\)"):
        zeros.update(torch.zeros(2, 3), torch.zeros(2, 4))


def test_random_batches_are_the_same_each_time():
    first, second = (list(random_batches((3, 4, 4), (1, 2))) for _ in range(2))
    assert [b.shape[0] for b in first] == [1, 2] and all(map(torch.equal, first, second))
