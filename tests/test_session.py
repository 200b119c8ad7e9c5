"""Whole passes against torch in float64, and what a session promises about bits and faults."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from reference import TorchNetwork, fisher_sums, normalise, proto_loss
from small_networks import FAMILIES, network_of, random_graph, with_random_biases
from tasks import shapes_task, tiny_network
from tinytrain_ext import _core
from tinytrain_ext.errors import BudgetExceeded, NonFiniteError
from tinytrain_ext.images import Augmentation, apply_augmentation, draw_augmentation
from tinytrain_ext.network import Network, Operation
from tinytrain_ext.protonet import loss_and_gradient
from tinytrain_ext.selection import LayerUpdate, UpdatePolicy, full_train, last_layer
from tinytrain_ext.session import OPTIMIZERS, Session, plan

# Optimisers whose gradients are kept until `step`.
STEPPING = tuple(name for name in OPTIMIZERS if name != "in_place_sgd")

EXACT = 1e-9  # relative, of sums over a whole network in float64
ISAS = _core.available_isas()
PAPER_NETWORKS = ("mcunet", "mobilenetv2", "proxylessnas")
SCALE = 10.0


@pytest.fixture(autouse=True, scope="module")
def _one_torch_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.lru_cache
def tiny() -> Network:
    return with_random_biases(tiny_network(feature_mix=True))


NETWORKS = ("tiny", *PAPER_NETWORKS)


@pytest.fixture(params=NETWORKS)
def network(request) -> Network:
    """The small random network, then the three imported ones where there are any."""
    if request.param == "tiny":
        return tiny()
    return request.getfixturevalue("imported_networks")[request.param]


def all_of_tiny(*values: str, of_all: str = ""):
    """Networks and values; of the others than the small one, `few` takes `of_all` only."""
    return [
        pytest.param(
            name,
            value,
            marks=[pytest.mark.all_cases] * (name != "tiny" and value != of_all),
        )
        for name in NETWORKS
        for value in values
    ]


def task(network: Network, ways: int = 2, shots: int = 1, seed: int = 0):
    """(images uint8, labels) of the network's size."""
    return shapes_task(ways, shots, seed, network.input_size)


def mixed_policy(network: Network, seed: int = 0) -> UpdatePolicy:
    """Some output channels here, some input channels there, a few biases."""
    rng = np.random.default_rng(seed)
    layers, count = {}, len(network.convolutions)
    chosen = rng.permutation(np.arange(count // 3, count))[: max(2, count // 4)]
    for turn, layer in enumerate(chosen):
        operation = network.operations[network.convolutions[layer]]
        columns = turn % 3 == 0 and not operation.depthwise and operation.inputs[0] != 0
        channels = operation.in_channels if columns else operation.out_channels
        selected = rng.permutation(channels)[: rng.integers(1, channels + 1)]
        layers[int(layer)] = LayerUpdate("in" if columns else "out", selected.tolist())
    return UpdatePolicy(layers, tuple(int(b) for b in rng.permutation(chosen)[:2]))


def rows(update: LayerUpdate):
    """The selected weights as an index into (O, C / groups, k, k)."""
    channels = list(update.channels)
    return np.s_[channels] if update.axis == "out" else np.s_[:, channels]


def assert_close(found, reference, what=""):
    reference = np.asarray(reference)
    atol = EXACT * float(np.abs(reference).max(initial=0))
    np.testing.assert_allclose(found, reference, rtol=EXACT, atol=atol, err_msg=what)


def everything(session: Session) -> dict[str, NDArray]:
    """Every gradient and Fisher sum, by name."""
    return {
        **{f"gradient of layer {n}": g for n, g in session.gradients().items()},
        **{f"gradient of bias {n}": g for n, g in session.bias_gradients().items()},
        **{f"Fisher of layer {n}": f for n, f in session.fisher().items()},
    }


def assert_same_bits(first: dict[str, NDArray], second: dict[str, NDArray]):
    assert first.keys() == second.keys()
    for name, values in first.items():
        assert values.tobytes() == second[name].tobytes(), name


def support_and_loss(model: TorchNetwork, support, query, labels, ways, dtype=torch.float64):
    """torch's prototypes from the support, and each query image's loss and feature."""
    with torch.no_grad():
        features = model(normalise(support, model.network, dtype))
    prototypes = torch.stack([features[torch.as_tensor(labels) == k].mean(0) for k in range(ways)])
    found = model(normalise(query, model.network, dtype))
    return prototypes, found, proto_loss(found, labels, prototypes, SCALE)


def assert_gradients_equal(session: Session, policy: UpdatePolicy, model: TorchNetwork):
    """Every gradient against torch's, whose backward has run."""
    for layer, gradient in session.gradients().items():
        reference = model.weights[layer].grad.numpy()[rows(policy.layers[layer])]
        assert_close(gradient, reference, f"gradient of layer {layer}")
    for layer, gradient in session.bias_gradients().items():
        assert_close(gradient, model.biases[layer].grad, f"gradient of bias {layer}")


def assert_fisher_equals(session: Session, model: TorchNetwork, losses: torch.Tensor):
    fisher = session.fisher()
    for layer, values in fisher_sums(model, losses, tuple(fisher)).items():
        assert_close(fisher[layer], values, f"Fisher of layer {layer}")


def assert_task_equals_torch(session, network, policy, support, query, labels):
    """Features, prototypes, loss, every gradient and Fisher sum, against torch in float64."""
    ways = int(labels.max()) + 1
    session.set_prototypes(support, labels, ways)
    loss, correct = session.proto_backward(query, labels)
    model = TorchNetwork(network)
    prototypes, features, losses = support_and_loss(model, support, query, labels, ways)
    assert_close(session.embed(query), features.detach(), "features")
    assert_close(session.prototypes(), F.normalize(prototypes, dim=1), "prototypes")
    assert_close(loss, losses.detach().sum(), "loss")
    logits = F.normalize(features, dim=1) @ F.normalize(prototypes, dim=1).T
    assert correct == int((logits.argmax(1).numpy() == labels).sum())
    assert_fisher_equals(session, model, losses / len(query))
    assert_gradients_equal(session, policy, model)


def all_layers(network: Network) -> range:
    return range(len(network.convolutions))


# ---- equal to torch ----


def test_every_gradient_and_fisher_sum_equals_torch(network):
    support, labels = task(network, seed=1)
    query, _ = task(network, seed=2)
    policy = full_train(network)
    session = Session(network, policy, fisher_layers=all_layers(network), dtype="float64")
    assert_task_equals_torch(session, network, policy, support, query, labels)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_other_families_equal_torch(family, seed):
    """Trained whole, and in part: the graph is then cut somewhere in its middle."""
    network = FAMILIES[family]
    policy = full_train(network) if seed is None else mixed_policy(network, seed)
    inspected = tuple(policy.layers)
    support, labels = task(network, ways=3, seed=1)
    query, _ = task(network, ways=3, seed=2)
    session = Session(network, policy, fisher_layers=inspected, dtype="float64")
    assert_task_equals_torch(session, network, policy, support, query, labels)


@pytest.mark.parametrize("seed", range(40))
def test_random_graphs_equal_torch(seed):
    """With all the memory there is, and with as little as will do."""
    network = random_graph(seed)
    rng = np.random.default_rng(seed)
    images, _ = task(network, ways=3, seed=seed)
    grad_features = rng.standard_normal((3, network.feature_dim))
    policy = full_train(network) if seed % 2 else mixed_policy(network, seed)
    inspected = [layer for layer in all_layers(network) if rng.random() < 0.6]
    make = functools.partial(Session, network, policy, fisher_layers=inspected, dtype="float64")
    session = make(guard_bytes=64)
    session.backward(images, grad_features)
    assert session.broken_guard() == ""
    model = TorchNetwork(network)
    features = model(normalise(images, network, torch.float64))
    assert_close(session.embed(images), features.detach(), "features")
    assert_fisher_equals(session, model, (features * torch.from_numpy(grad_features)).sum(1))
    assert_gradients_equal(session, policy, model)

    with pytest.raises(BudgetExceeded) as error:
        make(memory_bytes=1)
    tight = make(memory_bytes=error.value.needed_bytes)
    tight.backward(images, grad_features)
    for name, values in everything(tight).items():
        assert_close(values, everything(session)[name], name)
    assert_same_bits({"features": tight.embed(images)}, {"features": session.embed(images)})


@pytest.mark.parametrize(
    ("network", "kind"),
    all_of_tiny("residual pointwise2", "last convolution"),
    indirect=["network"],
)
def test_fisher_of_linear_outputs_equals_per_image_torch(network, kind):
    """These outputs must be kept as they are: before the residual add, and before the pool."""
    adds = [o for o in network.operations if o.kind == "add"]
    residual = network.convolutions.index(adds[-1].inputs[1] - 1)
    layer = residual if kind == "residual pointwise2" else len(network.convolutions) - 1
    images, labels = task(network, ways=3)
    session = Session(network, fisher_layers=[layer], dtype="float64")
    session.set_prototypes(images, labels, 3)
    session.proto_backward(images, labels, loss_weight=1)
    model = TorchNetwork(network)
    prototypes, _, _ = support_and_loss(model, images, images, labels, 3)
    expected = 0
    for n in range(3):
        x = normalise(images[n : n + 1], network, torch.float64)
        proto_loss(model(x), labels[n : n + 1], prototypes, SCALE).sum().backward()
        output = model.outputs[layer]
        expected += (output * output.grad).sum(dim=(0, 2, 3)).square().detach().numpy()
    assert_close(session.fisher()[layer], expected)


def torch_optimizer(model: TorchNetwork, name: str, rate: float) -> torch.optim.Optimizer:
    if name == "adam":
        return torch.optim.Adam(model.parameters(), rate)
    return torch.optim.SGD(model.parameters(), rate, momentum=0.9 if name == "momentum" else 0)


def torch_step(model: TorchNetwork, optimizer: torch.optim.Optimizer, policy: UpdatePolicy):
    """A dense step whose gradients are zero where nothing is selected."""
    for layer, weight in enumerate(model.weights):
        mask = torch.zeros_like(weight)
        if layer in policy.layers:
            mask[rows(policy.layers[layer])] = 1
        weight.grad = mask * weight.grad
        model.biases[layer].grad = model.biases[layer].grad * (layer in policy.biases)
    optimizer.step()


@pytest.mark.parametrize(
    ("network", "optimizer"), all_of_tiny(*STEPPING, of_all="adam"), indirect=["network"]
)
def test_several_steps_equal_torch(network, optimizer):
    """Algorithm 1's loop: prototypes again under the new weights, one pass, one step."""
    steps, rate = 3, {"adam": 1e-3, "sgd": 1e-2, "momentum": 1e-2}[optimizer]
    policy = mixed_policy(network)
    support, labels = task(network, seed=1)
    query, _ = task(network, seed=2)
    session = Session(network, policy, optimizer=optimizer, dtype="float64")
    model = TorchNetwork(network)
    reference = torch_optimizer(model, optimizer, rate)
    for _ in range(steps):
        session.set_prototypes(support, labels, 2)
        loss, _ = session.proto_backward(query, labels)
        session.step(rate)
        session.zero_grad()
        reference.zero_grad()
        _, _, losses = support_and_loss(model, support, query, labels, 2)
        assert_close(loss, losses.detach().sum(), "loss")
        losses.mean().backward()
        torch_step(model, reference, policy)
    for layer in all_layers(network):
        weight, bias = session.layer(layer)
        assert_close(weight, model.weights[layer].detach(), f"layer {layer}")
        assert_close(bias, model.biases[layer].detach(), f"bias {layer}")


class MaskedRelu6(torch.autograd.Function):
    """ReLU6 whose derivative is a given mask."""

    @staticmethod
    def forward(ctx, x, mask):
        ctx.save_for_backward(mask)
        return x.clamp(0, 6)

    @staticmethod
    def backward(ctx, grad):
        (mask,) = ctx.saved_tensors
        return grad * mask, None


class MaskedTorchNetwork(TorchNetwork):
    """TorchNetwork whose ReLU6 let through the gradients that another run's did."""

    def __init__(self, network: Network, masks: dict[int, torch.Tensor], dtype: torch.dtype):
        super().__init__(network, dtype)
        self.masks = masks

    def activate(self, number, y, activation):
        if activation == "none":
            return y
        return MaskedRelu6.apply(y, self.masks[number].to(y.dtype))


def kernel_by_kernel(network: Network, x: NDArray[np.float32], isa: str):
    """The core's own forward pass, whole tensors at a time: its features and its ReLU masks."""
    tensors, masks, layer = [x], {}, 0
    for op in network.operations:
        if op.kind == "conv":
            height, width = tensors[-1].shape[1:3]
            conv = _core.Convolution32(
                network.weights[layer],
                network.biases[layer],
                height=height,
                width=width,
                stride=op.stride,
                padding=op.padding,
                depthwise=op.depthwise,
                activation=op.activation,
                isa=isa,
            )
            y, bits = conv.forward(tensors[-1])
            if op.activation == "relu6":
                flat = np.unpackbits(bits, axis=2, count=y.shape[-1], bitorder="little")
                masks[len(tensors)] = torch.from_numpy(flat.reshape(y.shape)).permute(0, 3, 1, 2)
            layer += 1
        elif op.kind == "add":
            y = tensors[op.inputs[0]] + tensors[op.inputs[1]]
        else:
            # One pixel after the other, as the kernel does.
            y = functools.reduce(
                np.add, tensors[-1].reshape(len(x), -1, tensors[-1].shape[-1]).swapaxes(0, 1)
            )
            y *= np.float32(1) / np.float32(height * width)
        if op.kind != "global_average_pool":
            height, width = y.shape[1:3]
        tensors.append(y)
    return tensors[-1], masks


def relative_error(found: NDArray, reference: NDArray) -> float:
    return float(np.linalg.norm(found - reference) / np.linalg.norm(reference))


@pytest.mark.parametrize(
    "isa", [pytest.param(isa, marks=[pytest.mark.all_cases] * (isa == "scalar")) for isa in ISAS]
)
def test_one_float32_step_is_as_good_as_a_naive_one(network, isa):
    """Against float64 with the same ReLU masks, so that no kink tips a gradient: from the images
    to the new weights our error is at most twice that of torch's own float32."""
    rate, ways = 0.05, 2
    policy = full_train(network)
    images, labels = task(network, ways, shots=2)
    x = normalise(images, network, torch.float32).permute(0, 2, 3, 1).contiguous().numpy()
    session = Session(network, policy, fisher_layers=all_layers(network), optimizer="sgd", isa=isa)
    features, masks = kernel_by_kernel(network, x, isa)
    assert session.embed(x).tobytes() == features.tobytes()
    session.set_prototypes(x, labels, ways)
    session.proto_backward(x, labels)
    found = everything(session)
    session.step(rate)
    for layer in all_layers(network):
        found[f"layer {layer}"], found[f"bias {layer}"] = session.layer(layer)

    def by_torch(dtype):
        model = MaskedTorchNetwork(network, masks, dtype)
        _, _, losses = support_and_loss(model, x, x, labels, ways, dtype)
        losses = losses / len(x)
        result = {
            f"Fisher of layer {layer}": values
            for layer, values in fisher_sums(model, losses, all_layers(network)).items()
        }
        torch.optim.SGD(model.parameters(), rate).step()
        for layer in all_layers(network):
            weight, bias = model.weights[layer], model.biases[layer]
            result[f"gradient of layer {layer}"] = weight.grad.numpy()
            result[f"gradient of bias {layer}"] = bias.grad.numpy()
            result[f"layer {layer}"] = weight.detach().numpy()
            result[f"bias {layer}"] = bias.detach().numpy()
        return result

    reference, naive = by_torch(torch.float64), by_torch(torch.float32)
    assert found.keys() == reference.keys()
    for kind in ("gradient of layer", "gradient of bias", "Fisher of layer", "layer", "bias"):
        names = [name for name in found if name.startswith(kind)]
        ours, theirs = (
            np.sqrt(np.mean([relative_error(run[name], reference[name]) ** 2 for name in names]))
            for run in (found, naive)
        )
        assert ours <= 2 * theirs + np.finfo(np.float32).eps, f"{kind}: {ours:.3g}, {theirs:.3g}"


# ---- the same bits ----


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_micro_batches_add_up_exactly(dtype):
    """Depth first: images add one after the other, however they are cut into calls."""
    network = tiny()
    images, labels = task(network, ways=3, shots=3)
    session = Session(
        network, mixed_policy(network), fisher_layers=all_layers(network), dtype=dtype
    )
    session.set_prototypes(images, labels, 3)
    loss, correct = session.proto_backward(images, labels)
    whole = everything(session)
    session.zero_grad()
    assert all((values == 0).all() for values in everything(session).values())
    parts = [
        session.proto_backward(images[part], labels[part], loss_weight=1 / len(images))
        for part in (slice(0, 2), slice(2, 3), slice(3, 9))
    ]
    assert_same_bits(everything(session), whole)
    assert sum(part[1] for part in parts) == correct
    assert sum(part[0] for part in parts) == pytest.approx(loss, rel=1e-14)


def run_everything(session: Session, images, labels, queries, augmentation) -> dict[str, NDArray]:
    """Algorithm 1 for two steps, and every number it leaves behind."""
    results = {}
    session.set_prototypes(images, labels, 3, keep=True)
    results["features"] = session.embed(queries)
    for step in range(2):
        loss, correct = session.proto_backward(queries, labels, augmentation)
        results[f"loss {step}"] = np.array([loss, correct])
        results |= {f"{name}, step {step}": g.copy() for name, g in everything(session).items()}
        session.step(1e-2)
        session.zero_grad()
        if session.kept:
            session.update_prototypes()
        else:
            session.set_prototypes(images, labels, 3)
        results[f"prototypes {step}"] = session.prototypes()
    for layer in range(len(session.network().weights)):
        results[f"layer {layer}"], results[f"bias {layer}"] = session.layer(layer)
    return results


def two_step_task(network: Network):
    images, labels = task(network, ways=3, shots=3, seed=1)
    queries, _ = task(network, ways=3, shots=3, seed=2)
    return (
        images,
        labels,
        queries,
        draw_augmentation(9, network.input_size, np.random.default_rng(0)),
    )


@pytest.mark.parametrize("optimizer", STEPPING)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("keep_images", [0, 9])
def test_any_number_of_threads_gives_the_same_bits(optimizer, isa, keep_images):
    network = tiny()
    arguments = two_step_task(network)
    one, *others = (
        run_everything(
            Session(
                network,
                mixed_policy(network),
                fisher_layers=all_layers(network)[10:],
                optimizer=optimizer,
                isa=isa,
                keep_images=keep_images,
                threads=threads,
            ),
            *arguments,
        )
        for threads in (1, 2, 4)
    )
    for other in others:
        assert_same_bits(one, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_threads_give_the_same_bits_in_other_families(family):
    network = FAMILIES[family]
    arguments = two_step_task(network)
    one, other = (
        run_everything(
            Session(network, full_train(network), fisher_layers=[0, 1, 2], threads=threads),
            *arguments,
        )
        for threads in (1, 4)
    )
    assert_same_bits(one, other)


def test_threads_that_a_budget_does_not_carry_change_no_bit():
    """Fewer threads, then a Fisher pass that recomputes: never because more were asked for."""
    network = tiny()
    arguments = two_step_task(network)
    make = functools.partial(
        Session, network, mixed_policy(network), fisher_layers=all_layers(network)
    )
    roomy = make().plan.peak_bytes
    for memory_bytes in (roomy, int(roomy * 1.3)):
        one = make(threads=1, memory_bytes=memory_bytes)
        four = make(threads=4, memory_bytes=memory_bytes)
        assert four.plan.threads < 4
        assert not four.plan.recompute
        assert_same_bits(run_everything(one, *arguments), run_everything(four, *arguments))


@pytest.mark.parametrize("optimizer", STEPPING)
@pytest.mark.parametrize("isa", ISAS)
def test_unselected_weights_stay_bit_identical(optimizer, isa):
    network, images = tiny(), two_step_task(tiny())
    policy = mixed_policy(network)
    session = Session(network, policy, optimizer=optimizer, isa=isa)
    run_everything(session, *images)
    adapted = session.network()
    for layer in all_layers(network):
        before, after = network.weights[layer], adapted.weights[layer]
        selected = np.zeros(before.shape, bool)
        if layer in policy.layers:
            selected[rows(policy.layers[layer])] = True
        np.testing.assert_array_equal(
            before[~selected].view(np.uint32), after[~selected].view(np.uint32)
        )
        changed = (before != after)[selected]
        assert changed.mean() > 0.5 if changed.size else True, f"layer {layer} was to change"
        same = network.biases[layer].tobytes() == adapted.biases[layer].tobytes()
        assert same == (layer not in policy.biases)


def test_a_kept_prefix_equals_a_recomputed_one():
    network = tiny()
    images, labels, queries, _ = two_step_task(network)
    policy = UpdatePolicy({len(network.convolutions) - 2: range(8)})
    keeping, fresh = (Session(network, policy, keep_images=n, guard_bytes=64) for n in (9, 0))
    keeping.set_prototypes(images, labels, 3, keep=True)
    fresh.set_prototypes(images, labels, 3, keep=True)
    assert keeping.kept
    assert not fresh.kept
    with pytest.raises(ValueError, match="no prefix outputs are kept"):
        fresh.update_prototypes()
    with pytest.raises(ValueError, match="no prefix outputs are kept"):
        fresh.kept_features()
    for session in (keeping, fresh):
        session.proto_backward(queries, labels)
        session.step(0.1)
    before = keeping.prototypes()
    keeping.update_prototypes()
    fresh.set_prototypes(images, labels, 3)
    assert (keeping.prototypes() != before).any()
    assert_same_bits({"p": keeping.prototypes()}, {"p": fresh.prototypes()})
    assert_same_bits({"f": keeping.kept_features()}, {"f": fresh.embed(images)})
    assert keeping.broken_guard() == fresh.broken_guard() == ""
    # More images than there is room for are not kept, and what was kept is forgotten.
    more = np.concatenate([images, images[:1]])
    keeping.set_prototypes(more, np.append(labels, 0), 3, keep=True)
    assert not keeping.kept


def smallest(make) -> int:
    with pytest.raises(BudgetExceeded) as error:
        make(memory_bytes=1)
    return error.value.needed_bytes


def test_recomputing_gives_the_same_fisher_information(network):
    """Block by block, with activations computed again: within rounding, whatever the limit."""
    images, labels = task(network, ways=2)
    inspected = all_layers(network)[-18:]
    make = functools.partial(Session, network, fisher_layers=inspected, dtype="float64")
    free = make()
    tight = make(memory_bytes=smallest(make))
    assert tight.plan.recompute
    assert not free.plan.recompute
    assert tight.plan.peak_bytes < free.plan.peak_bytes
    for session in (free, tight):
        session.set_prototypes(images, labels, 2)
        session.proto_backward(images, labels)
    for layer, values in free.fisher().items():
        assert_close(tight.fisher()[layer], values, f"layer {layer}")


@pytest.mark.parametrize("isa", ISAS)
def test_thin_strips_give_the_same_bits(isa):
    network = tiny()
    images, _ = task(network, ways=3)
    make = functools.partial(Session, network, UpdatePolicy({24: [0]}), isa=isa)
    wide, thin = make(), make(memory_bytes=smallest(make))
    assert thin.plan.peak_bytes < wide.plan.peak_bytes
    gradient = np.ones((3, network.feature_dim), np.float32)
    for session in (wide, thin):
        session.backward(images, gradient)
    assert_same_bits(everything(wide), everything(thin))
    assert_same_bits({"features": wide.embed(images)}, {"features": thin.embed(images)})


def test_a_session_is_repeatable_and_leaves_its_network_alone():
    network = tiny()
    weights = [w.copy() for w in network.weights]
    make = functools.partial(Session, network, full_train(network))
    arguments = two_step_task(network)
    assert_same_bits(run_everything(make(), *arguments), run_everything(make(), *arguments))
    for before, after in zip(weights, network.weights, strict=True):
        assert before.tobytes() == after.tobytes()


# ---- loss and images ----


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("limited", [False, True])
def test_the_two_halves_of_backward_give_its_bits(family, threads, limited):
    network, rng = FAMILIES[family], np.random.default_rng(3)
    for policy in (mixed_policy(network), full_train(network)):
        # Without a limit everything is saved, at the least of memory only the prefix's output.
        options = {"fisher_layers": range(1, len(network.convolutions)), "threads": threads}
        if limited:
            options["memory_bytes"] = smallest(
                functools.partial(Session, network, policy, **options)
            )
        images = rng.integers(0, 256, (3, network.input_size, network.input_size, 3), np.uint8)
        grads = rng.normal(size=(3, network.feature_dim)).astype(np.float32)
        whole = Session(network, policy, **options)
        whole.backward(images, grads)
        halves = Session(network, policy, **{**options, "guard_bytes": 0 if limited else 64})
        features, saved = halves.forward(images)
        assert features.tobytes() == whole.embed(images).tobytes()
        assert saved.shape == (3, halves.plan.saved_bytes)
        halves.forward(images[::-1].copy())  # another forward in between is no matter
        needs_images = halves.plan.first_tail_operation == 0
        if needs_images:
            with pytest.raises(ValueError, match="images: this plan has no frozen prefix"):
                halves.backward_saved(saved, grads)
        halves.backward_saved(saved, grads, images if needs_images else None)
        assert_same_bits(everything(whole), everything(halves))
        assert halves.broken_guard() == ""


def test_selected_weights_can_be_set(network):
    rng = np.random.default_rng(4)
    policy = mixed_policy(network)
    session = Session(network, policy, dtype="float64")
    images, labels = task(network)
    session.set_prototypes(images, labels, 2)
    session.proto_backward(images, labels)
    flat = session.flat_gradient()
    gradients = {**session.gradients(), **{-1 - n: b for n, b in session.bias_gradients().items()}}
    np.testing.assert_array_equal(flat, np.concatenate([g.ravel() for g in gradients.values()]))
    values = rng.normal(size=flat.shape)
    session.set_selected(values)
    for layer, gradient in session.gradients().items():
        wanted = network.weights[layer].astype(np.float64)
        mine, values = np.split(values, [gradient.size])
        wanted[rows(policy.layers[layer])] = mine.reshape(gradient.shape)
        np.testing.assert_array_equal(session.layer(layer)[0], wanted)
    for layer in policy.biases:
        mine, values = np.split(values, [len(network.biases[layer])])
        np.testing.assert_array_equal(session.layer(layer)[1], mine)
    before = [session.layer(layer)[0] for layer in policy.layers]
    with pytest.raises(NonFiniteError, match="set_selected: a value is not finite"):
        session.set_selected(np.where(np.arange(len(flat)) == len(flat) - 1, np.nan, flat))
    for layer, weight in zip(policy.layers, before, strict=True):
        np.testing.assert_array_equal(session.layer(layer)[0], weight)
    with pytest.raises(ValueError, match="values: expected shape"):
        session.set_selected(np.zeros(2))


@pytest.mark.parametrize("scale", [10.0, 0.5])
def test_proto_backward_is_protonet_and_backward(scale):
    network = tiny()
    support, labels, queries, augmentation = two_step_task(network)
    policy = mixed_policy(network)
    one, two = (
        Session(network, policy, fisher_layers=all_layers(network), dtype="float64")
        for _ in range(2)
    )
    one.set_prototypes(support, labels, 3)
    loss, correct = one.proto_backward(queries, labels, scale=scale)
    features = one.embed(queries)
    expected, expected_correct, gradient = loss_and_gradient(
        features, labels, one.prototypes(), scale
    )
    assert loss == pytest.approx(expected, rel=1e-12)
    assert correct == expected_correct
    two.backward(queries, gradient / len(queries))
    for name, values in everything(one).items():
        assert_close(values, everything(two)[name], name)
    # The same with augmented images.
    one.zero_grad()
    two.zero_grad()
    one.proto_backward(queries, labels, augmentation, scale=scale)
    seen = apply_augmentation(queries, augmentation)
    _, _, gradient = loss_and_gradient(one.embed(seen), labels, one.prototypes(), scale)
    two.backward(queries, gradient / len(queries), augmentation)
    for name, values in everything(one).items():
        reference = everything(two)[name]
        np.testing.assert_allclose(
            values, reference, rtol=1e-4, atol=1e-5 * np.abs(reference).max()
        )


SIZE = 15


@functools.lru_cache
def lens() -> Session:
    """One convolution as large as its image: the gradient of its weights is the image itself."""
    conv = Operation("conv", (0,), "none", 3, 1, SIZE, 1, 0)
    return Session(network_of("lens", [conv], SIZE), UpdatePolicy({0: [0]}), optimizer="sgd")


def as_the_stem_sees(image: NDArray, augmentation: Augmentation | None) -> NDArray[np.float32]:
    session = lens()
    session.zero_grad()
    session.backward(image[None], np.ones((1, 1), np.float32), augmentation)
    return session.gradients()[0][0].transpose(1, 2, 0)


AUGMENTATIONS = [
    # flip, shift x, shift y, brightness, saturation, contrast
    (0, 0, 0, 0, 1, 1),
    (1, 0, 0, 0, 1, 1),
    (0, 3, 0, 0, 1, 1),
    (0, -3, 0, 0, 1, 1),
    (0, 0, 2, 0, 1, 1),
    (0, 0, -2, 0, 1, 1),
    (0, 0, 0, 0.2, 1, 1),
    (0, 0, 0, 0, 1.7, 1),
    (0, 0, 0, 0, 0, 1),
    (0, 0, 0, 0, 1, 0.5),
    (0, 0, 0, 0, 1, 0),
    (1, 2, -1, -0.225, 0.3, 1.4),
    (1, -4, 5, 0.225, 1.9, 0.6),
    (0, SIZE - 1, 0, 0.1, 1, 1.2),
    (1, 1 - SIZE, SIZE - 1, 0, 0.5, 1),
    (0, SIZE, 0, 0, 1, 1),
    (1, 0, -SIZE, 0, 1, 1),
    (0, 1000, -1000, 0.1, 0.5, 0.7),
    (0, 2e9, -2e9, 0, 1, 1),
    (1, 3e38, -3e38, 0, 1, 1),
]


@pytest.mark.parametrize("row", AUGMENTATIONS)
def test_the_stem_sees_the_augmented_image(row):
    augmentation = Augmentation(np.array([row], np.float32))
    image = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    seen = as_the_stem_sees(image, augmentation)
    reference = apply_augmentation(image[None], augmentation, dtype=np.float64)[0]
    np.testing.assert_allclose(seen, reference, rtol=0, atol=2e-6)
    # A float32 image is normalised already: the identity as mean and deviation.
    normalised = np.random.default_rng(1).standard_normal((SIZE, SIZE, 3)).astype(np.float32)
    seen = as_the_stem_sees(normalised, augmentation)
    reference = apply_augmentation(
        normalised[None], augmentation, (0, 0, 0), (1 / 255, 1 / 255, 1 / 255), np.float64
    )[0]
    np.testing.assert_allclose(seen, reference, rtol=0, atol=4e-6)


def test_without_augmentation_the_stem_sees_the_normalised_image():
    image = np.arange(SIZE * SIZE * 3).astype(np.uint8).reshape(SIZE, SIZE, 3)
    np.testing.assert_allclose(as_the_stem_sees(image, None), image / 127.5 - 1, atol=1e-6)
    floats = np.linspace(-3, 3, SIZE * SIZE * 3, dtype=np.float32).reshape(SIZE, SIZE, 3)
    np.testing.assert_array_equal(as_the_stem_sees(floats, None), floats)


# ---- faults ----


def snapshot(session: Session) -> list[bytes]:
    return [
        array.tobytes() for n in range(len(session.network().weights)) for array in session.layer(n)
    ]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("fault", [np.nan, np.inf, -np.inf])
def test_images_that_are_not_finite_change_nothing(isa, threads, fault):
    network = tiny()
    images, labels, *_ = two_step_task(network)
    session = Session(network, full_train(network), threads=threads, isa=isa)
    session.set_prototypes(images, labels, 3)
    session.proto_backward(images, labels)
    session.step(1e-3)
    session.zero_grad()
    session.proto_backward(images, labels)
    before = snapshot(session)
    broken = normalise(images, network, torch.float32).permute(0, 2, 3, 1).contiguous().numpy()
    broken[4] = fault
    with pytest.raises(NonFiniteError, match="proto_backward: the loss is not finite"):
        session.proto_backward(broken, labels)
    assert all((values == 0).all() for values in everything(session).values())
    assert snapshot(session) == before
    # The session is as good as before.
    session.proto_backward(images, labels)
    session.step(1e-3)
    assert snapshot(session) != before


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("optimizer", STEPPING)
@pytest.mark.parametrize("fault", [np.nan, np.inf, 1e30])
def test_gradients_that_are_not_finite_change_nothing(isa, optimizer, fault):
    network = tiny()
    images, _, _, _ = two_step_task(network)
    session = Session(network, mixed_policy(network), optimizer=optimizer, isa=isa)
    gradient = np.ones((9, network.feature_dim), np.float32)
    session.backward(images, gradient)
    session.step(1e-3)
    before = snapshot(session)
    gradient[3, 1] = fault
    session.backward(images, gradient)
    with pytest.raises(NonFiniteError, match="step: a gradient is not finite or has exploded"):
        session.step(1e-3)
    assert snapshot(session) == before
    assert all((values == 0).all() for values in everything(session).values())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layer", [0, 7, 16])
def test_weights_that_are_not_numbers_are_found(isa, layer):
    """A Network refuses them; beneath it no ReLU swallows a NaN."""
    network = tiny()
    weights = [w.copy() for w in network.weights]
    weights[layer].flat[0] = np.nan
    images, labels, *_ = two_step_task(network)
    broken = copy.copy(network)
    object.__setattr__(broken, "weights", tuple(weights))
    session = Session(broken, full_train(network), isa=isa)
    before = [values.tobytes() for n in all_layers(network) for values in session.layer(n)]
    session.set_prototypes(images, labels, 3)
    with pytest.raises(NonFiniteError):
        session.proto_backward(images, labels)
    assert before == [values.tobytes() for n in all_layers(network) for values in session.layer(n)]


# ---- arguments ----


@pytest.fixture(scope="module")
def ready():
    """A session with prototypes, its images and its labels."""
    network = tiny()
    images, labels, *_ = two_step_task(network)
    session = Session(network, UpdatePolicy({20: [0]}), max_ways=5)
    session.set_prototypes(images, labels, 3)
    return session, images, labels


def test_images_are_checked(ready):
    session, images, labels = ready
    wide = np.zeros((2, 32, 64, 3), np.uint8)
    for wrong, error, message in [
        (
            images.astype(np.float64),
            TypeError,
            "images: expected a uint8 or float32 array, got float64",
        ),
        (
            images.astype(np.int64),
            TypeError,
            "images: expected a uint8 or float32 array, got int64",
        ),
        (images.tolist(), TypeError, "images: expected a uint8 or float32 array, got list"),
        (wide[:, :, ::2], TypeError, "images: expected a C-contiguous array"),
        (images.transpose(0, 2, 1, 3), TypeError, "images: expected a C-contiguous array"),
        (images[0], ValueError, r"images: expected shape \(N, 32, 32, 3\), got \(32, 32, 3\)"),
        (wide, ValueError, r"images: expected shape \(N, 32, 32, 3\), got \(2, 32, 64, 3\)"),
    ]:
        for call in (
            session.embed,
            lambda x: session.set_prototypes(x, labels, 3),
            lambda x: session.proto_backward(x, labels),
            lambda x: session.backward(x, np.zeros((9, 64), np.float32)),
        ):
            with pytest.raises(error, match=message):
                call(wrong)
    assert session.embed(images[:0]).shape == (0, session.embed(images[:1]).shape[1])
    with pytest.raises(ValueError, match="images: expected at least one"):
        session.proto_backward(images[:0], labels[:0])


def test_labels_and_ways_are_checked(ready):
    session, images, labels = ready
    for wrong, error, message in [
        (labels[:4], ValueError, r"labels: expected shape \(9\), got \(4\)"),
        (labels.astype(np.float32), TypeError, r"labels: expected \(N,\) integers, got float32"),
        (labels[:, None], TypeError, r"labels: expected \(N,\) integers, got int64 \(9, 1\)"),
        (labels + 1, ValueError, "labels: expected 0 to 2, got 3"),
        (labels - 1, ValueError, "labels: expected 0 to 2, got -1"),
    ]:
        with pytest.raises(error, match=message):
            session.proto_backward(images, wrong)
    with pytest.raises(ValueError, match="labels: class 2 of 3 has no image"):
        session.set_prototypes(images[:6], labels[:6], 3)
    with pytest.raises(ValueError, match="labels: expected 0 to 1, got 2"):
        session.set_prototypes(images, labels, 2)
    with pytest.raises(ValueError, match="labels: class 3 of 1000000000 has no image"):
        session.set_prototypes(images, labels, 10**9)
    for ways in (0, -1):
        with pytest.raises(ValueError, match=f"ways: expected 1 to 5, got {ways}"):
            session.set_prototypes(images, labels, ways)
    with pytest.raises(ValueError, match="ways: expected 1 to 5, got 6"):
        session.set_prototypes(images, np.array([0, 1, 2, 3, 4, 5, 0, 1, 2]), 6)
    fresh = Session(tiny(), UpdatePolicy({20: [0]}))
    with pytest.raises(ValueError, match="proto_backward: call set_prototypes first"):
        fresh.proto_backward(images, labels)
    with pytest.raises(ValueError, match="updates nothing and inspects nothing"):
        Session(tiny()).proto_backward(images, labels)


def test_numbers_are_checked(ready):
    session, images, labels = ready
    for scale in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="scale: expected a positive number, got"):
            session.proto_backward(images, labels, scale=scale)
    for weight in (np.nan, np.inf):
        with pytest.raises(ValueError, match="loss_weight: expected a finite number, got"):
            session.proto_backward(images, labels, loss_weight=weight)
    for rate in (0.0, -1e-3, np.nan, np.inf):
        with pytest.raises(ValueError, match="learning_rate: expected a positive number, got"):
            session.step(rate)


def test_gradients_and_augmentations_are_checked(ready):
    session, images, labels = ready
    right = np.zeros((9, tiny().feature_dim), np.float32)
    with pytest.raises(TypeError, match="grad_features: expected float32, got float64"):
        session.backward(images, right.astype(np.float64))
    with pytest.raises(TypeError, match="grad_features: expected a C-contiguous array"):
        session.backward(images, np.asfortranarray(right))
    with pytest.raises(ValueError, match=r"grad_features: expected shape \(9, 64\), got \(8, 64\)"):
        session.backward(images, right[:8])
    augmentation = draw_augmentation(8, 32, np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"augmentation: expected shape \(9, 6\), got \(8, 6\)"):
        session.backward(images, right, augmentation)
    with pytest.raises(ValueError, match=r"augmentation: expected shape \(9, 6\), got \(8, 6\)"):
        session.proto_backward(images, labels, augmentation)
    for fault in (np.nan, np.inf):
        parameters = np.zeros((9, 6), np.float32)
        parameters[7, 1] = fault
        with pytest.raises(ValueError, match="augmentation: expected finite numbers"):
            session.proto_backward(images, labels, Augmentation(parameters))


def test_requests_are_checked():
    network = tiny()
    for change, message in [
        (
            {"optimizer": "lion"},
            "optimizer: expected one of adam, sgd, momentum, in_place_sgd, got 'lion'",
        ),
        ({"threads": 0}, "threads: expected at least 1, got 0"),
        ({"threads": 65}, "threads: expected 1 to 64, got 65"),
        ({"memory_bytes": 0}, "memory_bytes: expected a positive number or None, got 0"),
        ({"max_ways": 0}, "max_ways: expected 1 to 100000, got 0"),
        ({"keep_images": -1}, "keep_images: expected 0 or more"),
        ({"fisher_layers": [99]}, "fisher_layers: expected distinct layers from 0 to 24, got 99"),
        ({"fisher_layers": [3, 3]}, "fisher_layers: expected distinct layers"),
        ({"policy": UpdatePolicy({99: [0]})}, "policy: layer 99: expected 0 to 24"),
        ({"policy": UpdatePolicy({0: [8]})}, "policy: layer 0: channels must be"),
        (
            {"policy": UpdatePolicy({1: LayerUpdate("in", (0,))})},
            "policy: layer 1: axis 'in' is for",
        ),
        (
            {"policy": UpdatePolicy({0: LayerUpdate("in", (0,))})},
            "policy: layer 0: axis 'in' cannot",
        ),
    ]:
        for make in (Session, plan):
            with pytest.raises(ValueError, match=message):
                make(network, **change)
    with pytest.raises(ValueError, match="dtype: expected 'float32' or 'float64', got 'half'"):
        Session(network, dtype="half")
    with pytest.raises(ValueError, match="isa: unknown instruction set 'sse9'"):
        Session(network, isa="sse9")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_frozen_bytes_are_exact_where_weights_came_from_bytes(dtype):
    """An imported network's weights are int8 times a scale: kept so, the results are the same."""
    rng = np.random.default_rng(4)
    network = tiny_network()
    network = network.replace(
        weights=tuple(
            rng.integers(-128, 128, w.shape).astype(np.float32)
            * rng.uniform(0.001, 0.02, (len(w), 1, 1, 1)).astype(np.float32)
            for w in network.weights
        )
    )
    last = len(network.convolutions) - 1
    policy = UpdatePolicy(
        {last - 1: LayerUpdate("out", (0, 3)), last: LayerUpdate("in", (1, 2))}, (last - 2,)
    )
    images, labels = shapes_task(shots=3)
    sessions = [
        Session(
            network,
            policy,
            fisher_layers=(last - 3, last),
            optimizer="adam",
            dtype=dtype,
            frozen_weights=kind,
            guard_bytes=64,
        )
        for kind in ("float32", "int8")
    ]
    for _ in range(3):
        for session in sessions:
            session.set_prototypes(images, labels, 3)
        rows = [session.proto_backward(images, labels) for session in sessions]
        assert rows[0] == rows[1]
        for name in ("gradients", "bias_gradients", "fisher"):
            found, bytewise = (getattr(session, name)() for session in sessions)
            for layer, values in found.items():
                assert values.any()
                np.testing.assert_array_equal(values, bytewise[layer])
        for session in sessions:
            session.step(1e-3)
            session.zero_grad()
            assert session.broken_guard() == ""
    plain, bytewise = sessions
    for before, after in zip(plain.network().weights, bytewise.network().weights, strict=True):
        np.testing.assert_array_equal(before, after)
    assert bytewise.plan.resident_weight_bytes < 0.6 * plain.plan.resident_weight_bytes


def test_frozen_bytes_round_weights_that_were_never_bytes():
    network = tiny_network()
    images, _ = shapes_task(shots=2)
    session = Session(network, frozen_weights="int8")
    rounded = session.network()
    for layer, (before, after) in enumerate(zip(network.weights, rounded.weights, strict=True)):
        largest = np.abs(before).max(axis=(1, 2, 3), keepdims=True)
        assert (np.abs(before - after) <= largest / 127 / 2 * 1.0001).all(), layer
    np.testing.assert_array_equal(session.embed(images), Session(rounded).embed(images))
    with pytest.raises(ValueError, match="frozen_weights: expected float32 or int8, got int4"):
        Session(network, frozen_weights="int4")


def test_in_place_sgd_is_sgd_image_by_image():
    """The same weights as plain SGD steps on one image after another, with no gradient kept."""
    network = tiny_network()
    images, labels = shapes_task(shots=3)
    last = len(network.convolutions) - 1
    policy = UpdatePolicy(
        {
            last - 2: LayerUpdate("out", (0, 3)),
            last - 1: LayerUpdate("out", (1, 4)),
            last: LayerUpdate("in", (1, 2)),
        },
        (last - 1,),
    )
    sgd = Session(network, policy, optimizer="sgd", dtype="float64")
    in_place = Session(
        network,
        policy,
        optimizer="in_place_sgd",
        in_place_rate=0.05,
        dtype="float64",
        guard_bytes=64,
    )
    for session in (sgd, in_place):
        session.set_prototypes(images, labels, 3)
    result = in_place.proto_backward(images, labels)
    losses = []
    order = [turn * 5 % len(images) for turn in range(len(images))]  # 9 photos, in strides of 5
    assert sorted(order) == list(range(9))
    for n in order:
        one = slice(n, n + 1)
        losses.append(sgd.proto_backward(images[one], labels[one], loss_weight=1 / len(images))[0])
        sgd.step(0.05)
        sgd.zero_grad()
    assert result[0] == pytest.approx(sum(losses))
    for layer in range(len(network.convolutions)):
        for one, other in zip(sgd.layer(layer), in_place.layer(layer), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-14)
    assert (sgd.layer(last)[0] != network.weights[last]).any()
    assert in_place.broken_guard() == ""
    assert in_place.plan.peak_bytes < sgd.plan.peak_bytes
    assert in_place.arena_high_water() <= in_place.plan.peak_bytes


def test_in_place_sgd_refuses_what_it_cannot_do():
    network = tiny_network()
    images, labels = shapes_task(shots=2)
    policy = last_layer(network)
    with pytest.raises(ValueError, match="in_place_rate: expected with optimizer 'in_place_sgd'"):
        Session(network, policy, optimizer="in_place_sgd")
    with pytest.raises(ValueError, match="in_place_rate: expected with"):
        Session(network, policy, in_place_rate=0.1)
    with pytest.raises(ValueError, match="in_place_rate: expected a positive number"):
        Session(network, policy, optimizer="in_place_sgd", in_place_rate=-1)
    with pytest.raises(ValueError, match="threads: expected 1 with in-place SGD"):
        Session(network, policy, optimizer="in_place_sgd", in_place_rate=0.1, threads=2)
    session = Session(network, policy, optimizer="in_place_sgd", in_place_rate=0.1)
    session.set_prototypes(images, labels, 3)
    with pytest.raises(ValueError, match="take their steps themselves"):
        session.step(0.1)
    with pytest.raises(ValueError, match="gradients: in_place_sgd keeps none"):
        session.gradients()
    features = np.full((len(images), network.feature_dim), np.nan, np.float32)
    with pytest.raises(NonFiniteError, match="updates stopped before it"):
        session.backward(images, features)
    for weights in session.network().weights:
        assert np.isfinite(weights).all()
