"""What stands beside the weights comes back as it was written; a file without it tells nothing."""

from repmlp.trained_on import TrainedOn


def test_it_comes_back():
    trained = TrainedOn({"name": "imagenet", "interpolation": "bicubic"}, ("a", "b"), (0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    assert TrainedOn.from_metadata(trained.to_metadata()) == trained
    windows = TrainedOn({"name": "camvid"}, ("a", "b"), (0.1, 0.2, 0.3), (1.0, 2.0, 3.0), (32, 64))
    assert TrainedOn.from_metadata(windows.to_metadata()) == windows
    assert all(isinstance(text, str) for text in trained.to_metadata().values())


def test_a_file_without_it_tells_nothing():
    assert TrainedOn.from_metadata({}) == TrainedOn() == TrainedOn({}, (), (), ())
