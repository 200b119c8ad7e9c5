"""The plan names every byte: what it promises is measured in the arena."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest

from small_networks import FAMILIES
from tasks import shapes_task
from tinytrain_ext.architectures import ARCHITECTURES, random_network
from tinytrain_ext.cost import inspected_layers
from tinytrain_ext.errors import BudgetExceeded
from tinytrain_ext.network import Network
from tinytrain_ext.selection import UpdatePolicy, full_train
from tinytrain_ext.session import OPTIMIZERS, Plan, Session, plan

MIB = 1 << 20
WAYS = 3


@functools.lru_cache
def zoo(name: str) -> Network:
    return random_network(ARCHITECTURES[name], np.random.default_rng(0), feature_mix=True)


def tinytrain_policy(network: Network) -> UpdatePolicy:
    """Half of two layers' channels and a quarter of four later ones', as TinyTrain selects."""
    shares = {36: 2, 37: 2, 39: 4, 42: 4, 45: 4, 48: 4}
    layers = {}
    for layer, share in shares.items():
        if layer < len(network.weights):
            layers[layer] = range(0, len(network.weights[layer]), share)
    return UpdatePolicy(layers)


def arguments(network: Network, program: str) -> dict:
    """What to make a Session of, for each kind of run."""
    return {
        "embed": {},
        "TinyTrain": {"policy": tinytrain_policy(network)},
        "FullTrain": {"policy": full_train(network)},
        "Fisher": {"fisher_layers": inspected_layers(network)},
    }[program]


PROGRAMS = ("embed", "TinyTrain", "FullTrain", "Fisher")
every_run = pytest.mark.parametrize(
    ("name", "program"), list(itertools.product(ARCHITECTURES, PROGRAMS))
)


def run(session: Session, network: Network, training: bool):
    """Every kind of pass the session has, over two images of each way."""
    images, labels = shapes_task(WAYS, 2, size=network.input_size)
    session.embed(images)
    session.set_prototypes(images, labels, WAYS, keep=True)
    if session.kept:
        session.update_prototypes()
    if training:
        session.proto_backward(images, labels)
        session.step(1e-3)
        session.zero_grad()


def assert_no_overlap(found: Plan):
    """Slots alive at the same step of a program, and all shared ones, have bytes of their own."""
    for program in ("shared", "embed", "train"):
        slots = [slot for slot in found.slots if slot.program == program and slot.bytes > 0]
        low, high = (
            (0, found.shared_bytes)
            if program == "shared"
            else (found.shared_bytes, found.shared_bytes + found.workspace_bytes)
        )
        for slot in slots:
            assert low <= slot.offset, slot
            assert slot.offset + slot.bytes <= high, slot
            assert slot.offset % 64 == 0, slot
        for first, second in itertools.combinations(slots, 2):
            together = first.first <= second.last and second.first <= first.last
            apart = (
                first.offset + first.bytes <= second.offset
                or second.offset + second.bytes <= first.offset
            )
            assert apart or not together, (first, second)


@every_run
def test_the_highest_touched_byte_is_the_planned_peak(name, program):
    network = zoo(name)
    session = Session(network, **arguments(network, program), max_ways=WAYS)
    assert_no_overlap(session.plan)
    run(session, network, training=program != "embed")
    assert session.arena_high_water() == session.plan.peak_bytes
    assert sum(session.plan.bytes_by_kind().values()) == session.plan.peak_bytes


@every_run
@pytest.mark.parametrize("threads", [1, 2])
def test_guard_bytes_between_slots_stay_intact(name, program, threads):
    network = zoo(name)
    session = Session(
        network,
        **arguments(network, program),
        max_ways=WAYS,
        keep_images=2 * WAYS,
        threads=threads,
        guard_bytes=64,
    )
    run(session, network, training=program != "embed")
    assert session.broken_guard() == ""
    assert session.arena_high_water() <= session.plan.peak_bytes


@every_run
@pytest.mark.parametrize("threads", [1, 4])
def test_the_smallest_feasible_budget_is_named_and_kept(name, program, threads):
    network = zoo(name)
    request = {**arguments(network, program), "max_ways": WAYS, "threads": threads}
    with pytest.raises(BudgetExceeded, match="memory_bytes: 1 bytes are too few") as error:
        plan(network, memory_bytes=1, **request)
    needed = error.value.needed_bytes
    with pytest.raises(BudgetExceeded) as error:
        plan(network, memory_bytes=needed - 1, **request)
    assert error.value.needed_bytes == needed
    session = Session(network, memory_bytes=needed, guard_bytes=0, **request)
    assert session.plan.peak_bytes == needed
    assert session.plan.threads == 1
    assert_no_overlap(session.plan)
    run(session, network, training=program != "embed")
    assert session.arena_high_water() <= needed


@every_run
def test_a_limit_is_never_exceeded(name, program):
    """A larger one buys, in this order, activations kept for Fisher, threads, kept prefixes."""
    network = zoo(name)
    make = functools.partial(plan, network, **arguments(network, program), keep_images=40)
    most = make(threads=4)
    with pytest.raises(BudgetExceeded) as error:
        make(threads=4, memory_bytes=1)
    limits = np.linspace(error.value.needed_bytes, most.peak_bytes, 9).astype(int).tolist()
    plans = [make(threads=4, memory_bytes=limit) for limit in limits]
    for found, limit in zip(plans, limits, strict=True):
        assert found.peak_bytes <= limit
        assert_no_overlap(found)
    assert plans[-1] == most
    assert (most.threads, most.recompute) == (4, False)
    assert most.keep_images == (0 if program == "FullTrain" else 40)  # without a prefix, nothing
    gains = [(not p.recompute, p.threads) for p in plans]
    assert gains == sorted(gains)


@pytest.mark.parametrize("family", FAMILIES)
def test_plans_of_other_families(family):
    network = FAMILIES[family]
    make = functools.partial(
        Session, network, full_train(network), fisher_layers=range(3), max_ways=WAYS
    )
    assert_no_overlap(make().plan)
    session = make(guard_bytes=64, keep_images=6)
    run(session, network, training=True)
    assert session.broken_guard() == ""
    with pytest.raises(BudgetExceeded) as error:
        make(memory_bytes=1)
    assert_no_overlap(make(memory_bytes=error.value.needed_bytes).plan)


@pytest.mark.parametrize(("optimizer", "most"), [("sgd", 0.6), ("adam", 0.75)])
def test_training_memory_meets_the_floor(optimizer, most):
    """Any batch, one thread, no kept prefixes (design target: 0.6 MiB with SGD, 0.75 with Adam)."""
    network = zoo("mobilenetv2")
    found = plan(network, tinytrain_policy(network), optimizer=optimizer)
    assert found.peak_bytes <= most * MIB


def test_memory_does_not_depend_on_the_number_of_images():
    network = zoo("mobilenetv2")
    session = Session(network, tinytrain_policy(network), max_ways=WAYS)
    peaks = set()
    for shots in (1, 4):
        images, labels = shapes_task(WAYS, shots, size=network.input_size)
        session.set_prototypes(images, labels, WAYS)
        session.proto_backward(images, labels)
        peaks.add(session.arena_high_water())
    assert peaks == {session.plan.peak_bytes}


def test_a_plan_counts_what_the_request_says():
    network = zoo("mcunet")
    policy = tinytrain_policy(network)
    weights = sum(len(u.channels) * network.weights[n][0].size for n, u in policy.layers.items())
    for words, optimizer in enumerate(("sgd", "momentum", "adam")):
        kinds = plan(network, policy, optimizer=optimizer).bytes_by_kind()
        assert kinds["gradient"] == 4 * weights
        assert kinds.get("optimizer", 0) == 4 * weights * words
    make = functools.partial(plan, network, policy)
    one, two = make(threads=1), make(threads=2)
    # Another workspace, and in each the gradient of one image.
    assert two.workspace_bytes >= one.workspace_bytes
    assert two.peak_bytes >= one.peak_bytes + two.workspace_bytes
    kept = make(keep_images=10)
    slot = next(s for s in kept.slots if s.kind == "kept prefix")
    operation = network.operations[kept.first_tail_operation]
    height, width, channels = network.tensor_shapes[operation.inputs[0]]
    assert slot.bytes == 10 * 4 * height * width * channels
    more_ways = make(max_ways=100).peak_bytes - make(max_ways=50).peak_bytes
    assert more_ways >= 50 * 4 * network.feature_dim
    assert set(OPTIMIZERS) == {"in_place_sgd", "sgd", "momentum", "adam"}


def test_the_table_names_every_slot():
    found = plan(zoo("mcunet"), UpdatePolicy({40: [0, 1]}))
    table = found.table()
    for slot in found.slots:
        assert slot.name in table
    assert f"{found.peak_bytes:,}" in table
