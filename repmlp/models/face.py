"""Networks for face recognition at 96x96 pixels: FaceResNet, the same with RepMLP blocks, and MobileFaceNet.

Paper: RepMLP (arXiv 2105.01883), Section 4.3. `import repmlp` registers them with timm. They end in an embedding, a
linear layer on the pooled or flattened map: num_classes is its length. The paper says neither its length for the two
ResNets (0 by default: the pooled body) nor the sizes of the branches (1, 3, 5 are assumed).
"""

from __future__ import annotations

from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

from repmlp.models.registered import build_registered
from repmlp.models.repmlp_resnet import RepMLPResNet, checkpoint_filter_fn, in_our_names
from repmlp.tracing import readable

# widths 128 to 1024, 3x3 convolutions as wide as the block: timm multiplies channels by 4, and by base_width / 64
FACE_RESNET = {"layers": (3, 2, 2, 2), "channels": (32, 64, 128, 256), "base_width": 256}
# expansion, width, blocks, stride of the first
MOBILE_FACE_BLOCKS = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1))


class InvertedResidual(nn.Sequential):
    """1x1 to more channels, 3x3 depth-wise, 1x1 without activation; batch norms, PReLU; x + that where shapes agree.

    expansion: of the channels in between. stride: of the depth-wise convolution.
    Input (N, C, H, W), output (N, O, ceil(H/stride), ceil(W/stride)).
    """

    def __init__(self, in_channels: int, out_channels: int, expansion: int, stride: int):
        hidden = in_channels * expansion
        super().__init__(
            *_conv_bn(in_channels, hidden, 1),
            nn.PReLU(hidden),
            *_conv_bn(hidden, hidden, 3, stride, 1, hidden),
            nn.PReLU(hidden),
            *_conv_bn(hidden, out_channels, 1),
        )
        self.shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self:  # not nn.Sequential's own forward(), which TorchScript does not find
            y = layer(y)
        return x + y if self.shortcut else y


class MobileFaceNet(nn.Module):
    """MobileFaceNet for 96x96 pixels, which the older paper compares its face network with.

    Paper: RepMLP Section 4.3. 3x3 convolution with stride 2, 3x3 depth-wise one, inverted residuals
    (MOBILE_FACE_BLOCKS), 1x1 convolution to 512 channels, a depth-wise one over the whole 6x6 map without activation,
    1x1 convolution to the embedding.

    num_classes: length of the embedding. in_chans: channels of the image.
    Input (N, in_chans, 96, 96), output (N, num_classes).
    """

    def __init__(self, num_classes: int = 128, in_chans: int = 3):
        super().__init__()
        self.num_classes, self.in_chans, self.num_features = num_classes, in_chans, 512
        layers = [*_conv_bn(in_chans, 64, 3, 2, 1), nn.PReLU(64), *_conv_bn(64, 64, 3, 1, 1, 64), nn.PReLU(64)]
        channels = 64
        for expansion, width, repeats, stride in MOBILE_FACE_BLOCKS:
            for i in range(repeats):
                layers.append(InvertedResidual(channels, width, expansion, stride if i == 0 else 1))
                channels = width
        layers += [*_conv_bn(channels, 512, 1), nn.PReLU(512), *_conv_bn(512, 512, 6, groups=512)]
        self.body = nn.Sequential(*layers)
        self.embedding = nn.Sequential(*_conv_bn(512, num_classes, 1))

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, 96, 96) -> (N, 512, 1, 1)."""
        return self.body(x)

    @readable
    def forward(self, x: Tensor) -> Tensor:
        # (N, num_classes, 1, 1) -> (N, num_classes)
        return self.embedding(self.forward_features(x)).flatten(1)


def _conv_bn(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, padding: int = 0, groups: int = 1
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(out_channels)


def _cfg(first_conv: str, classifier: str, num_classes: int, fixed: bool) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": num_classes,
        "input_size": (3, 96, 96),
        "pool_size": (3, 3),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": first_conv,
        "classifier": classifier,
        "fixed_input_size": fixed,
        "license": "mit",
    }


default_cfgs = generate_default_cfgs(
    {
        "faceresnet_96": _cfg("conv1", "fc", 0, False),
        "repmlp_faceres_96": _cfg("conv1", "fc", 0, True),
        "mobilefacenet_96": _cfg("body.0", "embedding.0", 128, False),
    }
)


@register_model
def faceresnet_96(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """FaceResNet: the body has 30.84M parameters and 0.998 G MACs, batch norms folded."""
    arguments = {"block": Bottleneck, **FACE_RESNET, "num_classes": 0, **kwargs}
    return build_registered(ResNet, "faceresnet_96", pretrained, **arguments)


@register_model
def repmlp_faceres_96(pretrained: bool = False, **kwargs: Any) -> RepMLPResNet:
    """RepMLP-FaceRes, r = 2 and g = 4 in c2, c3 and c4: 64.78M parameters, 1.088 G MACs, batch norms folded."""
    blocks = {"stages": ("c2", "c3", "c4"), "reductions": 2, "groups": 4, "partition": 6}
    return build_registered(
        RepMLPResNet,
        "repmlp_faceres_96",
        pretrained,
        in_our_names,
        pretrained_filter_fn=checkpoint_filter_fn,
        **{**FACE_RESNET, **blocks, "num_classes": 0, **kwargs},
    )


@register_model
def mobilefacenet_96(pretrained: bool = False, **kwargs: Any) -> MobileFaceNet:
    """MobileFaceNet with an embedding of 128 numbers, as the older paper describes it."""
    return build_registered(MobileFaceNet, "mobilefacenet_96", pretrained, **kwargs)
