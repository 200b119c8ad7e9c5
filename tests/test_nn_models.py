"""Whole models in sparse layers, and networks that come from PyTorch and go back."""

from __future__ import annotations

import copy
import functools
import importlib
import pickle

import numpy as np
import pytest
import torch
from torch import nn as tnn
from torch.nn import functional as F

import tinytrain_ext as tt
from lookalikes import LOOKALIKES, MobileNetV2, randomised
from small_networks import FAMILIES, with_random_biases
from tasks import shapes_task, tiny_network
from test_nn import FEW, saved_bytes
from tinytrain_ext import nn
from tinytrain_ext.architectures import ARCHITECTURES, random_network
from tinytrain_ext.cost import inspected_layers
from tinytrain_ext.images import apply_augmentation, draw_augmentation
from tinytrain_ext.network import Classifier, Network
from tinytrain_ext.selection import LayerUpdate, UpdatePolicy, full_train
from tinytrain_ext.session import Session, plan
from tolerance import assert_as_good_as_naive

HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


@functools.cache
def lookalike(name: str, dtype=torch.float32) -> tnn.Module:
    torch.manual_seed(0)
    return randomised(LOOKALIKES[name]()).to(dtype)


def pixels(count: int = 2, size: int = 32, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, size, size, dtype=dtype, generator=generator)


def policy_for(model: tnn.Module, seed: int = 0) -> UpdatePolicy:
    """Some rows of half of the convolutions, some columns of one."""
    rng = np.random.default_rng(seed)
    convs = [
        m for m in nn.convert(model, UpdatePolicy()).modules() if isinstance(m, nn.SparseConv2d)
    ]
    convs.sort(key=lambda conv: conv.layer)
    layers: dict[int, LayerUpdate] = {}
    for layer in rng.permutation(np.arange(1, len(convs)))[: len(convs) // 2 + 1]:
        axis = "in" if not layers and convs[layer].groups == 1 else "out"
        total = convs[layer].in_channels if axis == "in" else convs[layer].out_channels
        chosen = rng.permutation(total)[: max(1, total // 3)]
        layers[int(layer)] = LayerUpdate(axis, tuple(chosen.tolist()))
    return UpdatePolicy(layers)


def conv_names(converted: tnn.Module) -> dict[int, str]:
    return {
        module.layer: name
        for name, module in converted.named_modules()
        if isinstance(module, nn.SparseConv2d)
    }


def selection_mask(weight: torch.Tensor, update: LayerUpdate) -> torch.Tensor:
    mask = torch.zeros_like(weight)
    mask[(slice(None),) * (update.axis == "in") + (list(update.channels),)] = 1
    return mask


class MaskedModel:
    """The model as it was, trained densely with everything but the selection masked."""

    def __init__(self, model: tnn.Module, policy: UpdatePolicy, names: dict[int, str]) -> None:
        self.model = copy.deepcopy(model)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_("classifier" in name or "fc" in name)
        self.masks = {}
        for layer, update in policy.layers.items():
            weight = self.model.get_submodule(names[layer]).weight.requires_grad_()
            self.masks[weight] = (selection_mask(weight, update), weight.detach().clone())

    def parameters(self):
        return [p for p in self.model.parameters() if p.requires_grad]

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        for weight, (mask, _) in self.masks.items():
            weight.grad *= mask
        optimizer.step()
        with torch.no_grad():  # weight decay reaches what no gradient does
            for weight, (mask, before) in self.masks.items():
                weight.copy_(torch.where(mask > 0, weight, before))


# Conversion


@pytest.mark.parametrize("name", LOOKALIKES)
def test_a_converted_model_is_the_model(name):
    model, x = lookalike(name), pixels()
    before = copy.deepcopy(model.state_dict())
    policy = policy_for(model)
    converted = nn.convert(model, policy)
    torch.testing.assert_close(converted(x), model(x))
    # Stock modules can hold no input any more: no convolution, norm or ReLU of torch's is left.
    for module in converted.modules():
        assert not isinstance(module, tnn.Conv2d | tnn.ReLU | tnn.ReLU6)
        assert not isinstance(module, tnn.BatchNorm2d) or isinstance(module, nn.FoldedBatchNorm2d)
    trained = [n for n, p in converted.named_parameters() if p.requires_grad]
    assert len(trained) == len(policy.layers) + 2  # the linear head's
    assert converted.state_dict().keys() == before.keys()
    for key, value in converted.state_dict().items():
        assert torch.equal(value, before[key]), key
    again = copy.deepcopy(model)
    again.load_state_dict(converted.state_dict())
    for module in nn.sparse_layers(converted).values():
        if module.rows is not None:
            with torch.no_grad():
                module.rows += 0.01
    reverted = nn.revert(converted)
    torch.testing.assert_close(reverted(x), converted(x))
    assert [type(m) for m in reverted.modules()] == [type(m) for m in model.modules()]
    assert all(p.requires_grad for p in reverted.parameters())
    twice = nn.convert(converted, UpdatePolicy({0: (1,)}))
    torch.testing.assert_close(twice(x), converted(x))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5),
}


@pytest.mark.parametrize("optimizer", ["adamw"] if FEW else OPTIMIZERS)
@pytest.mark.parametrize("name", ["torchvision mobilenet_v2", "torchvision resnet18"])
def test_twenty_steps_equal_a_masked_model(name, optimizer):
    model = lookalike(name, torch.float64)
    policy = policy_for(model)
    converted = nn.convert(model, policy)
    names = conv_names(converted)
    masked = MaskedModel(model, policy, names)
    ours = OPTIMIZERS[optimizer]([p for p in converted.parameters() if p.requires_grad])
    theirs = OPTIMIZERS[optimizer](masked.parameters())
    labels = torch.arange(4) % 3
    for step in range(20):
        x = pixels(4, seed=step, dtype=torch.float64)
        for network, stepper in ((converted, ours), (masked.model, theirs)):
            stepper.zero_grad()
            F.cross_entropy(network(x), labels).backward()
        ours.step()
        masked.step(theirs)
    reference, state = masked.model.state_dict(), model.state_dict()
    for key, value in converted.state_dict().items():
        torch.testing.assert_close(value, reference[key], rtol=1e-9, atol=1e-11, msg=key)
    for layer, update in policy.layers.items():
        key = f"{names[layer]}.weight"
        weight = nn.revert(converted).state_dict()[key]
        changed = weight != state[key]
        assert torch.equal(changed & (selection_mask(weight, update) == 0), changed & False)
        assert changed.any()


def test_one_float32_step_is_as_good_as_torchs():
    """By the tolerance rule, against the same step in float64; unselected weights bit-identical."""
    single = lookalike("mcunet, proxylessnas")
    double = copy.deepcopy(single).double()
    policy, x, labels = policy_for(single), pixels(4), torch.arange(4) % 3

    def stepped(model, ours: bool):
        network = nn.convert(model, policy)
        names = conv_names(network)
        masked = MaskedModel(model, policy, names)
        parameters = network.parameters() if ours else masked.parameters()
        optimizer = torch.optim.SGD([p for p in parameters if p.requires_grad], lr=1e-2)
        network = network if ours else masked.model
        dtype = next(network.parameters()).dtype
        F.cross_entropy(network(x.to(dtype)), labels).backward()
        optimizer.step() if ours else masked.step(optimizer)
        state = network.state_dict()
        return {layer: state[f"{names[layer]}.weight"].numpy() for layer in policy.layers}

    exact, naive, found = stepped(double, False), stepped(single, False), stepped(single, True)
    names = conv_names(nn.convert(single, policy))
    for layer, update in policy.layers.items():
        before = single.state_dict()[f"{names[layer]}.weight"]
        kept = (selection_mask(before, update) == 0).numpy()
        assert np.array_equal(found[layer][kept], before.numpy()[kept])
        magnitude = float(np.abs(exact[layer]).max())
        assert_as_good_as_naive(found[layer], exact[layer], naive[layer], magnitude, str(layer))


def test_channels_by_name():
    model = lookalike("torchvision resnet18")
    converted = nn.convert(
        model, {"layer2.0.downsample.0": [1, 2], "conv1": LayerUpdate("out", (0,))}
    )
    rows = {name: p.shape[0] for name, p in converted.named_parameters() if "rows" in name}
    assert rows == {"conv1.rows": 1, "layer2.0.downsample.0.rows": 2}
    with pytest.raises(ValueError, match="policy: 'fc' is no convolution; expected some of"):
        nn.convert(model, {"fc": [0]})
    with pytest.raises(ValueError, match="policy: layer 8: expected 0 to 7"):
        nn.convert(model, UpdatePolicy({8: (0,)}))
    with pytest.raises(ValueError, match=r"conv1 \(conv1\): layer 0: channels: expected 0 to 7"):
        nn.convert(model, UpdatePolicy({0: (8,)}))


class Strange(tnn.Module):
    """What no Network expresses: squeeze and excitation, dilation, functional activations."""

    def __init__(self):
        super().__init__()
        self.conv = tnn.Conv2d(3, 8, 3, dilation=2)
        self.second = tnn.Conv2d(8, 8, 3, padding=1)
        self.gate = tnn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = F.hardswish(self.conv(x))
        x = F.relu(self.second(x))
        return x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))


def test_a_model_may_hold_anything_else():
    torch.manual_seed(0)
    model, x = Strange().double(), pixels(dtype=torch.float64)
    converted = nn.convert(model, {"second": [0, 5], "gate": [1]})
    assert isinstance(converted.conv, tnn.Conv2d)  # the kernels have no dilation
    torch.testing.assert_close(converted(x), model(x))
    converted(x).square().sum().backward()
    model(x).square().sum().backward()
    torch.testing.assert_close(converted.second.rows.grad, model.second.weight.grad[[0, 5]])
    torch.testing.assert_close(converted.gate.rows.grad, model.gate.weight.grad[[1]])
    with pytest.raises(ValueError, match=r"conv \(conv\): layer 0: conv: dilation: expected 1"):
        nn.convert(model, {"conv": [0]})

    class Branching(tnn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match=r"model: torch\.fx cannot trace Branching"):
        nn.convert(Branching(), UpdatePolicy())


def test_biases_train_where_the_policy_says():
    model = lookalike("mcunet, proxylessnas", torch.float64)
    converted = nn.convert(model, UpdatePolicy({9: (0, 1)}, biases=(8, 9)))
    trained = [n for n, p in converted.named_parameters() if p.requires_grad]
    expected = "blocks.2.mobile_inverted_conv.point_linear.bn.bias", "feature_mix_layer.bn.bias"
    assert set(expected) < set(trained)
    x = pixels(dtype=torch.float64)
    converted(x).square().sum().backward()
    model(x).square().sum().backward()
    for name in expected:
        found, wanted = converted.get_parameter(name).grad, model.get_parameter(name).grad
        torch.testing.assert_close(found, wanted)
    model.zero_grad()


# Fisher information, costs and selection


def test_fisher_information_of_any_model():
    """Of a residual network whose adds write in place, against each image's own gradients."""
    model = lookalike("torchvision resnet18", torch.float64)
    converted = nn.convert(model, UpdatePolicy())
    x, labels = pixels(5, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    loss = functools.partial(F.cross_entropy, reduction="sum")
    layers = range(len(nn.sparse_layers(converted)))
    found = nn.fisher_information(
        converted, loss, [(x[:2], labels[:2]), (x[2:], labels[2:])], layers=layers
    )
    outputs: dict[str, torch.Tensor] = {}
    reference = copy.deepcopy(model)
    names = conv_names(converted)
    norms = {
        name: name.replace("conv", "bn").replace("sample.0", "sample.1") for name in names.values()
    }

    def keep(name):
        # Behind the batch norm, before anything is done to it in place.
        return lambda module, inputs, out: outputs.setdefault(name, out).clone()

    for name, norm in norms.items():
        reference.get_submodule(norm).register_forward_hook(keep(name))
    total = loss(reference(x), labels)
    for layer, name in names.items():
        a = outputs[name]
        (g,) = torch.autograd.grad(total, a, retain_graph=True)
        wanted = (a * g).sum(dim=(2, 3)).square().sum(dim=0) / (2 * len(x))
        np.testing.assert_allclose(found[layer], wanted.detach(), rtol=1e-9, atol=1e-15)
    default = nn.fisher_information(converted, loss, [(x, labels)])
    assert sorted(default) == [5, 6, 7]
    np.testing.assert_allclose(default[6], found[6], rtol=1e-12)
    assert all(p.grad is None for p in converted.parameters())
    with pytest.raises(ValueError, match=r"layers: expected some of \[0, 1"):
        nn.fisher_information(converted, loss, [], layers=[99])
    with pytest.raises(ValueError, match="data: expected at least one batch, got none"):
        nn.fisher_information(converted, loss, [])
    with pytest.raises(tt.NonFiniteError, match="loss_fn: expected a finite loss"):
        nn.fisher_information(converted, lambda y, t: y.sum() * torch.nan, [(x, labels)])


@pytest.fixture(
    params=("tiny", *(pytest.param(name, marks=pytest.mark.all_cases) for name in ARCHITECTURES))
)
def network(request) -> Network:
    """The small random network, then the three imported ones where there are any."""
    if request.param == "tiny":
        return with_random_biases(tiny_network(feature_mix=True))
    return request.getfixturevalue("imported_networks")[request.param]


def proto_loss(features, labels, prototypes, scale=10.0):
    logits = scale * F.normalize(features, dim=1) @ F.normalize(prototypes, dim=1).T
    return F.cross_entropy(logits, labels, reduction="sum")


def test_the_session_and_the_converted_model_agree(network):
    """In float64, from the same seed: features, Fisher information, policy, weights."""
    images, labels = shapes_task(2, 2, 0, network.input_size)
    targets = torch.tensor(labels)
    x = torch.tensor(apply_images(images, network)).permute(0, 3, 1, 2)
    model = nn.convert(network.to_torch().double(), UpdatePolicy())
    inspected = inspected_layers(network)

    def augmented(rng):
        draw = draw_augmentation(len(images), network.input_size, rng)
        seen = apply_augmentation(images, draw, network.mean, network.std, np.float64)
        return draw, torch.tensor(seen).permute(0, 3, 1, 2)

    def prototypes(model):
        with torch.no_grad():
            features = model(x)
        return torch.stack([features[targets == way].mean(dim=0) for way in range(2)])

    # Lines 1 to 4 of Algorithm 1
    session = Session(network, fisher_layers=inspected, dtype="float64")
    draw, seen = augmented(np.random.default_rng(5))
    session.set_prototypes(images, labels, 2)
    np.testing.assert_allclose(model(x).detach(), session.embed(images), rtol=1e-9, atol=1e-11)
    session.proto_backward(images, labels, draw, loss_weight=1.0)
    ours = {layer: sums / (2 * len(images)) for layer, sums in session.fisher().items()}
    loss = functools.partial(proto_loss, prototypes=prototypes(model))
    theirs = nn.fisher_information(model, loss, [(seen, targets)], layers=inspected)
    for layer, values in ours.items():
        atol = 1e-9 * values.max()
        np.testing.assert_allclose(theirs[layer], values, rtol=1e-7, atol=atol)
    budget = tt.Budget(memory_bytes=1 << 20, compute=0.15)
    policy = tt.select(ours, tt.profile(network), budget)
    example = pixels(1, network.input_size)
    assert nn.select(theirs, nn.profile(model, example), budget) == policy

    # Lines 5 and 6
    session = Session(network, policy, optimizer="adam", dtype="float64")
    model = nn.convert(network.to_torch().double(), policy)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    rng = np.random.default_rng(6)
    for _ in range(4):
        draw, seen = augmented(rng)
        session.set_prototypes(images, labels, 2)
        session.proto_backward(images, labels, draw)
        session.step(1e-3)
        session.zero_grad()
        optimizer.zero_grad()
        (proto_loss(model(seen), targets, prototypes(model)) / len(images)).backward()
        optimizer.step()
    for layer, module in nn.sparse_layers(model).items():
        if layer in policy.layers:
            weight, _ = session.layer(layer)
            np.testing.assert_allclose(module.weight, weight, rtol=1e-7, atol=1e-9)
            assert not np.array_equal(weight, network.weights[layer])
        else:
            assert np.array_equal(module.weight, network.weights[layer])


def apply_images(images, network):
    nothing = np.tile(np.array([0, 0, 0, 0, 1, 1], np.float32), (len(images), 1))
    draw = tt.images.Augmentation(nothing)
    return apply_augmentation(images, draw, network.mean, network.std, np.float64)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("part", ["last 6 blocks", "a few channels"])
def test_saved_bytes_are_the_planners(name, part):
    """Within 5 %: counted by autograd's own hooks, without parameters and indices."""
    network = random_network(ARCHITECTURES[name], np.random.default_rng(0))
    inspected = inspected_layers(network)
    policy = UpdatePolicy({n: range(len(network.biases[n])) for n in inspected})
    if part != "last 6 blocks":
        policy = UpdatePolicy({n: range(1, len(network.biases[n]) // 2) for n in inspected[3:9:2]})
    planned = plan(network, policy).saved_bytes
    x = pixels(1, 128)
    stock = network.to_torch()
    for model in (nn.convert(stock, policy), nn.SparseBackbone(network, policy)):
        found = saved_bytes(lambda m=model: m(x), *model.parameters(), *model.buffers())
        assert abs(found - planned) <= 0.05 * planned
    if part == "last 6 blocks":
        paper = tt.profile(network).activation_bytes(6)
        assert abs(planned - paper) <= 0.01 * paper
    for layer, parameter in enumerate(stock.parameters()):
        parameter.requires_grad_(layer % 2 == 0 and layer // 2 in policy.layers)
    assert saved_bytes(lambda: stock(x), *stock.parameters()) > 1.8 * planned


# The whole tail


@pytest.mark.parametrize("family", [*FAMILIES, "tiny"])
@pytest.mark.parametrize("everything", [False, True])
def test_the_whole_tail_equals_the_layers(family, everything):
    network = FAMILIES.get(family) or with_random_biases(tiny_network(feature_mix=True))
    model = network.to_torch().double()
    policy = policy_for(model)
    policy = full_train(network) if everything else UpdatePolicy(policy.layers, (1, 2))
    layers = nn.convert(model, policy)
    tail = nn.SparseBackbone(network, policy, dtype=torch.float64, threads=2)
    x = pixels(3, network.input_size)
    first, second = tail(x), tail(2 * x.contiguous(memory_format=torch.channels_last))
    (first.square().sum() + second.sum()).backward()  # two forwards, one backward
    (layers(x.double()).square().sum() + layers(2 * x.double()).sum()).backward()
    torch.testing.assert_close(first, layers(x.double()), rtol=1e-9, atol=1e-12)
    found = tail.selected.grad
    for layer, module in nn.sparse_layers(layers).items():
        if layer in policy.layers:
            assert torch.equal(tail.rows(layer), module.rows)
            mine, found = found[: module.rows.numel()], found[module.rows.numel() :]
            torch.testing.assert_close(mine.view_as(module.rows), module.rows.grad)
    for layer in policy.biases:
        module = nn.sparse_layers(layers)[layer]
        assert torch.equal(tail.bias(layer), module.bias)
        mine, found = found[: module.bias.numel()], found[module.bias.numel() :]
        torch.testing.assert_close(mine, module.bias.grad)
    assert found.numel() == 0


def test_a_training_loop_of_the_whole_tail():
    network = tiny_network(feature_mix=True)
    policy = UpdatePolicy({18: range(20), 20: range(10, 24), 23: LayerUpdate("in", (1, 2, 3))})
    images, labels = shapes_task(3, 4)
    targets = torch.tensor(labels)
    tail = nn.SparseBackbone(network, policy)
    head = torch.nn.Linear(network.feature_dim, 3)
    optimizer = torch.optim.AdamW([*tail.parameters(), *head.parameters()], lr=5e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.cross_entropy(head(tail(torch.tensor(images))), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    trained = tail.network()
    with torch.no_grad():
        features = tail(torch.tensor(images))
    np.testing.assert_allclose(trained.embed(images), features, rtol=1e-4, atol=1e-5)
    for layer, (weight, before) in enumerate(zip(trained.weights, network.weights, strict=True)):
        assert np.array_equal(weight, before) == (layer not in policy.layers)
    np.testing.assert_array_equal(trained.weights[23][:, [0, 4]], network.weights[23][:, [0, 4]])
    np.testing.assert_array_equal(trained.weights[18][20:], network.weights[18][20:])
    again = nn.SparseBackbone(network, policy)
    again.load_state_dict(tail.state_dict())
    for copied in (again, copy.deepcopy(tail), pickle.loads(pickle.dumps(tail))):
        with torch.no_grad():
            assert torch.equal(copied(torch.tensor(images)), features)
    with torch.no_grad():
        copied.selected += 1
        assert torch.equal(tail(torch.tensor(images)), features)
    with pytest.raises(TypeError, match=r"selected: expected torch\.float32, got torch\.float64"):
        copied.double()(torch.tensor(images))


@pytest.mark.parametrize("images", [1, 4])
def test_the_loss_inside_the_tail_is_the_loss_outside(images):
    network = with_random_biases(tiny_network(feature_mix=True))
    policy = UpdatePolicy({18: range(20), 23: (0, 4)}, biases=(23,))
    support, labels = (torch.tensor(array) for array in shapes_task(2, 2))
    query = torch.tensor(shapes_task(2, 2, seed=1)[0][:images])
    inside, outside = (nn.SparseBackbone(network, policy, dtype=torch.float64) for _ in range(2))
    with pytest.raises(ValueError, match="call set_prototypes first"):
        inside.proto_loss(query, labels[:images])
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (inside, outside)]
    for _ in range(3):
        with torch.no_grad():
            features = outside(support)
        prototypes = torch.stack([features[labels == way].mean(dim=0) for way in range(2)])
        wanted = proto_loss(outside(query), labels[:images], prototypes, 7.0) / images
        inside.set_prototypes(support, labels, 2)
        loss = inside.proto_loss(query, labels[:images], scale=7.0)
        torch.testing.assert_close(loss, wanted)
        for optimizer, value in zip(optimizers, (loss, wanted), strict=True):
            optimizer.zero_grad()
            (3 * value).backward()
            optimizer.step()
        torch.testing.assert_close(inside.selected, outside.selected, rtol=1e-9, atol=1e-12)
    saved = saved_bytes(lambda: inside.proto_loss(query, labels[:images]), inside.selected)
    assert saved == inside.selected.nbytes


def test_the_whole_tail_checks_its_inputs():
    network = tiny_network()
    tail = nn.SparseBackbone(network, UpdatePolicy({20: (0,)}))
    x = pixels(1)
    for wrong, error, message in (
        (x.requires_grad_(), ValueError, "images: no gradient reaches them"),
        (x.detach().double(), TypeError, r"expected torch.uint8 or torch.float32, got torch.fl"),
        (x.detach()[:, :, :30], ValueError, r"expected shape \(N, \*\(3, 32, 32\)\), got"),
        (x.detach().to("meta"), TypeError, "expected a tensor on the CPU, got one on meta"),
    ):
        with pytest.raises(error, match=message):
            tail(wrong)
    x = x.detach()
    with torch.autocast("cpu"), pytest.raises(RuntimeError, match="autocast: these layers run"):
        tail(x)
    y = tail(x)
    (grad,) = torch.autograd.grad(y.square().sum(), tail.selected, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    y = tail(x)
    with torch.no_grad():
        tail.selected += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    with torch.no_grad():
        tail.selected[0] = torch.nan
    with pytest.raises(tt.NonFiniteError, match="set_selected: a value is not finite"):
        tail(x)
    with pytest.raises(ValueError, match="policy: expected at least one layer to train"):
        nn.SparseBackbone(network, UpdatePolicy())
    with pytest.raises(TypeError, match=r"dtype: expected torch\.float32 or"):
        nn.SparseBackbone(network, UpdatePolicy({1: (0,)}), dtype=torch.float16)
    double = nn.SparseBackbone(network, UpdatePolicy({1: (0,), 22: (3, 9)}), dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda s: torch.func.functional_call(double, {"selected": s * 1.0}, x),
        (double.selected,),
        fast_mode=True,
    )


# Networks from PyTorch


@pytest.mark.parametrize("name", LOOKALIKES)
def test_a_model_becomes_a_network(name, tmp_path, caplog):
    model, x = lookalike(name), pixels()
    outputs = model(x)
    classes = [f"class {i}" for i in range(outputs.shape[1])]
    network = Network.from_torch(model, x, **HALF, classes=classes, size=32)
    assert f"the linear head of {len(classes)} classes is kept" in caplog.text
    assert "adapt() neither uses nor trains it" in caplog.text
    assert (network.input_size, network.resize) == (32, 36)
    features = network.embed(np.ascontiguousarray(x.permute(0, 2, 3, 1)))
    np.testing.assert_allclose(
        network.classifier.logits(features), outputs.detach(), rtol=1e-4, atol=1e-4
    )
    network.save(tmp_path / "network.safetensors")
    loaded = Network.load(tmp_path / "network.safetensors")
    assert loaded.classifier.classes == tuple(classes)
    np.testing.assert_array_equal(loaded.classifier.weight, network.classifier.weight)
    back = loaded.to_torch().eval()
    torch.testing.assert_close(back(x), outputs, rtol=1e-4, atol=1e-4)
    # Converted and reverted, it is the same network.
    converted = nn.convert(model, policy_for(model))
    again = Network.from_torch(converted, x, **HALF)
    assert again.operations == network.operations
    # The device may adapt it.
    images, labels = shapes_task(2, 3)
    result = tt.adapt(loaded, images, labels, iterations=1, budget=tt.Budget(compute=0.9))
    np.testing.assert_array_equal(result.network.classifier.weight, loaded.classifier.weight)


def test_inverted_residuals_are_marked_as_blocks():
    for name in ("torchvision mobilenet_v2", "timm mobilenetv2", "mcunet, proxylessnas"):
        network = Network.from_torch(lookalike(name), pixels(), **HALF)
        blocks = [network.operations[index].block for index in network.convolutions]
        assert blocks == [None, 0, 0, 1, 1, 1, 2, 2, 2, None], name
    network = Network.from_torch(lookalike("torchvision resnet18"), pixels(), **HALF)
    assert {operation.block for operation in network.operations} == {None}


@pytest.mark.parametrize("name", [*ARCHITECTURES, *FAMILIES])
def test_a_network_goes_to_torch_and_back(name):
    if name in ARCHITECTURES:
        network = random_network(ARCHITECTURES[name], np.random.default_rng(0), feature_mix=True)
    else:
        network = FAMILIES[name]
    model = network.to_torch()
    x = pixels(1, network.input_size)
    back = Network.from_torch(
        model, x, mean=network.mean, std=network.std, resize=network.resize, name=network.name
    )
    assert back.operations == network.operations
    for mine, theirs in zip(
        (*back.weights, *back.biases), (*network.weights, *network.biases), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)
    assert (back.name, back.resize, back.classifier) == (network.name, network.resize, None)


def changed(**modules: tnn.Module) -> tnn.Module:
    model = randomised(MobileNetV2())
    for name, module in modules.items():
        parent, _, last = name.replace("__", ".").rpartition(".")
        setattr(model.get_submodule(parent), last, module)
    return model.eval()


class Wrapped(tnn.Module):
    """A model of one function of a convolution's output."""

    def __init__(self, function, channels=4):
        super().__init__()
        self.conv = tnn.Conv2d(3, channels, 3)
        self.function = function

    def forward(self, x):
        return self.function(self.conv(x))


CONV = "features__0__0"
REFUSED = {
    r"features_0_0 \(features\.0\.0\): dilation: expected 1, got 2": changed(
        **{CONV: tnn.Conv2d(3, 8, 3, 2, 2, dilation=2)}
    ),
    r"features_1_conv_0_0 \(.*\): groups: .*got 2 for 8 -> 8 channels": changed(
        features__1__conv__0__0=tnn.Conv2d(8, 8, 3, 1, 1, groups=2)
    ),
    r"features_0_0 .*: kernel_size: expected one whole number, got \(3, 1\)": changed(
        **{CONV: tnn.Conv2d(3, 8, (3, 1), 2, padding=(1, 0))}
    ),
    r"features_0_0 .*: padding: expected one whole number, got same": changed(
        **{CONV: tnn.Conv2d(3, 8, 3, padding="same")}
    ),
    r"features_0_0 .*: padding_mode: expected 'zeros', got 'circular'": changed(
        **{CONV: tnn.Conv2d(3, 8, 3, 2, 1, padding_mode="circular")}
    ),
    r"features_0_2 \(features\.0\.2\): Hardswish is not expressible": changed(
        features__0__2=tnn.Hardswish()
    ),
    r"features_0_1 .*: GroupNorm is not expressible": changed(features__0__1=tnn.GroupNorm(2, 8)),
    "features_0_1 .*: a batch norm without running statistics": changed(
        features__0__1=tnn.BatchNorm2d(8, track_running_stats=False)
    ),
    "classifier_2 .*: stands behind the linear head: expected it to be the last": changed(
        classifier=tnn.Sequential(tnn.Linear(20, 9), tnn.Identity(), tnn.Linear(9, 4))
    ),
    "classifier_1 .*: stands behind the global average pool": changed(
        classifier=tnn.Sequential(tnn.Dropout(), tnn.Sigmoid())
    ),
    "mul: mul is not expressible": Wrapped(lambda x: x * 2),
    "cat: cat is not expressible": Wrapped(lambda x: torch.cat([x, x], 1)),
    "add: add is not expressible": Wrapped(lambda x: x + 1),
    "relu: an activation that is not alone behind": Wrapped(lambda x: x + F.relu(x)),
    "relu_: writes in place to a tensor that is read again": Wrapped(lambda x: x.relu_() + x),
    "flatten: reads a map of 30 x 30 pixels": Wrapped(lambda x: torch.flatten(x, 1)),
    "max_pool2d: dilation: expected 1, got 2": Wrapped(lambda x: F.max_pool2d(x, 2, dilation=2)),
    "avg_pool2d: ceil_mode: expected False": Wrapped(lambda x: F.avg_pool2d(x, 4, ceil_mode=True)),
    "avg_pool2d: count_include_pad": Wrapped(lambda x: F.avg_pool2d(x, 3, 2, padding=1)),
    "adaptive_avg_pool2d: .* not expressible": Wrapped(lambda x: F.adaptive_avg_pool2d(x, 2)),
    "mean_1: reads an average over one dimension only": Wrapped(lambda x: x.mean(3).mean(1)),
    "model: expected one tensor as its result": Wrapped(lambda x: (x, x)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_expressed_is_refused_by_name(message):
    with pytest.raises(ValueError, match=message):
        Network.from_torch(REFUSED[message], pixels(), **HALF)


FORMS = {
    "a map": lambda x: x,
    "mean": lambda x: x.mean([2, 3]),
    "half": lambda x: x.mean(-1).mean(-1),
    "keepdim": lambda x: x.mean((-2, -1), keepdim=True),
    "reshape": lambda x: F.adaptive_avg_pool2d(F.relu6(x), 1).reshape(x.shape[0], -1),
    "view": lambda x: F.adaptive_avg_pool2d(x, (1, 1)).view(x.size(0), -1),
    "squeeze": lambda x: F.avg_pool2d(F.relu(x), 30).squeeze(-1).squeeze(-1),
    "method relu": lambda x: torch.flatten(x.relu().mean((2, 3)), 1),
    "hardtanh": lambda x: F.hardtanh(x, 0.0, 6.0),
    "max pool": lambda x: F.max_pool2d(F.relu_(x), 3, 2, 1).contiguous(),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_the_same_thing(form, caplog):
    torch.manual_seed(0)
    model = Wrapped(FORMS[form])
    network = Network.from_torch(model, pixels(), **HALF)  # which compares the two
    assert network.operations[-1].kind == "global_average_pool"
    gives_a_map = model(pixels()).ndim == 4 and form != "keepdim"
    assert ("a global average pool makes features of it" in caplog.text) == gives_a_map


def test_a_head_may_be_a_convolution():
    head = tnn.Sequential(tnn.AdaptiveAvgPool2d(1), tnn.Conv2d(4, 6, 1), tnn.Flatten())
    torch.manual_seed(0)
    model = tnn.Sequential(tnn.Conv2d(3, 4, 3), tnn.ReLU(), head)
    network = Network.from_torch(model, pixels(), **HALF)
    assert network.classifier.weight.shape == (6, 4)
    assert len(network.convolutions) == 1


def test_examples_and_classes_are_checked():
    model = lookalike("torchvision mobilenet_v2")
    for example, message in (
        (
            pixels()[:, :, :30],
            r"example: expected shape \(N, 3, size, size\), got \(2, 3, 30, 32\)",
        ),
        (pixels()[0], r"example: expected shape \(N, 3, size, size\), got \(3, 32, 32\)"),
    ):
        with pytest.raises(ValueError, match=message):
            Network.from_torch(model, example, **HALF)
    with pytest.raises(ValueError, match=r"expected shape \(N, 3, 64, 64\) of size"):
        Network.from_torch(model, pixels(), **HALF, size=64)
    with pytest.raises(TypeError, match="example: expected normalised floats"):
        Network.from_torch(model, pixels().byte(), **HALF)
    with pytest.raises(ValueError, match="classes: expected 5 names, got 1"):
        Network.from_torch(model, pixels(), **HALF, classes=["one"])
    with pytest.raises(ValueError, match="mean: expected 3 numbers, got 1"):
        Network.from_torch(model, pixels(), mean=[0.5], std=[0.5])
    with pytest.raises(ValueError, match="classes: the model has no linear head"):
        Network.from_torch(Wrapped(F.relu), pixels(), **HALF, classes=["one"])

    class Lying(MobileNetV2):
        def eval(self):
            return self  # dropout stays on, and the model differs from one call to the next

    with pytest.raises(ValueError, match="the import computes something else"):
        Network.from_torch(randomised(Lying()).train(), pixels(), **HALF)


def test_a_classifier_is_checked():
    network = tiny_network()
    weight, bias = np.zeros((2, 32), np.float32), np.zeros(2, np.float32)
    assert network.replace(classifier=Classifier(weight, bias)).classifier.classes == ()
    for wrong, message in (
        (Classifier(weight[:, :5], bias), r"classifier.weight: expected shape \(2, 32\)"),
        (Classifier(weight, bias, ("a",)), "classifier: expected .* 2 distinct classes, got 1"),
        (Classifier(weight, bias, ("a", "a")), "classifier: expected .* distinct classes"),
        (Classifier(weight, bias * np.nan), "classifier.bias: expected finite numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            network.replace(classifier=wrong)


@pytest.mark.parametrize(
    ("package", "call", "size"),
    [
        ("torchvision", "models.mobilenet_v2", 64),
        ("torchvision", "models.resnet18", 64),
        ("torchvision", "models.resnet50", 64),
        ("timm", "mobilenetv2_100", 64),
        ("timm", "mobilenetv1_100", 64),
        ("timm", "resnet18", 64),
    ],
)
def test_the_real_packages(package, call, size):
    try:
        module = importlib.import_module(package)
    except Exception as error:  # not installed, or not with this torch
        pytest.skip(f"{package} does not import here: {error}")
    if package == "timm":
        model = module.create_model(call, num_classes=7)
    else:
        model = functools.reduce(getattr, call.split("."), module)(num_classes=7)
    model, x = randomised(model), pixels(1, size)
    network = Network.from_torch(model, x, **HALF)
    assert len(network.classifier.bias) == 7
    torch.testing.assert_close(
        nn.convert(model, policy_for(model))(x), model(x), rtol=1e-3, atol=1e-3
    )
