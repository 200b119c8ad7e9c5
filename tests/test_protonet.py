import math

import numpy as np
import pytest

from tinytrain_ext.protonet import (
    compute_prototypes,
    cosine_logits,
    leave_one_out,
    loss_and_gradient,
    loss_and_gradients,
    probabilities,
    unknown_threshold,
)


def task(ways=4, shots=5, dim=7, seed=0, spread=1.0):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(ways), shots)
    centres = rng.standard_normal((ways, dim))
    return centres[labels] + spread * rng.standard_normal((ways * shots, dim)), labels


def test_prototypes_are_normalised_means():
    features, labels = task()
    order = np.random.default_rng(1).permutation(len(labels))
    prototypes = compute_prototypes(features[order], labels[order], 4)
    for way in range(4):
        mean = features[labels == way].mean(axis=0)
        np.testing.assert_allclose(prototypes[way], mean / np.linalg.norm(mean))
    assert compute_prototypes(features.astype(np.float32), labels, 4).dtype == np.float32


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([0, 1, 3], ValueError, "labels: expected 0 to 2, got 0 to 3"),
        ([0, -1, 2], ValueError, "labels: expected 0 to 2, got -1 to 2"),
        ([0, 0, 2], ValueError, "labels: class 1 has no features"),
        ([0, 1], ValueError, r"labels: expected shape \(3,\), got \(2,\)"),
        ([0.0, 1.0, 2.0], TypeError, "labels: expected integers, got float64"),
    ],
)
def test_unsound_labels_are_refused(labels, error, message):
    with pytest.raises(error, match=message):
        compute_prototypes(np.ones((3, 2)), np.array(labels), 3)


def test_logits_are_scaled_cosines():
    features, labels = task()
    prototypes = compute_prototypes(features, labels, 4)
    logits = cosine_logits(features, 5 * prototypes, 10.0)
    for n in (0, 7, 19):
        for k in range(4):
            cosine = features[n] @ prototypes[k] / np.linalg.norm(features[n])
            assert logits[n, k] == pytest.approx(10 * cosine)
    table = probabilities(features, prototypes, 10.0)
    np.testing.assert_allclose(table, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True))
    assert cosine_logits(features.astype(np.float32), prototypes, 10.0).shape == (20, 4)


def test_a_zero_feature_is_like_every_class():
    prototypes = np.eye(3)
    zero = np.zeros((1, 3))
    np.testing.assert_allclose(probabilities(zero, prototypes, 10.0), 1 / 3)
    loss, _, gradient = loss_and_gradient(zero, np.array([1]), prototypes, 10.0)
    assert loss == pytest.approx(math.log(3))
    assert (gradient == 0).all()


def test_loss_and_accuracy():
    features, labels = task(spread=0.5)
    prototypes = compute_prototypes(features, labels, 4)
    loss, correct, _ = loss_and_gradient(features, labels, prototypes, 10.0)
    table = probabilities(features, prototypes, 10.0)
    assert loss == pytest.approx(-np.log(table[np.arange(20), labels]).sum())
    assert correct == (table.argmax(axis=1) == labels).sum()
    assert loss_and_gradient(features[:0], labels[:0], prototypes, 10.0)[:2] == (0.0, 0)


@pytest.mark.parametrize("scale", [1.0, 10.0, 1000.0])
@pytest.mark.parametrize("seed", range(3))
def test_gradient_by_central_differences(scale, seed):
    features, labels = task(ways=3, shots=2, dim=5, seed=seed)
    prototypes = compute_prototypes(*task(ways=3, shots=4, dim=5, seed=seed + 10), 3)
    _, _, gradient = loss_and_gradient(features, labels, prototypes, scale)
    step = 1e-6
    numeric = np.zeros_like(features)
    for index in np.ndindex(features.shape):
        for sign in (1, -1):
            moved = features.copy()
            moved[index] += sign * step
            numeric[index] += sign * loss_and_gradient(moved, labels, prototypes, scale)[0]
    numeric /= 2 * step
    np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=1e-7 * scale)


def test_micro_batches_add_up():
    features, labels = task()
    prototypes = compute_prototypes(features, labels, 4)
    loss, correct, gradient = loss_and_gradient(features, labels, prototypes, 10.0)
    parts = [
        loss_and_gradient(features[i : i + 3], labels[i : i + 3], prototypes, 10.0)
        for i in range(0, 20, 3)
    ]
    assert sum(part[0] for part in parts) == pytest.approx(loss)
    assert sum(part[1] for part in parts) == correct
    np.testing.assert_allclose(np.concatenate([part[2] for part in parts]), gradient)


def test_huge_logits_do_not_overflow():
    features = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)
    loss, _, gradient = loss_and_gradient(features, np.array([1, 0]), features, 1e4)
    assert loss == pytest.approx(2e4)
    assert np.isfinite(gradient).all()


def test_leave_one_out_is_what_it_says():
    features, labels = task(spread=2.0)
    expected = []
    for n in range(20):
        others = np.arange(20) != n
        prototypes = compute_prototypes(features[others], labels[others], 4)
        row = probabilities(features[n : n + 1], prototypes, 10.0)[0]
        if row.argmax() == labels[n]:
            expected.append(row.max())
    prototypes = compute_prototypes(features, labels, 4)
    found = [leave_one_out(features[labels == k], k, prototypes, 10.0) for k in range(4)]
    assert 0 < len(expected) < 20
    np.testing.assert_allclose(np.concatenate(found), expected)
    assert unknown_threshold(np.array(expected)) == np.median(expected)


def test_one_shot_classes_cannot_be_judged():
    found = leave_one_out(np.ones((1, 3)), 0, np.eye(3), 10.0)
    assert len(found) == 0
    assert unknown_threshold(found) == 0.0


def test_gradients_reach_both_sets():
    support, support_labels = task(ways=3, shots=4)
    query, labels = task(ways=3, shots=2, seed=5)
    support_labels, support = support_labels[::-1], support[::-1].copy()
    loss, correct, grad_query, grad_support = loss_and_gradients(
        query, labels, support, support_labels, 3, 10.0
    )
    prototypes = compute_prototypes(support, support_labels, 3)
    expected = loss_and_gradient(query, labels, prototypes, 10.0)
    assert (loss, correct) == pytest.approx(expected[:2])
    np.testing.assert_allclose(grad_query, expected[2])
    for index in np.ndindex(support.shape):
        moved = [support.copy(), support.copy()]
        moved[0][index] -= 1e-6
        moved[1][index] += 1e-6
        below, above = (
            loss_and_gradients(query, labels, one, support_labels, 3, 10.0)[0] for one in moved
        )
        assert grad_support[index] == pytest.approx((above - below) / 2e-6, rel=1e-4, abs=1e-7)
    with pytest.raises(ValueError, match="labels: class 1 has no features"):
        loss_and_gradients(query, labels, support, support_labels * 0, 3, 10.0)
