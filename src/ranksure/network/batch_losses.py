"""Running a trained network on labelled batches: losses, and gradients without the logits ever being whole.

A language model's logits, positions times vocabulary, are larger than anything else of a batch. Where the network
ends with its output embeddings, these are shown one position, and the hidden states before them are put through them
again a few labelled positions at a time; the gradient at the hidden states goes back in one piece.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ranksure.choices import Weighting
from ranksure.errors import CaptureError, DataError, SettingError
from ranksure.loss_terms import CHUNK_VALUES, Terms, batch_terms, is_shifted, kind_of, token_places
from ranksure.losses import CrossEntropy, Kind, get_loss
from ranksure.network.logits import Batch, device_of, logits_in, not_finite, output_of, to_device, unlabelled
from ranksure.network.targets import base_layer, base_network

_TEXT_INPUTS = {"input_ids", "attention_mask", "token_type_ids", "position_ids"}
_WORDS = 8  # tokens of a text on which the model's own loss is looked at
_LABELS = 16  # classes on which it is looked at
_ROUTER_LOSS = re.compile(r"(aux|router|moe|z).*loss.*(coef|weight|alpha)")


class OtherLossError(SettingError):
    """The model computes another loss than the one that was found for it."""


class NotFiniteError(DataError):
    """The network's logits are NaN or infinite."""


def check_own_loss(model: nn.Module, batch: Batch, kind: Kind | None = None, counted: bool = False) -> None:
    """The loss that a model computes itself is the mean of its terms.

    Args:
        model: the network, in evaluation mode.
        batch: rows with ``labels``, of which a few are looked at.
        kind: which loss; by the model's own rules by default.
        counted: it must divide by ``num_items_in_batch``, too: a Trainer that accumulates adds such losses up.

    Raises:
        OtherLossError: it is another.
    """
    forward = Forward(model, kind)
    inputs, labels = forward.split(batch)
    few = forward.check_loss(inputs, labels)
    if counted and few is not None:
        with torch.no_grad():
            one, two = (float(model(**few, num_items_in_batch=torch.tensor(n)).loss) for n in (1, 2))
        if math.isclose(one, two, rel_tol=1e-3):
            raise OtherLossError(
                "the model's loss does not divide by the number of rows of a step, so the Trainer adds up those of "
                "the accumulated batches, which changes what the penalty weighs; pass "
                "compute_loss_func=ranksure.mean_loss_function(...)"
            )


class Forward:
    """Runs batches and adds up their terms.

    Args:
        model: the network, in evaluation mode (see :func:`~ranksure.network.logits.frozen`).
        kind: which loss; by the model's own rules by default.
        weighting: of the tokens of one sample: every ``token`` alike, or every ``sample`` alike.
        targets: modules whose gradients are wanted.
        check: compare the loss with the one that the model computes itself, on a few rows of the first batch.

    Attributes:
        weight: total weight of the terms seen; ``total`` is the weighted sum of their losses, ``n_samples`` their rows.
        last: of the last batch, the row of each term and its loss.

    Raises:
        SettingError: unknown weighting.
    """

    def __init__(
        self,
        model: nn.Module,
        kind: Kind | None = None,
        weighting: Weighting = "token",
        targets: Iterable[nn.Module] = (),
        check: bool = False,
    ) -> None:
        if weighting not in ("token", "sample"):
            raise SettingError(f"unknown weighting {weighting!r}: use token or sample")
        self.model = model
        self.base = base_network(model)
        self.kind: Kind | None = kind
        self.weighting: Weighting = weighting
        self.weight = self.total = 0.0
        self.n_samples = 0
        self._check = check and kind is None
        self._head = _output_embeddings(self.base, set(targets))
        self.last: tuple[Tensor, Tensor] = torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.float64)
        self._losses: list[Tensor] = []
        self._weights: list[Tensor] = []

    @property
    def mean(self) -> float:
        """Mean loss so far."""
        return self.total / self.weight

    @property
    def losses(self) -> Tensor:
        """Every term's loss so far, float64 ``(T,)``, on the CPU; the first rows' first."""
        return torch.cat([torch.zeros(0, dtype=torch.float64), *self._losses])

    def terms(self) -> Terms:
        """All terms, with weights that sum to one."""
        return Terms(self.kind or CrossEntropy.name, self.losses, torch.cat(self._weights) / self.weight)

    def losses_only(self, batch: Batch) -> None:
        """Add a batch's terms, without gradients.

        Raises:
            DataError: no labels, labels that do not fit, or logits that are not finite.
        """
        inputs, labels = self.split(batch)
        with torch.no_grad():
            output, streamed = self._run(inputs, labels, lambda: None)
            self._add_terms(output, inputs, labels, streamed, gradient=False)

    def gradients(self, batch: Batch, restart: Callable[[], None], backward: Callable[[], None]) -> None:
        """Add a batch's terms, and propagate the gradient of their weighted sum back.

        ``restart`` is called when the forward pass is to be run again from the beginning, ``backward`` before the
        backward pass.

        Raises:
            DataError: as :meth:`losses_only`.
            SettingError: the model computes another loss than the one that was found for it.
        """
        inputs, labels = self.split(batch)
        if self._check:
            self._check = False
            self.check_loss(inputs, labels)
            restart()
        with torch.enable_grad():
            output, streamed = self._run(inputs, labels, restart)
        found = self._add_terms(output, inputs, labels, streamed, gradient=True)
        if found is None:
            return
        root, seed = found
        if root.requires_grad:  # else the loss depends on none of the targets
            backward()
            torch.autograd.backward(root, seed)

    def _run(self, inputs: dict[str, Any], labels: Tensor, restart: Callable[[], None]) -> tuple[Tensor, bool]:
        """Logits, or the hidden states before the output embeddings and True."""
        head = self._head
        if head is None or labels.dim() != 2 or labels.is_floating_point():
            return _logits(self.model, inputs), False
        hidden: list[Tensor | None] = []
        shown: list[Tensor] = []

        def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            fits = len(args) == 1 and args[0].dim() == 3 and args[0].shape[:2] == labels.shape
            hidden.append(args[0] if fits else None)
            return (args[0][:, :1],) if fits else None

        def after(_: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
            shown.append(output.detach())

        handles = [head.register_forward_pre_hook(before), head.register_forward_hook(after)]
        try:
            logits = _logits(self.model, inputs)
        finally:
            for handle in handles:
                handle.remove()
        if not any(x is not None for x in hidden):
            self._head = None
            return logits, False
        # What comes after the output embeddings (a soft cap, a scale) would be missed: then the logits stay whole.
        alone = len(hidden) == len(shown) == 1 and logits.shape == shown[0].shape
        if alone and torch.equal(logits.detach().double(), shown[0].double()):
            assert hidden[0] is not None
            return hidden[0], True
        self._head = None
        restart()
        return _logits(self.model, inputs), False

    def _add_terms(
        self, output: Tensor, inputs: Batch, labels: Tensor, streamed: bool, gradient: bool
    ) -> tuple[Tensor, Tensor] | None:
        """Add a batch's terms; for gradients the tensor to start from, and what comes in there."""
        labels = labels.to(output.device)
        self.n_samples += len(output)
        self.last = self.last[0][:0], self.last[1][:0]
        if streamed:
            return self._add_streamed(output, labels, gradient)
        if output.dim() == 2 and not bool(torch.isfinite(output).all()):
            raise NotFiniteError(not_finite("on this data", inputs))
        kind = self.kind = self.kind or kind_of(getattr(self.base, "config", None), labels, output)
        found = batch_terms(kind, output, labels, is_shifted(self.base) if output.dim() == 3 else False)
        per_row = self._add(found.rows, len(output), found.losses)
        return (output, found.seed(per_row)) if gradient and len(found.rows) else None

    def _add_streamed(self, hidden: Tensor, labels: Tensor, gradient: bool) -> tuple[Tensor, Tensor] | None:
        self.kind = self.kind or CrossEntropy.name
        if get_loss(self.kind).term != "sample":
            raise SettingError(f"the {self.kind} loss is not one of tokens")
        rows, places, truth = token_places(hidden.shape, labels, is_shifted(self.base))
        if not len(rows):
            return None
        weights = self._row_weights(rows, len(hidden)).to(rows.device)[rows]
        start = hidden[rows, places]
        seed, losses = torch.zeros_like(start), []
        step = max(1, CHUNK_VALUES // self._width(start))
        for low in range(0, len(rows), step):
            part = slice(low, low + step)
            found, slope = self._chunk(start[part], truth[part], weights[part], gradient)
            losses.append(found)
            if slope is not None:
                seed[part] = slope
        self._add(rows, len(hidden), torch.cat(losses))
        return (start, seed) if gradient else None

    def _chunk(self, hidden: Tensor, truth: Tensor, weights: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
        """Losses of some positions, and their gradient in the hidden states."""
        assert self._head is not None
        leaf = hidden.detach().requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            logits = self._head(leaf)
        plain = type(base_layer(self._head)) is nn.Linear  # whose backward does not need its output
        shown = logits.detach() if plain else logits.detach().clone()
        losses, slope = get_loss(self.kind or CrossEntropy.name).terms(shown, truth, weights)
        if not gradient:
            return losses, None
        return losses, torch.autograd.grad(logits, leaf, slope.to(logits.dtype))[0]

    def _width(self, hidden: Tensor) -> int:
        """The vocabulary's size."""
        assert self._head is not None
        size = getattr(self._head, "out_features", None)
        if isinstance(size, int):
            return size
        with torch.no_grad():
            return self._head(hidden[:1]).shape[-1]

    def _row_weights(self, rows: Tensor, n: int) -> Tensor:
        """Weight of each term of every row, float64 ``(n,)``, on the CPU."""
        counts = torch.bincount(rows.cpu(), minlength=n).double()
        return 1 / counts.clamp(min=1) if self.weighting == "sample" else torch.ones(n, dtype=torch.float64)

    def _add(self, rows: Tensor, n: int, losses: Tensor) -> Tensor:
        per_row = self._row_weights(rows, n)
        rows, losses = rows.cpu(), losses.cpu()
        weights, self.last = per_row[rows], (rows, losses)
        self._losses.append(losses)
        self._weights.append(weights)
        self.weight += float(weights.sum())
        self.total += float((weights * losses).sum())
        return per_row

    def split(self, batch: Batch) -> tuple[dict[str, Any], Tensor]:
        """A batch's inputs on the model's device, and its labels."""
        if not isinstance(batch, Mapping):
            raise DataError(f"a batch is a mapping of tensors with 'labels', not a {type(batch).__name__}")
        found = [key for key in ("labels", "label") if isinstance(batch.get(key), Tensor)]
        if not found:
            raise DataError("a batch has no 'labels' tensor: the certificate needs the loss that was trained")
        return to_device(unlabelled(batch), device_of(self.model)), batch[found[0]]

    def check_loss(self, inputs: dict[str, Any], labels: Tensor) -> dict[str, Any] | None:
        """Compare with the loss that the model computes itself, on a few rows, which are returned if it does.

        Raises:
            OtherLossError: it is another.
        """
        if "labels" not in inspect.signature(self.base.forward).parameters:
            return None
        chosen, own_labels = (part.to(device_of(self.model)) for part in _few_rows(labels, _classes(self.base)))
        rows = labels.shape[0]
        few = {k: v[chosen] if isinstance(v, Tensor) and v.dim() and len(v) == rows else v for k, v in inputs.items()}
        ids = few.get("input_ids")
        a_text = getattr(self.base, "loss_type", None) != "ForTokenClassification" and few.keys() <= _TEXT_INPUTS
        flat = all(isinstance(value, Tensor) and value.dim() == 2 for value in few.values())  # packed rows are not
        if a_text and flat and isinstance(ids, Tensor) and labels.shape[1:] == ids.shape[1:]:
            # A language model's whole logits are large: a few words, with themselves as the labels, will do.
            start = int(few["attention_mask"][0].long().argmax()) if "attention_mask" in few else 0
            few = {key: value[:1, start : start + _WORDS] for key, value in few.items()}
            own_labels = few["input_ids"]
        config = getattr(self.base, "config", None)
        stated = getattr(config, "problem_type", None)
        with torch.no_grad():
            output = output_of(self.model, {**few, "labels": own_labels})
        own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if hasattr(config, "problem_type"):
            config.problem_type = stated  # transformers writes there what it finds  # pyright: ignore
        if router_loss(self.base) or (isinstance(own, Tensor) and _has_router_loss(self.base, output)):
            raise OtherLossError(
                "the model adds an auxiliary loss of its router to its own: say which part of it to certify (loss=)"
            )
        if not isinstance(own, Tensor) or own.numel() != 1 or not bool(torch.isfinite(own)):
            return None
        ours = Forward(self.model, self.kind, "token")
        ours.losses_only({**few, "labels": own_labels})
        exact = next(self.base.parameters()).dtype in (torch.float32, torch.float64)
        if not math.isclose(float(own), ours.mean, rel_tol=1e-4 if exact else 0.05, abs_tol=1e-5 if exact else 0.05):
            raise OtherLossError(
                f"the model's own loss is {float(own):.5g} on the first rows, but their mean {ours.kind} loss is "
                f"{ours.mean:.5g}: it trains with another loss; say which part of it to certify (loss=)"
            )
        return {**few, "labels": own_labels}


def router_loss(base: nn.Module) -> bool:
    """Whether a mixture's configuration has the model add an auxiliary loss of its router, by any coefficient."""
    config: Any = getattr(base, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if not (getattr(config, "output_router_logits", False) or getattr(text, "output_router_logits", False)):
        return False
    return _coefficient(text) != 0


def _coefficient(config: Any) -> float:
    """The largest coefficient of a router's loss in a configuration; 1 where it names none."""
    named = {name: value for name, value in vars(config).items() if _ROUTER_LOSS.search(name)}
    found = [abs(float(value)) for value in named.values() if isinstance(value, (int, float))]
    return max(found, default=1.0)


def _has_router_loss(base: nn.Module, output: Any) -> bool:
    """Whether an output says that its loss holds one."""
    config: Any = getattr(base, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return isinstance(getattr(output, "aux_loss", None), Tensor) and (text is None or _coefficient(text) != 0)


def _few_rows(labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Rows on which a loss shows what it is, and labels: two rows, or one for every class, whatever rows there are.

    Class weights do not show where all rows are of one class.
    """
    if labels.dim() != 1 or labels.is_floating_point() or classes < 2:
        return torch.arange(min(2, len(labels))), labels[:2]
    each = torch.arange(min(classes, _LABELS))
    return each % len(labels), each.to(labels.dtype)


def _classes(base: nn.Module) -> int:
    """How many classes a transformers classifier has; 0 where it does not say."""
    config: Any = getattr(base, "config", None)
    stated = getattr(config, "num_labels", 0)
    choices = type(base).__name__.endswith("MultipleChoice")  # as many as a row has
    return stated if isinstance(stated, int) and not choices else 0


def _logits(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    output = output_of(model, inputs)
    logits = logits_in(output)
    if not isinstance(logits, Tensor) or logits.dim() not in (2, 3):
        raise CaptureError(f"the network returned {type(output).__name__} without logits of shape (B, K) or (B, L, V)")
    return logits


def _output_embeddings(base: nn.Module, targets: set[nn.Module]) -> nn.Module | None:
    """The layer that makes a language model's logits, if its own gradient is not wanted."""
    getter = getattr(base, "get_output_embeddings", None)
    try:
        head = getter() if callable(getter) else None
    except (AttributeError, NotImplementedError):
        return None
    return head if isinstance(head, nn.Module) and not targets.intersection(head.modules()) else None
