"""Prototypes, their loss and its gradient (Eq. 1 of the paper; ProtoNet with cosine, as in PMF).

A class's prototype is the mean of its support features; a photo's logits are scale * cosine to
each prototype. Prototypes are constants to the gradient here. All functions work in the dtype of
their features, float32 or float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "compute_prototypes",
    "cosine_logits",
    "leave_one_out",
    "loss_and_gradient",
    "loss_and_gradients",
    "probabilities",
    "unknown_threshold",
]


def compute_prototypes(
    features: NDArray[Any], labels: NDArray[np.int64], ways: int
) -> NDArray[Any]:
    """The L2-normalised mean feature of each class.

    features: (N, m); labels: (N,) in 0..ways-1, every class at least once.
    Returns (ways, m). Raises ValueError for a label out of range or a class without features.
    """
    labels = _checked_labels(labels, len(features), ways)
    counts = np.bincount(labels, minlength=ways)
    if not counts.all():
        raise ValueError(f"labels: class {int(np.argmin(counts))} has no features")
    sums = np.zeros((ways, features.shape[1]), features.dtype)
    np.add.at(sums, labels, features)
    return _normalised(sums / counts[:, None].astype(features.dtype))


def cosine_logits(features: NDArray[Any], prototypes: NDArray[Any], scale: float) -> NDArray[Any]:
    """(N, ways): scale * cos(f, c_k) of features (N, m) and prototypes (ways, m).

    A zero vector has cosine 0 with everything.
    """
    logits: NDArray[Any] = _normalised(features) @ _normalised(prototypes).T
    logits *= features.dtype.type(scale)
    return logits


def probabilities(features: NDArray[Any], prototypes: NDArray[Any], scale: float) -> NDArray[Any]:
    """(N, ways): softmax of `cosine_logits`."""
    return _softmax(cosine_logits(features, prototypes, scale))


def loss_and_gradient(
    features: NDArray[Any],
    labels: NDArray[np.int64],
    prototypes: NDArray[Any],
    scale: float,
) -> tuple[float, int, NDArray[Any]]:
    """Summed cross-entropy of `cosine_logits` against labels (N,), and its gradient.

    Returns the sum over images, the number of images classified correctly (the lower class wins a
    tie), and the gradient (N, m) with respect to each feature.
    """
    directions = _normalised(prototypes)
    loss, correct, grad_logits = _cross_entropy(features, labels, directions, scale)
    along = grad_logits @ directions * features.dtype.type(scale)
    return loss, correct, _before_normalisation(features, along)


def loss_and_gradients(
    features: NDArray[Any],
    labels: NDArray[np.int64],
    support: NDArray[Any],
    support_labels: NDArray[np.int64],
    ways: int,
    scale: float,
) -> tuple[float, int, NDArray[Any], NDArray[Any]]:
    """`loss_and_gradient` against the prototypes of a support set, gradients reaching both sets.

    support: (S, m) and support_labels: (S,), every class at least once. Returns the summed loss,
    the number classified correctly, and the gradients (N, m) of the features and (S, m) of the
    support features, through their class's mean.
    """
    support_labels = _checked_labels(support_labels, len(support), ways)
    prototypes = compute_prototypes(support, support_labels, ways)
    loss, correct, grad_logits = _cross_entropy(features, labels, prototypes, scale)
    factor = features.dtype.type(scale)
    gradient = _before_normalisation(features, grad_logits @ prototypes * factor)
    counts = np.bincount(support_labels, minlength=ways)[:, None].astype(features.dtype)
    sums = np.zeros_like(prototypes)
    np.add.at(sums, support_labels, support)
    along = grad_logits.T @ _normalised(features) * factor
    of_means = _before_normalisation(sums / counts, along) / counts
    return loss, correct, gradient, of_means[support_labels]


def _cross_entropy(
    features: NDArray[Any],
    labels: NDArray[np.int64],
    directions: NDArray[Any],
    scale: float,
) -> tuple[float, int, NDArray[Any]]:
    """The summed loss, how many are right, and the gradient (N, ways) of the logits."""
    labels = _checked_labels(labels, len(features), len(directions))
    logits = _normalised(features) @ directions.T * features.dtype.type(scale)
    shifted = logits - logits.max(axis=1, keepdims=True, initial=-np.inf)
    rows = np.arange(len(labels))
    log_sums = np.log(np.exp(shifted).sum(axis=1))
    loss = float((log_sums - shifted[rows, labels]).sum())
    grad_logits = _softmax(logits)
    grad_logits[rows, labels] -= 1
    correct = int((logits.argmax(axis=1) == labels).sum()) if len(labels) else 0
    return loss, correct, grad_logits


def _before_normalisation(vectors: NDArray[Any], along: NDArray[Any]) -> NDArray[Any]:
    """The gradient of vectors (N, m) from that of their directions: without its radial part."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    safe = np.where(norms > 0, norms, 1).astype(vectors.dtype)
    units = vectors / safe
    radial = (along * units).sum(axis=1, keepdims=True)
    gradient: NDArray[Any] = np.where(norms > 0, (along - radial * units) / safe, 0)
    return gradient


def leave_one_out(
    features: NDArray[Any], way: int, prototypes: NDArray[Any], scale: float
) -> NDArray[np.float64]:
    """How sure the support photos of one class are recognised when its prototype lacks them.

    features: (n, m) of all support photos of class `way`; prototypes: (ways, m) of all classes.
    Returns the best class's probability for those of the n photos that are recognised correctly.
    A photo that is alone in its class cannot be judged and is left out.
    """
    features = features.astype(np.float64)
    best = []
    for feature in features if len(features) > 1 else ():
        others = prototypes.astype(np.float64)
        others[way] = features.sum(axis=0) - feature  # a cosine looks at the direction only
        row = probabilities(feature[None], others, scale)[0]
        if row.argmax() == way:
            best.append(row.max())
    return np.array(best, np.float64)


def unknown_threshold(best: NDArray[np.float64]) -> float:
    """The default probability below which a photo is "unknown", from `leave_one_out`.

    The median over the support photos under the network *before* adaptation. Training makes the
    network surer of photos of its classes, so that few of them fall below (0 to 11 % on the
    validation domains), while leave-one-out after training is useless as a measure: the features
    are fitted to these very photos (it turned away 30 to 78 %). Zero, nothing is unknown, where
    no support photo could be judged.
    """
    return float(np.median(best)) if len(best) else 0.0


def _normalised(vectors: NDArray[Any]) -> NDArray[Any]:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    result: NDArray[Any] = vectors / np.where(norms > 0, norms, 1).astype(vectors.dtype)
    return result


def _softmax(logits: NDArray[Any]) -> NDArray[Any]:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
    result: NDArray[Any] = powers / powers.sum(axis=1, keepdims=True)
    return result


def _checked_labels(labels: NDArray[np.int64], count: int, ways: int) -> NDArray[np.int64]:
    if labels.shape != (count,):
        raise ValueError(f"labels: expected shape {(count,)}, got {labels.shape}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"labels: expected integers, got {labels.dtype}")
    if count and not (labels.min() >= 0 and labels.max() < ways):
        raise ValueError(f"labels: expected 0 to {ways - 1}, got {labels.min()} to {labels.max()}")
    return labels
