"""The measure at tile borders, its bootstrap and its table; the partition that scrambles tiles and channels."""

import importlib
import json
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_UPERNET, command, randomise_norms
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from PIL import Image
from torch import nn

from repmlp import RepMLPBlock, RepMLPNet, build_model, load_model, save_model
from repmlp.data import build_segmentation_data
from repmlp.models.upernet import distance_to_borders
from repmlp.statistics import bootstrap_weights, interval, pooled

sys.path[:0] = [str(ROOT / folder) for folder in ("experiments", "analysis", "tests")]
borders, border_counts, border_statistics, plot_borders, scrambled_partition = (
    importlib.import_module(name)
    for name in ("borders", "border_counts", "border_statistics", "plot_borders", "scrambled_partition")
)
scrambled = scrambled_partition.scrambled

CLASSES = 11
UPERNET = {**TINY_UPERNET, "auxiliary_channels": 0}
RESNET = {
    "name": "control",
    "arch": "upernet",
    "encoder": "resnet18d",
    "kernels": [],
    "decoder_channels": 16,
    "auxiliary_channels": 0,
    "arguments": {"channels": [8, 16, 32, 64], "layers": [1, 1, 1, 1], "stem_width": 8},
}
GRID = ("step=16", "margin=8", "block=2", "pictures=2", "device=cpu")
COUNTS = ("correct", "labelled", "correct_far")


class Fake(nn.Module):
    """Reads the truth off the first channel, and is wrong where `wrong(crops)`, (N, h, w), says so."""

    def __init__(self, wrong):
        super().__init__()
        self.wrong = wrong

    def forward(self, crops):
        truth = crops[:, 0].long()
        guess = torch.where(self.wrong(crops), (truth + 1) % CLASSES, truth)
        return nn.functional.one_hot(guess, CLASSES).permute(0, 3, 1, 2).float()


def samples(n=3, size=(120, 100), flags=None):
    """Images whose first channel is the truth and whose second one holds flags; a tenth is not labelled."""
    generator = torch.Generator().manual_seed(0)
    for i in range(n):
        truth = torch.randint(CLASSES, size, generator=generator)
        image = torch.stack([truth, torch.zeros(size) if flags is None else flags, torch.rand(size)])
        void = torch.rand(size, generator=generator) < 0.1
        yield f"image{i}", image.float(), torch.where(void, 255, truth)


def at_borders(closer, tile):
    return lambda crops: (distance_to_borders(tuple(crops.shape[2:]), tile) < closer).expand(len(crops), -1, -1)


def brute_distance(y, x, tile):
    """Pixels between a pixel of a crop and the nearest line: lines run between pixels."""
    lines = range(0, 10 * tile, tile)
    return min(min(a - line if line <= a else line - a - 1 for line in lines) for a in (y, x))


def summary_of(counts, bin_width: int) -> dict:
    """What is said of counts with tiles of 32 pixels, a step of 16 and blocks of two images."""
    distances = list(range(0, 16, bin_width))
    return border_statistics.summarise({**counts._asdict(), "distances": distances, "near": 8, "block": 2, "views": 4})


# ---- the measure


@pytest.mark.parametrize(("size", "tile", "step", "margin"), [((120, 100), 32, 16, 8), ((100, 150), 32, 8, 0)])
def test_counts_are_those_of_plain_loops(size, tile, step, margin):
    height, width = ((side - tile + step) // tile * tile for side in size)
    logits = torch.randn(len(range(0, tile, step)), CLASSES, height, width)  # other guesses in every crop of a row
    net = nn.Module()
    net.forward = lambda crops: logits + 4 * Fake(lambda c: torch.zeros_like(c[:, 0]).bool())(crops)
    counts, _ = border_counts.measure(net, samples(2, size), tile, step, margin, 2)
    assert counts.labelled.shape == (2, tile // 4)
    for i, (_, image, mask) in enumerate(samples(2, size)):
        expected, differing = np.zeros((3, tile // 4), dtype=int), 0
        guesses = {
            (y, x): net(torch.stack([image[:, y : y + height, z : z + width] for z in range(0, tile, step)]))[
                x // step
            ].argmax(0)
            for y in range(0, tile, step)
            for x in range(0, tile, step)
        }
        for row in range(tile - step + margin, height - margin):
            for column in range(tile - step + margin, width - margin):
                if mask[row, column] == 255:
                    continue
                views = [
                    (brute_distance(row - y, column - x, tile), int(guess[row - y, column - x]))
                    for (y, x), guess in guesses.items()
                ]
                truth = int(mask[row, column])
                (middle,) = [guess == truth for distance, guess in views if distance >= (tile - step) // 2]
                for distance, guess in views:
                    expected[:, distance // 2] += (guess == truth, 1, middle)
                differing += len({guess for _, guess in views}) > 1
        seams = [0, 0, 0, 0]
        inside = [range(tile - step + margin, side - margin) for side in (height, width)]
        for row, column in product(*inside):
            for down, right in ((1, 0), (0, 1)):
                a, b = row + down, column + right
                if a not in inside[0] or b not in inside[1] or 255 in (mask[row, column], mask[a, b]):
                    continue
                lines = [(a - y) % tile == 0 if down else (b - x) % tile == 0 for y, x in guesses]
                for crossed, ((y, x), guess) in zip(lines, guesses.items(), strict=True):
                    if any(lines):
                        differs = int(guess[row - y, column - x]) != int(guess[a - y, b - x])
                        seams[0 if crossed else 2] += 1
                        seams[1 if crossed else 3] += differs
        assert counts.seams[i].tolist() == seams and seams[0] and seams[2]
        assert np.array_equal(np.stack([each[i] for each in counts[:3]]), expected)
        assert counts.differing[i] == differing


def test_the_layout_of_camvid():
    layout = border_counts.lay_out((360, 480), 96, 32, 32)
    assert layout.size == (288, 384) and len(layout.corners) == 9 and layout.far == 32
    assert (layout.rows, layout.columns) == (slice(96, 256), slice(96, 352))
    (h, w), (y, x) = layout.size, layout.corners[-1]
    assert (y, x) == (64, 64) and y + h <= 360 and x + w <= 480
    for index, (y, x) in enumerate(layout.corners):
        for row, column in ((0, 0), (17, 90), (159, 255)):
            found = int(layout.distances[index, row, column])
            assert found == brute_distance(row + 96 - y, column + 96 - x, 96)
    # in bins of 16 pixels every pixel is seen as often as every other
    bins = nn.functional.one_hot(layout.distances // 16, 3).sum(dim=0)
    assert bins.flatten(0, 1).unique(dim=0).tolist() == [[5, 3, 1]]


@pytest.mark.parametrize("closer", [4, 8, 12])
def test_errors_at_borders_are_found(closer):
    counts, _ = border_counts.measure(Fake(at_borders(closer, 32)), samples(), 32, 16, 8, 4)
    total = [each.sum(axis=0) for each in counts[:3]]
    wrong = np.arange(4) * 4 < closer
    # from 12 on, the middle of a tile, 8 pixels from the lines and more, is wrong in part as well
    assert np.array_equal(total[0], np.where(wrong, 0, total[1]))
    summary = summary_of(counts, 4)
    if closer < 12:
        assert np.array_equal(total[2], total[1])
        share = 100 if closer == 8 else 100 * total[1][0] / total[1][:2].sum()
        assert summary["near_minus_far_points"] == pytest.approx(-share, abs=1e-3)
        assert summary["interval_blocks"][1] < -0.8 * share
    assert summary["near_pct"] == pytest.approx(100 * total[0][:2].sum() / total[1][:2].sum(), abs=1e-3)
    if closer == 8:
        assert summary["differing_pct"] == 100


def test_errors_that_come_from_the_position_alone_are_not():
    """Wrong at the very lines of one phase: a single pass over the images would find -100 points."""
    flags = (distance_to_borders((120, 100), 32) < 8).float()
    counts, _ = border_counts.measure(Fake(lambda crops: crops[:, 1] > 0), samples(flags=flags), 32, 16, 8, 4)
    assert 0 < counts.correct.sum() < counts.labelled.sum()
    assert np.array_equal(counts.correct, counts.correct_far) and not counts.differing.any()
    summary = summary_of(counts, 4)
    assert summary["near_minus_far_points"] == 0 and summary["near_pct"] == summary["far_pct"]
    assert summary["interval_images"] == summary["interval_blocks"] == [0, 0]
    # in bins as wide as half a step the plain curve is flat as well
    plain, _ = border_counts.measure(Fake(lambda crops: crops[:, 1] > 0), samples(flags=flags), 32, 16, 8, 8)
    shares = plain.correct.sum(axis=0)
    assert shares[0] == 3 * shares[1] and np.array_equal(plain.labelled[:, 0], 3 * plain.labelled[:, 1])


@pytest.mark.parametrize("effect", [0.0, 0.1])
def test_an_effect_is_told_from_chance(effect):
    """A tenth of all views wrong by chance, and more at borders, where the picture is difficult too."""
    generator = torch.Generator().manual_seed(1)

    def wrong(crops):
        share = 0.1 + 0.4 * (crops[:, 1] > 0) + effect * at_borders(8, 32)(crops)
        return torch.rand(crops[:, 0].shape, generator=generator) < share

    flags = (distance_to_borders((120, 100), 32) < 8).float()
    counts, _ = border_counts.measure(Fake(wrong), samples(12, flags=flags), 32, 16, 8, 4)
    summary = summary_of(counts, 4)
    for name in ("interval_images", "interval_blocks"):
        low, high = summary[name]
        assert low <= -100 * effect <= high and high - low < 3, name
        assert effect == 0 or high < -5


def test_seams_are_found():
    """Every second tile is guessed wrong as a whole: no pixel of it is worse than another, but its edges show."""

    def every_second_tile(crops):
        rows, columns = (torch.arange(side) // 32 for side in crops.shape[2:])
        return ((rows[:, None] + columns) % 2 == 1).expand(crops[:, 0].shape)

    same = [(name, image * torch.tensor([0, 1, 1])[:, None, None], mask * 0) for name, image, mask in samples(8)]
    counts, _ = border_counts.measure(Fake(every_second_tile), same, 32, 16, 8, 4)
    summary = summary_of(counts, 4)
    assert (summary["seam_pct"], summary["no_seam_pct"], summary["seam_interval"]) == (100, 0, [100, 100])
    assert summary["near_minus_far_points"] == 0  # which the accuracy at borders does not tell
    counts, _ = border_counts.measure(Fake(lambda crops: crops[:, 1] > 9), samples(8), 32, 16, 8, 4)  # nothing is wrong
    summary = summary_of(counts, 4)
    assert summary["seam_pct"] == summary["no_seam_pct"] and summary["seam_interval"] == [0, 0]


def test_few_images_have_no_interval():
    for n, images, blocks in ((1, False, False), (2, True, False), (3, True, True)):
        counts, _ = border_counts.measure(Fake(at_borders(8, 32)), samples(n), 32, 16, 8, 4)
        summary = summary_of(counts, 4)
        assert (summary["interval_images"] is not None, summary["interval_blocks"] is not None) == (images, blocks)


def test_bad_images():
    net = Fake(at_borders(8, 32))
    with pytest.raises(ValueError, match=r"79 pixels high and 100 wide are too small .* need 80 both ways"):
        border_counts.measure(net, samples(1, (79, 100)), 32, 16, 8, 4)
    border_counts.measure(net, samples(1, (80, 80)), 32, 16, 8, 4)
    void = [("void", image, torch.full_like(mask, 255)) for _, image, mask in samples(1)]
    with pytest.raises(ValueError, match="no pixel is labelled at some distance"):
        border_counts.measure(net, void, 32, 16, 8, 4)


# ---- the bootstrap


def test_weights_are_those_of_whole_blocks():
    weights = bootstrap_weights(7, 3, resamples=50, seed=1)
    assert weights.shape == (50, 7) and np.array_equal(weights, bootstrap_weights(7, 3, resamples=50, seed=1))
    assert not np.array_equal(weights, bootstrap_weights(7, 3, resamples=50, seed=2))
    blocks = weights[:, [0, 3, 6]]
    assert np.array_equal(weights, blocks[:, [0, 0, 0, 1, 1, 1, 2]]) and (blocks.sum(axis=1) == 3).all()
    with pytest.raises(ValueError, match=r"7 items in blocks of 7 are 1 block\(s\)"):
        bootstrap_weights(7, 7)


def test_pooled_is_a_ratio_of_sums():
    rng = np.random.default_rng(0)
    part, whole = rng.integers(0, 50, (6, 2)), rng.integers(50, 90, (6, 2))
    weights = bootstrap_weights(6, 2, resamples=20)
    found = pooled(part, whole, weights)
    for row, drawn in zip(found, weights, strict=True):
        items = [i for i, times in enumerate(drawn) for _ in range(int(times))]
        assert np.allclose(row, part[items].sum(axis=0) / whole[items].sum(axis=0), rtol=1e-12)
    assert np.allclose(pooled(part, whole), part.sum(axis=0) / whole.sum(axis=0), rtol=1e-12)
    assert np.isnan(pooled(np.zeros(2), np.zeros(2)))
    assert np.allclose(interval(np.arange(101.0)), [2.5, 97.5])


def test_intervals_hold_what_they_should():
    """Of 300 experiments 95 % hold the truth; where neighbours are alike, only with blocks."""
    rng = np.random.default_rng(0)
    n, held = 200, {"alone": 0, "alike": 0, "alike in blocks": 0}
    weights = {block: bootstrap_weights(n, block, resamples=400) for block in (1, 10)}
    for _ in range(300):
        whole = rng.integers(500, 1500, n)
        alone = rng.normal(0.7, 0.1, n)
        alike = 0.7 + rng.normal(0, 0.1, n // 10).repeat(10) + rng.normal(0, 0.03, n)
        for name, share, block in (("alone", alone, 1), ("alike", alike, 1), ("alike in blocks", alike, 10)):
            low, high = interval(pooled(share * whole, whole, weights[block]))
            held[name] += low <= 0.7 <= high
    assert 0.91 < held["alone"] / 300 < 0.985
    assert held["alike"] / 300 < 0.7
    assert 0.87 < held["alike in blocks"] / 300 < 0.985


# ---- the command


@pytest.fixture(scope="module")
def camvid(tmp_path_factory) -> Path:
    """A tree of six images to train on and six to test on, 112 pixels high and 144 wide."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split in ("train", "test"):
        for folder in (split, f"{split}annot"):
            (root / "CamVid" / folder).mkdir(parents=True)
        for i in range(6):
            mask = rng.integers(0, 12, (14, 18), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
            image = rng.integers(0, 256, (112, 144, 3), dtype=np.uint8)
            Image.fromarray(mask).save(root / f"CamVid/{split}annot/frame{i}.png")
            Image.fromarray(image).save(root / f"CamVid/{split}/frame{i}.png")
    return root


@torch.no_grad()
def outspoken(net: nn.Module) -> nn.Module:
    """Take the classes' mean logits out of a random network: otherwise it makes one guess everywhere."""
    net.upernet.segmentation_head[0].bias -= net(torch.randn(2, 3, 96, 128)).mean(dim=(0, 2, 3))
    return net


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """The weights of a tiny random UperNet on a RepMLPNet with tiles of 32 pixels."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tiny") / "model.safetensors"
    net = outspoken(randomise_norms(build_model(UPERNET, CLASSES)).eval())
    save_model(path, net, UPERNET, {"study": "some_study", "key": "0123456789ab"})
    return path


@pytest.fixture(scope="module")
def control(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("control") / "model.safetensors"
    net = outspoken(randomise_norms(build_model(RESNET, CLASSES)).eval())
    save_model(path, net, RESNET, {"study": "some_study", "key": "ba9876543210"})
    return path


def settings(*overrides) -> DictConfig:
    with initialize_config_dir(str(ROOT / "experiments/conf"), version_base="1.3"):
        return compose("borders", overrides=list(map(str, overrides)))


@pytest.fixture(scope="module")
def study(checkpoint, control, camvid, tmp_path_factory) -> Path:
    """The results folder of a study: a network with tiles by the command, the control by the function."""
    results = tmp_path_factory.mktemp("results")
    where = (*GRID, f"data.root={camvid}", "data.workers=0", "threads=1")
    out = results / "some_study/borders/0123456789ab.json"
    done = command("experiments/borders.py", f"checkpoint={checkpoint}", *where, f"out={out}")
    assert done.returncode == 0, done.stderr
    assert f"{out}\n" in done.stdout and "tiny, 6 images of camvid, tile 32: counted under 4 phases" in done.stdout
    borders.borders(settings(*where, f"checkpoint={control}", f"out={out.parent / 'control.json'}", "tile=32"))
    return results


def test_the_command(study, checkpoint, camvid):
    path = study / "some_study/borders/0123456789ab.json"
    text = path.read_text()
    results = json.loads(text)
    assert str(camvid) not in text and "root" not in results["config"]["data"]
    assert results["tiled"] and (results["tile"], results["n_images"], results["views"]) == (32, 6, 4)
    assert results["distances"] == [0, 4, 8, 12] and (results["near"], results["far"]) == (8, 8)
    assert (results["model"], results["key"], results["config"]["model"]) == ("tiny", "0123456789ab", UPERNET)
    counts = [np.array(results[name]) for name in COUNTS]
    assert all(each.shape == (6, 4) for each in counts) and (counts[0] <= counts[1]).all()
    # rows 24 to 87, columns 24 to 119
    masks = [np.array(Image.open(camvid / f"CamVid/testannot/frame{i}.png")) for i in range(6)]
    labelled = [(mask[24:88, 24:120] != 11).sum() for mask in masks]
    assert (counts[1].sum(axis=1) == 4 * np.array(labelled)).all()
    assert "summary" not in results and {each.name for each in checkpoint.parent.iterdir()} == {checkpoint.name}
    with np.load(path.with_suffix(".npz"), allow_pickle=False) as pictures:
        assert list(pictures["names"]) == ["frame0", "frame5"] and pictures["tile"] == 32
        assert (pictures["truth0"] == np.where(masks[0] == 11, 255, masks[0])[:96, :128]).all()
        photograph = np.array(Image.open(camvid / "CamVid/test/frame0.png"))[:96, :128]
        assert np.abs(pictures["image0"].astype(int) - photograph).max() <= 1
        assert pictures["guess1"].shape == (96, 128)
    other = json.loads((path.parent / "control.json").read_text())
    assert not other["tiled"] and other["labelled"] == results["labelled"]


def test_the_merged_network_guesses_what_the_trained_one_does(study, checkpoint, camvid):
    """And the images come in the order of their names, at their own corner."""
    results = json.loads((study / "some_study/borders/0123456789ab.json").read_text())
    net, _ = load_model(checkpoint)
    data = build_segmentation_data(
        {"name": "camvid", "root": camvid, "crop_size": [32, 32], "workers": 0}, batch_size=1, seed=0
    )
    data.setup()
    given = (
        (name, pair[0][0], pair[1][0]) for name, pair in zip(data.eval_names, data.whole_evaluation(), strict=True)
    )
    counts, _ = border_counts.measure(net, given, 32, 16, 8, 4)
    assert np.abs(counts.correct - np.array(results["correct"])).max() <= 2


def test_where_results_go(checkpoint, tmp_path):
    _, metadata = load_model(checkpoint)
    assert borders.output_path(settings(), metadata) == Path("results/some_study/borders/0123456789ab.json")
    with pytest.raises(ValueError, match="does not say of which run it is: say where to write, out="):
        borders.output_path(settings("checkpoint=a"), {})
    with pytest.raises(ValueError, match=r"out=a\.txt: name a file that ends in \.json"):
        borders.output_path(settings("out=a.txt"), metadata)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["checkpoint=null"], "which checkpoint"),
        (["checkpoint=nowhere.safetensors"], "/nowhere.safetensors"),
        (["step=24"], "step=24: tile=32 has to be a multiple of it; use one of 2, 4, 8, 16$"),
        (["step=32"], "step=32: tile=32 has to be a multiple of it"),
        (["step=0"], "step=0: use a whole number, at least 1"),
        (["margin=8.5"], r"margin=8\.5: use a whole number"),
        (["margin=64"], "112 pixels high and 144 wide are too small for tile=32, step=16 and margin=64"),
        (["bin=3"], "bin=3: with tile=32 and step=16 use one of 1, 2, 4, 8$"),
        (["step=8", "bin=8"], "bin=8: with tile=32 and step=8 use one of 1, 2, 4$"),
        (["tile=64"], "tile=64: the network's own tiles are 32 pixels wide; leave tile=null"),
        (["n_images=0"], "n_images=0: use a whole number, at least 1"),
        (["device=gpu"], "device='gpu': use cpu, cuda or auto"),
        (["data=patterns"], "unknown data set 'patterns': use one of camvid, cityscapes"),
        (["data=cityscapes", "data.root=nowhere"], r"no folder nowhere.leftImg8bit.val: pass data\.root=FOLDER"),
        (["data.root=nowhere"], r"no folder nowhere.CamVid.test: pass data\.root=FOLDER"),
    ],
)
def test_mistakes(overrides, reason, checkpoint, camvid, tmp_path):
    base = [*GRID, f"checkpoint={checkpoint}", f"data.root={camvid}", "data.workers=0", f"out={tmp_path}/a.json"]
    if overrides[0] == "data=patterns":
        base = [each for each in base if not each.startswith("data.")]
    with pytest.raises((ValueError, FileNotFoundError), match=reason):
        borders.borders(settings(*base, *overrides))
    assert not list(tmp_path.iterdir())


def test_mistakes_with_another_network(control, camvid, tmp_path):
    base = [*GRID, f"data.root={camvid}", "data.workers=0", f"out={tmp_path}/a.json"]
    with pytest.raises(ValueError, match="this network has no tiles: say tile=N"):
        borders.borders(settings(*base, f"checkpoint={control}"))
    with pytest.raises(ValueError, match="tile=48: use a multiple of 32"):
        borders.borders(settings(*base, f"checkpoint={control}", "tile=48"))
    few = tmp_path / "few.safetensors"
    save_model(few, build_model(RESNET, 5), RESNET)
    with pytest.raises(ValueError, match=r"few\.safetensors tells 5 classes, data=camvid has 11"):
        borders.borders(settings(*base, f"checkpoint={few}", "tile=32"))
    model = {"arch": "repmlpnet", "img_size": 32, "channels": [8], "blocks": [1], "share_sets": [1]}
    classifier = tmp_path / "classifier.safetensors"
    save_model(classifier, build_model(model, 5), model)
    done = command("experiments/borders.py", f"checkpoint={classifier}", *base)
    assert done.returncode == 1
    words = "borders of tiles are measured of a UperNet alone; train one with experiments/segment.py"
    assert done.stderr == f"error: {classifier} is a RepMLPNet: {words}\n"


def test_too_many_counts_for_a_small_file(checkpoint, camvid, monkeypatch):
    monkeypatch.setattr(borders, "LARGEST", 71)
    with pytest.raises(ValueError, match=r"bin=4: 4 distances of 6 images are too much .* n_images=N"):
        borders.borders(settings(*GRID, f"checkpoint={checkpoint}", f"data.root={camvid}"))


# ---- the table and the picture of a study


def test_table_of_a_study(study, tmp_path, capsys):
    plot_borders.main(["some_study", "--results", str(study), "--large", str(tmp_path / "large")])
    printed = capsys.readouterr().out
    folder = study / "some_study"
    assert "tiny, 6 images of camvid, tile 32: accuracy" in printed
    assert "over blocks of 2)" in printed and "in all 4 phases" in printed
    names = {f"{key}_frame{i}.png" for key in ("0123456789ab", "control") for i in (0, 5)}
    assert {each.name for each in (tmp_path / "large").iterdir()} == names
    single = tmp_path / "large/0123456789ab_frame0.png"
    with Image.open(folder / "borders/0123456789ab.png") as sheet, Image.open(single) as one:
        assert sheet.height > sheet.width / 2 and one.width > sheet.width
    assert (folder / "borders.md").read_text() in printed
    assert (folder / "borders.png").stat().st_size > 10_000
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    assert [line.split("|")[1].strip() for line in lines] == ["network", "tiny", "control"]
    summary = border_statistics.load(folder / "borders")[0]["summary"]
    assert 0 < summary["differing_pct"] < 100
    low, high = summary["interval_blocks"]
    assert f"{summary['near_minus_far_points']:+.2f} ({low:+.2f} to {high:+.2f})" in lines[1]
    assert lines[2].split("|")[6].strip() == ""


def test_what_was_said_of_the_committed_counts_still_is():
    """The first files hold what was found beside the counts: it comes out of the counts, number for number."""
    for record in border_statistics.load(ROOT / "results/segmentation_small_camvid/borders"):
        assert record["summary"] == json.loads(record["path"].read_text())["summary"]


def test_differences_are_paired(study):
    records = border_statistics.load(study / "some_study/borders")
    found = border_statistics.differences(records)
    twin = border_statistics.differences([records[0], {**records[0], "label": "twin", "tiled": False}])
    assert twin.loc["tiny", ["over_control", "control_low", "control_high"]].tolist() == [0, 0, 0]
    assert np.isnan(twin.loc["twin", "over_control"])
    assert found.loc["tiny", "over_control"] == pytest.approx(found["difference"].diff().iloc[1] * -1)
    weights = bootstrap_weights(6, 2)
    near = slice(0, 2)  # distances 0 and 4
    shares = [
        (weights @ (r["correct"] - r["correct_far"])[:, near].sum(1)) / (weights @ r["labelled"][:, near].sum(1))
        for r in records
    ]
    low, high = np.quantile(100 * (shares[0] - shares[1]), [0.025, 0.975])
    assert found.loc["tiny", ["control_low", "control_high"]].tolist() == pytest.approx([low, high])
    # two controls count half each
    three = border_statistics.differences([*records, {**records[0], "label": "twin", "tiled": False}])
    assert three.loc["tiny", "over_control"] == pytest.approx(found.loc["tiny", "over_control"] / 2)
    alone = border_statistics.differences(records[:1])
    assert alone["over_control"].isna().all()


def test_what_a_study_cannot_be_made_of(study, tmp_path, capsys):
    def refused(reason):
        with pytest.raises(SystemExit, match=reason):
            plot_borders.main(["a", "--results", str(tmp_path)])

    refused("error: nothing was counted in .*borders: run experiments/borders.py")
    folder = tmp_path / "a/borders"
    folder.mkdir(parents=True)
    one = json.loads((study / "some_study/borders/0123456789ab.json").read_text())
    (folder / "1.json").write_text(json.dumps(one))
    for name, change, reason in (
        ("2.json", {"margin": 16}, "1.json has margin=8 and .*2.json margin=16: .*same settings"),
        ("2.json", {"labelled": one["labelled"][::-1]}, "1.json and .*2.json are of different images"),
    ):
        (folder / name).write_text(json.dumps({**one, **change}))
        refused(reason)
    (folder / "2.json").write_text("{")
    refused("2.json is none of borders.py's files")
    (folder / "2.json").write_text(json.dumps({**one, "key": "other"}))
    labels = [record["label"] for record in border_statistics.load(folder)]
    assert labels == ["tiny 0123456789ab", "tiny other"]
    for path in folder.iterdir():
        path.write_text(json.dumps({**one, "block": 6}))
    refused(r"6 items in blocks of 6 are 1 block\(s\)")


# ---- the partition that scrambles


def block(share_sets, kernels=(1, 3), **kwargs) -> RepMLPBlock:
    return randomise_norms(RepMLPBlock(8, (3, 4), share_sets, kernels, **kwargs)).double().eval()


@torch.no_grad()
def test_scrambled_is_ours_with_one_tile_and_another_with_several():
    for share_sets in (1, 2, 8):
        ours = block(share_sets)
        wrong = scrambled(ours)
        x = torch.randn(2, 8, 3, 4, dtype=torch.float64)
        assert torch.equal(ours(x), wrong(x))
        x = torch.randn(2, 8, 6, 8, dtype=torch.float64)
        assert torch.equal(ours(x), wrong(x)) == (share_sets == 8)  # C/S = 1: nothing to mix with
        assert type(ours) is RepMLPBlock and torch.equal(scrambled(wrong)(x), wrong(x))
        x = torch.randn(2, 8, 5, 7, dtype=torch.float64)  # padded
        assert wrong(x).shape == x.shape and torch.equal(ours(x), wrong(x)) == (share_sets == 8)


@torch.no_grad()
def test_an_identity_kernel_gives_the_identity_unless_scrambled():
    ours = block(2, (), global_perceptron=False, inference_mode=True)
    ours.channel_perceptron.weight.copy_(torch.eye(12).expand(2, 12, 12))
    ours.channel_perceptron.bias.zero_()
    x = torch.randn(2, 8, 6, 12, dtype=torch.float64)
    assert torch.equal(ours(x), x)
    found = scrambled(ours)(x)
    assert not torch.equal(found, x) and torch.equal(found.flatten(1).sort().values, x.flatten(1).sort().values)

    def place(tile, group):
        row, column = divmod(tile, 3)
        channels = slice(2 * group, 2 * group + 2)
        return slice(None), channels, slice(3 * row, 3 * row + 3), slice(4 * column, 4 * column + 4)

    # tile t of six, group g of four: what was written as row t * 4 + g is read as row g * 6 + t
    for t in range(6):
        for g in range(4):
            t_from, g_from = divmod(g * 6 + t, 4)
            assert torch.equal(found[place(t, g)], x[place(t_from, g_from)])


@torch.no_grad()
def test_whole_networks_are_scrambled(checkpoint):
    small = {"img_size": 32, "channels": (8, 16), "blocks": (1, 1), "share_sets": (2, 4), "num_classes": 5}
    ours = randomise_norms(RepMLPNet(**small)).eval()
    x = torch.randn(2, 3, 32, 64)
    assert torch.equal(ours(x[..., :32]), scrambled(ours)(x[..., :32]))
    assert not torch.allclose(ours(x), scrambled(ours)(x))
    net, _ = load_model(checkpoint)
    assert not torch.allclose(net(x), scrambled(net)(x))


def test_the_picture_of_it(checkpoint, camvid, tmp_path, capsys):
    scrambled_partition.main([str(checkpoint), str(camvid), str(tmp_path / "out.png")])
    printed = capsys.readouterr().out
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.width > 1000
    from repmlp.models.upernet import predict

    data = build_segmentation_data(
        {"name": "camvid", "root": camvid, "crop_size": [32, 32], "workers": 0}, batch_size=1, seed=0
    )
    data.setup()
    net, pairs = load_model(checkpoint)[0], [data.items(train=False)[i] for i in (0, 3)]
    for form, words in ((net, "prediction"), (scrambled(net), "scrambled partitions")):
        with torch.no_grad():
            right = sum(int((predict(form, image[None]).argmax(1)[0] == mask).sum()) for image, mask in pairs)
        share = 100 * right / sum(int((mask != 255).sum()) for _, mask in pairs)
        assert f"{words}, {share:.1f} % of the pixels" in printed
