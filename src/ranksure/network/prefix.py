"""What lies below the lowest adapted module, run once: its outputs are the same in every evaluation.

Modules that end before the first target begins (:mod:`ranksure.network.below`) no longer run. Which of their outputs
the rest needs is found by trial: a module that is not needed hands out NaN, which would show in the logits. One that is
needed hands out what was recorded, or runs where that costs little (norms, embeddings). All else of the network (masks,
the sums between layers) runs as always, so nothing is assumed of an architecture. Every batch is compared once with the
whole network.

What was recorded is found by the content of the network's inputs: other rows, or other tokens of the same rows, go
through the whole network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ranksure.errors import MemoryBudgetError
from ranksure.network.below import layers_among, mapped, modules_below, starts
from ranksure.network.kept import Kept
from ranksure.network.logits import Batch, device_of, frozen, logits_in, to_device, unlabelled
from ranksure.network.replay import IN_PLACE, CannotSkipError, Made, Replay
from ranksure.network.targets import base_network


@dataclass(frozen=True)
class Prefix:
    """Whether the frozen layers are skipped.

    Attributes:
        batches: the same batches.
        skipped: names of the layers that no longer run; empty where everything runs.
        why_not: why everything runs; empty where it does not.
        nbytes: bytes that are kept.
        in_file: whether they lie in a file, for want of memory.
    """

    batches: Sequence[Batch]
    skipped: list[str]
    why_not: str = ""
    nbytes: int = 0
    in_file: bool = False
    _cache: _Cache | None = None

    @contextmanager
    def paused(self) -> Iterator[Sequence[Batch]]:
        """The whole network again, on these batches, too."""
        if self._cache is None:
            yield self.batches
            return
        self._cache.paused, before = True, self._cache.paused
        try:
            yield self.batches
        finally:
            self._cache.paused = before


@contextmanager
def cached_prefix(
    model: nn.Module, batches: Sequence[Batch], targets: Mapping[str, nn.Module], memory_bytes: float = float("inf")
) -> Iterator[Prefix]:
    """Run what lies below the targets once, for the time of the context.

    Within it, ``model(**batch)`` on one of the batches skips those layers; on other rows the whole network runs.

    Args:
        model: the network; its weights below the targets must not change meanwhile (an error).
        batches: as the network takes them (labels are left out of the inputs).
        targets: all modules that are adapted.
        memory_bytes: most bytes to keep in memory; beyond it they go to a file, beyond the disk everything runs.

    Raises:
        CaptureError: within, where weights below the targets or hidden states were changed.
    """
    cache = None
    with ExitStack() as stack:
        try:
            cache, skipped = _filled(model, batches, targets, memory_bytes, stack)
            prefix = Prefix(batches, skipped, "", cache.kept.nbytes, cache.kept.in_file, cache)
        except (CannotSkipError, MemoryBudgetError) as reason:
            stack.close()
            prefix = Prefix(batches, [], str(reason))
        yield prefix


def _filled(
    model: nn.Module, batches: Sequence[Batch], targets: Mapping[str, nn.Module], memory_bytes: float, stack: ExitStack
) -> tuple[_Cache, list[str]]:
    """A cache that is in place until the stack is left, and the layers that no longer run."""
    if not len(batches) or not targets:
        raise CannotSkipError("there are no batches or no targets")
    below = modules_below(model, batches[0], targets)
    skipped = layers_among(model, below)
    if not skipped:
        raise CannotSkipError("no frozen layer lies below the targets")
    cache = _Cache(model, below, targets)
    stack.callback(cache.close)
    with frozen(model), torch.no_grad(), ExitStack() as whole:
        for name in below:
            whole.enter_context(cache.standing_in(name))
        cache.record(batches, memory_bytes)
        stack.enter_context(whole.pop_all())
    stack.callback(model.register_forward_pre_hook(cache.choose, with_kwargs=True).remove)
    stack.callback(model.register_forward_hook(cache.forget, always_call=True).remove)
    return cache, skipped


class _Cache(Replay):
    """A replay, and how it is recorded."""

    def record(self, batches: Sequence[Batch], memory_bytes: float) -> None:
        """One pass over the batches, each compared with the whole network.

        Raises:
            CannotSkipError, MemoryBudgetError: it cannot be done.
        """
        self.idle = self._found_idle(batches[0])
        index = 0
        while index < len(batches):
            if index == 0:
                self.kept.close()
                self.kept = Kept(memory_bytes, len(batches))
                self.entries, self.made = {}, []
            if self._add(batches, index):
                index += 1
                continue
            fewer = self.idle & self._found_idle(batches[index])  # this batch needs more than those before it
            if fewer == self.idle:
                raise CannotSkipError("the logits change when the frozen layers are skipped")
            self.idle, index = fewer, 0
        self.kept.written()
        self.versions = [[x._version for x in tensors] for tensors in self.kept.lists]

    def _add(self, batches: Sequence[Batch], index: int) -> bool:
        """Record a batch; whether its logits are those of the whole network."""
        device, own = device_of(self.model), unlabelled(batches[index])
        batch = to_device(own, device)
        here = all(x.device == device for x in own.values() if isinstance(x, Tensor))  # then none was copied
        key = self.keys.of(batch, lasting=here and batches[index] is batches[index])
        if key is None:
            raise CannotSkipError("the batches hold something other than tensors")
        seen, whole = self._whole(batch)
        made, tensors = self._parted(seen, self.idle)
        if not self._agrees(batch, made, tensors, whole):
            return False
        self.kept.add(tensors)
        self.entries[key] = index
        self.made.append(made)
        return True

    def _whole(self, batch: Batch) -> tuple[dict[str, Any], list[Tensor]]:
        """What every module gives on a batch, and what the network does."""
        self.seen, self.begun = {}, False
        try:
            with ExitStack() as stack:
                starts(self.targets, stack, self._begin)
                whole = _result(self.model, batch)
            if self.seen.keys() != self.below.keys():
                raise CannotSkipError("a layer does not run in every forward pass")
            return self.seen, whole
        finally:
            self.seen = None

    def _begin(self) -> None:
        self.begun = True

    def _agrees(self, batch: Batch, made: dict[str, Any], tensors: list[Tensor], whole: list[Tensor]) -> bool:
        """Whether the network gives the same when modules hand out what is made."""
        versions = [x._version for x in tensors]
        self.given = made, tensors, versions
        try:
            found = _result(self.model, batch)
        except (ValueError, TypeError, AttributeError, LookupError, RuntimeError, ArithmeticError, AssertionError):
            return False  # something needs what is NaN now
        finally:
            self.given = None
        if [x._version for x in tensors] != versions:
            raise CannotSkipError(IN_PLACE)
        return len(found) == len(whole) and all(_same(a, b) for a, b in zip(found, whole, strict=True))

    def _found_idle(self, batch: Batch) -> set[tuple[str, int]]:
        """Outputs that the rest of the network does not need, by trial of halves."""
        batch = to_device(unlabelled(batch), device_of(self.model))
        seen, whole = self._whole(batch)
        if not self._agrees(batch, *self._parted(seen, set()), whole):
            raise CannotSkipError("the logits change when the frozen layers are skipped")
        if self._runs_again(batch, *self._parted(seen, set())):
            raise CannotSkipError("the network runs its frozen layers again in the backward pass (checkpointing)")
        idle: set[tuple[str, int]] = set()
        waiting = [
            [(name, i) for name, nest in seen.items() for i, x in enumerate(_tensors(nest)) if x.is_floating_point()]
        ]
        while waiting:
            part = waiting.pop()
            if part and self._agrees(batch, *self._parted(seen, idle.union(part)), whole):
                idle.update(part)
            elif len(part) > 1:
                half = len(part) // 2
                waiting += [part[half:], part[:half]]
        return idle

    def _runs_again(self, batch: Batch, made: dict[str, Any], tensors: list[Tensor]) -> bool:
        """Whether modules run in a backward pass, when nothing says for which batch."""

        def reached(_: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
            return output * torch.ones((), dtype=output.dtype, device=output.device, requires_grad=True)

        with torch.enable_grad(), ExitStack() as stack:
            for target in self.targets.values():
                stack.callback(target.register_forward_hook(reached).remove)
            self.given = made, tensors, [x._version for x in tensors]
            try:
                found = torch.stack([x.float().square().sum() for x in _result(self.model, batch)]).sum()
                self.calls = 0
                if found.requires_grad:
                    found.backward()
            finally:
                self.given = None
        return self.calls > 0

    def _parted(self, seen: dict[str, Any], idle: set[tuple[str, int]]) -> tuple[dict[str, Any], list[Tensor]]:
        """What modules give, without the tensors, and the tensors that are needed."""
        given: dict[str, Any] = {}
        kept: list[Tensor] = []
        for name, nest in seen.items():
            needed = [(name, i) not in idle for i, _ in enumerate(_tensors(nest))]
            if name in self.cheap and any(needed):
                continue  # it runs
            numbers = iter([len(kept) + sum(needed[:i]) if need else None for i, need in enumerate(needed)])
            given[name] = mapped(nest, lambda x, numbers=numbers: Made(x.shape, x.dtype, x.device, next(numbers)))
            kept += [x for x, need in zip(_tensors(nest), needed, strict=True) if need]
        return given, kept


def _tensors(nest: Any) -> list[Tensor]:
    found: list[Tensor] = []
    mapped(nest, found.append)
    return found


def _result(model: nn.Module, batch: Batch) -> list[Tensor]:
    """Logits; of a language model what goes into its output embeddings, and the logits of one position."""
    getter = getattr(base_network(model), "get_output_embeddings", None)
    try:
        head = getter() if callable(getter) else None
    except (AttributeError, NotImplementedError):
        head = None
    found: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if len(args) != 1 or args[0].dim() != 3:
            return None
        found.append(args[0])
        return (args[0][:, :1],)

    with ExitStack() as stack:
        if isinstance(head, nn.Module):
            stack.callback(head.register_forward_pre_hook(before).remove)
        logits = logits_in(model(**batch))
    if not isinstance(logits, Tensor):
        raise CannotSkipError("the network returns no logits")
    return [logits, *found]


def _same(found: Tensor, whole: Tensor) -> bool:
    if found.shape != whole.shape or found.dtype != whole.dtype:
        return False
    finite = whole[whole.isfinite()].abs()
    eps = torch.finfo(whole.dtype).eps
    allowed = (16 if eps < 1e-3 else 4) * eps * float(finite.max()) if finite.numel() else 0.0
    return torch.allclose(found, whole, rtol=0, atol=allowed, equal_nan=True)
