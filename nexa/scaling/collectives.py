"""Time of a collective over a network of two levels: links inside a node, ports between nodes.

A ring of r ranks sends each byte over r - 1 hops, an all-reduce twice (Patarasuk and Yuan, J. Parallel Distrib.
Comput. 69, 2009). Time is latency of the hops, one after the other, plus bytes over the bandwidth that the slowest
stretch leaves a rank. The library lays several rings, so that the ranks of a group use all their ports of a node at
once: a group with p ranks in a node crosses to the next with p ports. Latencies of a hop and of a call are those with
which NCCL chooses its algorithms (src/graph/tuning.cc at 5067397c, protocol Simple); an all-reduce may also go up and
down a tree, with half the volume at each end and log2 of the nodes in hops, and takes the quicker way, as NCCL does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

CALL_SECONDS = 8.4e-6
"""Of one collective, whatever its size: NCCL's base latency."""
HOP_SECONDS = 3.4e-6
"""Of a hop inside a node: NCCL's NVLink ring."""
BETWEEN_SECONDS = 14e-6
"""Of a hop between nodes: NCCL's network."""
LINK_SHARE = 0.7
"""Assumed share of a link's data sheet bandwidth that collectives reach."""
TREE_SHARE = 0.92
"""NCCL's own factor for the bandwidth of a tree against a ring."""
KINDS = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1}
"""Collective -> times that each byte goes round the ring."""


@dataclass(frozen=True)
class Network:
    """Two levels; bytes per second and direction by the data sheet, of which `share` is reached; seconds."""

    inside: float | None
    """Of one GPU to the others of its node; None when it depends on the machine."""
    between: float
    """Of one GPU's port to other nodes."""
    node: int = 8
    """GPUs of a node."""
    hop: float = HOP_SECONDS
    hop_between: float = BETWEEN_SECONDS
    call: float = CALL_SECONDS
    share: float = LINK_SHARE


@dataclass(frozen=True)
class Group:
    """Ranks that talk to each other, and how many of them share a node."""

    ranks: int
    per_node: int

    @property
    def nodes(self) -> int:
        """Nodes over which the ranks are spread."""
        return math.ceil(self.ranks / self.per_node)


def tensor_group(tensor: int, network: Network) -> Group:
    """Ranks that share a layer: neighbours, in one node while they fit."""
    return Group(tensor, min(tensor, network.node))


def data_group(data: int, tensor: int, network: Network) -> Group:
    """Ranks that hold the same part of a layer: a node has one for each tensor group in it."""
    return Group(data, min(data, max(1, network.node // tensor)))


def bandwidth(group: Group, network: Network) -> float:
    """Bytes per second of one rank in a ring.

    Raises:
        ValueError: the group uses links inside a node whose bandwidth is not known.
    """
    inside = math.inf
    if group.per_node > 1:
        if network.inside is None:
            raise ValueError("the bandwidth inside a node is not known")
        inside = network.inside
    between = math.inf if group.nodes == 1 else network.between * group.per_node
    return network.share * min(inside, between)


def ring(kind: str, size: float, group: Group, network: Network) -> float:
    """Seconds of a ring collective, a row of `KINDS`; size: bytes of the tensor on the side that has it whole."""
    r, n = group.ranks, group.nodes
    if r == 1:
        return 0.0
    # n - 1 hops of the way round cross nodes
    way = (r - n) * network.hop + (n - 1) * network.hop_between
    return network.call + KINDS[kind] * (way + (r - 1) / r * size / bandwidth(group, network))


def tree(size: float, group: Group, network: Network) -> float:
    """Seconds of an all-reduce of `size` bytes up and down a tree over the nodes, a chain inside each."""
    r, n = group.ranks, group.nodes
    if r == 1:
        return 0.0
    way = (math.ceil(r / n) - 1) * network.hop + math.log2(n) * network.hop_between
    return network.call + 2 * (way + size / (TREE_SHARE * bandwidth(group, network)))


def seconds(kind: str, size: float, group: Group, network: Network) -> float:
    """Seconds of a collective of `size` bytes: the ring's, or the tree's for an all-reduce that it makes shorter."""
    around = ring(kind, size, group, network)
    return min(around, tree(size, group, network)) if kind == "all_reduce" else around
