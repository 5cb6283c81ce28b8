"""UperNet: its parts, the prediction of whole images, the loss and the measures, and runs through the command."""

from itertools import pairwise

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import TINY_UPERNET, randomise_norms
from torch import nn

import repmlp
from repmlp.checkpoints import load_model, save_model
from repmlp.cost import count_macs
from repmlp.models import upernet as segmentation
from repmlp.models.build import build_model
from repmlp.models.upernet import distance_to_borders, predict
from repmlp.training.schedule import poly_with_warmup
from repmlp.training.segmenter import Segmenter, compare_merged_masks, pixel_metrics, summarise

RECIPE = {
    "epochs": 2, "warmup_epochs": 1, "lr_per_256": 0.01, "weight_decay": 0.1, "betas": [0.9, 0.999], "clip_norm": 5.0,
    "batch_size": 2, "label_smoothing": 0.0, "auxiliary_weight": 0.4, "window": None,
}  # fmt: skip


def tiny(**changes) -> nn.Module:
    return randomise_norms(build_model({**TINY_UPERNET, **changes}, num_classes=5)).eval()


def test_network_takes_and_gives_what_it_says():
    net = tiny()
    images = torch.randn(2, 3, 64, 96)
    logits, auxiliary = net.with_auxiliary(images)
    assert logits.shape == (2, 5, 64, 96) and auxiliary.shape == (2, 5, 4, 6)
    assert torch.equal(net(images), logits)
    assert isinstance(net.backbone, repmlp.RepMLPNet) and net.backbone.embed_kernel == 3
    assert net.backbone.stages[0][0].block.channel_perceptron.kernels == (1, 3)
    assert tiny(auxiliary_channels=0).with_auxiliary(images)[1] is None


def test_other_encoders_by_name():
    plain = {"kernels": [], "embed_kernel": None, "img_size": None, "arguments": None}
    for name in ("resnet10t", "convnext_atto"):  # maps from stride 2 and from stride 4
        net = tiny(encoder=name, **plain)
        assert net(torch.randn(1, 3, 64, 32)).shape == (1, 5, 64, 32)
    with pytest.raises(ValueError, match="resnet10t is no RepMLPNet"):
        tiny(encoder="resnet10t", **{**plain, "kernels": [3]})
    with pytest.raises(ValueError, match="no model 'repmlpnet_d255'"):
        tiny(encoder="repmlpnet_d255")
    with pytest.raises(ValueError, match=r"vit_tiny_patch16_224: .*maps of strides 4, 8, 16 and 32"):
        tiny(encoder="vit_tiny_patch16_224", **plain)


def test_compiling_reaches_what_training_runs():
    net = tiny()
    net.compile(backend="eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    net.with_auxiliary(torch.randn(1, 3, 64, 64))
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0


@pytest.mark.parametrize("kernels", [[1, 3], [1, "3s", "1x3"]])
def test_merging_through_the_wrapper_leaves_no_branch_and_the_same_logits(kernels):
    net = tiny(kernels=kernels).double()
    merged = timm.utils.reparameterize_model(net)
    images = torch.randn(2, 3, 96, 64, dtype=torch.float64)
    expected = net(images)
    assert float((merged(images) - expected).norm() / expected.norm()) < 1e-12
    left = [name for name, _ in merged.named_modules() if "local_perceptron" in name]
    assert not left and any("local_perceptron" in name for name, _ in net.named_modules())


def test_saved_networks_come_back(tmp_path):
    net = tiny()
    for form, model in (("trained", net), ("merged", timm.utils.reparameterize_model(net))):
        path = tmp_path / f"{form}.safetensors"
        save_model(path, model, {**TINY_UPERNET, "backbone": "0" * 64})
        again, _ = load_model(path)
        images = torch.randn(1, 3, 64, 64)
        assert torch.equal(again(images), model(images))


class Flip(nn.Module):
    """Logits that are the image's own first channels: what comes back shows what went in."""

    def forward(self, images):
        self.seen = tuple(images.shape)
        return torch.cat([images, -images], dim=1)


def test_images_of_any_size_are_padded_and_cropped_back():
    net = Flip()
    images = torch.randn(2, 3, 45, 64)
    assert torch.equal(predict(net, images)[:, :3], images) and net.seen == (2, 3, 64, 64)


@pytest.mark.parametrize("size", [(45, 64), (160, 224), (64, 96), (32, 32), (97, 33)])
@pytest.mark.parametrize("window", [(64, 64), (32, 96), (96, 32), (96, 96)])
def test_sliding_windows_cover_every_pixel(size, window):
    net = Flip()
    images = torch.randn(1, 3, *size)
    logits = predict(net, images, window)
    assert torch.allclose(logits[:, :3], images, atol=1e-6) and logits.shape == (1, 6, *size)
    assert net.seen[2] <= window[0] and net.seen[3] <= window[1]


def test_overlapping_windows_are_averaged():
    class Where(nn.Module):
        def forward(self, images):
            self.calls += 1
            return torch.full((1, 1, *images.shape[2:]), float(self.calls))

        calls = 0

    logits = predict(Where(), torch.zeros(1, 3, 64, 96), (64, 64))  # windows at 0 and 32
    assert logits[0, 0, 0].unique().tolist() == [1.0, 1.5, 2.0]
    for length, side in ((192, 64), (2048, 256), (1024, 512), (96, 96), (160, 128)):
        starts = segmentation._window_starts(length, side)
        assert starts[0] == 0 and starts[-1] == length - side and all(start % 32 == 0 for start in starts)
        assert all(0 < b - a <= side * 2 / 3 for a, b in pairwise(starts))
    with pytest.raises(ValueError, match="multiples of 32"):
        predict(Flip(), torch.zeros(1, 3, 64, 64), (60, 64))


def test_distance_to_borders_by_hand():
    assert distance_to_borders((4, 8), 4).tolist() == [
        [0] * 8,
        [0, 1, 1, 0, 0, 1, 1, 0],
        [0, 1, 1, 0, 0, 1, 1, 0],
        [0] * 8,
    ]
    assert distance_to_borders((8, 8), 8, (2, 0))[2, 4] == 3


def test_poly_schedule():
    values = [poly_with_warmup(step, 100, 10) for step in (0, 5, 10, 55, 100, 120)]
    assert values == pytest.approx([0, 0.5, 0.9, 0.45, 0, 0])


def test_loss_counts_labelled_pixels_alone_and_adds_the_auxiliary():
    net = tiny().double()
    module = Segmenter(net, RECIPE, 1, "abcde")
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    masks = torch.randint(0, 5, (2, 64, 64))
    masks[0, :, 20:] = 255
    logits, auxiliary = net.with_auxiliary(images)
    valid = masks != 255
    terms = []
    for each in (logits, F.interpolate(auxiliary, size=(64, 64), mode="bilinear")):
        log_p = each.log_softmax(dim=1).permute(0, 2, 3, 1)[valid]
        terms.append(-log_p[torch.arange(len(log_p)), masks[valid]].mean())
    loss = module.training_step((images, masks), 0)
    assert float(loss) == pytest.approx(float(terms[0] + 0.4 * terms[1]), rel=1e-12)
    assert float(module.training_step((images, torch.full_like(masks, 255)), 0)) == 0


def test_iou_by_hand():
    guess = torch.tensor([[0, 0, 1, 1, 2, 0]])
    masks = torch.tensor([[0, 1, 1, 1, 255, 255]])
    metrics = pixel_metrics(4)
    metrics.update(guess, masks)
    # class 0: 1 of 2, class 1: 2 of 3; what is guessed on void pixels counts nowhere, classes 2 and 3 occur nowhere
    found = summarise(metrics, ("a", "b", "c", "d"))
    assert found == pytest.approx(
        {"miou": 100 * (1 / 2 + 2 / 3) / 2, "pixel_accuracy": 75.0, "iou_a": 50.0, "iou_b": 200 / 3}
    )


def test_merged_and_trained_are_compared_pixel_by_pixel():
    net = tiny()
    batches = [(torch.randn(1, 3, 45, 64), torch.randint(0, 5, (1, 45, 64))) for _ in range(3)]
    found = compare_merged_masks(net, batches, "abcde")
    assert found["merge_error"] < 1e-5 and found["eval_pixels"] == 3 * 45 * 64
    assert found["miou_pct"] == pytest.approx(found["miou_merged_pct"], abs=0.5)
    guesses = torch.cat([predict(net, images).argmax(1) for images, _ in batches])
    masks = torch.cat([m for _, m in batches])
    iou = [((guesses == k) & (masks == k)).sum() / ((guesses == k) | (masks == k)).sum() for k in range(5)]
    assert list(found["class_iou_pct"].values()) == pytest.approx([100 * float(each) for each in iou], abs=1e-3)
    assert found["pixel_accuracy_pct"] == pytest.approx(100 * float((guesses == masks).float().mean()), abs=1e-3)


@pytest.mark.parametrize(
    ("encoder", "embed_kernel", "printed"),
    [("resnet101c", None, 2049.82), ("repmlpnet_d256", 3, 1960.01), ("repmlpnet_d256", 5, 1960.16)],
)
def test_macs_are_the_papers(encoder, embed_kernel, printed):
    config = {"arch": "upernet", "encoder": encoder, "embed_kernel": embed_kernel, "decoder_channels": 512}
    with torch.device("meta"):
        net = build_model(config, num_classes=19)
    assert count_macs(net, (1024, 2048)) / 1e9 == pytest.approx(printed, rel=0.005)
