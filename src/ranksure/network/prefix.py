"""The frozen layers below the lowest adapted one, run once: what they give is the same in every evaluation.

Layers of a stack (a ``ModuleList``) before the first that holds a target hand their input through, and that layer
takes its input from what was kept. All else of the network (embeddings, masks, positions) runs as always, so nothing is
assumed of an architecture but what is checked: the logits of the first batch are those of the whole network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn

from ranksure.errors import CaptureError
from ranksure.network.logits import Batch, device_of, frozen, logits_in, to_device, unlabelled


@dataclass(frozen=True)
class Prefix:
    """Whether the frozen layers are skipped.

    Attributes:
        batches: the same batches, to be used in place of them; one pass at a time.
        skipped: names of the layers that no longer run; empty where everything runs.
        why_not: why everything runs; empty where it does not.
        nbytes: bytes that are kept.
    """

    batches: Sequence[Batch]
    skipped: list[str]
    why_not: str = ""
    nbytes: int = 0

    @contextmanager
    def paused(self, pause: bool = True) -> Iterator[Sequence[Batch]]:
        """The whole network again, for work on other rows than whole batches; gives the batches as they are.

        Of several prefixes of one network all but one must be paused; ``pause=False`` is a pause within a pause.
        """
        reader = self.batches
        if not isinstance(reader, _Reader):
            yield reader
            return
        before, reader.paused = reader.paused, pause
        try:
            yield reader.batches if pause else reader
        finally:
            reader.paused = before


@contextmanager
def cached_prefix(
    model: nn.Module, batches: Sequence[Batch], targets: Mapping[str, nn.Module], memory_bytes: float = float("inf")
) -> Iterator[Prefix]:
    """Run what lies below the targets once, for the time of the context.

    Args:
        model: the network; its weights below the targets must not change meanwhile.
        batches: as the network takes them (labels are left out of the inputs).
        targets: adapted modules.
        memory_bytes: most bytes to keep; beyond it everything runs every time.
    """
    stack = _stack_of(model, targets)
    if stack is None:
        yield Prefix(batches, [], "no frozen layer lies below the targets in one stack of layers")
        return
    name, layers, first = stack
    names = [f"{name}.{index}" for index in range(first)]
    with frozen(model), torch.no_grad():
        kept, whole, why_not = _record(model, layers, first, batches, memory_bytes)
    if why_not:
        yield Prefix(batches, [], why_not)
        return
    reader = _Reader(batches, kept)
    with ExitStack() as undo:
        for layer, made in zip(layers[:first], kept.returns, strict=True):
            undo.enter_context(_handing_through(layer, made, reader))
        undo.callback(layers[first].register_forward_pre_hook(reader.substitute, with_kwargs=True).remove)
        if _agrees(model, reader, whole):
            yield Prefix(reader, names, nbytes=kept.nbytes)
            return
    yield Prefix(batches, [], "the logits change when the frozen layers are skipped: more than hidden states pass")


def _stack_of(model: nn.Module, targets: Mapping[str, nn.Module]) -> tuple[str, nn.ModuleList, int] | None:
    """The outermost list of modules that holds all targets, none in its first modules, and how many those are."""
    named = {module: name for name, module in model.named_modules()}
    targets = {named.get(module, name): module for name, module in targets.items()}  # theirs may be a part's
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not name:
            continue
        held = [target.removeprefix(name + ".") for target in targets if target.startswith(name + ".")]
        if len(held) == len(targets):
            first = min(int(rest.split(".", 1)[0]) for rest in held)
            return (name, module, first) if first else None
    return None


@dataclass(frozen=True)
class _Kept:
    """What enters the first adapted layer, one tensor a batch, and what each layer before it returns."""

    hidden: list[Tensor]
    returns: list[int]  # length of the tuple; 0 for a tensor

    @property
    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.hidden)


def _record(
    model: nn.Module, layers: nn.ModuleList, first: int, batches: Sequence[Batch], memory_bytes: float
) -> tuple[_Kept, Tensor, str]:
    """One pass over the batches: what to keep, the first batch's logits, and why it cannot be done."""
    kept = _Kept([], [-1] * first)
    seen = [0] * (first + 1)
    faults: list[str] = []

    def entered(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[first] += 1
        x = args[0] if args else kwargs.get("hidden_states")
        if isinstance(x, Tensor):
            kept.hidden.append(x)
        else:
            faults.append("the first adapted layer takes no tensor of hidden states")

    def left(index: int) -> Any:
        def hook(_: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            seen[index] += 1
            alone = isinstance(output, tuple) and all(part is None for part in output[1:])
            if not isinstance(output, Tensor) and not alone:
                faults.append("a frozen layer returns more than hidden states")
            kept.returns[index] = len(output) if isinstance(output, tuple) else 0

        return hook

    whole = torch.empty(0)
    with ExitStack() as undo:
        undo.callback(layers[first].register_forward_pre_hook(entered, with_kwargs=True).remove)
        for index in range(first):
            undo.callback(layers[index].register_forward_hook(left(index)).remove)
        for index, batch in enumerate(batches):
            output = model(**to_device(unlabelled(batch), device_of(model)))
            whole = logits_in(output) if index == 0 else whole
            if faults:
                return kept, whole, faults[0]
            if any(count != index + 1 for count in seen):
                return kept, whole, "a layer of the stack does not run exactly once in a forward pass"
            if kept.nbytes * len(batches) / (index + 1) > memory_bytes:
                return kept, whole, "what the frozen layers give does not fit the memory"
    return kept, whole, ""


class _Reader(Sequence[Batch]):
    """The batches; whichever was handed out last is the one whose hidden states go in."""

    def __init__(self, batches: Sequence[Batch], kept: _Kept) -> None:
        self.batches, self.kept, self.current, self.paused = batches, kept, 0, False
        self._versions = [x._version for x in kept.hidden]

    def __len__(self) -> int:
        return len(self.batches)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Batch]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            raise TypeError("batches with a prefix are read one at a time")
        self.current = range(len(self.batches))[index]
        return self.batches[index]

    def substitute(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        if self.paused:
            return None
        hidden = self.kept.hidden[self.current]
        if hidden._version != self._versions[self.current]:
            raise CaptureError("the network changes hidden states in place: its frozen layers cannot be left out")
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}


@contextmanager
def _handing_through(layer: nn.Module, made: int, reader: _Reader) -> Iterator[None]:
    """The layer returns its input, in the form in which it returns its output."""
    own, before = layer.forward, layer.__dict__.get("forward")

    def through(*args: Any, **kwargs: Any) -> Any:
        if reader.paused:
            return own(*args, **kwargs)
        x = args[0] if args else kwargs["hidden_states"]
        return (x, *[None] * (made - 1)) if made else x

    layer.forward = through
    try:
        yield
    finally:
        if before is None:
            del layer.forward
        else:
            layer.forward = before  # of another prefix


def _agrees(model: nn.Module, reader: _Reader, whole: Tensor) -> bool:
    """Whether the first batch's logits are those of the whole network."""
    with frozen(model), torch.no_grad():
        found = logits_in(model(**to_device(unlabelled(reader[0]), device_of(model))))
    allowed = 64 * torch.finfo(found.dtype).eps * (1 + float(whole.abs().max()))
    return whole.shape == found.shape and float((whole - found).abs().max()) <= allowed
