"""analysis.py: hand-computed numbers, independent oracles, and that it analyses the function that a layer computes."""

import itertools
import math

import mpmath
import numpy as np
import pytest
import torch
from helpers import assert_close, elements, make_raw_gates, numpy_block, numpy_weights

from statemix import BDLRU, HLRU
from statemix.analysis import (
    composition,
    conjugacy_classes,
    discriminants,
    distance_to_permutation,
    eigenvalues,
    gate_entropy,
    half_life,
    joint_kernel,
    leak,
    log_singular_values,
    nearest_permutation,
    needed_block_size,
    relabel,
    representation,
    transitions,
)
from statemix.gates import NORMALIZATIONS
from statemix.mixers.half_life import half_life_gates
from statemix.tasks.permutation import group_table

KINDS = ("block", "companion", "observer")


def f64(rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def natural(group: str) -> np.ndarray:
    """x(i) of the elements of S_n, A_n or Z_n, in the order of their numbers, by their definition."""
    n = int(group[1:])
    if group[0] == "Z":
        return np.array([[(i + x) % n for i in range(n)] for x in range(n)])
    return np.array(elements(group))


def copying(action: np.ndarray) -> torch.Tensor:
    """A_x[i, x(i)] = 1, float64: new component i is old component x(i)."""
    return torch.eye(action.shape[1], dtype=torch.float64)[torch.from_numpy(action)]


S3 = natural("S3")
SIGNS = [1, -1, -1, 1, 1, -1]  # of the elements of S3


# what a layer does in a step


def test_transitions_by_hand():
    rows = f64([[1, 2, 1], [0, -3, 1]])[..., None]  # one block of two components
    transition, input_gate = transitions(rows, normalization="linear", kind="block")
    assert transition.tolist() == [[[0.25, 0.5], [0, -0.75]]]
    assert input_gate.tolist() == [[0.25, 0.25]]
    row = f64([1, -2, 1])[:, None]
    transition, input_gate = transitions(row, normalization="linear", kind="companion")
    assert (transition.tolist(), input_gate.tolist()) == ([[[0.25, -0.5], [1, 0]]], [[0.25, 0]])
    transition, input_gate = transitions(row, normalization="linear", kind="observer")
    assert (transition.tolist(), input_gate.tolist()) == ([[[0.25, 1], [-0.5, 0]]], [[0.25, 0]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("order", [1, 3])
def test_stepping_with_the_matrices_gives_the_states_of_the_layer(kind, normalization, order, generator):
    """The layer's read-out is made the identity, so that its output is its state; the loop knows the matrices only."""
    batch, length, blocks = 2, 9, 4
    width = blocks * order
    layer = BDLRU(width, blocks, order, normalization=normalization) if kind == "block" else None
    layer = (layer or HLRU(width, blocks, order, normalization=normalization, form=kind)).double()
    x = torch.randn(batch, length, width, generator=generator, dtype=torch.float64)
    start = torch.randn(batch, order, blocks, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        layer.output.weight.copy_(torch.eye(width))
        layer.raw_gates.projection.weight.mul_(0.2 if normalization == "none" else 3)
        states, last = layer(x, start)
        transition, input_gate = layer.transitions(x)
        values = layer.values(x)
    values = values.unflatten(2, (order, blocks)).mT if kind == "block" else values[..., None]  # (B, T, N, M or 1)
    assert transition.shape == (batch, length, blocks, order, order)
    assert input_gate.shape == (batch, length, blocks, order)
    for b in range(batch):
        state = start[b].T  # (N, M)
        for t in range(length):
            drive = input_gate[b, t] * values[b, t]
            state = torch.stack([transition[b, t, n] @ state[n] + drive[n] for n in range(blocks)])
            assert_close(states[b, t].view(order, blocks), state.T.contiguous(), f"states, sequence {b}, step {t}")
        assert_close(last[b], state.T.contiguous(), f"final state, sequence {b}")


@pytest.mark.parametrize("kind", KINDS)
def test_transitions_are_those_of_the_formulas(kind, generator):
    names = ("softmax", "sigmoid", "relu", "tanh", "silu", "linear", "none")  # those that the oracle has
    for order, normalization in itertools.product((1, 2, 5), names):
        rows = (order,) if kind == "block" else ()
        raw = make_raw_gates(generator, normalization, (2, 3, *rows, order + 1, 7))
        block, gate = numpy_block(kind, numpy_weights(normalization, raw.numpy(), axis=raw.ndim - 2))
        transition, input_gate = transitions(raw, normalization=normalization, kind=kind)
        assert_close(transition, torch.from_numpy(block.copy()), f"{kind}, {normalization}, M {order}: A")
        assert_close(input_gate, torch.from_numpy(gate), f"{kind}, {normalization}, M {order}: a0")


def test_transitions_carry_gradients_and_keep_the_dtype():
    raw = torch.zeros(2, 3, 4, requires_grad=True)
    transition, input_gate = transitions(raw, normalization="softmax", kind="block")
    assert transition.dtype == input_gate.dtype == torch.float32
    transition[0, 0, 0].backward()
    assert raw.grad is not None
    assert raw.grad[0, :, 0].tolist() == pytest.approx([2 / 9, -1 / 9, -1 / 9])  # p (1 - p), -p p at p = 1/3


def test_a_layer_without_selection_has_one_transition():
    layer = BDLRU(3, 2, 2, selective=False)
    transition, _ = layer.transitions(torch.randn(1, 5, 3))
    assert (transition == transition[:, :1]).all()


# one matrix


def test_eigenvalues_by_hand():
    cycle = copying(natural("Z3"))[1]
    roots = sorted(eigenvalues(cycle).tolist(), key=lambda z: z.imag)
    assert roots == pytest.approx([complex(-0.5, -math.sqrt(0.75)), 1, complex(-0.5, math.sqrt(0.75))])
    companion = f64([[0.7, -0.1], [1, 0]])  # (z - 0.5)(z - 0.2) = z^2 - 0.7 z + 0.1
    assert eigenvalues(companion).tolist() == pytest.approx([0.5, 0.2])
    many = eigenvalues(torch.diag_embed(f64([[0.1, -0.9], [0.3, 0.2]])).float())
    assert many.dtype == torch.complex128
    assert torch.allclose(many.real, f64([[-0.9, 0.1], [0.3, 0.2]]))


def test_half_lives_by_hand():
    assert half_life(torch.diag(f64([0.1, 0.5]))).item() == pytest.approx(1)
    assert half_life(torch.diag(f64([-(0.5**0.125), 0.5]))).item() == pytest.approx(8)
    assert half_life(f64([[0, 1], [0, 0]])).item() == 0
    assert half_life(f64([[1.5]])).item() == math.inf


def test_a_permutation_has_no_half_life():
    for n in (3, 5, 6):
        assert (half_life(copying(natural(f"Z{n}"))) == math.inf).all()
    nearly = copying(natural("Z5")) * (1 - 1e-10)  # the rounding of an eigenvalue is up to 1e-15
    assert half_life(nearly)[1].item() == pytest.approx(math.log(2) * 1e10, rel=1e-3)


@pytest.mark.parametrize("normalization", sorted(set(NORMALIZATIONS) & {"softmax", "sigmoid", "relu", "tanh", "silu"}))
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_made_to_remember_for_h_steps_has_that_half_life(kind, normalization):
    for steps in (0.5, 3.0, 200.0):
        raw = half_life_gates(kind, 3, normalization, steps)[..., None]
        transition, _ = transitions(raw, normalization=normalization, kind=kind)
        assert half_life(transition).item() == pytest.approx(steps, rel=1e-9)


def test_entropies_by_hand():
    weights = f64([[0.5, 0.5, 0], [0, -1, 0], [0, 0, 0], [0.2, -0.2, 0.4]])
    expected = [math.log(2), 0, 0, 1.5 * math.log(2)]  # the last: 1/4, 1/4, 1/2
    assert gate_entropy(weights).tolist() == pytest.approx(expected)
    assert gate_entropy(weights.T, dim=0).tolist() == pytest.approx(expected)
    assert gate_entropy(torch.ones(7)).item() == pytest.approx(math.log(7))


def test_leaks_by_hand():
    assert leak(f64([[0.25, 0.5], [0, -0.75]])).tolist() == [0.5, 0.25]
    assert leak(copying(S3)).eq(0).all()


# products


def test_singular_values_of_a_long_product_that_is_planted(generator):
    """A_t = Q_t diag(d) Q_{t-1}^T: the product has the singular values d^T, the smallest of them 10^-1500."""
    d, length = f64([0.999, 0.9, 0.9, 1e-5]), 300
    q = torch.linalg.qr(torch.randn(length + 1, 4, 4, generator=generator, dtype=torch.float64)).Q
    product = log_singular_values(q[1:] * d @ q[:-1].mT)
    assert torch.allclose(product, length * d.log(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_singular_values_of_a_product_against_many_digits(order, generator):
    raw = make_raw_gates(generator, "softmax", (1, 40, order, order + 1, 3))
    transition = transitions(raw, normalization="softmax", kind="block")[0][0]  # (T, N, M, M)
    logs = log_singular_values(transition)
    assert logs.shape == (3, order)
    with mpmath.workdps(200):
        for n in range(3):
            product = mpmath.eye(order)
            for matrix in transition[:, n].tolist():
                product = mpmath.matrix(matrix) * product
            exact = [float(mpmath.log(value)) for value in mpmath.svd_r(product, compute_uv=False)]
            assert logs[n].tolist() == pytest.approx(exact, rel=1e-8, abs=1e-8)


def test_singular_values_of_products_that_vanish():
    flat = torch.full((5, 2, 2), 0.5, dtype=torch.float64)
    assert log_singular_values(flat).tolist() == pytest.approx([0, -math.inf], abs=1e-12)
    assert log_singular_values(torch.zeros(3, 2, 2)).tolist() == [-math.inf, -math.inf]
    order = f64([[[0, 1], [0, 0]], [[0, 0], [0, 1]]])  # A_2 A_1 = 0, A_1 A_2 is not
    assert log_singular_values(order).tolist() == [-math.inf, -math.inf]
    assert log_singular_values(order.flip(0)).tolist() == [0, -math.inf]


# permutations


def test_the_nearest_permutation_by_hand():
    greedy_is_wrong = f64([[0.9, 0.8], [0.8, 0.0]])
    assert nearest_permutation(greedy_is_wrong).tolist() == [[0, 1], [1, 0]]
    assert distance_to_permutation(greedy_is_wrong).item() == pytest.approx(math.sqrt(0.81 + 2 * 0.04))
    assert nearest_permutation(f64([[-0.9]])).tolist() == [[1]]
    assert nearest_permutation(f64([[-0.9]]), signed=True).tolist() == [[-1]]
    assert distance_to_permutation(f64([[-0.9]])).item() == pytest.approx(1.9)
    assert distance_to_permutation(f64([[-0.9]]), signed=True).item() == pytest.approx(0.1)
    for size in (2, 5):
        assert distance_to_permutation(torch.full((size, size), 1 / size)).item() == pytest.approx(math.sqrt(size - 1))
    between = [torch.linalg.matrix_norm(a - b).item() for a, b in itertools.combinations(copying(natural("S4")), 2)]
    assert min(between) == 2


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_no_permutation_is_nearer(order, signed, generator):
    """Against all of them, with all of their signs."""
    signs = itertools.product([1.0, -1.0] if signed else [1.0], repeat=order)
    every = torch.cat([f64(s)[:, None] * copying(natural(f"S{order}")) for s in signs])
    blocks = torch.randn(30, 2, order, order, generator=generator, dtype=torch.float64)
    least = torch.linalg.matrix_norm(blocks[:, :, None] - every).amin(-1)
    assert torch.equal(distance_to_permutation(blocks, signed=signed), least)
    found = nearest_permutation(blocks, signed=signed)
    assert all((every == p).all((1, 2)).any() for p in found.flatten(0, 1))


def test_a_large_permutation_is_found_under_noise(generator):
    for order in (7, 16):
        columns = torch.randperm(order, generator=generator)
        planted = torch.eye(order)[columns]
        noisy = planted * 0.6 + 0.4 * torch.rand(order, order, generator=generator)
        # the planted weight of each row and column is above all others: no other assignment has as much
        assert torch.equal(nearest_permutation(noisy), planted)


# groups


@pytest.mark.parametrize("group", ["S3", "S4", "A4", "Z5"])
def test_copying_composes_as_the_group_from_the_right(group):
    table = group_table(group)
    matrices = copying(natural(group))
    found = composition(matrices, table)
    assert found.order == ("both" if group == "Z5" else "antihomomorphism")
    assert found.faithful
    assert found.image_order == len(table)
    assert all(torch.equal(found.images[x], matrices[x]) for x in range(len(table)))
    turned = composition(matrices.mT, table)
    assert turned.order == ("both" if group == "Z5" else "homomorphism")


def test_the_sign_is_a_quotient_and_a_wrong_token_is_found():
    table = group_table("S3")
    swap = f64([[0, 1], [1, 0]])
    sign = torch.stack([torch.eye(2, dtype=torch.float64) if s > 0 else swap for s in SIGNS])
    found = composition(sign, table)
    assert (found.order, found.kernel, found.image_order, found.faithful) == ("both", (0, 3, 4), 2, False)
    for wrong in range(6):
        broken = sign.clone()
        broken[wrong] = broken[wrong] @ swap
        assert composition(broken, table) is None
    assert composition(copying(S3)[[0, 3, 2, 1, 4, 5]], table) is None  # a transposition and a 3-cycle exchanged
    inverse = composition(copying(S3)[[0, 1, 2, 4, 3, 5]], table)  # 3-cycles exchanged: every x has the matrix of x^-1
    assert inverse.order == "homomorphism"


def test_composition_against_all_products(generator):
    """Random assignments of S2's and of Z3's matrices: those which compose are those where every product is right."""
    for group, degree in (("S3", 2), ("Z4", 2), ("Z3", 3)):
        table = group_table(group)
        choice = copying(natural(f"S{degree}"))
        counts = [0, 0]
        for numbers in itertools.product(range(len(choice)), repeat=len(table)):
            p = choice[list(numbers)]
            pairs = list(itertools.product(range(len(table)), repeat=2))
            forth = all(torch.equal(p[table[x, y]], p[x] @ p[y]) for x, y in pairs)
            back = all(torch.equal(p[table[x, y]], p[y] @ p[x]) for x, y in pairs)
            found = composition(p, table)
            assert (found is not None) == (forth or back)
            if found is not None:
                assert found.order == ("both" if forth and back else "homomorphism" if forth else "antihomomorphism")
            counts[found is not None] += 1
        assert min(counts) >= 1


def test_generators_stand_for_the_group():
    table = group_table("S3")
    tokens = [1, 2, 5]  # the transpositions
    found = composition(copying(S3)[tokens], table, tokens)
    assert sorted(found.images) == list(range(6))
    assert all(torch.equal(found.images[x], copying(S3)[x]) for x in range(6))
    both = composition(f64([[[-1]], [[1]], [[-1]]]), group_table("Z2"), [1, 0, 1])  # two tokens that are one element
    assert both is not None
    assert composition(f64([[[-1]], [[1]], [[1]]]), group_table("Z2"), [1, 0, 1]) is None
    part = composition(f64([[[1]]]), table, [3])  # generates the three even elements only
    assert sorted(part.images) == [0, 3, 4]


def test_a_block_represents_a_group_by_some_of_its_components():
    """S3 by components 3, 0, 2 of four; component 1 mixes, and reads the others: that does not disturb them."""
    table, places = group_table("S3"), [3, 0, 2]
    block = torch.zeros(6, 4, 4, dtype=torch.float64)
    for x in range(6):
        for i in range(3):
            block[x, places[i], places[S3[x, i]]] = 0.9
            block[x, places[i], 1] = 0.05
        block[x, 1] = f64([0.3, 0.1, 0.3, 0.3])
    found = representation(block, table)
    assert found.components == (0, 2, 3)
    assert found.composition.faithful
    # a row is 0.1 short at its place and has 0.05 where nothing should be
    assert found.distance.tolist() == pytest.approx([math.sqrt(3 * (0.1**2 + 0.05**2))] * 6)
    assert representation(block, table, within=0.19) is None
    assert relabel(block, S3) == (3, 0, 2)
    block[:, 0] = f64([1, 0, 0, 0])  # component 0 keeps itself now: what the others gave it is lost
    found = representation(block, table)
    assert (found.components, found.composition.image_order) == ((0,), 1)


def test_a_sign_in_one_component_is_a_representation():
    found = representation(0.95 * f64(SIGNS)[:, None, None], group_table("S3"))
    assert (found.components, found.composition.kernel) == ((0,), (0, 3, 4))
    assert found.distance.tolist() == pytest.approx([0.05] * 6)


def test_blocks_can_tell_elements_apart_together():
    """Z6 by a block of two and one of three components: neither does it alone."""
    table, tokens = group_table("Z6"), np.arange(6)
    parts = [composition(copying(natural(f"Z{n}")[tokens % n]), table) for n in (2, 3)]
    assert [part.kernel for part in parts] == [(0, 2, 4), (0, 3)]
    assert joint_kernel(parts) == (0,)
    assert joint_kernel(parts[:1]) == (0, 2, 4)
    assert joint_kernel([]) == ()


def test_the_needed_block_size_is_that_of_the_smallest_sets_that_suffice():
    z6, tokens = group_table("Z6"), np.arange(6)
    parts = {n: copying(natural(f"Z{n}")[tokens % n]) for n in (2, 3, 6)}
    both = torch.stack([torch.block_diag(parts[2][x], parts[3][x], f64([[0.5]])) for x in range(6)])
    assert needed_block_size(both[:, None], z6, 0) == 3
    six, two = parts[6][:, None], torch.nn.functional.pad(parts[2], (0, 4, 0, 4))[:, None]
    assert needed_block_size(six, z6, 0) == 6
    assert needed_block_size(torch.cat([two, six], dim=1), z6, 0) == 6
    assert needed_block_size(two, z6, 0) is None  # half of the states look alike
    assert needed_block_size(0.4 * six, z6, 0) is None  # 0.6 sqrt(6) away
    assert needed_block_size(0.5 * six, z6, 0) == 6
    assert needed_block_size(0.5 * six, z6, 0, within=1.2) is None
    signs = f64(SIGNS)[:, None, None, None]
    assert needed_block_size(signs, group_table("S3"), 0) is None
    assert needed_block_size(signs[:2], group_table("Z2"), 0) == 1
    # cycles that are none of the task's: four states, in which three steps are not nothing
    wrong = copying(natural("Z3")[np.array([0, 1, 2, 0])])[:, None]
    assert needed_block_size(wrong, group_table("Z4"), 0) is None


def test_the_needed_block_size_of_generators_and_of_states_that_are_never_reached():
    s3 = group_table("S3")
    tokens = [1, 2]
    moves = np.concatenate([s3[:, tokens], [[6, 0]]])  # a seventh state, from which the others are reached
    assert needed_block_size(copying(S3)[tokens][:, None], moves, 0) == 3
    assert needed_block_size(copying(S3)[[1]][:, None], s3[:, [1]], 0) == 2  # two states, by a swap


def test_discriminants_by_hand():
    """Two labels at distance (1, 1), spread 1 and 10: the direction is that of (1, 1 / 100)."""
    corners = f64(list(itertools.product([1, -1], [10, -10])))
    states = torch.cat([corners, corners + 1])
    labels = torch.tensor([7] * 4 + [3] * 4)
    best = discriminants(states, labels)[:, 0]
    assert (best / best[0]).tolist() == pytest.approx([1, 0.01], rel=1e-6)
    assert (corners @ best).square().mean().item() == pytest.approx(1)  # the spread there


def test_states_without_spread():
    points = f64([[0, 0, 1], [0, 2, 0], [5, 0, 0]])
    states, labels = points.repeat(4, 1), torch.arange(3).repeat(4)
    seen = states @ discriminants(states, labels)
    assert seen.isfinite().all()
    assert torch.cdist(seen[:3], seen[:3])[~torch.eye(3, dtype=torch.bool)].min() > 1e3


@pytest.mark.parametrize("group", ["S3", "A4", "Z5"])
def test_relabel_finds_planted_places_under_noise(group, generator):
    action = natural(group)
    points = action.shape[1]
    size = points + 1
    places = torch.randperm(size, generator=generator)[:points]
    block = torch.rand(len(action), size, size, generator=generator, dtype=torch.float64) * 0.3
    for x, image in enumerate(action):
        block[x, places, places[image]] += 0.7
    found = torch.tensor(relabel(block, action))
    if group != "Z5":  # the places of a cycle can be turned
        assert torch.equal(found, places)
    assert all((block[x, found, found[image]] >= 0.7).all() for x, image in enumerate(action))


def test_conjugacy_classes():
    assert conjugacy_classes(group_table("S3")) == [(0,), (1, 2, 5), (3, 4)]
    assert conjugacy_classes(group_table("Z3")) == [(0,), (1,), (2,)]
    assert sorted(map(len, conjugacy_classes(group_table("S4")))) == [1, 3, 6, 6, 8]
    assert sorted(map(len, conjugacy_classes(group_table("A4")))) == [1, 3, 4, 4]


WRONG = {
    "kind": (
        lambda: transitions(torch.zeros(3, 4, 1), normalization="softmax", kind="dense"),
        r"^transitions: `kind` must be one of \['block', 'companion', 'observer'\], got 'dense'\.$",
    ),
    "normalization": (
        lambda: transitions(torch.zeros(3, 4, 1), normalization="softmx", kind="block"),
        r"^transitions: `normalization` must be one of .*, got 'softmx'\.$",
    ),
    "gates": (
        lambda: transitions(torch.zeros(4, 4, 1), normalization="softmax", kind="block"),
        r"^transitions: `raw_gates` of kind 'block' must have shape \(\.\.\., M, M\+1, N\), got \(4, 4, 1\)\.$",
    ),
    "square": (
        lambda: half_life(torch.zeros(2, 3)),
        r"^eigenvalues: `transition` must have shape \(\.\.\., M, M\) with M of at least 1, got \(2, 3\)\.$",
    ),
    "finite": (
        lambda: nearest_permutation(torch.full((2, 2), math.nan)),
        r"^nearest_permutation: `transition` must be finite, got NaN or infinity\.$",
    ),
    "large": (
        lambda: nearest_permutation(torch.zeros(17, 17)),
        r"^nearest_permutation: `transition` must have M of at most 16, got 17\.$",
    ),
    "no time": (
        lambda: log_singular_values(torch.zeros(2, 2)),
        r"^log_singular_values: `transition` must have shape .*, T >= 1, M <= 8, got \(2, 2\)\.$",
    ),
    "elements": (
        lambda: composition(torch.zeros(2, 1, 1), group_table("S3")),
        r"^composition: `elements` must have one entry per token = 2, got 6\.$",
    ),
    "table": (
        lambda: conjugacy_classes(np.ones((2, 2), dtype=np.int16)),
        r"^conjugacy_classes: `table` must be that of a group, got one without an identity\.$",
    ),
    "points": (
        lambda: relabel(torch.zeros(6, 2, 2), S3),
        r"^relabel: `transition` must have 3 <= M <= 8, got M = 2\.$",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors(case):
    call, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        call()
