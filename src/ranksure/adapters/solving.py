"""``ranksure.solve_network()``: the network's solver, which starts from the adapter that a model has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Unpack

from torch import nn

from ranksure.adapters.loaded import read_adapter
from ranksure.choices import Weighting
from ranksure.errors import AdapterError, SettingError
from ranksure.losses import Kind
from ranksure.network.logits import Batch
from ranksure.network.targets import base_network
from ranksure.solvers.network import NetworkSolution, Solving
from ranksure.solvers.network import solve_network as solve_plain


def solve_network(
    model: nn.Module,
    batches: Sequence[Batch],
    targets: Mapping[str, nn.Module] | None = None,
    *,
    weight_decay: float | Mapping[str, float],
    loss: Kind | None = None,
    weighting: Weighting = "token",
    adapter: str | None = None,
    memory_bytes: float = 4 * 2**30,
    **solving: Unpack[Solving],
) -> NetworkSolution:
    """Minimise ``mean loss + lambda sum_j ||delta_j||_*`` of a network over updates of its target modules.

    Full batch, in evaluation mode: dropout is off. What lies below the lowest target runs once. Nothing in the model
    changes.

    Args:
        model: the network. The LoRA adapter of a ``PeftModel`` is where the solve starts, and the solution takes its
            place; what else was trained with it (a head, biases, other adapters) stays.
        batches: with ``labels``, as the model takes them.
        targets: modules by name (see :func:`ranksure.select_targets`); by default those of the adapter, which they must
            include.
        weight_decay: lambda, for all modules or by name: the L2 decay of factors of scale one.
        loss: its name; by the model's own rules by default, checked against the loss that it computes itself.
        weighting: of a causal language model's tokens: every ``token`` or every ``sample`` alike.
        adapter: its name; needed where several are active.
        memory_bytes: for what the frozen layers give, and for a capture where the cheap certificate is loose.
        **solving: ``start`` (factors), ``tolerance`` (the gap to reach, as a share of what was gained),
            ``max_gradients``, ``max_seconds``, ``progress``, ``checkpoint``, ``resume``: see
            :func:`ranksure.solvers.network.solve_objective`.

    Raises:
        SettingError: a lambda that is not positive, no targets, a loss that is not the model's own, or a start at which
            the network overflows.
        AdapterError: an adapter that cannot be read, or targets that leave out a module of it.
        TargetError: a module that is quantised.
        DataError, CaptureError: as :func:`ranksure.network.gradient.gradient_pass`.
    """
    read = read_adapter(model, adapter) if adapter is not None or getattr(model, "peft_config", None) else None
    if read is not None:
        if read.untested:
            raise AdapterError(f"adapter {read.name!r} cannot be solved for: {read.untested[0]}")
        targets = read.modules if targets is None else targets
        if left := [name for name in read.blocks if name not in targets]:
            raise AdapterError(f"adapter {read.name!r} adapts {left[0]}, which is not among `targets`: add it")
        solving.setdefault("start", read.factors)
    if targets is None:
        raise SettingError("this model has no adapter: say what to adapt, targets=ranksure.select_targets(model, ...)")
    with read.without() if read is not None else nullcontext():
        return solve_plain(
            base_network(model),
            batches,
            targets,
            weight_decay=weight_decay,
            loss=loss,
            weighting=weighting,
            memory_bytes=memory_bytes,
            **solving,
        )
