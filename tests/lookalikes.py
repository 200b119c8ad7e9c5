"""Small models built as torchvision, timm and mit-han-lab build theirs: the same structure of
modules and names in the state_dict, a few channels. (Neither package is needed.)"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["LOOKALIKES", "randomised"]


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """In eval mode, with batch norms as after training."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 1.5),
                (module.weight, 0.6, 1.4),
                (module.bias, -0.3, 0.6),
            ):
                tensor.data.uniform_(low, high, generator=generator)
        elif isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            module.weight.data.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
    return model.eval()


# torchvision


class ConvNormActivation(nn.Sequential):
    def __init__(self, c_in, c_out, kernel=3, stride=1, groups=1, activation=nn.ReLU6):
        padding = (kernel - 1) // 2
        layers = [
            nn.Conv2d(c_in, c_out, kernel, stride, padding, groups=groups, bias=False),
            nn.BatchNorm2d(c_out),
        ]
        if activation is not None:
            layers.append(activation(inplace=True))
        super().__init__(*layers)


class InvertedResidual(nn.Module):
    def __init__(self, c_in, c_out, stride, expand):
        super().__init__()
        self.use_res_connect = stride == 1 and c_in == c_out
        hidden = c_in * expand
        layers = [ConvNormActivation(c_in, hidden, 1)] if expand != 1 else []
        layers += [
            ConvNormActivation(hidden, hidden, 3, stride, hidden),
            nn.Conv2d(hidden, c_out, 1, bias=False),
            nn.BatchNorm2d(c_out),
        ]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


class MobileNetV2(nn.Module):
    """torchvision.models.mobilenet_v2."""

    def __init__(self, classes=5):
        super().__init__()
        features = [ConvNormActivation(3, 8, 3, 2), InvertedResidual(8, 4, 1, 1)]
        features += [InvertedResidual(4, 8, 2, 6), InvertedResidual(8, 8, 1, 6)]
        features.append(ConvNormActivation(8, 20, 1))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(20, classes))

    def forward(self, x):
        return self._forward_impl(x)

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = nn.functional.adaptive_avg_pool2d(x, (1, 1))
        x = torch.flatten(x, 1)
        return self.classifier(x)


class BasicBlock(nn.Module):
    def __init__(self, c_in, c_out, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)  # for two places
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    def __init__(self, c_in, planes, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * 2, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * 2)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(
            nn.Conv2d(c_in, planes * 2, 1, stride, bias=False), nn.BatchNorm2d(planes * 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        identity = self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """torchvision.models.resnet18 / resnet50."""

    def __init__(self, bottleneck=False, classes=4):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        if bottleneck:
            self.layer1 = nn.Sequential(Bottleneck(8, 6))
            self.layer2 = nn.Sequential(Bottleneck(12, 8, 2))
        else:
            self.layer1 = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8))
            self.layer2 = nn.Sequential(BasicBlock(8, 16, 2))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        x = self.maxpool(x)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)


# timm


class BatchNormAct2d(nn.BatchNorm2d):
    """timm.layers.BatchNormAct2d: the activation in the norm, the forward its own."""

    def __init__(self, channels, act=nn.ReLU6, apply_act=True):
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = act(inplace=True) if apply_act else nn.Identity()

    def forward(self, x):
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps
        )
        return self.act(self.drop(x))


class DropPath(nn.Module):
    def forward(self, x):
        if not self.training:
            return x
        return x * torch.empty(x.shape[0], 1, 1, 1).bernoulli_(0.9)


class DepthwiseSeparableConv(nn.Module):
    def __init__(self, c_in, c_out, stride=1, pw_act=False):
        super().__init__()
        self.conv_dw = nn.Conv2d(c_in, c_in, 3, stride, 1, groups=c_in, bias=False)
        self.bn1 = BatchNormAct2d(c_in)
        self.aa = nn.Identity()
        self.se = nn.Identity()
        self.conv_pw = nn.Conv2d(c_in, c_out, 1, bias=False)
        self.bn2 = BatchNormAct2d(c_out, apply_act=pw_act)
        self.drop_path = nn.Identity()
        self.has_skip = False

    def forward(self, x):
        return self.bn2(self.conv_pw(self.se(self.aa(self.bn1(self.conv_dw(x))))))


class TimmInvertedResidual(nn.Module):
    def __init__(self, c_in, c_out, stride, expand):
        super().__init__()
        middle = c_in * expand
        self.has_skip = stride == 1 and c_in == c_out
        self.conv_pw = nn.Conv2d(c_in, middle, 1, bias=False)
        self.bn1 = BatchNormAct2d(middle)
        self.conv_dw = nn.Conv2d(middle, middle, 5, stride, 2, groups=middle, bias=False)
        self.bn2 = BatchNormAct2d(middle)
        self.aa, self.se = nn.Identity(), nn.Identity()
        self.conv_pwl = nn.Conv2d(middle, c_out, 1, bias=False)
        self.bn3 = BatchNormAct2d(c_out, apply_act=False)
        self.drop_path = DropPath()

    def forward(self, x):
        shortcut = x
        x = self.bn1(self.conv_pw(x))
        x = self.se(self.aa(self.bn2(self.conv_dw(x))))
        x = self.bn3(self.conv_pwl(x))
        if self.has_skip:
            x = self.drop_path(x) + shortcut
        return x


class SelectAdaptivePool2d(nn.Module):
    def __init__(self):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(1)

    def forward(self, x):
        return self.flatten(self.pool(x))


class EfficientNet(nn.Module):
    """timm's mobilenetv2_100 and mobilenetv1_100 (mobilenet_edgetpu's blocks left out)."""

    def __init__(self, v1=False, classes=3):
        super().__init__()
        self.conv_stem = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.bn1 = BatchNormAct2d(8)
        if v1:
            blocks = [[DepthwiseSeparableConv(8, 12, 1, True)]]
            blocks.append([DepthwiseSeparableConv(12, 16, 2, True)])
        else:
            blocks = [[DepthwiseSeparableConv(8, 6)]]
            blocks.append([TimmInvertedResidual(6, 10, 2, 6), TimmInvertedResidual(10, 10, 1, 6)])
        self.blocks = nn.Sequential(*(nn.Sequential(*stage) for stage in blocks))
        self.conv_head = nn.Conv2d(16 if v1 else 10, 18, 1, bias=False)
        self.bn2 = BatchNormAct2d(18)
        self.global_pool = SelectAdaptivePool2d()
        self.classifier = nn.Linear(18, classes)
        self.drop_rate = 0.1

    def forward_features(self, x):
        x = self.bn1(self.conv_stem(x))
        x = self.blocks(x)
        return self.bn2(self.conv_head(x))

    def forward_head(self, x, pre_logits: bool = False):
        x = self.global_pool(x)
        if self.drop_rate > 0.0:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.classifier(x)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


# mit-han-lab (MCUNet, ProxylessNAS)


class ConvLayer(nn.Module):
    def __init__(self, c_in, c_out, kernel=3, stride=1, act=True):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(c_out)
        self.act = nn.ReLU6(inplace=True) if act else None

    def forward(self, x):
        x = self.bn(self.conv(x))
        return x if self.act is None else self.act(x)


class MBInvertedConvLayer(nn.Module):
    def __init__(self, c_in, c_out, kernel, stride, expand):
        super().__init__()
        middle = c_in * expand
        self.inverted_bottleneck = None
        if expand != 1:
            self.inverted_bottleneck = nn.Sequential()
            self.inverted_bottleneck.add_module("conv", nn.Conv2d(c_in, middle, 1, bias=False))
            self.inverted_bottleneck.add_module("bn", nn.BatchNorm2d(middle))
            self.inverted_bottleneck.add_module("act", nn.ReLU6(inplace=True))
        depth = nn.Conv2d(middle, middle, kernel, stride, kernel // 2, groups=middle, bias=False)
        self.depth_conv = nn.Sequential()
        self.depth_conv.add_module("conv", depth)
        self.depth_conv.add_module("bn", nn.BatchNorm2d(middle))
        self.depth_conv.add_module("act", nn.ReLU6(inplace=True))
        self.point_linear = nn.Sequential()
        self.point_linear.add_module("conv", nn.Conv2d(middle, c_out, 1, bias=False))
        self.point_linear.add_module("bn", nn.BatchNorm2d(c_out))

    def forward(self, x):
        if self.inverted_bottleneck:
            x = self.inverted_bottleneck(x)
        return self.point_linear(self.depth_conv(x))


class IdentityLayer(nn.Module):
    def forward(self, x):
        return x


class MobileInvertedResidualBlock(nn.Module):
    def __init__(self, conv, shortcut):
        super().__init__()
        self.mobile_inverted_conv = conv
        self.shortcut = shortcut

    def forward(self, x):
        if self.shortcut is None:
            return self.mobile_inverted_conv(x)
        return self.mobile_inverted_conv(x) + self.shortcut(x)


class LinearLayer(nn.Module):
    def __init__(self, c_in, classes):
        super().__init__()
        self.linear = nn.Linear(c_in, classes)

    def forward(self, x):
        return self.linear(x)


class ProxylessNASNets(nn.Module):
    """mcunet.tinynas.nn.networks.ProxylessNASNets, which is MCUNet, too."""

    def __init__(self, classes=7):
        super().__init__()
        self.first_conv = ConvLayer(3, 8, 3, 2)
        self.blocks = nn.ModuleList(
            [
                MobileInvertedResidualBlock(MBInvertedConvLayer(8, 8, 3, 1, 1), None),
                MobileInvertedResidualBlock(MBInvertedConvLayer(8, 12, 7, 2, 3), None),
                MobileInvertedResidualBlock(MBInvertedConvLayer(12, 12, 5, 1, 4), IdentityLayer()),
            ]
        )
        self.feature_mix_layer = ConvLayer(12, 24, 1)
        self.classifier = LinearLayer(24, classes)

    def forward(self, x):
        x = self.first_conv(x)
        for block in self.blocks:
            x = block(x)
        if self.feature_mix_layer is not None:
            x = self.feature_mix_layer(x)
        x = x.mean(3).mean(2)  # global average pooling
        return self.classifier(x)


class MobileNetV1(nn.Module):
    """The first PyTorch MobileNet: separable convolutions, a 7 x 7 average pool, view."""

    def __init__(self, classes=3):
        super().__init__()

        def separable(c_in, c_out, stride):
            depth = nn.Conv2d(c_in, c_in, 3, stride, 1, groups=c_in, bias=False)
            return nn.Sequential(
                depth,
                nn.BatchNorm2d(c_in),
                nn.ReLU(inplace=True),
                nn.Conv2d(c_in, c_out, 1, 1, 0, bias=False),
                nn.BatchNorm2d(c_out),
                nn.ReLU(inplace=True),
            )

        stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        )
        self.model = nn.Sequential(stem, separable(8, 16, 1), separable(16, 24, 2), nn.AvgPool2d(8))
        self.fc = nn.Linear(24, classes)

    def forward(self, x):
        x = self.model(x)
        x = x.view(-1, 24)
        return self.fc(x)


LOOKALIKES = {
    "torchvision mobilenet_v2": MobileNetV2,
    "torchvision resnet18": ResNet,
    "torchvision resnet50": lambda: ResNet(bottleneck=True),
    "timm mobilenetv2": EfficientNet,
    "timm mobilenetv1": lambda: EfficientNet(v1=True),
    "mcunet, proxylessnas": ProxylessNASNets,
    "mobilenet v1": MobileNetV1,
}
