"""Collectives by hand: two nodes of four GPUs, 100 GB/s inside, 10 GB/s a port."""

import pytest

from nexa.scaling.collectives import (
    KINDS,
    TREE_SHARE,
    Group,
    Network,
    bandwidth,
    data_group,
    ring,
    seconds,
    tensor_group,
    tree,
)

NETWORK = Network(inside=100e9, between=10e9, node=4, hop=1e-6, hop_between=10e-6, call=5e-6, share=0.5)
INSIDE, ACROSS = Group(4, 4), Group(8, 4)


def test_inside_a_node():
    """3 hops of 1 us; 3/4 of 1 GB at 50 GB/s are 15 ms."""
    assert ring("all_gather", 1e9, INSIDE, NETWORK) == pytest.approx(5e-6 + 3e-6 + 15e-3)
    assert ring("reduce_scatter", 1e9, INSIDE, NETWORK) == pytest.approx(5e-6 + 3e-6 + 15e-3)
    assert ring("all_reduce", 1e9, INSIDE, NETWORK) == pytest.approx(5e-6 + 6e-6 + 30e-3)


def test_across_nodes_all_ports_work():
    """6 hops inside and 1 between; 7/8 of 1 GB over four ports at 5 GB/s each."""
    assert bandwidth(ACROSS, NETWORK) == pytest.approx(20e9)
    assert ring("all_gather", 1e9, ACROSS, NETWORK) == pytest.approx(5e-6 + 16e-6 + 0.875 / 20)


def test_a_rank_alone_in_its_node_has_one_port():
    group = Group(2, 1)
    assert bandwidth(group, NETWORK) == pytest.approx(5e9)
    assert ring("all_gather", 1e9, group, NETWORK) == pytest.approx(5e-6 + 10e-6 + 0.1)


def test_a_tree_by_hand():
    """A chain of 3 hops inside and log2(8) between, up and down; 2 GB at 92% of 20 GB/s."""
    group = Group(32, 4)
    assert tree(1e9, group, NETWORK) == pytest.approx(5e-6 + 2 * (3e-6 + 30e-6 + 1 / (TREE_SHARE * 20)))


def test_small_all_reduces_go_by_tree_and_large_ones_inside_a_node_by_ring():
    group = Group(4096, 4)
    assert (
        seconds("all_reduce", 1e3, group, NETWORK)
        == tree(1e3, group, NETWORK)
        < ring("all_reduce", 1e3, group, NETWORK)
    )
    assert seconds("all_reduce", 1e9, INSIDE, NETWORK) == ring("all_reduce", 1e9, INSIDE, NETWORK)
    assert seconds("all_gather", 1e3, group, NETWORK) == ring("all_gather", 1e3, group, NETWORK)


def test_groups_of_a_layout():
    network = Network(1e9, 1e9, node=8)
    assert tensor_group(4, network) == Group(4, 4)
    assert tensor_group(16, network) == Group(16, 8)
    assert data_group(16, 1, network) == Group(16, 8) and data_group(16, 1, network).nodes == 2
    assert data_group(16, 4, network) == Group(16, 2) and data_group(16, 4, network).nodes == 8
    assert data_group(16, 8, network).nodes == 16
    assert data_group(2, 1, network) == Group(2, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_time_grows_with_bytes_ranks_and_latency_and_falls_with_bandwidth(kind):
    sizes = [seconds(kind, size, ACROSS, NETWORK) for size in (0, 1e3, 1e6, 1e9)]
    assert sizes == sorted(sizes) and sizes[0] >= NETWORK.call
    ranks = [seconds(kind, 1e6, Group(n, min(n, 4)), NETWORK) for n in (1, 2, 4, 8, 64, 1024, 10_000)]
    assert ranks[0] == 0 and ranks == sorted(ranks)
    slow = Network(inside=100e9, between=5e9, node=4, hop=1e-6, hop_between=20e-6, call=5e-6, share=0.5)
    assert seconds(kind, 1e6, ACROSS, slow) > seconds(kind, 1e6, ACROSS, NETWORK)
    assert seconds(kind, 1e6, INSIDE, slow) == seconds(kind, 1e6, INSIDE, NETWORK)


def test_an_unknown_link_is_not_invented():
    network = Network(inside=None, between=1e9)
    with pytest.raises(ValueError, match="not known"):
        ring("all_gather", 1e6, Group(8, 8), network)
    assert ring("all_gather", 1e6, Group(8, 1), network) > 0
