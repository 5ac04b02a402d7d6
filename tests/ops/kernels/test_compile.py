"""What ptxas makes of every kernel of the CUDA engine for Hopper, without a GPU: registers that go to memory, shared
memory, and matrix products that it makes wait for one another.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

pytest.importorskip("triton")

import triton

from path_attention.ops.engines.cuda import TRITON_VERSIONS

pytestmark = pytest.mark.slow

# Shared memory of one program on sm_90, in bytes.
MOST_SHARED = 227 * 1024
# Of each of two programs that are to share a multiprocessor, which keeps 1 KB for itself of either.
MOST_SHARED_OF_TWO = 113 * 1024
# Bytes of registers stored to memory and loaded back that are accepted, all instructions counted once: the most that
# Triton 3.6 and 3.9 need today, and 10%. A kernel that is not here spills nothing. A number that grows has a reason, or
# the change that made it grow is not taken.
SPILLS: dict[int, dict[str, int]] = {
    64: {
        "leaf_kernels.leaf_backward_kernel": 3150,
        "transport_kernels.query_transport_backward_kernel": 18,  # before its loop over levels and after it
        "dense_kernels.dense_backward_keys_kernel": 565,
        "hopper.leaf.leaf_forward_kernel": 180,  # the price of three programs a multiprocessor
        "hopper.leaf.leaf_backward_kernel": 140,
        "hopper.leaf_group.leaf_backward_group_kernel": 1550,  # addresses: the price of two programs a multiprocessor
    },
    128: {
        "leaf_kernels.leaf_forward_kernel": 370,
        "leaf_kernels.leaf_backward_kernel": 5620,
        "transport_kernels.query_transport_kernel": 430,
        "transport_kernels.key_transport_kernel": 300,
        "transport_kernels.query_transport_backward_kernel": 150,
        "dense_kernels.dense_backward_keys_kernel": 1920,
        "dense_kernels.lowest_level_backward_kernel": 55,
        "pair_kernels.pair_backward_keys_kernel": 62,
        "tree_kernels.tree_backward_kernel": 1095,  # the price of four warps: 0.44 ms for 0.48 that eight take
        "hopper.leaf_group.leaf_backward_group_kernel": 640,  # of one query head
        # Beside the tiles: rows that are moved are two accumulators more of 64 columns.
        "hopper.dense_forward.dense_forward_kernel": 207,
        "hopper.dense_backward.dense_backward_kernel": 425,
    },
    256: {
        "transport_kernels.query_transport_kernel": 5000,
        "transport_kernels.key_transport_kernel": 4840,
        "transport_kernels.query_transport_backward_kernel": 8860,
        "transport_kernels.key_transport_backward_kernel": 8860,
        "dense_kernels.dense_forward_kernel": 910,
        "dense_kernels.dense_backward_queries_kernel": 980,
        "dense_kernels.dense_backward_keys_kernel": 5280,
    },
}
SPILLS_FLOAT32 = {
    64: {"dense_kernels.dense_backward_keys_kernel": 800},
    256: SPILLS[256],
}
# Of a split sequence's edges: leaves without attention, and rows of one level, or gradients.
EDGE_SPILLS: dict[int, dict[str, int]] = {
    64: {
        "leaf_kernels.leaf_backward_kernel": 715,
        "hopper.leaf.leaf_forward_kernel": 180,
    },
    128: SPILLS[128]
    | {
        "leaf_kernels.leaf_backward_kernel": 2515,
        "transport_kernels.query_transport_kernel": 555,
        "transport_kernels.key_transport_kernel": 530,
    },
}
# Of what writes more than its attention: factors of leaves, moved queries.
KEPT_SPILLS: dict[int, dict[str, int]] = {
    64: {},
    128: {"leaf_kernels.leaf_forward_kernel": 560, "hopper.dense_forward.dense_forward_kernel": 410},
}
# Of pairs of its pieces on Hopper.
PAIR_SPILLS: dict[int, dict[str, int]] = {
    64: {},
    128: {
        "hopper.pair_kernels.pair_forward_kernel": 53,  # float32 rows that wait under the first tile
    },
}
# On Hopper with gates: their sums take registers that the loops do not have.
GATED_SPILLS: dict[int, dict[str, int]] = {
    64: SPILLS[64]
    | {
        "hopper.leaf.leaf_forward_kernel": 515,  # of groups, since it asks for all that it reads at its beginning
        "hopper.leaf_group.leaf_backward_group_kernel": 2000,
        "hopper.dense_backward.dense_backward_kernel": 45,
    },
    128: SPILLS[128]
    | {
        "hopper.leaf.leaf_forward_kernel": 240,
        "hopper.leaf_group.leaf_backward_group_kernel": 690,
        "hopper.dense_backward.dense_backward_kernel": 745,
        "dense_kernels.lowest_level_backward_kernel": 106,
    },
}
# With several query heads a key head: before and after the loop over them.
GROUP_SPILLS: dict[int, dict[str, int]] = {64: {}, 128: {"hopper.leaf_group.leaf_backward_group_kernel": 600}}
GATED_GROUP_SPILLS: dict[int, dict[str, int]] = {64: {}, 128: {"hopper.leaf_group.leaf_backward_group_kernel": 730}}
# Of a cache. attend_kernel of a step spills what it needs before it reads pages, that of long calls more; fold_kernel
# what it needs before and after its loop over tiles of keys; fold_leaf_kernel for one more program a multiprocessor.
CACHE_SPILLS: dict[int, dict[str, int]] = {
    64: {
        "decode_kernels.attend_kernel": 132,
        "append_kernels.fold_kernel": 955,
        "fold_kernels.fold_leaf_kernel": 1170,
    },
    128: {
        "decode_kernels.attend_kernel": 1810,
        "append_kernels.fold_kernel": 890,
        "fold_kernels.fold_leaf_kernel": 970,
    },
}
# With a Triton that the kernels for Hopper have not been run with.
LATER_SPILLS: dict[int, dict[str, int]] = {
    64: {
        "hopper.leaf.leaf_forward_kernel": 750,
        "hopper.leaf.leaf_backward_kernel": 370,
        "hopper.leaf_group.leaf_backward_group_kernel": 2310,
        "hopper.dense_backward.dense_backward_kernel": 130,
        "hopper.pair_kernels.pair_backward_kernel": 106,
    },
    128: {
        "hopper.leaf.leaf_forward_kernel": 415,
        "hopper.leaf_group.leaf_backward_group_kernel": 1255,
        "hopper.dense_forward.dense_forward_kernel": 250,
        "hopper.dense_backward.dense_backward_kernel": 1100,
        "hopper.pair_kernels.pair_backward_kernel": 572,
    },
}
VERSION = ".".join(triton.__version__.split(".")[:2])
for_hopper = pytest.mark.skipif(
    VERSION not in TRITON_VERSIONS,
    reason=f"Triton {VERSION}: the kernels for Hopper are made for {', '.join(TRITON_VERSIONS)}",
)


def compiled(*calls: dict[str, Any], only: str = "") -> list[dict[str, Any]]:
    """Of a process of its own: in this one Triton's kernels may be for its interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.ops.kernels.ahead_of_time", "--only", only]
    done = subprocess.run([*command, *map(json.dumps, calls)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


# What ptxas may say of them: one wait of its own (C7517), before a product that begins with numbers of its queries. It
# moves these into place behind the product before, under which then nothing runs, and the exponentials under this one.
WAITING = ("hopper.dense_backward.dense_backward_kernel", "hopper.pair_kernels.pair_backward_kernel")


def check(found: list[dict[str, Any]], spills: dict[str, int]) -> None:
    for x in found:
        unknown = [w for w in x["warnings"] if "C7517" not in w or x["kernel"] not in WAITING]
        assert not unknown, x
        assert len(x["warnings"]) <= 1, x
        assert x["shared_bytes"] <= MOST_SHARED, x
        assert x["spilled_bytes"] <= spills.get(x["kernel"], 0), x


@pytest.mark.parametrize("dim", [64, 128])
def test_portable_kernels(dim: int) -> None:
    found = compiled({"backend": "triton", "dim": dim}, {"backend": "pairs", "dim": dim})
    names = {x["kernel"].partition(".")[0] for x in found}
    stages = ("leaf", "tree", "transport", "dense", "merge", "pair")
    assert {f"{stage}_kernels" for stage in stages} <= names
    check(found, SPILLS[dim])


@pytest.mark.parametrize("dim", [64, 128])
def test_leaves_that_keep_their_factors(dim: int) -> None:
    (found,) = compiled({"backend": "triton", "dim": dim, "kept": True}, only="leaf_kernels.leaf_forward")
    check([found], KEPT_SPILLS[dim])


def test_kernels_are_compiled_once_for_all_lengths_and_heads() -> None:
    """Of as many levels: a training on texts of every length would else wait for the compiler again and again, and so
    would calls that are cut along their heads.
    """
    shapes = ((1024, 128), (715, 128), (960, 3), (1024, 1))
    call = {"backend": "triton", "dim": 16, "gated": True}
    found = compiled(*({**call, "length": length, "heads": heads} for length, heads in shapes))
    variants = Counter(x["kernel"] for x in found)
    assert variants.pop("tree_kernels.tree_kernel") <= 2  # for one and two levels
    assert max(variants.values()) == 2  # leaf_forward in both passes


@pytest.mark.parametrize("dim", [64, 128])
def test_edges_of_pieces(dim: int) -> None:
    found = compiled({"backend": "edges", "dim": dim})
    assert {x["kernel"].partition(".")[0] for x in found} == {"leaf_kernels", "tree_kernels", "transport_kernels"}
    check(found, EDGE_SPILLS[dim])


@for_hopper
def test_edges_of_pieces_on_hopper() -> None:
    found = compiled({"backend": "edges", "dim": 64, "by_hopper": True})
    assert {f"hopper.leaf.leaf_{x}_kernel" for x in ("forward", "backward")} <= {x["kernel"] for x in found}
    check(found, EDGE_SPILLS[64])


@for_hopper
@pytest.mark.parametrize("dim", [64, 128])
def test_pairs_of_pieces_on_hopper(dim: int) -> None:
    call = {"backend": "hopper_pairs", "dim": dim}
    found = compiled(call, {**call, "gated": True}, {**call, "gated": True, "group": 4})
    names = [f"hopper.pair_kernels.pair_{x}_kernel" for x in ("forward", "backward")]
    assert [x["kernel"] for x in found] == 3 * names
    check(found, PAIR_SPILLS[dim])


@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_convolve_normalise(dim: int) -> None:
    """What a token shares with its neighbours is in registers for all the time: none goes to memory at any width."""
    call = {"backend": "convolve_normalise", "dim": dim}
    found = compiled(call, {**call, "packed": True}, {**call, "dtype": "float32", "width": 4, "packed": True})
    assert len(found) == 6
    check(found, {})


@pytest.mark.parametrize("dim", [64, 128])
def test_kernels_of_a_cache(dim: int) -> None:
    found = compiled({"backend": "decode", "dim": dim, "group": 4})
    names = {x["kernel"].partition(".")[2] for x in found}
    of_steps, of_folds = ("attend", "append", "fold", "join"), ("fold_leaf", "fold_chain")
    assert {f"{x}_kernel" for x in (*of_steps, *of_folds, "prefill_keys", "prefill_products")} <= names
    check(found, CACHE_SPILLS[dim])


def test_wide_rows() -> None:
    found = compiled({"backend": "triton", "dim": 256, "gated": True, "packed": True, "group": 2})
    assert not any(x["kernel"].startswith("leaf_kernels") for x in found)
    check(found, SPILLS[256])


@pytest.mark.parametrize("dim", [64, 256])
def test_float32(dim: int) -> None:
    check(
        compiled({"backend": "triton", "dim": dim, "dtype": "float32", "gated": True, "group": 2}), SPILLS_FLOAT32[dim]
    )


@for_hopper
@pytest.mark.parametrize("dim", [64, 128])
def test_gates_and_float16_on_hopper(dim: int) -> None:
    gated = {"backend": "hopper", "dim": dim, "gated": True}
    found = compiled(gated, {**gated, "group": 2, "packed": True}, {**gated, "dtype": "float16"})
    # The other stages are those of the portable kernels.
    between = [x for x in found if x["kernel"].startswith(("hopper.", "dense_kernels."))]
    assert sum(x["kernel"] == "hopper.dense_backward.dense_backward_kernel" for x in between) == 3
    check(between, GATED_SPILLS[dim])


@for_hopper
@pytest.mark.parametrize("dim", [64, 128])
def test_groups_on_hopper(dim: int) -> None:
    grouped = {"backend": "hopper", "dim": dim, "group": 4}
    found = compiled(grouped, {**grouped, "group": 8, "packed": True}, {**grouped, "gated": True}, only="hopper.")
    leaves = [x for x in found if "leaf_backward" in x["kernel"]]
    assert [x["kernel"] for x in leaves] == 3 * ["hopper.leaf_group.leaf_backward_group_kernel"]
    check(leaves, GATED_SPILLS[dim] | GATED_GROUP_SPILLS[dim])
    check(leaves[:2], SPILLS[dim] | GROUP_SPILLS[dim])
    assert dim == 128 or all(x["shared_bytes"] <= MOST_SHARED_OF_TWO for x in leaves)


@for_hopper
@pytest.mark.parametrize("dim", [64, 128])
def test_kernels_for_hopper(dim: int) -> None:
    call = {"backend": "hopper", "dim": dim}
    found = compiled(call, {**call, "kept": True})
    names = {x["kernel"] for x in found}
    assert {f"hopper.{x}_kernel" for x in ("dense_forward.dense_forward", "dense_backward.dense_backward")} <= names
    leaf_backward = "leaf.leaf_backward" if dim == 64 else "leaf_group.leaf_backward_group"
    assert {f"hopper.{x}_kernel" for x in ("leaf.leaf_forward", leaf_backward)} <= names
    attention = [x for x in found if x["kernel"] == "hopper.dense_forward.dense_forward_kernel"]
    assert len(attention) == 2
    check([x for x in found if x is not attention[1]], SPILLS[dim])
    check(attention[1:], SPILLS[dim] | KEPT_SPILLS[dim])


@pytest.mark.skipif(VERSION in TRITON_VERSIONS, reason="the tests above have every kernel, and its spills")
@pytest.mark.parametrize("dim", [64, 128])
def test_kernels_for_hopper_with_a_later_triton(dim: int) -> None:
    """Gluon's names have changed: they are compiled, and no products are serialised, which is a warning."""
    plain = {"backend": "hopper", "dim": dim}
    calls = plain, {**plain, "gated": True, "group": 4}, {"backend": "hopper_pairs", "dim": dim}
    found = compiled(*calls, only="hopper.")
    assert {x["kernel"] for x in found} >= {*LATER_SPILLS[dim], "hopper.dense_forward.dense_forward_kernel"}
    check(found, LATER_SPILLS[dim])
