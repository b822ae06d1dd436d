"""True L2 decay of LoRA factors, as parameter groups and as an optimizer that any Trainer takes.

The penalty of the theory, ``sum_j (lambda_j / 2)(||u_j||^2 + ||v_j||^2)``, is for factors of scale one. With
PEFT's ``delta_j = s_j B_j A_j``, ``u = sqrt(s) B`` and ``v = sqrt(s) A^T``, it is an L2 decay of
``lambda_j s_j`` on the matrices A and B. The optimizer has to add that decay to the gradient, as torch's
``SGD`` and ``Adam`` do. ``AdamW`` subtracts it beside the gradient's step (Loshchilov and Hutter 2019): what
it converges to depends on the learning rate's schedule and minimises no penalised objective.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ranksure.adapters.matrices import adapted_layers, chosen_adapter, matrices, scale_of
from ranksure.choices import OptimizerKind
from ranksure.errors import AdapterError, SettingError

_KINDS: dict[str, Any] = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}


def parameter_groups(
    model: nn.Module,
    *,
    lam: float | Mapping[str, float] | None = None,
    weight_decay: float | None = None,
    adapter: str | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups in which a LoRA adapter's matrices decay by L2, and nothing else does.

    Args:
        model: a network with a trainable LoRA adapter (a ``PeftModel``, as a rule).
        lam: the penalty ``lambda`` on factors of scale one, of every module or by module name (all of them): A and
            B of module j decay by ``lambda_j s_j``.
        weight_decay: in its place, one decay for A and B of every module (``lambda_j = weight_decay / s_j``).
        adapter: the adapter, where several are active.

    Returns:
        One group per decay, in the order of the modules, then one of decay 0 with everything else that requires
        gradients (biases, norms, ``modules_to_save``); each with ``params`` and ``weight_decay``, for an optimizer
        that adds its decay to the gradient.

    Raises:
        SettingError: neither or both penalties, a negative or infinite one, or one that names other modules.
        AdapterError: no LoRA adapter, several without a name, or one that is frozen.
    """
    matrices = _matrices(model, adapter)
    decays = _decays({name: scale for name, (scale, _) in matrices.items()}, lam, weight_decay)
    groups: dict[float, list[nn.Parameter]] = {}
    taken: set[int] = set()
    for name, (_, parameters) in matrices.items():
        for parameter in parameters:
            if not parameter.requires_grad:
                raise AdapterError(
                    f"the adapter's matrices for {name} are frozen: load it with is_trainable=True to train it"
                )
            if id(parameter) not in taken:
                taken.add(id(parameter))
                groups.setdefault(decays[name], []).append(parameter)
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    out = [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()]
    return [*out, {"params": rest, "weight_decay": 0.0}] if rest else out


def l2_optimizer(
    model: nn.Module,
    *,
    lam: float | Mapping[str, float] | None = None,
    weight_decay: float | None = None,
    lr: float = 1e-3,
    kind: OptimizerKind = "adam",
    adapter: str | None = None,
    **options: Any,
) -> torch.optim.Optimizer:
    """An optimizer whose stationary points are those of mean loss plus the L2 penalty of the theory.

    For ``Trainer(optimizers=(l2_optimizer(model, lam=...), None))`` of transformers or TRL, which then makes the
    schedule itself. (A Trainer that wraps the model in an adapter, as TRL's does with ``peft_config``, must be
    given the wrapped model instead.)

    Args:
        model: see :func:`parameter_groups`, as for ``lam``, ``weight_decay`` and ``adapter``.
        lam: the penalty on factors of scale one.
        weight_decay: the decay of PEFT's matrices.
        lr: learning rate.
        kind: ``adam`` (decay added to the gradient, before the moments) or ``sgd``.
        adapter: the adapter, where several are active.
        **options: further arguments of ``torch.optim.Adam`` or ``torch.optim.SGD``.

    Raises:
        SettingError: an unknown kind, ``adamw``, options that the optimizer refuses, or as :func:`parameter_groups`.
        AdapterError: as :func:`parameter_groups`.
    """
    if kind not in _KINDS:
        why = " (its decay is decoupled from the gradient, so it is no L2 penalty)" if str(kind) == "adamw" else ""
        raise SettingError(f"unknown optimizer {kind!r}{why}: use adam or sgd")
    if "weight_decay" in options or options.get("decoupled_weight_decay"):
        raise SettingError("a decoupled weight decay is no L2 penalty: leave decoupled_weight_decay out")
    groups = parameter_groups(model, lam=lam, weight_decay=weight_decay, adapter=adapter)
    try:
        return _KINDS[kind](groups, lr=lr, **options)
    except (TypeError, ValueError) as error:
        raise SettingError(f"{_KINDS[kind].__name__} refuses its options: {error}") from None


def _matrices(model: nn.Module, adapter: str | None) -> dict[str, tuple[float, list[nn.Parameter]]]:
    """Scale and matrices (A, B) by module name in the base network."""
    layers = adapted_layers(model)
    adapter = chosen_adapter(layers, adapter, "default")
    out = {
        name: (scale_of(name, layer, adapter), list(matrices(layer, adapter)))
        for name, layer in layers.items()
        if adapter in layer.scaling
    }
    if not out:
        raise AdapterError(f"the model has no LoRA adapter {adapter!r} to train: wrap it with peft.get_peft_model")
    return out


def _decays(
    scales: Mapping[str, float], lam: float | Mapping[str, float] | None, weight_decay: float | None
) -> dict[str, float]:
    if (lam is None) == (weight_decay is None):
        raise SettingError("give either lambda (lam=) or the weight decay of PEFT's matrices (weight_decay=)")
    if isinstance(lam, Mapping):
        if set(lam) != set(scales):
            odd = sorted(set(lam) ^ set(scales))[0]
            raise SettingError(f"lambda by module must name every adapted module and no other: see {odd}")
        given = dict(lam)
    else:
        given = dict.fromkeys(scales, lam if weight_decay is None else weight_decay)
    for value in given.values():
        if value is None or not 0 <= value < math.inf:
            raise SettingError(f"lambda and weight decay must be at least 0 and finite, not {value}")
    if weight_decay is not None:
        return {name: float(value) for name, value in given.items() if value is not None}
    return {name: float(value) * scales[name] for name, value in given.items() if value is not None}
