"""The kernel explorer: its numbers against independent ones, its page in a real browser."""

import importlib
import io
import math
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from bokeh.palettes import Viridis256
from conftest import ROOT, randomise_norms
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageColor

from repmlp import InjectedLinear, SetSharingFC, kernels
from repmlp.checkpoints import Checkpoint, save_model, to_official
from repmlp.locality import kernel_map, locality_profile, network_profiles
from repmlp.models.build import build_model
from repmlp.repmlp_block import PartitionPerceptron

sys.path.insert(0, str(ROOT / "analysis"))
codes = importlib.import_module("explorer.codes")
collect = importlib.import_module("explorer.collect")
explore_kernels = importlib.import_module("explore_kernels")

CONFIG = {
    "name": "mixed", "arch": "repmlpnet", "img_size": 32, "stem_stride": 2, "channels": [8, 16], "blocks": [1, 2],
    "share_sets": [2, 4], "kernels": [1, "1x3", "3d2", "3s"],
}  # fmt: skip
LAYER, SET, POINT = "stages.0.0.block.channel_perceptron", 1, (6, 9)  # a 16x16 map
FAR, WEIGHT = (14, 2), -0.3141  # a cell that no branch sees from the point, and its weight


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    model = randomise_norms(build_model(CONFIG, 10)).eval()
    layer = model.get_submodule(LAYER)
    assert not layer.local_perceptron.taps(POINT)[FAR]
    with torch.no_grad():
        layer.norm.reset_running_stats()
        layer.norm.weight.fill_(1)
        layer.norm.eps = 0.0  # so that the FC's own weights are the merged kernel's
        layer.weight[SET, POINT[0] * 16 + POINT[1], FAR[0] * 16 + FAR[1]] = WEIGHT
    return model


@pytest.fixture(scope="module")
def page_file(net, tmp_path_factory):
    path = tmp_path_factory.mktemp("explorer") / "page.html"
    path.write_text(explore_kernels.build(Checkpoint(net, CONFIG, {}), "a test").html(), encoding="utf-8")
    return path


# ---- numbers


@given(arrays(np.float32, st.integers(1, 60), elements=st.floats(-(2.0**20), 2.0**20, width=32)))
@settings(deadline=None)
def test_a_code_is_within_half_a_step_of_its_weight(weights):
    written, base = codes.quantise(weights)
    found = codes.restore(written, base)
    large = np.abs(weights) > 1e-13 * np.abs(weights).max()
    assert np.all(np.abs(found[large] / weights[large].astype(np.float64) - 1) <= math.expm1(codes.STEP / 2) + 1e-12)
    assert np.all(np.abs(found[~large]) <= 1e-13 * np.abs(weights).max())
    assert np.all(found[weights == 0] == 0)


def test_half_a_step_is_less_than_half_a_colour():
    """256 colours over a factor of e or more on the logarithmic scale, over the largest magnitude on the linear one."""
    assert codes.STEP * len(Viridis256) < math.log(math.e)
    assert math.expm1(codes.STEP) * len(Viridis256) < 1


@given(arrays(np.int16, st.integers(1, 500)))
@settings(deadline=None)
def test_packed_numbers_come_back(numbers):
    text = codes.pack(numbers)
    np.testing.assert_array_equal(codes.unpack(text), numbers)
    assert len(text) <= codes.packed_limit(len(numbers))


def test_noise_packs_within_the_limit():
    numbers = np.random.default_rng(0).integers(-(2**15), 2**15, 100_000).astype(np.int16)
    assert 0.9 * codes.packed_limit(len(numbers)) < len(codes.pack(numbers)) <= codes.packed_limit(len(numbers))


def test_weights_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        codes.quantise(np.array([1.0, np.nan]))


LAYERS = {
    "all kinds": lambda: SetSharingFC((6, 5), 2, [1, 3, "1x3", "3x1", "3d2", "3s"]),
    "plain": lambda: SetSharingFC((4, 7), 3, [5]),
    "sequence": lambda: InjectedLinear((9,), [1, 3, "3d2"]),
    "group-wise": lambda: PartitionPerceptron(4, 6, (5, 4), 2, [1, 3, "1x3", "3s"]),
    "none": lambda: SetSharingFC((3, 3), 1),
}


def impulse_response(layer, part, position, channel, channels):
    """What comes out of a layer, or of its branches, for one cell of one channel: float64, the constant taken off."""
    maps = torch.zeros(2, channels, *layer.size, dtype=torch.float64)
    maps[1, channel].view(-1)[position] = 1
    on_tokens = isinstance(part, InjectedLinear)  # (N, C, h*w)
    out = part(maps.flatten(2) if on_tokens else maps)
    # (channels, h, w) or (channels, h*w) -> (channels, h*w)
    return (out[1] - out[0]).flatten(1)


@pytest.mark.parametrize("kind", LAYERS)
def test_kernels_are_what_the_layer_computes(kind):
    """Columns of all three matrices against the response to a single cell: torch's own linear layer, conv and norm."""
    layer = randomise_norms(LAYERS[kind]()).double().eval()
    grouped = isinstance(layer, PartitionPerceptron)
    inputs = layer.in_channels if grouped else layer.share_sets
    sets = list(collect.kernel_sets(layer))
    assert len(sets) == (4 * 2 if grouped else layer.share_sets)
    for number, kernel in enumerate(sets):
        out, source = (divmod(number, 2)) if grouped else (number, number)
        if grouped:
            assert kernel.label == f"output channel {out}, input channel {source} of its group"
            source += out // 3 * 2  # three output and two input channels a group
        for position in (0, 7):
            merged = impulse_response(layer, layer, position, source, inputs)[out]
            branches = torch.zeros_like(merged)
            if layer.local_perceptron is not None:
                branches = impulse_response(layer, layer.local_perceptron, position, source, inputs)[out]
            torch.testing.assert_close(kernel.merged[:, position], merged, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(kernel.branches[:, position], branches, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(kernel.fc[:, position], merged - branches, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", LAYERS)
def test_taps_are_those_of_every_branch(kind):
    layer = LAYERS[kind]()
    taps = kernels.Taps.of(layer)
    ends = taps.counts.cumsum()
    for p, end in enumerate(ends):
        seen = set(taps.cells[end - taps.counts[p] : end].tolist())
        point = divmod(p, layer.size[1])
        if kind == "group-wise":
            # a cell is seen where the branches of random numbers give it a weight
            kernel = next(collect.kernel_sets(layer))
            expected = kernel.branches[p].nonzero().flatten().tolist()
        elif layer.local_perceptron is None:
            expected = []
        else:
            expected = layer.local_perceptron.taps(point).flatten().nonzero().flatten().tolist()
        assert seen == set(expected)


def test_a_described_layer_holds_every_weight(net):
    """Unpacked as the page does it: FC everywhere, branches and merged kernel at the taps, all to 0.05 %."""
    layer = net.get_submodule(LAYER)
    about, texts = collect.describe_layer(LAYER, layer, network_profiles(net)[0])
    taps, numbers = codes.unpack(texts[0]), codes.unpack(texts[1 + SET])
    counts, cells = taps[:256], taps[256:]
    rows = np.repeat(np.arange(256), counts)
    kernel = list(collect.kernel_sets(layer))[SET]
    parts = np.split(codes.restore(numbers, about["sets"][SET]["base"]), [256 * 256, 256 * 256 + len(cells)])
    for found, matrix in zip(parts, (kernel.fc.flatten(), *(m[rows, cells] for m in kernel[2:])), strict=True):
        np.testing.assert_allclose(found, matrix.numpy(), rtol=codes.STEP)
    elsewhere = torch.ones(256, 256, dtype=torch.bool)
    elsewhere[rows, cells] = False
    assert torch.equal(kernel.merged[elsewhere], kernel.fc[elsewhere]) and not kernel.branches[elsewhere].any()
    assert about["title"] == "stage 1, block 1" and about["branches"] == "1x1 + 1x3 + 3x3d2 + 3x3s"
    assert about["reach"] == 2


def test_names_of_layers():
    names = ["stages.2.9.block.channel_perceptron", "blocks.3.linear_tokens", "trunk.mix", "layer3.1.repmlp.mix"]
    titles = ["stage 3, block 10", "block 4", "trunk.mix", "stage 3, block 2"]
    assert [kernels.layer_title(name) for name in names] == titles
    assert collect.default_layer([*names[1:3], names[0]]) == names[0]
    assert collect.default_layer(["a", "b", "c", "d"]) == "b"


def large_net(variant: str) -> dict:
    with torch.device("meta"):
        return kernels.spatial_layers(build_model({"arch": "timm", "variant": variant, "kernels": [1, 3]}, 10))


def test_the_cifar_net_fits_and_of_a_large_net_the_papers_block_is_chosen():
    config = {"arch": "repmlpnet", "channels": [128, 256], "blocks": [6, 6], "share_sets": [8, 32], "stem_stride": 2}
    with torch.device("meta"):
        layers = kernels.spatial_layers(build_model({**config, "img_size": 32, "kernels": [1, 3]}, 100))
    assert collect.choose_layers(layers, None) == list(layers) and len(layers) == 12
    large = large_net("repmlpnet_d256")
    assert collect.choose_layers(large, None) == ["stages.2.9.block.channel_perceptron"]
    assert collect.choose_layers(large, "4") == ["stages.2.0.block.channel_perceptron"]
    with pytest.raises(ValueError, match=r"layer stages\.0\.0\.\S+ has 1 kernels of 4096 x 4096 weights: up to 47 MB"):
        collect.choose_layers(large, "0")
    with pytest.raises(ValueError, match="layer '99' does not exist: give a number from 0 to 23, or a name such as st"):
        collect.choose_layers(large, "99")


def test_the_profile_of_a_net_is_the_mean_over_its_layers(net):
    profiles = network_profiles(net)
    assert [len(each["injected"]) for each in profiles] == [16, 8, 8]
    mean = collect.net_profile(profiles)["merged"]
    assert mean[3] == pytest.approx(np.mean([each["injected"][3] for each in profiles]))
    assert mean[9] == pytest.approx((profiles[0]["injected"][9] + 2) / 3) and mean[-1] == pytest.approx(1)


def test_the_page_without_weights_is_as_small_as_is_counted_on(page_file):
    text = page_file.read_text()
    numbers = re.findall(r'<script type="text/plain" id="numbers-\S+">(.*?)</script>', text)
    assert len(numbers) == 3 + 2 + 4 + 4  # taps of three layers, and their share-sets
    assert len(text.encode()) - sum(map(len, numbers)) <= collect.PAGE_BYTES


def test_the_command_writes_a_page_and_says_where(net, tmp_path, capsys):
    save_model(tmp_path / "small.safetensors", net, CONFIG)
    checkpoint = str(tmp_path / "small.safetensors")
    explore_kernels.main(["--checkpoint", checkpoint, "--outputs", str(tmp_path), "--layer", "1"])
    written = tmp_path / "explorer/small.html"
    assert capsys.readouterr().out.startswith(f"{written}  (")
    assert "holds 1 of the net" in re.sub(r"\s+", " ", written.read_text()) and str(tmp_path) not in written.read_text()
    for arguments, words in (
        ([checkpoint, "--layer", "7"], "error: layer '7' does not exist: give a number from 0 to 2"),
        (["--study", "none", "--results", str(tmp_path)], "error: no weights of study 'none'"),
        (["--checkpoint", "/none.safetensors"], "error: no checkpoint at /none.safetensors"),
        ([checkpoint, "--output", str(tmp_path)], "error: .*[Ii]s a directory"),
    ):
        with pytest.raises(SystemExit, match=words):
            explore_kernels.main(arguments)
    for arguments in ([], [checkpoint, "--study", "s"]):
        with pytest.raises(SystemExit):
            explore_kernels.main(arguments)
        assert "name one of" in capsys.readouterr().err


def test_published_weights_are_explored_too(tmp_path, capsys):
    model = build_model({**CONFIG, "kernels": [1, 3]}, 10).eval()
    torch.save(to_official(model.state_dict()), tmp_path / "published.pth")
    explore_kernels.main([str(tmp_path / "published.pth"), "--output", str(tmp_path / "page.html")])
    assert capsys.readouterr().out.startswith(str(tmp_path / "page.html"))
    assert "Weights: published.pth." in (tmp_path / "page.html").read_text()


# ---- the page in a browser


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
    known = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next(filter(None, map(shutil.which, known)), None)
    with playwright.sync_playwright() as driver:
        if path is None and not Path(driver.chromium.executable_path).exists():
            pytest.skip("no Chromium here: apt-get install chromium, or playwright install chromium")
        root = hasattr(os, "geteuid") and os.geteuid() == 0  # whom Chromium's sandbox refuses
        started = driver.chromium.launch(executable_path=path, args=["--no-sandbox"] if root else [])
        yield started
        started.close()


@pytest.fixture
def view(browser, page_file):
    """Open the page; whatever it complains of or asks of a network fails the test."""
    complaints, opened = [], []

    def open_page(link: str = "", width: int = 1300):
        context = browser.new_context(viewport={"width": width, "height": 900}, offline=True)
        opened.append(context)
        page = context.new_page()
        page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request", lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else complaints.append(r.url)
        )
        page.goto(page_file.as_uri() + link)
        page.wait_for_selector("body[data-ready=yes]")
        return page

    yield open_page
    for context in opened:
        context.close()
    assert not complaints


LINK = f"#layer={LAYER}&set={SET}&point={POINT[0]},{POINT[1]}"
MAPS = ("fc", "branches", "merged", "picker")


def cells_at(page, name: str, cells) -> list[tuple[float, float]]:
    """Return where on the screen cells of a map on 16x16 have their middle."""
    chart = page.locator("section .bk-Figure").nth(MAPS.index(name))
    chart.scroll_into_view_if_needed()
    frame = chart.bounding_box()
    border = 2  # min_border of page.py's maps
    step = [(length - 2 * border) / 16 for length in (frame["width"], frame["height"])]
    return [(frame["x"] + border + (x + 0.5) * step[0], frame["y"] + border + (y + 0.5) * step[1]) for y, x in cells]


def cell_at(page, name: str, cell: tuple[int, int]) -> tuple[float, float]:
    return cells_at(page, name, [cell])[0]


def point_of(page) -> tuple[int, int]:
    return int(page.input_value("#row")), int(page.input_value("#column"))


def number_in(page, panel: str) -> float:
    return float(page.inner_text(f"#value-{panel}"))


def move_to(page, cell) -> None:
    """Wait for the view of another point: unpacking takes a moment."""
    page.wait_for_function(
        f"document.getElementById('summary').textContent.includes('row {cell[0]}, column {cell[1]}')"
    )


def merged_rows(net) -> dict[str, torch.Tensor]:
    kernel = list(collect.kernel_sets(net.get_submodule(LAYER)))[SET]
    return {name: getattr(kernel, name)[POINT[0] * 16 + POINT[1]] for name in ("fc", "branches", "merged")}


def test_it_shows_the_right_numbers(view, net):
    page, rows = view(LINK), merged_rows(net)
    assert number_in(page, "merged") == pytest.approx(float(rows["merged"][POINT[0] * 16 + POINT[1]]), rel=6e-3)
    page.mouse.move(*cell_at(page, "fc", FAR))
    page.wait_for_function("document.getElementById('value-branches').textContent === 'no branch'")
    assert page.inner_text("#value-fc") == page.inner_text("#value-merged") == "-0.314"
    assert page.locator(".cell").first.inner_text() == "row 14, column 2 (8 down, 7 left)"
    words = "row 14, column 2 (8 down, 7 left)"
    page.locator(".bk-Tooltip", has_text=words).filter(has_text="FC alone: -0.314").first.wait_for()
    taps = net.get_submodule(LAYER).local_perceptron.taps(POINT)
    assert taps.sum() >= 15
    for y, x in taps.nonzero().tolist()[::4]:
        page.mouse.move(*cell_at(page, "merged", (y, x)))
        page.wait_for_function(f"document.querySelector('.cell').textContent.startsWith('row {y}, column {x} ')")
        for panel, row in rows.items():
            assert number_in(page, panel) == pytest.approx(float(row[y * 16 + x]), rel=6e-3)


@pytest.mark.parametrize("scale", ["log", "linear"])
def test_it_draws_the_right_colours(view, net, scale):
    """Every cell has the colour of its weight, on one scale for all three maps."""
    page, rows = view(f"{LINK}&scale={scale}"), merged_rows(net)
    page.wait_for_timeout(300)  # until it is painted
    # near a corner of the cell, where no mark is
    corners = [(y - 0.27, x - 0.27) for y in range(16) for x in range(16)]
    spots = {panel: cells_at(page, panel, corners) for panel in rows}
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    palette = np.array([ImageColor.getrgb(colour) for colour in Viridis256], dtype=int)
    magnitudes = torch.cat(list(rows.values())).abs()
    low, high = magnitudes[magnitudes > 0].min(), magnitudes.max()
    taps = net.get_submodule(LAYER).local_perceptron.taps(POINT).flatten()
    for panel, row in rows.items():
        found = np.array([picture.getpixel((round(x), round(y))) for x, y in spots[panel]], dtype=int)
        drawn = torch.ones(256, dtype=torch.bool) if panel != "branches" else taps
        assert np.all(found[~drawn.numpy()] == (236, 236, 236))
        values = row.abs()
        place = (values.clamp_min(low) / low).log() / (high / low).log() if scale == "log" else values / high
        expected = (place * 256).long().clamp_max(255)[drawn].numpy()
        apart = np.abs(found[drawn.numpy()][:, None] - palette[None]).sum(-1)  # (cells, 256 colours)
        assert apart.min(1).max() <= 6
        assert np.abs(apart.argmin(1) - expected).max() <= 2


def test_keys_clicks_and_fields_move_the_point(view):
    page = view(LINK)
    page.keyboard.press("ArrowDown")
    move_to(page, (7, 9))
    page.keyboard.press("ArrowLeft")
    move_to(page, (7, 8))
    assert "point=7,8" in page.url
    for _ in range(20):
        page.keyboard.press("ArrowUp")
    move_to(page, (0, 8))
    page.mouse.click(*cell_at(page, "branches", (12, 3)))
    move_to(page, (12, 3))
    assert point_of(page) == (12, 3)
    page.fill("#row", "5")
    page.locator("#row").blur()
    move_to(page, (5, 3))
    page.fill("#row", "16")  # outside: as it was
    page.locator("#row").blur()
    assert point_of(page) == (5, 3)
    page.focus("#set")
    page.keyboard.press("ArrowUp")  # in a list the keys choose within it
    page.wait_for_function("location.hash.includes('set=0')")
    assert point_of(page) == (5, 3)


def test_passing_over_the_map_of_points_is_a_look(view):
    page = view(LINK)
    before = page.inner_text("#summary")
    page.mouse.move(*cell_at(page, "picker", (2, 13)))
    move_to(page, (2, 13))
    assert "point=6,9" in page.url
    page.mouse.move(1, 1)
    page.wait_for_function(f"document.getElementById('summary').textContent === {before!r}")
    page.mouse.click(*cell_at(page, "picker", (2, 13)))
    page.wait_for_function("location.hash.includes('point=2,13')")
    page.mouse.move(1, 1)
    move_to(page, (2, 13))


def test_a_link_restores_the_view(view):
    page = view()
    page.select_option("#layer", index=0)
    page.wait_for_function("location.hash.includes('layer=stages.0.0')")
    page.select_option("#set", "1")
    page.check("input[name=scale][value=linear]")
    page.check("input[name=span][value=set]")
    page.mouse.click(*cell_at(page, "fc", (15, 0)))
    move_to(page, (15, 0))
    page.mouse.move(1, 1)
    link = page.url[page.url.index("#") :]
    assert link == f"#layer={LAYER}&set=1&point=15,0&scale=linear&colours=set"
    again = view(link)
    assert again.url == page.url and again.inner_text("main") == page.inner_text("main")
    assert again.is_checked("input[value=linear]") and again.is_checked("input[name=span][value=set]")
    again.evaluate(f"location.hash = {LINK!r}")
    move_to(again, POINT)
    assert again.is_checked("input[value=log]")


def test_a_link_to_what_is_not_there_says_so(view):
    page = view("#layer=none&set=0&point=99,0&scale=cubic")
    assert "asks for layer=none, point=99,0, scale=cubic, which" in page.inner_text("#notice")
    assert point_of(page) == (3, 3)
    assert not view(LINK).is_visible("#notice")


def test_it_counts_what_the_branches_do_not_see(view, net):
    page, rows = view(LINK), merged_rows(net)
    layer = net.get_submodule(LAYER)
    seen = layer.local_perceptron.taps(POINT)
    for panel in ("fc", "merged"):
        values = rows[panel].abs().view(16, 16)
        weakest = len(kernels.outside_stronger(values, seen))
        strongest = int((values[~seen] > values[seen].max()).sum())
        text = page.inner_text(f"#caption-{panel}")
        assert f"Of {256 - int(seen.sum())} cells" in text
        assert re.search(rf"{weakest} exceeds? the weakest that they see, {strongest} the strongest", text)
        drawn = page.evaluate(
            "name => Object.fromEntries(['strongest', 'weakest'].map((kind) => [kind, "
            "Bokeh.documents[0].get_model_by_name(`exceed-${kind}-${name}`).data.x.length]))",
            panel,
        )
        assert drawn == {"strongest": strongest, "weakest": min(weakest - strongest, 8)}


def test_its_shares_by_distance_are_those_of_the_library(view, net):
    page, rows = view(LINK), merged_rows(net)
    lines = page.evaluate(
        "['point', 'layer', 'net'].map((name) => Bokeh.documents[0].get_model_by_name(`profile-${name}`).data)"
    )
    profiles = network_profiles(net)
    for key, name in (("fc", "trained"), ("merged", "injected")):
        alone = torch.zeros(1, 256, 256, dtype=torch.float64)
        # every other row sees nothing: their part of the mean is 0
        alone[0, POINT[0] * 16 + POINT[1]] = rows[key]
        expected = 256 * np.array(locality_profile(alone, (16, 16)))
        np.testing.assert_allclose(np.array(lines[0][key]) / 100, expected, atol=1e-3)
        np.testing.assert_allclose(np.array(lines[1][key]) / 100, profiles[0][name], atol=1e-5)
        np.testing.assert_allclose(np.array(lines[2][key]) / 100, collect.net_profile(profiles)[key], atol=1e-9)
        assert f"{100 * expected[2]:.{1 if expected[2] < 0.0995 else 0}f} %" in page.inner_text(
            f"#caption-{key}"
        ).replace("\xa0", " ")


def test_the_picture_is_the_papers_but_for_a_constant(net):
    """log |w|, which the page's logarithmic colours are of, against Appendix A's log(|w| / min |W|)."""
    kernel = list(collect.kernel_sets(net.get_submodule(LAYER)))[SET]
    paper = kernel_map(kernel.merged[None], (16, 16), 0, POINT).flatten()
    constant = paper - kernel.merged[POINT[0] * 16 + POINT[1]].abs().log()
    assert float(constant.max() - constant.min()) < 1e-9


def test_a_browser_that_cannot_draw_it_says_so(browser, page_file):
    page = browser.new_page()
    page.add_init_script("delete globalThis.DecompressionStream")
    page.goto(page_file.as_uri())
    page.wait_for_function("!document.getElementById('notice').hidden")
    assert "needs a browser of 2023 or later" in page.inner_text("#notice")
    page.close()


@pytest.mark.parametrize("kind", ["group-wise", "sequence", "none", "one cell"])
def test_other_layers_are_drawn_too(browser, tmp_path, kind):
    """No complaint, and the right number, whatever the layer's map and branches."""
    model = SetSharingFC((1, 1), 1, [1]) if kind == "one cell" else LAYERS[kind]()
    net = torch.nn.Sequential(torch.nn.Identity(), model).eval()
    path = tmp_path / "page.html"
    path.write_text(explore_kernels.build(Checkpoint(net, {}, {}), "a test").html(), encoding="utf-8")
    page, complaints = browser.new_page(), []
    page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(path.as_uri())
    page.wait_for_selector("body[data-ready=yes]")
    p = point_of(page)[0] * model.size[1] + point_of(page)[1]
    kernel = next(iter(collect.kernel_sets(model)))
    assert number_in(page, "merged") == pytest.approx(float(kernel.merged[p, p]), rel=6e-3)
    page.keyboard.press("ArrowRight")
    page.check("input[value=linear]")
    page.wait_for_function("location.hash.includes('linear')")
    assert page.inner_text("#value-branches") == "no branch" or model.local_perceptron is not None
    page.close()
    assert not complaints


def test_it_fits_a_telephone(view):
    page = view(LINK, width=375)
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 375
    for name in ("fc", "merged"):
        assert page.locator("section .bk-Figure").nth(MAPS.index(name)).bounding_box()["width"] > 300
    page.mouse.click(*cell_at(page, "merged", (1, 1)))
    move_to(page, (1, 1))
