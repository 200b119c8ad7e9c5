"""Your own model on the device: from PyTorch to a network file, and adapted there without PyTorch.

The model is a stand-in in the form that torchvision gives MobileNetV2; torchvision's own, timm's
and mit-han-lab's come in the same way. `photos/` has one folder of photos for each class.
"""

import torch
from torch import nn

import tinytrain_ext as tt


def conv_bn_relu(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> list:
    padding = kernel // 2
    conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(c_out), nn.ReLU6(inplace=True)]


class InvertedResidual(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = c_in * expand
        self.use_res_connect = stride == 1 and c_in == c_out
        self.conv = nn.Sequential(
            *conv_bn_relu(c_in, hidden, 1),
            *conv_bn_relu(hidden, hidden, 3, stride, hidden),
            nn.Conv2d(hidden, c_out, 1, bias=False),
            nn.BatchNorm2d(c_out),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


torch.manual_seed(0)
model = nn.Sequential(
    *conv_bn_relu(3, 16, 3, 2),
    InvertedResidual(16, 24, 2, 4),
    InvertedResidual(24, 24, 1, 4),
    InvertedResidual(24, 40, 2, 4),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Dropout(0.2),
    nn.Linear(40, 10),
)

# On the server, once: mean and std are those the model was trained with.
example = torch.randn(1, 3, 96, 96)
network = tt.Network.from_torch(
    model, example, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), name="my-model"
)
network.save("my-model.safetensors")

# On the device, with NumPy alone: `tinytrain adapt --network my-model.safetensors ...`, or
network = tt.Network.load("my-model.safetensors")
photos = tt.load_folder("photos", resize=network.resize, input_size=network.input_size)
result = tt.adapt(
    network,
    photos.images,
    photos.labels,
    classes=photos.classes,
    budget=tt.Budget(memory_bytes=2 << 20, compute=0.5),
    iterations=10,
)
result.network.save("my-photos.safetensors")
print(result.classify(photos.images[:2]).labels)

# And back to PyTorch, or anywhere else: `tinytrain export my-photos.safetensors --onnx FILE`.
assert result.network.to_torch()(example).shape == (1, 10)
