"""Random linearised problems, an independent convex oracle, and small shared checks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor, nn

from ranksure.certificate import lambda_max
from ranksure.factors import Delta, Factors
from ranksure.losses import get_loss
from ranksure.operators.base import TangentOperator
from ranksure.operators.dense import DenseOperator
from ranksure.operators.factored import FactoredOperator, Group
from ranksure.problem import Problem

LOSS_NAMES = ("cross-entropy", "logistic", "squared-error")
SHAPES = {"a.query": (3, 4), "a.value": (4, 2)}


def rounding(model: nn.Module) -> float:
    """The unit roundoff of a forward pass: half the spacing of numbers at 1, in its least precise step.

    transformers computes RMS norms, rotary angles and the softmax of eager attention beside them (Llama's, Gemma's)
    in float32, whatever the weights are in. Their last bits change with the shape of a batch and the processor, and
    stay in a float64 result. A network without such modules is computed in the precision of its weights.
    """
    single = any(type(module).__name__.endswith(("RMSNorm", "RotaryEmbedding")) for module in model.modules())
    weights = next(model.parameters()).dtype
    dtype = torch.float32 if single and weights == torch.float64 else weights
    return torch.finfo(dtype).eps / 2


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def random_labels(loss: str, n: int, k: int, generator: torch.Generator) -> Tensor:
    if loss == "cross-entropy":
        return torch.randint(k, (n,), generator=generator)
    if loss == "logistic":
        return torch.randint(2, (n, k), generator=generator).double()
    return randn(n, k, generator=generator)


def dense_operator(seed: int, n: int, c: int, shapes: dict[str, tuple[int, int]], scale: float = 1.0) -> DenseOperator:
    g = generator_of(seed)
    return DenseOperator({name: scale * randn(n, c, *shape, generator=g) for name, shape in shapes.items()})


def token_group(
    lengths: Sequence[int], width: int, outputs: dict[str, int], c: int, seed: int, index: bool = False
) -> Group:
    """A group of random tokens: ``lengths[i]`` of them for sample ``i``."""
    g = generator_of(seed)
    tokens = sum(lengths)
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    inputs = torch.randint(width, (tokens,), generator=g) if index else randn(tokens, width, generator=g)
    return Group(inputs, width, sample, {name: randn(tokens, c, m, generator=g) for name, m in outputs.items()})


def densified(operator: FactoredOperator) -> DenseOperator:
    """Jacobians summed token by token in plain loops: shares no code with the operators."""
    jacobians: dict[str, Tensor] = {}
    for group in operator.groups:
        for name, b in group.outputs.items():
            out = torch.zeros(operator.n_samples, operator.n_outputs, b.shape[2], group.width, dtype=torch.float64)
            for t in range(group.n_tokens):
                a = torch.zeros(group.width, dtype=torch.float64)
                if group.is_index:
                    a[group.inputs[t]] = 1
                else:
                    a = group.inputs[t].double()
                for c in range(operator.n_outputs):
                    out[int(group.sample[t]), c] += torch.outer(b[t, c].double(), a)
            jacobians[name] = out
    return DenseOperator({name: jacobians[name] for name in operator.shapes})


def random_factors(
    shapes: dict[str, tuple[int, int]], ranks: int | dict[str, int], seed: int = 0, starts: int = 0, scale: float = 1.0
) -> Factors:
    g = generator_of(seed)
    lead = (starts,) if starts else ()
    out: Factors = {}
    for name, (m, n) in shapes.items():
        r = ranks if isinstance(ranks, int) else ranks.get(name, 0)
        out[name] = (scale * randn(*lead, m, r, generator=g), scale * randn(*lead, n, r, generator=g))
    return out


def random_problem(
    seed: int = 0,
    loss: str = "cross-entropy",
    n: int = 5,
    k: int = 2,
    shapes: dict[str, tuple[int, int]] | None = None,
    share: float = 0.3,
    uneven: bool = True,
    weighted: bool = False,
    operator: TangentOperator | None = None,
) -> Problem:
    """A random problem whose largest lambda is ``share`` of the smallest one with zero optimum."""
    g = generator_of(seed + 1000)
    function = get_loss(loss)
    shapes = shapes or SHAPES
    operator = operator or dense_operator(seed, n, function.effective_outputs(k), shapes)
    names = list(operator.shapes)
    labels = random_labels(loss, operator.n_samples, k, g)
    base = randn(operator.n_samples, k, generator=g)
    weights = torch.empty(0)
    if weighted:
        weights = 0.05 + torch.rand(operator.n_samples, generator=g, dtype=torch.float64)
    flat = Problem(operator, base, labels, function, dict.fromkeys(names, 1.0), weights)
    largest = share * lambda_max(flat)
    steps = [1.0 - 0.4 * i / max(1, len(names) - 1) if uneven else 1.0 for i in range(len(names))]
    return flat.with_penalty({name: largest * s for name, s in zip(names, steps, strict=True)})


def jacobians_of(problem: Problem) -> dict[str, Tensor]:
    operator = problem.operator
    dense = operator if isinstance(operator, DenseOperator) else DenseOperator.from_operator(operator)
    return dense.to(torch.float64).jacobians()


def minimise(problem: Problem, contrasts: cp.Expression, penalty: cp.Expression) -> float:
    """The optimal value by cvxpy with Clarabel, for flat contrasts ``(N C,)`` and a penalty that are expressions."""
    base, weights = problem.base_logits.double().numpy(), problem.weights.double().numpy()
    n, k = base.shape
    basis = problem.loss.contrasts(k).numpy()
    z = base + cp.reshape(contrasts, (n, basis.shape[1]), order="C") @ basis.T
    y = problem.labels.numpy()
    if problem.loss.name == "cross-entropy":
        hot = np.eye(k)[y]
        losses = [cp.log_sum_exp(z[i]) - hot[i] @ z[i] for i in range(n)]
    elif problem.loss.name == "logistic":
        losses = [cp.sum(cp.logistic(z[i]) - cp.multiply(y[i], z[i])) / k for i in range(n)]
    else:
        losses = [cp.sum_squares(z[i] - y[i]) / k for i in range(n)]
    goal = cp.Problem(cp.Minimize(cp.sum(cp.multiply(weights, cp.hstack(losses))) + penalty))
    accuracy = {f"tol_{kind}": 1e-10 for kind in ("gap_abs", "gap_rel", "feas", "ktratio")}
    goal.solve(solver=cp.CLARABEL, **accuracy)
    assert goal.status in ("optimal", "optimal_inaccurate"), goal.status
    return float(goal.value)


def convex_optimum(problem: Problem) -> tuple[float, Delta]:
    """Optimal value and updates, written from the definition of the objective."""
    variables = {name: cp.Variable(shape) for name, shape in problem.operator.shapes.items()}
    flat: cp.Expression = cp.Constant(np.zeros(problem.operator.n_samples * problem.operator.n_outputs))
    for name, g in jacobians_of(problem).items():
        flat = flat + g.flatten(0, 1).flatten(1).numpy() @ cp.vec(variables[name], order="C")
    minimise(problem, flat, sum(problem.penalty[name] * cp.normNuc(d) for name, d in variables.items()))
    delta = {name: torch.from_numpy(np.asarray(d.value)) for name, d in variables.items()}
    # What is returned is the objective at the updates found, so it is never below the optimum.
    return objective(problem, delta), delta


def objective(problem: Problem, delta: Delta) -> float:
    """``F(delta)`` from the dense Jacobians and singular values, in float64."""
    k = problem.n_logits
    z = problem.base_logits.double()
    for name, g in jacobians_of(problem).items():
        values = torch.einsum("icmn,mn->ic", g, delta[name].double())
        z = z + values @ problem.loss.contrasts(k).T
    weights = problem.weights.double()
    if problem.loss.name == "cross-entropy":
        each = torch.nn.functional.cross_entropy(z, problem.labels, reduction="none")
    elif problem.loss.name == "logistic":
        each = torch.nn.functional.binary_cross_entropy_with_logits(z, problem.labels.double(), reduction="none")
        each = each.mean(1)
    else:
        each = (z - problem.labels.double()).square().mean(1)
    nuclear = sum(problem.penalty[n] * float(torch.linalg.svdvals(d.double()).sum()) for n, d in delta.items())
    return float((weights * each).sum()) + nuclear


def joined(first: Factors, second: Factors) -> Factors:
    """Columns side by side: the sum of the updates."""
    return {n: (torch.cat([u, second[n][0]], 1), torch.cat([v, second[n][1]], 1)) for n, (u, v) in first.items()}


def updates(factors: Factors) -> Delta:
    return {name: u @ v.mT for name, (u, v) in factors.items()}


def flatten(factors: Factors) -> Tensor:
    return torch.cat([part.reshape(-1) for pair in factors.values() for part in pair])


def unflatten(x: Tensor, like: Factors) -> Factors:
    out: Factors = {}
    low = 0
    for name, (u, v) in like.items():
        mid, high = low + u.numel(), low + u.numel() + v.numel()
        out[name] = (x[low:mid].view(u.shape), x[mid:high].view(v.shape))
        low = high
    return out


def factored_objective(problem: Problem, like: Factors, x: Tensor) -> Tensor:
    """The objective on flattened factors, written for ``torch.func``."""
    z = problem.base_logits
    penalty = torch.zeros((), dtype=torch.float64)
    jacobians = jacobians_of(problem)
    for name, (u, v) in unflatten(x, like).items():
        values = torch.einsum("icmn,mr,nr->ic", jacobians[name], u, v)
        z = z + values @ problem.loss.contrasts(problem.n_logits).T
        penalty = penalty + 0.5 * problem.penalty[name] * (u.square().sum() + v.square().sum())
    if problem.loss.name == "cross-entropy":
        hot = torch.nn.functional.one_hot(problem.labels, problem.n_logits).double()
        each = torch.logsumexp(z, 1) - (z * hot).sum(1)
    elif problem.loss.name == "logistic":
        each = (torch.logaddexp(z, torch.zeros_like(z)) - z * problem.labels).mean(1)
    else:
        each = (z - problem.labels).square().mean(1)
    return (problem.weights * each).sum() + penalty


def spurious_instance(
    r: int, lam: float = 0.1, c: float = math.sqrt(2), s: float = 1.0, rho: float = 2.0
) -> tuple[Problem, Factors, Delta, float]:
    """The instance of docs/theory/landscape.md: a trap at rank ``r``, an optimum of rank 1.

    Returns:
        The problem, the trap's factors, an optimal update, and the trap's excess objective.
    """
    size, n = r + 1, r * (r + 3) // 2
    unit = torch.eye(size, dtype=torch.float64)
    gradients, labels = [], []
    for a in range(r):
        gradients.append(c * (torch.outer(unit[a], unit[a]) + rho / r * torch.outer(unit[r], unit[r])))
        labels.append(c * s + n * lam / (2 * c))
    for a in range(r):
        for b in range(a + 1, r):
            gradients.append(c * (torch.outer(unit[a], unit[b]) + torch.outer(unit[b], unit[a])) / math.sqrt(2))
            labels.append(0.0)
    for a in range(r):
        gradients.append(c * (torch.outer(unit[r], unit[a]) + torch.outer(unit[a], unit[r])) / math.sqrt(2))
        labels.append(0.0)
    assert len(gradients) == n
    problem = Problem(
        DenseOperator({"w": torch.stack(gradients)[:, None]}),
        torch.zeros(n, 1, dtype=torch.float64),
        torch.tensor(labels, dtype=torch.float64)[:, None],
        get_loss("squared-error"),
        {"w": lam},
    )
    trap = math.sqrt(s) * unit[:, :r]
    t = (labels[0] - n * lam / (2 * c * rho)) * r / (c * rho)
    best = {"w": t * torch.outer(unit[r], unit[r])}
    excess = objective(problem, {"w": trap @ trap.T}) - objective(problem, best)
    return problem, {"w": (trap, trap.clone())}, best, excess
