"""What every tangent operator must be: the dense one, in every method.

A new operator's tests are a class that inherits :class:`OperatorTests` and gives the fixture ``operator``.
"""

from __future__ import annotations

import pytest
import torch

from ranksure.errors import SettingError
from ranksure.factors import Delta, Factors
from ranksure.operators import DenseOperator, TangentOperator
from ranksure.solvers.burer_monteiro import solve
from tests.helpers import generator_of, randn, random_factors, random_problem, updates

CLOSE = {"rtol": 1e-10, "atol": 1e-11}


def assert_same(ours: Delta, theirs: Delta, **tolerance: float) -> None:
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, **(tolerance or CLOSE))


def random_delta(operator: TangentOperator, seed: int) -> Delta:
    g = generator_of(seed)
    return {name: randn(*shape, generator=g) for name, shape in operator.shapes.items()}


def random_residual(operator: TangentOperator, seed: int, *lead: int) -> torch.Tensor:
    return randn(*lead, operator.n_samples, operator.n_outputs, generator=generator_of(seed + 1))


def sizes(operator: TangentOperator, oracle: DenseOperator, seed: int) -> None:
    assert dict(operator.shapes) == dict(oracle.shapes)
    assert list(operator.shapes) == list(oracle.shapes)
    assert (operator.n_samples, operator.n_outputs) == (oracle.n_samples, oracle.n_outputs)
    assert (operator.dtype, operator.device) == (oracle.dtype, oracle.device)
    assert operator.dense_nbytes == sum(g.numel() * g.element_size() for g in oracle.jacobians().values())
    assert operator.nbytes >= 0 and operator.multiplications >= 0


def apply(operator: TangentOperator, oracle: DenseOperator, seed: int) -> None:
    delta = random_delta(oracle, seed)
    first = next(iter(delta))
    torch.testing.assert_close(operator.apply(delta), oracle.apply(delta), **CLOSE)
    torch.testing.assert_close(operator.apply({first: delta[first]}), oracle.apply({first: delta[first]}), **CLOSE)
    assert torch.equal(operator.apply({}), torch.zeros_like(random_residual(oracle, 0)))


def adjoint(operator: TangentOperator, oracle: DenseOperator, seed: int) -> None:
    """Against the oracle, and ``<A(delta), R> = <delta, A*(R)>``."""
    delta, residual = random_delta(oracle, seed), random_residual(oracle, seed)
    gradients = operator.adjoint(residual)
    assert_same(gradients, oracle.adjoint(residual))
    left = float((operator.apply(delta) * residual).sum())
    assert left == pytest.approx(sum(float((delta[n] * gradients[n]).sum()) for n in delta), rel=1e-9, abs=1e-9)


def products_with_factors(operator: TangentOperator, oracle: DenseOperator, seed: int) -> None:
    """For one start and a batch of them, of ranks 0 to 2, and the pullback."""
    first = next(iter(oracle.shapes))
    mixed = {name: (1 + index) % 3 for index, name in enumerate(oracle.shapes)}
    for starts in (0, 1, 3):
        factors = random_factors(oracle.shapes, mixed, seed, starts)
        weight = random_residual(oracle, seed, *((starts,) if starts else ()))
        z, pullback = operator.apply_factors_vjp(factors)
        each = [oracle.apply({n: d[s] for n, d in updates(factors).items()}) for s in range(starts)]
        expected = torch.stack(each) if starts else oracle.apply(updates(factors))
        torch.testing.assert_close(z, expected, **CLOSE)
        torch.testing.assert_close(operator.apply_factors(factors), expected, **CLOSE)
        subset = {first: factors[first]}
        torch.testing.assert_close(operator.apply_factors(subset), oracle.apply_factors(subset), **CLOSE)
        back = pullback(weight)
        assert list(back) == list(factors)
        for s in range(starts) if starts else [...]:
            for name, gradient in oracle.adjoint(weight[s]).items():
                u, v = factors[name][0][s], factors[name][1][s]
                torch.testing.assert_close(back[name][0][s], gradient @ v, **CLOSE)
                torch.testing.assert_close(back[name][1][s], gradient.T @ u, **CLOSE)


def single_gradients(operator: TangentOperator, oracle: DenseOperator, seed: int) -> None:
    """All of them, and their products from one side and from both, against einsum."""
    g = generator_of(seed)
    assert_same(operator.jacobians(), oracle.jacobians())
    for name, gradient in oracle.jacobians().items():
        m, n = oracle.shapes[name]
        u, v = randn(m, 2, generator=g), randn(n, 3, generator=g)
        left, right = operator.jacobian_products(name, u[:, 0], v[:, 0])
        torch.testing.assert_close(left, torch.einsum("icmn,n->icm", gradient, v[:, 0]).flatten(0, 1), **CLOSE)
        torch.testing.assert_close(right, torch.einsum("icmn,m->icn", gradient, u[:, 0]).flatten(0, 1), **CLOSE)
        core = torch.einsum("icmn,mp,nq->icpq", gradient, u, v).flatten(0, 1)
        torch.testing.assert_close(operator.core_products(name, u, v), core, **CLOSE)


def gram(operator: TangentOperator, oracle: DenseOperator, seed: int) -> None:
    first = next(iter(oracle.shapes))
    for blocks in (None, [first]):
        torch.testing.assert_close(operator.gram(blocks), oracle.gram(blocks), **CLOSE)
    # a norm from inner products has half the digits
    assert_same(operator.sample_norms(), oracle.sample_norms(), rtol=1e-7, atol=1e-6)


PRODUCTS = (sizes, apply, adjoint, products_with_factors, single_gradients, gram)


def assert_same_map(operator: TangentOperator, oracle: DenseOperator, seed: int = 0) -> None:
    """Every product of the operator against the dense oracle."""
    for agrees in PRODUCTS:
        agrees(operator, oracle, seed)


def adjoint_error(operator: TangentOperator, oracle: DenseOperator, seed: int) -> None:
    """A bound on what float32 rounds, and of the order of rounding: a huge one would be of no use."""
    residual = random_residual(oracle, seed)
    for name, gradient in oracle.adjoint(residual).items():
        assert 0 <= operator.adjoint_error(residual)[name] <= 1e-11 * max(float(gradient.norm()), 1.0)
    if operator.is_stored:
        low = operator.to(torch.float32)
        exact = low.to(torch.float64).adjoint(residual.float().double())
        for name, gradient in low.adjoint(residual.float()).items():
            error = torch.linalg.matrix_norm(gradient.double() - exact[name], 2)
            assert float(error) <= low.adjoint_error(residual.float())[name]


def other_forms(operator: TangentOperator, oracle: DenseOperator, seed: int) -> None:
    """Another dtype, fewer samples, fewer blocks, another basis; or a refusal where no gradient is held."""
    g = generator_of(seed)
    samples = torch.randperm(oracle.n_samples, generator=g)[: max(1, oracle.n_samples - 1)]
    names = list(oracle.shapes)[::2]
    m, n = oracle.shapes[names[0]]
    maps = {names[0]: (randn(m + 1, m, generator=g), randn(n, n, generator=g))}
    assert operator.to(operator.dtype) is operator
    by = {names[0]: 3.0}
    larger = DenseOperator({name: by.get(name, 1.0) * gradient for name, gradient in oracle.jacobians().items()})
    assert_same_map(operator.scaled(by), larger, seed)
    if not operator.is_stored:
        for refused in (lambda: operator.to(torch.float32), lambda: operator.select(samples), operator.stored):
            with pytest.raises(SettingError, match=type(operator).__name__):
                refused()
        return
    assert_same_map(operator.stored(), oracle, seed)
    assert_same_map(operator.select(samples), oracle.select(samples), seed)
    assert_same_map(operator.restrict(names), oracle.restrict(names), seed)
    moved, expected = operator.congruent(maps), dict(oracle.jacobians())
    for name, (left, right) in maps.items():
        expected[name] = torch.einsum("pm,icmn,qn->icpq", left, expected[name], right)
    assert_same_map(moved, DenseOperator(expected), seed)
    low = operator.to(torch.float32)
    assert operator.scaled({}).dtype == operator.dtype and low.scaled({names[0]: 2.0}).dtype == torch.float32
    assert low.dtype == torch.float32 and low.adjoint(random_residual(oracle, 0).float())[names[0]].dtype == low.dtype
    assert_same(low.to(torch.float64).jacobians(), oracle.jacobians(), rtol=1e-5, atol=1e-5)


def smaller_and_faster_forms(operator: TangentOperator, oracle: DenseOperator, seed: int) -> None:
    """The reduced operator predicts the same, there and back; so does the one for dense updates."""
    reduced, bases = operator.reduced()
    factors = random_factors(oracle.shapes, 2, seed)
    torch.testing.assert_close(reduced.apply_factors(bases.restrict(factors)), oracle.apply_factors(factors), **CLOSE)
    small: Factors = random_factors(dict(reduced.shapes), 2, seed)
    torch.testing.assert_close(oracle.apply_factors(bases.lift(small)), reduced.apply_factors(small), **CLOSE)
    for limit in (0, 1 << 40):
        delta, fast = random_delta(oracle, seed), operator.for_dense_updates(limit)
        torch.testing.assert_close(fast.apply(delta), oracle.apply(delta), **CLOSE)


def solutions(operator: TangentOperator, oracle: DenseOperator, seed: int) -> None:
    """A problem on it is solved to the oracle's optimum."""
    k = oracle.n_outputs
    ours, theirs = (
        solve(random_problem(seed, "squared-error", k=k, operator=each), tolerance=1e-8) for each in (operator, oracle)
    )
    assert ours.status == theirs.status == "converged"
    assert ours.certificate.objective == pytest.approx(theirs.certificate.objective, rel=1e-6)


class OperatorTests:
    """Inherit, and give the fixture ``operator``, in float64; and ``oracle`` where its gradients are known."""

    @pytest.fixture
    def oracle(self, operator: TangentOperator) -> DenseOperator:
        return DenseOperator.from_operator(operator)

    @pytest.mark.parametrize("seed", [0, 1])
    @pytest.mark.parametrize(
        "agrees",
        [*PRODUCTS, adjoint_error, other_forms, smaller_and_faster_forms, solutions],
        ids=lambda agrees: agrees.__name__,
    )
    def test_it_is_the_dense_operator(self, operator, oracle, agrees, seed):
        agrees(operator, oracle, seed)
