"""PSPNet: counts to the printed digit, the head against its definition, weights from a classifier, merging."""

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import randomise_norms
from timm.models.resnet import Bottleneck, ResNet
from torch import nn

import repmlp
from repmlp import RepMLPResNet, fold_batch_norms, load_older_backbone
from repmlp.cost import count_macs, count_params
from repmlp.models.pspnet import PSPNet, PyramidPooling, build_pspnet
from repmlp.models.repmlp_partitions import map_sizes
from repmlp.older_key_names import to_older

REPMLP = {"encoder": "repmlp_res50_g4_8_320", "arguments": {"global_reductions": (4, 8)}}
# a network whose classifier sees 56 pixels, and whose backbone sees 80 with an output stride of 8
NARROW = {"layers": (2, 2, 2, 2), "channels": (16, 16, 32, 64), "partition": 2, "kernels": (1,), "groups": 2}


def test_counts_are_the_printed_ones():
    with torch.device("meta"):
        resnet = build_pspnet().eval()
        net = build_pspnet(**REPMLP, kernels=(1, 3, 5, 7)).eval()
    assert count_macs(resnet, 713) == 350_004_969_152  # printed: 350,004M
    folded = fold_batch_norms(resnet)
    assert count_params(folded) == 46_562_451  # printed: 46.56M
    assert count_macs(folded, 713) == count_macs(resnet, 713)
    merged = fold_batch_norms(net)
    assert (count_params(merged), round(count_macs(merged, 713) / 1e9, 2)) == (175_411_307, 342.70)
    assert count_macs(merged, 713) < count_macs(resnet, 713)  # the paper: fewer FLOPs
    assert map_sizes(net.backbone, 713)["c4"] == (90, 90)
    assert [net.backbone.layer2[1].repmlp.partitions, net.backbone.layer3[1].repmlp.partitions] == [(9, 9), (9, 9)]
    # dilation in c5 alone: every convolution of c3 and c4 but its first block's stride is dense
    dilations = {layer: {m.dilation for m in getattr(net.backbone, layer).modules() if isinstance(m, nn.Conv2d)}
                 for layer in ("layer2", "layer3", "layer4")}  # fmt: skip
    assert dilations["layer2"] == dilations["layer3"] == {(1, 1)} and max(dilations["layer4"]) > (1, 1)


@torch.no_grad()
def test_pooling_is_the_definition():
    pooling = randomise_norms(PyramidPooling(8, (1, 2))).double().eval()
    x = torch.randn(2, 8, 6, 4, dtype=torch.float64)
    out = pooling(x)
    assert torch.equal(out[:, :8], x)
    for i, cells in enumerate((1, 2)):
        conv, norm = pooling.convs[i][0], pooling.convs[i][1]
        blocks = x.view(2, 8, cells, 6 // cells, cells, 4 // cells).mean(dim=(3, 5))
        y = norm(torch.einsum("oi,nihw->nohw", conv.weight[:, :, 0, 0], blocks)).relu()
        expected = F.interpolate(y, size=(6, 4), mode="bilinear")
        torch.testing.assert_close(out[:, 8 + 4 * i : 12 + 4 * i], expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"bins=\[1, 2, 3\]: 3 grids do not divide 8 channels"):
        PyramidPooling(8, (1, 2, 3))


def narrow(**kwargs) -> PSPNet:
    backbone = RepMLPResNet(**NARROW, img_size=80, output_stride=8, num_classes=0, global_pool="", **kwargs)
    return PSPNet(backbone, 5, channels=8)


@torch.no_grad()
def test_forms_compute_the_same():
    model = randomise_norms(narrow()).double().eval()
    x = torch.randn(1, 3, 80, 80, dtype=torch.float64)
    expected = model(x)
    assert expected.shape == (1, 5, 80, 80)
    merged = timm.utils.reparameterize_model(model)
    for form in (merged, repmlp.deploy(model), fold_batch_norms(merged)):
        assert float((form(x) - expected).norm() / expected.norm()) < 1e-12
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in repmlp.deploy(model).modules())
    assert not any("local_perceptron" in name for name in merged.state_dict())


def test_every_parameter_gets_a_gradient():
    model = randomise_norms(narrow())
    model(torch.randn(2, 3, 80, 80)).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("foreign", [False, True])
@torch.no_grad()
def test_backbone_from_a_classifier(foreign):
    """FC1 and FC2 are fresh, everything else is the classifier's; c5 has no RepMLP here."""
    classifier = randomise_norms(RepMLPResNet(**NARROW, img_size=56, num_classes=3))
    weights = to_older(classifier.state_dict()) if foreign else classifier.state_dict()
    backbone = narrow().backbone
    fresh = load_older_backbone(backbone, weights)
    gates = [f"{layer}.1.repmlp.global_perceptron" for layer in ("layer2", "layer3")]
    assert fresh == [f"{gate}.{fc}" for gate in gates for fc in ("fc1", "fc2")]
    state, own = classifier.state_dict(), backbone.state_dict()
    assert all(torch.equal(own[n], state[n]) for n in own if not n.startswith(tuple(fresh)))
    assert backbone(torch.zeros(1, 3, 80, 80)).shape[1] == 256
    # from one partition each: the Global Perceptron as a whole
    one = RepMLPResNet(**{**NARROW, "stages": ("c3",), "groups": 2}, img_size=16, num_classes=3)
    target = RepMLPResNet(**{**NARROW, "stages": ("c3",), "groups": 2}, img_size=56, num_classes=0)
    assert load_older_backbone(target, one.state_dict()) == gates[:1]
    assert load_older_backbone(one, one.state_dict()) == []


def test_backbones_that_do_not_fit():
    classifier = RepMLPResNet(**NARROW, img_size=56, num_classes=3)
    before = {n: t.clone() for n, t in classifier.state_dict().items()}
    other = RepMLPResNet(**{**NARROW, "kernels": (1, "1x3"), "partition": 3}, img_size=56, num_classes=0)
    with pytest.raises(ValueError, match=r"layer2\.1\.repmlp\.partition_perceptron\.weight is \(2, 16, 16\) there"):
        load_older_backbone(other, classifier.state_dict())
    with pytest.raises(ValueError, match=r"convs\.1\.weight is missing there"):
        load_older_backbone(classifier, RepMLPResNet(**{**NARROW, "kernels": ()}, img_size=56).state_dict())
    with pytest.raises(ValueError, match=r"layer3\.1\.conv2\.weight is \(8, 32, 3, 3\) there"):
        target = RepMLPResNet(**{**NARROW, "stages": "c3"}, img_size=56, num_classes=0)
        weights = classifier.state_dict()
        load_older_backbone(target, weights)
    assert all(torch.equal(t, before[n]) for n, t in classifier.state_dict().items())
    with pytest.raises(TypeError, match="got PSPNet"):
        load_older_backbone(narrow(), {})


def test_any_resnet_will_do():
    with torch.device("meta"):
        backbone = ResNet(Bottleneck, (1, 1, 1, 1), output_stride=16, num_classes=0, global_pool="")
        net = PSPNet(backbone, 4)
        assert tuple(net(torch.empty(2, 3, 64, 96)).shape) == (2, 4, 64, 96)
