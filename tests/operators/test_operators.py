"""Dense, factored, span-reduced and matrix-free operators agree in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ranksure.capture import capture
from ranksure.factors import ranks_of
from ranksure.operators.base import TangentOperator, cast_factors, zero_factors
from ranksure.operators.dense import DenseOperator
from ranksure.operators.factored import FactoredOperator, Group
from ranksure.operators.matrix_free import MatrixFreeOperator
from tests.helpers import dense_operator, densified, generator_of, randn, random_factors, token_group
from tests.operators.base import CLOSE, OperatorTests, assert_same_map
from tests.refusals import refusal


@st.composite
def operators(draw, empty=True):
    """Ragged token groups: samples without tokens, shared inputs, embeddings, widths above and below T."""
    c = draw(st.integers(1, 3))
    n = draw(st.integers(1, 5))
    seed = draw(st.integers(0, 10_000))
    groups, count = [], 0
    for index in range(draw(st.integers(1, 3))):
        low = 0 if empty else 1
        lengths = draw(st.lists(st.integers(low, 4), min_size=n, max_size=n))
        widths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
        outputs = {f"block.{count + i}": m for i, m in enumerate(widths)}
        count += len(widths)
        groups.append(token_group(lengths, draw(st.integers(1, 12)), outputs, c, seed + index, draw(st.booleans())))
    return FactoredOperator(groups, n)


@settings(max_examples=60)
@given(operators(), st.integers(0, 100))
def test_factored_matches_dense(operator, seed):
    assert_same_map(operator, densified(operator), seed)


def test_gradients_are_stored_a_few_samples_at_a_time(monkeypatch):
    operator = FactoredOperator([token_group([3, 0, 5, 1], 6, {"a": 4, "b": 7}, 2, 0, False)], 4)
    whole = operator.jacobians()
    monkeypatch.setattr("ranksure.operators.tokens._CHUNK_BYTES", 1)
    for name, part in operator.jacobians().items():
        torch.testing.assert_close(part, whole[name], **CLOSE)


def test_dense_definitions():
    """The oracle itself, against its definition."""
    g = generator_of(0)
    jacobians = {"a": randn(3, 2, 4, 5, generator=g), "b": randn(3, 2, 2, 3, generator=g)}
    operator = DenseOperator(jacobians)
    delta = {"a": randn(4, 5, generator=g), "b": randn(2, 3, generator=g)}
    residual = randn(3, 2, generator=g)
    expected = sum(torch.einsum("icmn,mn->ic", jacobians[n], delta[n]) for n in delta)
    torch.testing.assert_close(operator.apply(delta), expected)
    for name, gradient in operator.adjoint(residual).items():
        torch.testing.assert_close(gradient, torch.einsum("icmn,ic->mn", jacobians[name], residual))
    rows = torch.cat([jacobians[n].flatten(2).flatten(0, 1) for n in jacobians], 1)
    torch.testing.assert_close(operator.gram(), rows @ rows.T)
    torch.testing.assert_close(operator.sample_norms()["a"], jacobians["a"].flatten(2).norm(dim=2))
    again = DenseOperator.from_operator(operator)
    for name in jacobians:
        torch.testing.assert_close(again.jacobians()[name], jacobians[name])
    refusal(ValueError, "at least one block", DenseOperator, {})


@settings(max_examples=60)
@given(operators(), st.integers(0, 100))
def test_span_reduction_is_exact(operator, seed):
    reduced, bases = operator.reduced()
    for name, (m, n) in reduced.shapes.items():
        assert m <= operator.shapes[name][0]
        assert n <= operator.shapes[name][1]
    factors = random_factors(operator.shapes, 2, seed)
    down = bases.restrict(factors)
    torch.testing.assert_close(reduced.apply_factors(down), operator.apply_factors(factors), **CLOSE)
    small = random_factors(reduced.shapes, 2, seed + 1)
    lifted = bases.lift(small)
    torch.testing.assert_close(operator.apply_factors(lifted), reduced.apply_factors(small), **CLOSE)
    residual = randn(operator.n_samples, operator.n_outputs, generator=generator_of(seed))
    full, less = operator.adjoint(residual), reduced.adjoint(residual)
    for name in operator.shapes:
        assert lifted[name][0].shape == (operator.shapes[name][0], 2)
        torch.testing.assert_close(bases.restrict(lifted)[name], small[name], **CLOSE)
        for up, low in zip(lifted[name], small[name], strict=True):  # isometric: the penalty is the same
            torch.testing.assert_close(up.norm(), low.norm(), **CLOSE)
        gap = min(full[name].shape) - min(less[name].shape)
        values = torch.nn.functional.pad(torch.linalg.svdvals(less[name]), (0, gap))
        torch.testing.assert_close(values, torch.linalg.svdvals(full[name]), **CLOSE)


def test_span_reduction_shrinks_and_promotes():
    operator = FactoredOperator([token_group([1, 2], 30, {"a": 20, "b": 4}, 1, 0)], 2).to(torch.float32)
    reduced, _ = operator.reduced()
    assert dict(reduced.shapes) == {"a": (3, 3), "b": (3, 3)}
    assert reduced.dtype == torch.float64
    embedding = FactoredOperator([token_group([2, 2], 50, {"e": 3}, 2, 0, index=True)], 2)
    assert embedding.reduced()[0].shapes["e"][1] == len(torch.unique(embedding.groups[0].inputs))


@settings(max_examples=40)
@given(operators(), st.integers(0, 3), st.integers(0, 3), st.sampled_from([256 << 20, 1]))
def test_core_products(operator, p, q, budget):
    """Against the dense definition, in one slice of samples and in many."""
    oracle = densified(operator)
    g = generator_of(p)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ranksure.operators.tokens._CHUNK_BYTES", budget)
        for name, (m, n) in operator.shapes.items():
            u, v = randn(m, p, generator=g), randn(n, q, generator=g)
            expected = torch.einsum("icmn,mp,nq->icpq", oracle.jacobians()[name], u, v).flatten(0, 1)
            torch.testing.assert_close(operator.core_products(name, u, v), expected, **CLOSE)
            torch.testing.assert_close(oracle.core_products(name, u, v), expected, **CLOSE)


def test_gram_code_paths(monkeypatch):
    """By token pairs and by rows, each in one slice and in many."""
    operator = FactoredOperator([token_group([3, 0, 4, 1], 6, {"a": 5, "b": 7}, 2, 1)], 4)
    packed = operator._packed[0]
    oracle = densified(operator)
    for budget in (256 << 20, 1):
        monkeypatch.setattr("ranksure.operators.tokens._CHUNK_BYTES", budget)
        pairs = packed.gram_by_token_pairs(["a", "b"])
        torch.testing.assert_close(pairs, oracle.gram(), **CLOSE)
        for name in ("a", "b"):
            rows = torch.zeros(8, 8, dtype=torch.float64)
            packed.add_gram_by_rows(rows, name)
            torch.testing.assert_close(rows, oracle.gram([name]), **CLOSE)
        for name, norms in oracle.sample_norms().items():
            torch.testing.assert_close(operator.sample_norms()[name], norms, **CLOSE)


@pytest.mark.parametrize("tokens", [1, 40])
def test_gram_chooses_either_path(tokens):
    operator = FactoredOperator([token_group([tokens, tokens], 3, {"a": 4}, 2, 1)], 2)
    torch.testing.assert_close(operator.gram(), densified(operator).gram(), **CLOSE)


@settings(max_examples=30)
@given(operators(empty=False), st.data())
def test_select_and_restrict(operator, data):
    oracle = densified(operator)
    order = data.draw(st.permutations(range(operator.n_samples)))
    chosen = torch.tensor(order[: data.draw(st.integers(1, operator.n_samples))])
    picked = DenseOperator({name: g[chosen] for name, g in oracle.jacobians().items()})
    assert_same_map(operator.select(chosen), picked)
    names = data.draw(st.lists(st.sampled_from(sorted(oracle.shapes)), min_size=1, unique=True))
    kept = [name for name in oracle.shapes if name in names]
    assert_same_map(operator.restrict(names), DenseOperator({name: oracle.jacobians()[name] for name in kept}))


def test_select_keeps_empty_samples():
    operator = FactoredOperator([token_group([2, 0, 3, 0], 4, {"a": 3}, 2, 5)], 4)
    chosen = torch.tensor([3, 2, 1])
    torch.testing.assert_close(
        DenseOperator.from_operator(operator.select(chosen)).jacobians()["a"],
        densified(operator).jacobians()["a"][chosen],
    )


@settings(max_examples=60)
@given(operators(), st.integers(0, 1000), st.floats(-6, 6))
def test_adjoint_error_bounds_float32_rounding(operator, seed, exponent):
    low = operator.to(torch.float32)
    exact = low.to(torch.float64)  # the float32 factors are the truth here
    residual = (10**exponent * randn(low.n_samples, low.n_outputs, generator=generator_of(seed))).float()
    bound = low.adjoint_error(residual)
    reference = exact.adjoint(residual.double())
    for name, gradient in low.adjoint(residual).items():
        error = torch.linalg.matrix_norm(gradient.double() - reference[name], 2)
        assert float(error) <= bound[name]
    dense = DenseOperator.from_operator(exact).to(torch.float32)
    promoted = dense.to(torch.float64).adjoint(residual.double())
    bound = dense.adjoint_error(residual)
    for name, gradient in dense.adjoint(residual).items():
        assert float(torch.linalg.matrix_norm(gradient.double() - promoted[name], 2)) <= bound[name]


def test_adjoint_error_is_of_the_order_of_rounding():
    """A bound that is true because it is huge would be of no use."""
    operator = FactoredOperator([token_group([6] * 10, 8, {"a": 8}, 2, 0)], 10)
    residual = randn(10, 2, generator=generator_of(0))
    norm = float(torch.linalg.matrix_norm(operator.adjoint(residual)["a"], 2))
    assert 0 < operator.adjoint_error(residual)["a"] < 1e-11 * norm


def test_sizes_and_validation():
    group = token_group([2, 3], 4, {"a": 3, "b": 5}, 2, 0)
    operator = FactoredOperator([group], 2, ["b", "a"])
    assert list(operator.shapes) == ["b", "a"]
    assert operator.nbytes == 8 * (5 * 4 + 5 * 2 * 3 + 5 * 2 * 5)
    assert operator.dense_nbytes == 8 * 2 * 2 * (3 * 4 + 5 * 4)
    assert operator.to(torch.float64) is operator
    assert operator.to(torch.bfloat16).nbytes == operator.nbytes // 4
    refusal(ValueError, "one group", FactoredOperator, [group, group], 2)
    refusal(ValueError, "one block", FactoredOperator, [Group(group.inputs, 4, group.sample, {})], 2)
    zero = zero_factors(operator)
    assert ranks_of(zero) == {"a": 0, "b": 0}
    assert torch.equal(operator.apply_factors(zero), torch.zeros(2, 2, dtype=torch.float64))
    assert cast_factors(random_factors(operator.shapes, 1), operator.to(torch.float32))["a"][0].dtype == torch.float32


def test_a_block_without_tokens_is_zero():
    """Every token dropped (a gradient that vanishes): a legal, empty block."""
    operator = FactoredOperator(
        [token_group([0, 0], 4, {"none": 3}, 2, 0), token_group([1, 2], 4, {"some": 3}, 2, 0)], 2
    )
    assert_same_map(operator, densified(operator))
    reduced, bases = operator.reduced()
    assert reduced.shapes["none"] == (3, 4)
    lifted = bases.lift(zero_factors(reduced, 1))
    assert lifted["none"][0].shape == (3, 1)
    assert lifted["none"][1].shape == (4, 1)


class Network(nn.Module):
    """Embedding, shared module, convolution, in-place activation, and keyword-called module."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.twice = nn.Linear(6, 6)
        self.convolution = nn.Conv2d(1, 3, (2, 3), stride=(1, 2), padding=(1, 0), dilation=(2, 1))
        self.relu = nn.ReLU(inplace=True)
        self.named = nn.Linear(3, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, ids):
        x = self.embedding(ids)
        x = self.twice(torch.tanh(self.twice(x)))
        x = self.relu(self.convolution(x[:, None])).mean((2, 3))
        return self.head(torch.tanh(self.named(input=x)))


def network_and_batches():
    model = Network().double()
    ids = torch.randint(9, (5, 4))
    names = ("embedding", "twice", "convolution", "named", "head")
    targets = {name: model.get_submodule(name) for name in names}
    return model, [{"ids": ids[:3]}, {"ids": ids[3:]}], targets


def test_matrix_free_agrees_with_captured_and_dense():
    model, batches, targets = network_and_batches()
    contrasts = torch.linalg.qr(randn(3, 2, generator=generator_of(0))).Q
    operator = MatrixFreeOperator(model, batches, targets, contrasts)
    captured = capture(model, batches, targets, contrasts, dtype=torch.float64).operator
    oracle = DenseOperator.from_operator(captured)
    assert_same_map(captured, oracle)
    assert_same_map(operator, oracle)
    assert all(not module._forward_hooks for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


class TestDense(OperatorTests):
    @pytest.fixture
    def operator(self):
        return dense_operator(0, 4, 2, {"a": (3, 4), "b": (2, 5)})


class TestFactored(OperatorTests):
    @pytest.fixture(params=[False, True], ids=["rows", "indices"])
    def operator(self, request):
        shared = token_group([2, 0, 3, 1], 30, {"a": 4, "b": 20}, 2, 0, request.param)
        return FactoredOperator([shared, token_group([1, 1, 4, 2], 5, {"c": 3}, 2, 1)], 4, ["c", "a", "b"])

    @pytest.fixture
    def oracle(self, operator):
        return densified(operator)


class TestMatrixFree(OperatorTests):
    @pytest.fixture
    def operator(self):
        torch.manual_seed(0)
        model, batches, targets = network_and_batches()
        return MatrixFreeOperator(model, batches, targets, torch.eye(3).double()[:, :2])


class Outer(TangentOperator):
    """A toy: ``G_ic = b_ic a_i^T``, of a product and its adjoint."""

    def __init__(self, a, b):
        super().__init__({n: (b[n].shape[2], a[n].shape[1]) for n in a}, *b["x"].shape[:2], b["x"].dtype, b["x"].device)
        self.a, self.b = a, b

    def apply(self, delta):
        zero = torch.zeros(self.n_samples, self.n_outputs, dtype=self.dtype)
        return sum((torch.einsum("icm,mn,in->ic", self.b[n], d, self.a[n]) for n, d in delta.items()), zero)

    def adjoint(self, residual):
        return {n: torch.einsum("ic,icm,in->mn", residual, self.b[n], self.a[n]) for n in self.shapes}


class OuterFactors(TangentOperator):
    """The same toy of a product with factors and its pullback alone."""

    def __init__(self, a, b):
        super().__init__({n: (b[n].shape[2], a[n].shape[1]) for n in a}, *b["x"].shape[:2], b["x"].dtype, b["x"].device)
        self.a, self.b = a, b

    def apply_factors_vjp(self, factors):
        bu = {n: torch.einsum("icm,...mr->...icr", self.b[n], u) for n, (u, _) in factors.items()}
        av = {n: torch.einsum("in,...nr->...ir", self.a[n], v) for n, (_, v) in factors.items()}

        def pullback(r):
            return {
                n: (
                    torch.einsum("...ic,icm,...ir->...mr", r, self.b[n], av[n]),
                    torch.einsum("...ic,...icr,in->...nr", r, bu[n], self.a[n]),
                )
                for n in factors
            }

        return sum(torch.einsum("...icr,...ir->...ic", bu[n], av[n]) for n in factors), pullback


class TestToys(OperatorTests):
    @pytest.fixture
    def parts(self):
        g = generator_of(0)
        shapes = {"x": (3, 4), "y": (2, 3)}
        return (
            {n: randn(5, k, generator=g) for n, (_, k) in shapes.items()},
            {n: randn(5, 2, m, generator=g) for n, (m, _) in shapes.items()},
        )

    @pytest.fixture(params=[Outer, OuterFactors])
    def operator(self, request, parts):
        return request.param(*parts)

    @pytest.fixture
    def oracle(self, parts):
        a, b = parts
        return DenseOperator({n: torch.einsum("icm,in->icmn", b[n], a[n]) for n in a})


def test_an_operator_without_a_product_is_refused():
    with pytest.raises(TypeError, match="Half must define apply and adjoint, or apply_factors_vjp"):

        class Half(TangentOperator):
            def apply(self, delta):
                return torch.zeros(1, 1)


def test_matrix_free_error_estimate_covers_float32():
    model, batches, targets = network_and_batches()
    exact = MatrixFreeOperator(model, batches, targets, torch.eye(3).double())
    residual = randn(5, 3, generator=generator_of(3))
    reference = exact.adjoint(residual)
    low = MatrixFreeOperator(model.float(), batches, targets, torch.eye(3))
    assert low.dtype == torch.float32
    estimate = low.adjoint_error(residual.float())
    for name, gradient in low.adjoint(residual.float()).items():
        assert float(torch.linalg.matrix_norm(gradient.double() - reference[name], 2)) <= estimate[name]
