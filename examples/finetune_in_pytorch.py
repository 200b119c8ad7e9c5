"""Sparse fine-tuning of your own model in PyTorch.

The model here is a stand-in with random weights; put yours in its place, and your data. Whatever
torch.fx can trace will do: convolutions become sparse layers, everything else stays as it is.
"""

import torch
from torch import nn
from torch.nn import functional as F

import tinytrain_ext as tt


def block(c_in: int, c_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(c_in, c_in, 3, stride, 1, groups=c_in, bias=False),
        nn.BatchNorm2d(c_in),
        nn.ReLU6(inplace=True),
        nn.Conv2d(c_in, c_out, 1, bias=False),
        nn.BatchNorm2d(c_out),
        nn.ReLU6(inplace=True),
    )


torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(3, 16, 3, 2, 1, bias=False),
    nn.BatchNorm2d(16),
    nn.ReLU6(inplace=True),
    block(16, 32, 1),
    block(32, 64, 2),
    block(64, 64, 1),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(64, 4),
).eval()
images = torch.randn(32, 3, 64, 64).contiguous(memory_format=torch.channels_last)
labels = torch.arange(32) % 4
images += 2 * torch.randn(4, 3, 1, 1)[labels]  # a colour cast for each class

# What matters to this task (Eq. 2), what it costs, what a budget carries (Eq. 3).
frozen = tt.nn.convert(model, tt.UpdatePolicy())
fisher = tt.nn.fisher_information(
    frozen, lambda y, t: F.cross_entropy(y, t, reduction="sum"), [(images, labels)], layers=range(7)
)
costs = tt.nn.profile(model, images[:1])
policy = tt.nn.select(fisher, costs, tt.Budget(memory_bytes=256 << 10, compute=0.5), ratio=0.5)

# Ordinary PyTorch from here: the selected channels are the Parameters, and the linear head's.
model = tt.nn.convert(model, policy)
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=2e-2)
for _ in range(30):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    print(f"loss {loss.item():.3f}")
print(f"trained {sum(p.numel() for p in trained)} weights of layers {[*policy.layers]}")

model = tt.nn.revert(model)  # torch.nn.Conv2d and BatchNorm2d again
torch.save(model.state_dict(), "finetuned.pt")
