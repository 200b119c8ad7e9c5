import numpy as np
import pytest

from tasks import shapes_task, tiny_network
from tinytrain_ext.adapt import adapt, classify
from tinytrain_ext.cost import inspected_layers, profile
from tinytrain_ext.errors import BudgetExceeded, NonFiniteError
from tinytrain_ext.network import Network
from tinytrain_ext.protonet import compute_prototypes
from tinytrain_ext.selection import Budget, LayerUpdate, UpdatePolicy, full_train, last_layer

NETWORK = tiny_network()
IMAGES, LABELS = shapes_task(shots=5)
NAMES = ("cat", "dog", "owl")
# The tiny network's inspected layers are most of it, so that the compute share is high.
BUDGET = Budget(memory_bytes=1 << 20, compute=0.6)


def adapted(**options):
    return adapt(NETWORK, IMAGES, LABELS, **{"budget": BUDGET, "iterations": 6, **options})


@pytest.fixture(scope="module")
def result():
    return adapted(classes=NAMES)


def test_result(result):
    assert result.network.classes == NAMES
    assert result.network.prototypes.shape == (3, 32)
    assert result.policy.layers
    assert set(result.policy.layers) <= set(inspected_layers(NETWORK))
    assert set(result.timings) == {"fisher", "selection", "embed", "fine_tuning"}
    assert len(result.history) == 6
    assert result.history[-1].loss < result.history[0].loss
    assert 0 <= result.history[0].accuracy <= 1
    assert result.arena_high_water <= result.peak_bytes <= BUDGET.memory_bytes


def test_prototypes_are_of_the_final_weights(result):
    features = result.network.embed(IMAGES).astype(np.float64)
    np.testing.assert_allclose(
        result.network.prototypes, compute_prototypes(features, LABELS, 3), rtol=1e-4, atol=1e-5
    )


def test_only_the_selected_channels_change(result):
    changed = 0
    for layer, (before, after) in enumerate(
        zip(NETWORK.weights, result.network.weights, strict=True)
    ):
        update = result.policy.layers.get(layer)
        selected = list(update.channels) if update else []
        frozen = np.delete(np.arange(len(before)), selected)
        np.testing.assert_array_equal(before[frozen], after[frozen])
        changed += int((before[selected] != after[selected]).any()) if selected else 0
    assert changed == len(result.policy.layers)
    for before, after in zip(NETWORK.biases, result.network.biases, strict=True):
        np.testing.assert_array_equal(before, after)


def test_unknown_threshold_is_of_the_network_before(result):
    untrained = adapted(policy=UpdatePolicy(), budget=None)
    assert result.network.unknown_below == pytest.approx(untrained.network.unknown_below)
    assert 1 / 3 < result.network.unknown_below < 1
    assert adapt(NETWORK, *shapes_task(shots=1), iterations=0).network.unknown_below == 0


def test_an_adapted_network_survives_its_file(result, tmp_path):
    path = tmp_path / "adapted.safetensors"
    result.network.save(path)
    images, _ = shapes_task(shots=3, seed=9)
    before, after = result.classify(images), classify(Network.load(path), images)
    assert before.labels == after.labels
    np.testing.assert_array_equal(before.table, after.table)


def test_seed_decides_and_threads_do_not(result):
    again, threaded, other = adapted(), adapted(threads=4), adapted(seed=1)
    assert again.policy == threaded.policy == result.policy
    for layer in result.policy.layers:
        weights = result.network.weights[layer]
        np.testing.assert_array_equal(weights, again.network.weights[layer])
        np.testing.assert_array_equal(weights, threaded.network.weights[layer])
    assert other.history != result.history


def test_kept_prefix_changes_nothing(result):
    """With less memory the support's frozen prefix is computed again in each iteration."""
    tight = adapted(policy=result.policy, budget=None)
    peaks = {tight.plan.peak_bytes}
    free = UpdatePolicy(result.policy.layers)
    for share in (0.9, 0.5):
        limit = int(tight.plan.peak_bytes * share)
        try:
            other = adapted(policy=free, budget=Budget(limit, 1.0))
        except BudgetExceeded:
            break
        peaks.add(other.plan.peak_bytes)
        for layer in free.layers:
            np.testing.assert_array_equal(
                tight.network.weights[layer], other.network.weights[layer]
            )
    assert len(peaks) > 1


def test_a_given_policy_is_held_to_the_budget_by_its_optimizer():
    costs = profile(NETWORK)
    policy = UpdatePolicy({22: range(8)})
    limit = Budget(costs.memory_bytes(policy, "sgd"), 1.0, "paper")
    options = {"policy": policy, "budget": limit, "iterations": 1}
    adapted(**options, optimizer="sgd")
    with pytest.raises(BudgetExceeded, match=r"\(paper accounting\), got"):
        adapted(**options, optimizer="adam")
    with pytest.raises(ValueError, match="layer 99"):
        adapted(policy=UpdatePolicy({99: (0,)}), budget=limit)


@pytest.mark.parametrize("ratio", [1 / 8, 1 / 2, 1])
def test_the_budget_holds_down_to_the_smallest(ratio):
    with pytest.raises(BudgetExceeded) as error:
        adapted(ratio=ratio, budget=Budget(100, 0.6))
    needed = error.value.needed_bytes
    assert str(needed) in str(error.value)
    with pytest.raises(BudgetExceeded):
        adapted(ratio=ratio, budget=Budget(needed - 1, 0.6))
    for limit in (needed, needed + 5000, 2 * needed):
        found = adapted(ratio=ratio, budget=Budget(limit, 0.6), iterations=2)
        assert found.arena_high_water <= found.peak_bytes <= limit
        assert profile(NETWORK).compute_share(found.policy) <= 0.6


def test_an_impossible_compute_budget_names_what_would_do():
    with pytest.raises(BudgetExceeded, match="expected compute of at least") as error:
        adapted(budget=Budget(compute=1e-6))
    share = error.value.needed_compute
    assert adapted(budget=Budget(compute=share), iterations=1).policy.layers


def test_paper_accounting_selects_by_the_formula():
    costs = profile(NETWORK)
    limit = costs.forward_bytes + 16 * 700
    found = adapted(budget=Budget(limit, 0.6, "paper"))
    assert costs.memory_bytes(found.policy) <= limit


def test_given_policies():
    nothing = adapted(policy=UpdatePolicy(), budget=None)
    assert nothing.history == ()
    assert nothing.fisher is None
    assert "fisher" not in nothing.timings
    for before, after in zip(NETWORK.weights, nothing.network.weights, strict=True):
        np.testing.assert_array_equal(before, after)
    everything = adapted(policy=full_train(NETWORK), budget=None, learning_rate=1e-3)
    assert all(
        (a != b).any() for a, b in zip(NETWORK.weights, everything.network.weights, strict=True)
    )
    last = adapted(policy=last_layer(NETWORK), budget=Budget(compute=0.6))
    assert last.plan.peak_bytes < everything.plan.peak_bytes
    with pytest.raises(BudgetExceeded, match=r"expected a compute share of at most 0\.6") as error:
        adapted(policy=full_train(NETWORK))
    assert error.value.needed_compute == profile(NETWORK).compute_share(full_train(NETWORK))
    with pytest.raises(BudgetExceeded, match="paper accounting"):
        adapted(policy=full_train(NETWORK), budget=Budget(1000, 1.0, "paper"))
    with pytest.raises(BudgetExceeded):
        adapted(policy=full_train(NETWORK), budget=Budget(1000, 1.0))


def support_loss(network):
    """Mean cross-entropy of the support set itself, not of a random pseudo-query set."""
    table = classify(network, IMAGES).table
    return -np.log(table[np.arange(len(LABELS)), LABELS]).mean()


@pytest.mark.parametrize(
    ("optimizer", "learning_rate"), [("adam", 1e-3), ("momentum", 1e-3), ("sgd", 3e-3)]
)
def test_optimisers_learn(optimizer, learning_rate):
    untrained = adapted(policy=UpdatePolicy(), budget=None)
    found = adapted(optimizer=optimizer, learning_rate=learning_rate, iterations=30, biases=True)
    assert support_loss(found.network) < 0.9 * support_loss(untrained.network)
    assert found.policy.biases


def test_progress_is_told_in_order():
    calls = []
    adapted(progress=lambda *call: calls.append(call), iterations=3)
    assert calls == [
        ("fisher", 0, 1),
        ("fisher", 1, 1),
        ("fine-tuning", 1, 3),
        ("fine-tuning", 2, 3),
        ("fine-tuning", 3, 3),
    ]


def test_an_interruption_leaves_the_network_alone():
    before = [weight.copy() for weight in NETWORK.weights]

    def interrupt(phase, done, total):
        if (phase, done) == ("fine-tuning", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adapted(progress=interrupt)
    for old, new in zip(before, NETWORK.weights, strict=True):
        np.testing.assert_array_equal(old, new)


def test_divergence_is_an_error():
    with pytest.raises(NonFiniteError):
        adapted(learning_rate=1e38, iterations=20)


@pytest.mark.parametrize(
    ("images", "labels", "options", "error", "message"),
    [
        (IMAGES.astype(np.float32), LABELS, {}, TypeError, "images: expected uint8, got float32"),
        (IMAGES[:, :16], LABELS, {}, ValueError, r"images: expected shape \(N, 32, 32, 3\)"),
        (IMAGES, LABELS.astype(np.int32), {}, TypeError, "labels: expected int64, got int32"),
        (IMAGES, LABELS[:-1], {}, ValueError, r"labels: expected shape \(15,\), got \(14,\)"),
        (IMAGES, LABELS - 1, {}, ValueError, "labels: expected 0 to ways - 1"),
        (IMAGES, LABELS * 2, {}, ValueError, "labels: expected 0 to ways - 1"),
        (IMAGES, LABELS * 0, {}, ValueError, "at least two classes"),
        (IMAGES[:0], LABELS[:0], {}, ValueError, "at least two classes"),
        (
            IMAGES,
            LABELS,
            {"classes": ("a", "b")},
            ValueError,
            "classes: expected 3 different names, got a, b",
        ),
        (
            IMAGES,
            LABELS,
            {"classes": ("a", "b", "a")},
            ValueError,
            "classes: expected 3 different names",
        ),
        (IMAGES, LABELS, {"optimizer": "lion"}, ValueError, "optimizer: expected one of adam"),
        (IMAGES, LABELS, {"learning_rate": -1.0}, ValueError, "learning_rate: expected a positive"),
        (IMAGES, LABELS, {"iterations": -1}, ValueError, "iterations: expected at least 0, got -1"),
        (IMAGES, LABELS, {"ratio": 0.0}, ValueError, "ratio: expected above 0"),
        (IMAGES, LABELS, {"threads": 0}, ValueError, "threads: expected at least 1, got 0"),
        (IMAGES, LABELS, {"policy": UpdatePolicy({99: [0]})}, ValueError, "layer 99: expected"),
    ],
)
def test_unsound_inputs_are_refused(images, labels, options, error, message):
    calls = []
    with pytest.raises(error, match=message):
        adapt(NETWORK, images, labels, progress=lambda *call: calls.append(call), **options)
    assert all(phase == "fisher" for phase, _, _ in calls)


def test_classify(result):
    images, labels = shapes_task(shots=4, seed=3)
    found = classify(result.network, images, unknown_below=0.0)
    assert found.table.shape == (12, 3)
    np.testing.assert_allclose(found.table.sum(axis=1), 1)
    np.testing.assert_array_equal(found.probabilities, found.table.max(axis=1))
    assert found.labels == tuple(NAMES[index] for index in found.table.argmax(axis=1))
    assert (
        np.mean([NAMES[label] == name for label, name in zip(labels, found.labels, strict=True)])
        > 0.5
    )
    sure = classify(result.network, images, unknown_below=1.0)
    assert set(sure.labels) == {"unknown"}
    threshold = float(np.median(found.probabilities))
    some = classify(result.network.replace(unknown_below=threshold), images)
    assert some.labels.count("unknown") == (found.probabilities < threshold).sum()
    with pytest.raises(ValueError, match="'tiny': has no classes; adapt it first"):
        classify(NETWORK, images)


def test_the_gradient_may_reach_the_support_through_the_prototypes(result):
    """One SGD step against central differences of the loss of both passes."""
    last = len(NETWORK.convolutions) - 1
    policy = UpdatePolicy({last: LayerUpdate("out", (2, 7))})
    options = {"policy": policy, "budget": None, "iterations": 1, "optimizer": "sgd"}
    rate = 1e-3
    detached = adapted(**options, learning_rate=rate)
    whole = adapted(**options, learning_rate=rate, prototype_gradient=True)
    assert whole.history[0].loss == pytest.approx(detached.history[0].loss)
    step = (NETWORK.weights[last] - whole.network.weights[last])[[2, 7]] / rate
    assert not np.allclose(
        step, (NETWORK.weights[last] - detached.network.weights[last])[[2, 7]] / rate, rtol=0.05
    )

    def loss(weights):
        network = NETWORK.replace(weights=(*NETWORK.weights[:last], weights))
        return adapt(network, IMAGES, LABELS, **options).history[0].loss

    for index in ((2, 0), (2, 5), (7, 3), (7, 11)):
        moved = [NETWORK.weights[last].copy(), NETWORK.weights[last].copy()]
        moved[0][index] -= 2e-2
        moved[1][index] += 2e-2
        slope = (loss(moved[1]) - loss(moved[0])) / 4e-2
        found = step[(2, 7).index(index[0]), index[1]].item()
        assert found == pytest.approx(slope, rel=0.1, abs=2e-3)
    with pytest.raises(ValueError, match="prototype_gradient: 'in_place_sgd'"):
        adapted(prototype_gradient=True, optimizer="in_place_sgd")
