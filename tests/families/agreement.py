"""Plans and certificates of one architecture against plain torch autograd, row by row, or why they are refused.

What is right for a row is what the network gives for that row alone, without padding. Captured products, base logits,
the objective and lambda_max of a plan, and the loss and gradients that a certificate examines, have to be that at every
batch size and on either padding side.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from ranksure.adapters.loaded import read_adapter
from ranksure.certificate import lambda_max
from ranksure.data.images import ImageRows
from ranksure.data.recordings import SpeechRows
from ranksure.data.texts import Rows
from ranksure.errors import RanksureError, TargetError, one_line
from ranksure.losses import CrossEntropy
from ranksure.network.checkpoints import peft_targets, quiet
from ranksure.network.targets import base_layer, base_network, block_shape, select_targets
from ranksure.relinearised import Examiner
from ranksure.runs.certificate.certify import certify
from ranksure.runs.options import DataSettings
from ranksure.runs.saved.data import read_data
from ranksure.tasks.linearise import capture_rows
from ranksure.tasks.load import load_task
from tests.families.networks import CLASSES, WORDS, Family, build
from tests.runs.networks import merged_copy, randomise

EXACT = 1e-6
"""Largest relative difference in float64, whatever the padding and the batch size."""
SINGLE = 128 * torch.finfo(torch.float32).eps
"""The same where the network itself rounds to float32 on the way (norms, rotary angles): 128 of its units, 1.5e-5."""

ROWS, RATE = 6, 16_000
SIZES = (1, 3, ROWS)
LOSS = CrossEntropy()
FLOAT = torch.float64


class Untried(Exception):
    """The network cannot be run at toy size by transformers alone."""


@dataclass
class Outcome:
    """What became of one question (``plan`` or ``certify``) about one architecture.

    Attributes:
        errors: largest relative difference by what was asked: batch size and padding side.
        refusals: the reason by what was asked.
        failures: errors that are no refusal, by what was asked.
    """

    errors: dict[str, float] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def ask(self, what: str, measure: Callable[[], float]) -> None:
        """Measure a difference, or note why not."""
        try:
            self.errors[what] = measure()
        except RanksureError as error:
            self.refusals[what] = str(error)
        except Exception as error:
            self.failures[what] = f"{type(error).__name__}: {error}"

    @property
    def worst(self) -> float:
        """Largest relative difference; NaN counts as infinite."""
        return max((error if error == error else float("inf") for error in self.errors.values()), default=0.0)


@dataclass
class Report:
    """One architecture: what plan and certify make of it.

    Attributes:
        single: whether the network rounds to float32 inside.
        default: why the default targets are refused, where they are; then those of them that count are taken, or
            convolutions.
    """

    family: Family
    single: bool
    default: str = ""
    plan: Outcome = field(default_factory=Outcome)
    certify: Outcome = field(default_factory=Outcome)

    @property
    def tolerance(self) -> float:
        return SINGLE if self.single else EXACT

    @property
    def wrong(self) -> list[str]:
        """What is neither right nor refused."""
        out = []
        for name, outcome in (("plan", self.plan), ("certify", self.certify)):
            out += [f"{name}, {what}: {why}" for what, why in outcome.failures.items()]
            far = {what: error for what, error in outcome.errors.items() if not error <= self.tolerance}
            out += [f"{name}, {what}: off by {error:.2g}" for what, error in far.items()]
        return out


def examine(family: Family, sides: tuple[str, ...] = ("right", "left")) -> Report:
    """Ask all questions about an architecture; its rows are padded on these sides, where they are.

    Raises:
        Untried: transformers alone cannot run it at toy size.
    """
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        try:
            model = build(family)
            model.register_forward_pre_hook(_widened, with_kwargs=True)
            kind: Any = _KINDS[family.kind](family, model)
            with Rounding() as seen, torch.no_grad():
                logits = [kind.logits(model, row) for row in kind.rows]
        except RanksureError as error:
            return Report(
                family, False, plan=Outcome({}, {"any": str(error)}), certify=Outcome({}, {"any": str(error)})
            )
        except Exception as error:
            raise Untried(f"{type(error).__name__}: {' '.join(str(error).split())}") from error
        if not all(bool(torch.isfinite(z).all()) for z in logits):
            raise Untried("its logits are not finite at toy size, row by row")
        report = Report(family, seen.single)
        kind.sides = sides if kind.padded else ("",)
        for question, outcome in ((Plan, report.plan), (Certificate, report.certify)):
            try:
                question(kind, model, report).ask()
            except Untried:
                raise
            except RanksureError as error:
                outcome.refusals["any"] = str(error)
            except Exception as error:
                outcome.failures["any"] = f"{type(error).__name__}: {error}"
        return report


class Rounding(TorchDispatchMode):
    """Sees whether a float64 value is rounded to a narrower one."""

    def __init__(self) -> None:
        super().__init__()
        self.single = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype in (torch.float32, torch.bfloat16, torch.float16):
            self.single |= any(isinstance(each, Tensor) and each.dtype == torch.float64 for each in args)
        return out


def _widened(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Inputs in float64 (feature extractors give float32)."""
    wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in kwargs.items()}
    return args, wide


# ---------------------------------------------------------------------------------------------------------------------
# kinds of inputs


def tokenizer(end: bool) -> Any:
    """A word is a token; with an end token where ``end`` says so."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    if end:
        made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 3)])  # pyright: ignore[reportAttributeAccessIssue]
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "<s>", "eos_token": "</s>"}
    names = {"mask_token": "[MASK]", "model_input_names": ["input_ids", "attention_mask"]}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=32, **special, **names)


def texts() -> Rows:
    """Sentences of two to nine words."""
    random = np.random.RandomState(0)
    made = [" ".join(random.choice(WORDS[5:], count)) for count in (4, 9, 2, 6, 3, 7)]
    return _samples(Rows, texts=made)


def _samples(cls: Any, **columns: Any) -> Any:
    labels = [i % CLASSES for i in range(ROWS)]
    names = [str(i) for i in range(CLASSES)]
    return cls(**columns, labels=labels, label_names=names, source="rows", sha256="", notes=[])


def alone(model: nn.Module, row: Mapping[str, Any]) -> Tensor:
    """The logits that the network gives for a row, without a cache for generation."""
    uncached = "use_cache" in inspect.signature(base_network(model).forward).parameters
    return model(**row, **({"use_cache": False} if uncached else {})).logits


class Texts:
    """Labelled sentences of different lengths, for a sequence classifier."""

    task, padded = "text", True

    def __init__(self, family: Family, model: nn.Module) -> None:
        self.processor = tokenizer(end=True)
        self.samples = texts()
        self.rows = [self.processor(text, return_tensors="pt") for text in self.samples.texts]
        self.options: dict[str, Any] = {}

    def logits(self, model: nn.Module, row: Mapping[str, Any]) -> Tensor:
        """Logits of one row alone, ``(K,)``."""
        return alone(model, row)[0]

    def run_batches(self, model: nn.Module, size: int) -> tuple[list[Any], str]:
        """The batches that certify takes of these rows, and the loss."""
        found = read_data((model, self.processor), self.samples, DataSettings(batch_size=size))
        return found.batches, found.kind

    def loss(self, model: nn.Module) -> Tensor:
        """The mean loss that certify should see, of every row alone."""
        logits = torch.stack([self.logits(model, row) for row in self.rows])
        return F.cross_entropy(logits, torch.tensor(self.samples.labels))


class Prompts(Texts):
    """For a causal language model: prompts with a word per class, and completions."""

    task = "prompt"

    def __init__(self, family: Family, model: nn.Module) -> None:
        super().__init__(family, model)
        self.processor = tokenizer(end=False)
        self.words = [WORDS.index(word) for word in ("good", "bad", "fine")]
        self.rows = [self.processor(f"{text} was", return_tensors="pt") for text in self.samples.texts]
        self.options = {"template": "{text} was", "verbalizers": ["good", "bad", "fine"], "calibrate": False}
        self.pairs = [{"prompt": text + " ", "completion": "was very good"} for text in self.samples.texts]

    def logits(self, model: nn.Module, row: Mapping[str, Any]) -> Tensor:
        return alone(model, row)[0, -1, self.words]

    def run_batches(self, model: nn.Module, size: int) -> tuple[list[Any], str]:
        import pandas as pd

        found = read_data((model, self.processor), pd.DataFrame(self.pairs), DataSettings(batch_size=size))
        self.trained = found.features
        return found.batches, found.kind

    def loss(self, model: nn.Module) -> Tensor:
        if not hasattr(self, "trained"):
            self.run_batches(model, 1)
        logits, labels = [], []
        for row in self.trained:
            ids = torch.tensor([row["input_ids"]])
            logits.append(alone(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})[0, :-1])
            labels.append(torch.tensor(row["labels"][1:]))
        return F.cross_entropy(torch.cat(logits).double(), torch.cat(labels))


class Task:
    """Images or recordings: what certify sees is made by the task."""

    padded = False

    def __init__(self, task: str, samples: Any, processor: Any, model: Any, **options: Any) -> None:
        self.task, self.samples, self.processor, self.options = task, samples, processor, options
        made: Any = load_task(task, model, samples, processor=processor, batch_size=1, **options)
        self.rows = [dict(made.collator([row])) for row in made.rows(samples)]

    logits = Texts.logits

    def run_batches(self, model: Any, size: int) -> tuple[list[Any], str]:
        base = model.get_base_model()
        made: Any = load_task(self.task, base, self.samples, processor=self.processor, batch_size=size, **self.options)
        features = made.features(self.samples)
        return [made.collator(features[low : low + size]) for low in range(0, ROWS, size)], LOSS.name

    loss = Texts.loss


def _images(family: Family, model: Any) -> Task:
    size = getattr(model.config, "image_size", 32)
    side = size[0] if isinstance(size, (list, tuple)) else size
    random = np.random.RandomState(0)
    pictures = [random.randint(0, 256, (side, side, 3)).astype(np.uint8) for _ in range(ROWS)]
    processor = transformers.ViTImageProcessorPil(size={"height": side, "width": side})
    return Task("image", _samples(ImageRows, images=pictures), processor, model)


def _recordings(family: Family, model: Any) -> Task:
    random = np.random.RandomState(0)
    lengths = (3200, 6400, 4800, 8000, 4000, 5600)
    waves = [random.randn(length).astype(np.float32) for length in lengths]
    processor: Any = {
        "audio-spectrogram-transformer": lambda: transformers.ASTFeatureExtractor(num_mel_bins=16, max_length=64),
        "wav2vec2-bert": lambda: transformers.SeamlessM4TFeatureExtractor(num_mel_bins=16, feature_size=16),
        "whisper": lambda: transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=30),
    }.get(family.model_type, lambda: transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True))()
    samples = _samples(SpeechRows, waveforms=waves, sampling_rate=RATE)
    return Task("speech", samples, processor, model, max_seconds=1.0)


_KINDS: dict[str, Any] = {"text": Texts, "causal": Prompts, "image": _images, "speech": _recordings}


# ---------------------------------------------------------------------------------------------------------------------
# plan and certify


class Question:
    """One of the two, asked at every batch size and on either padding side."""

    def __init__(self, kind: Any, model: Any, report: Report) -> None:
        self.kind, self.model, self.report = kind, model, report

    def ask_all(self, outcome: Outcome, error: Callable[[int], float]) -> None:
        """Measure a difference at every batch size and padding side."""
        for side in self.kind.sides:
            self.kind.processor.padding_side = side or "right"
            for size in SIZES:
                outcome.ask(f"batches of {size}" + (f", padded {side}" if side else ""), lambda size=size: error(size))

    def task(self, size: int) -> Any:
        """The task of plan."""
        kind = self.kind
        return load_task(kind.task, self.model, kind.samples, processor=kind.processor, batch_size=size, **kind.options)


class Plan(Question):
    """Captured products, base logits, objective and lambda_max."""

    def ask(self) -> None:
        task = self.task(1)
        names = _default_targets(task, self.report)
        self.logits, self.gradients = self._by_row(task, names)
        used = [name for name in names if bool(self.gradients[name].any())]
        if not used:
            raise Untried("its logits depend on none of the targets at toy size")
        if len(used) < len(names):
            outcome = Outcome()
            outcome.ask("default", lambda: self._error(1, names))
            self.report.default = (outcome.refusals or outcome.failures).get("default", "")
        self.ask_all(self.report.plan, lambda size: self._error(size, used))

    def _by_row(self, task: Any, names: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits ``(N, K)`` of every row alone, and gradients ``(N, K, m, n)`` of each target's own weight."""
        base = copy.deepcopy(task.adapted).eval().requires_grad_(True)
        weights = {}
        for name in names:  # tied to nothing any more: an adapter changes its own module's use only
            layer: Any = base.get_submodule(name)
            weights[name] = layer.weight = nn.Parameter(layer.weight.detach().clone())
        wanted = {"inputs": list(weights.values()), "retain_graph": True, "allow_unused": True}
        logits, gradients = [], {name: [] for name in names}
        for row in self.kind.rows:
            z = self.kind.logits(base, row).double()
            each = [torch.autograd.grad(z[k], **wanted) for k in range(CLASSES)]
            logits.append(z.detach())
            for place, name in enumerate(names):
                gradients[name].append(torch.stack([_block(base.get_submodule(name), one[place]) for one in each]))
        return torch.stack(logits), {name: torch.stack(values) for name, values in gradients.items()}

    def _error(self, size: int, names: list[str]) -> float:
        task, logits = self.task(size), self.logits
        found = capture_rows(task, {n: task.adapted.get_submodule(n) for n in names}, self.kind.samples, LOSS, FLOAT)
        generator = torch.Generator().manual_seed(0)
        factors: dict[str, Any] = {}
        expected = torch.zeros(ROWS, CLASSES, dtype=FLOAT)
        for name in names:
            u, v = (torch.randn(k, 1, generator=generator, dtype=FLOAT) for k in self.gradients[name].shape[2:])
            factors[name] = u, v
            expected += torch.einsum("nkij,ia,ja->nk", self.gradients[name], u, v)
        expected @= LOSS.contrasts(CLASSES)
        labels = torch.tensor(self.kind.samples.labels)
        residual = (logits.softmax(1) - F.one_hot(labels, CLASSES)) / ROWS
        slopes = [torch.einsum("nk,nkij->ij", residual, self.gradients[name]) for name in names]
        largest = max(float(torch.linalg.matrix_norm(slope, 2)) for slope in slopes)
        return _largest(
            difference(found.base_logits, logits),
            difference(found.operator.apply_factors(factors).double(), expected),
            lambda_max(found.problem()) / largest - 1,
            float(found.losses({}).mean()) / float(F.cross_entropy(logits, labels)) - 1,
        )


class Certificate(Question):
    """The loss that a certificate has, and every gradient that it examines."""

    def ask(self) -> None:
        try:
            names = _default_targets(self.task(1), self.report)
        except RanksureError:  # no prompt, say: a fine-tuned language model needs none
            names = list(select_targets(self.model, peft_targets(self.model)))
        self.kind.processor.padding_side = "right"
        config = LoraConfig(r=2, lora_alpha=4, target_modules=names)
        try:
            adapted: Any = get_peft_model(copy.deepcopy(self.model), config, autocast_adapter_dtype=False)
        except ValueError as error:
            self.report.certify.refusals["any"] = f"PEFT: {one_line(error)}"
            return
        randomise(adapted, 0.2)
        adapted.eval()
        self.ask_all(self.report.certify, lambda size: self._error(adapted, size))

    def _error(self, adapted: Any, size: int) -> float:
        batches, loss_kind = self.kind.run_batches(adapted, size)
        with examined() as gradients:
            found = certify(adapted, batches, lam=1e-3, loss=loss_kind, probe=False)
        if found.verdict == "not-checked":
            raise RanksureError("; ".join(found.reasons))
        loss, expected = self._reference(adapted)
        assert gradients.keys() == expected.keys()
        scale = max(float(g.abs().max()) for g in expected.values())
        far = (difference(gradients[name], g, scale / 100) for name, g in expected.items())
        return _largest(found.loss / loss - 1, *far)

    def _reference(self, adapted: Any) -> tuple[float, dict[str, Tensor]]:
        """PEFT's own loss, and the gradient in each block: none where the network goes round PEFT's wrapper."""
        if not hasattr(self, "kept"):
            loss = self.kind.loss(adapted)
            columns = {n: layer.lora_B.default.weight for n, layer in read_adapter(adapted).modules.items()}
            slopes = torch.autograd.grad(loss, list(columns.values()), allow_unused=True)
            dead = [n for n, slope in zip(columns, slopes, strict=True) if slope is None or not bool(slope.any())]
            base, weights = merged_copy(adapted)
            base.requires_grad_(True)
            for name in dead:
                weights[name].data = self.model.get_submodule(name).weight.detach().clone()
            value = self.kind.loss(base)
            assert abs(float(value / loss) - 1) < self.report.tolerance, "PEFT computes another loss than W + u v^T"
            found = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
            blocks = {n: _block(base.get_submodule(n), g) for n, g in zip(weights, found, strict=True)}
            blocks |= {name: torch.zeros_like(blocks[name]) for name in dead}
            self.kept = float(loss.detach()), blocks
        return self.kept


def _default_targets(task: Any, report: Report) -> list[str]:
    """What plan adapts where the user names nothing; convolutions where that is no module."""
    try:
        return list(task.targets(None))
    except TargetError as error:
        report.default = str(error)
        every = task.adapted.named_modules()
        convolutions = [n for n, m in every if isinstance(m, nn.Conv2d) and m.groups == 1]
        if not convolutions:
            raise
        return list(task.targets(convolutions))


def _block(module: nn.Module, gradient: Tensor | None) -> Tensor:
    """A weight's gradient as the block's, ``(m, n)``."""
    m, n = block_shape(module)
    if gradient is None:
        return torch.zeros(m, n, dtype=FLOAT)
    turned = isinstance(base_layer(module), (Conv1D, nn.Embedding))
    return gradient.T if turned else gradient.reshape(m, n)


def difference(found: Tensor, expected: Tensor, least: float = 1e-12) -> float:
    """Largest difference over the size of what is expected, ``least`` at least."""
    return float((found.double() - expected).abs().max()) / max(float(expected.abs().max()), least)


def _largest(*errors: float) -> float:
    """The largest in size; NaN where one is."""
    return float(torch.tensor(errors, dtype=FLOAT).abs().max())


@contextmanager
def examined() -> Iterator[dict[str, Tensor]]:
    """The gradients that certificates examine meanwhile."""
    seen: dict[str, Tensor] = {}
    own = Examiner.__call__

    def call(self: Examiner, name: str, gradient: Tensor) -> Any:
        seen[name] = gradient.double().clone()
        return own(self, name, gradient)

    Examiner.__call__ = call
    try:
        yield seen
    finally:
        Examiner.__call__ = own
