"""The network file that ships with the package."""

from __future__ import annotations

from importlib import resources

from tinytrain_ext.architectures import ARCHITECTURES, operations
from tinytrain_ext.network import DEFAULT_NETWORK, default_network


def test_default_network_is_the_mcunet_of_the_paper() -> None:
    network = default_network()
    assert network.name == "mcunet-miniimagenet"
    assert network.operations == operations(ARCHITECTURES["mcunet"])
    assert (network.input_size, network.resize, network.feature_dim) == (128, 146, 160)
    assert network.mean == network.std == (0.5, 0.5, 0.5)
    assert sum(weight.size for weight in network.weights) == 463_216  # cost model, Table 3
    assert not network.classes


def test_default_network_is_small_enough_to_ship() -> None:
    file = resources.files("tinytrain_ext") / DEFAULT_NETWORK
    with resources.as_file(file) as path:
        assert path.stat().st_size <= 2_000_000
