"""Prompt-based classification: a language model says one word per class, and nothing new is trained but the adapter.

The setting of the paper's language experiments: the text stands in a template, each class has a verbaliser, a word of
one token, and the logits of the classes are the language model's own logits of these tokens, at the mask of a masked
model or after the last token of a causal one.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ranksure.data.texts import Rows
from ranksure.errors import ModelError, SettingError
from ranksure.network.checkpoints import (
    check_checkpoint,
    device_named,
    load_tokenizer,
    settle_padding,
    token_limit,
    with_embeddings,
)
from ranksure.network.logits import predict
from ranksure.solvers.lbfgs import minimize
from ranksure.tasks.classifiers import name_in_memory
from ranksure.tasks.collate import Collator
from ranksure.tasks.options import Loading
from ranksure.tasks.prompt_encoder import (
    Architecture,
    Encoded,
    PromptEncoder,
    Verbalizers,
    parse_template,
    parse_verbalizers,
)
from ranksure.tasks.prompt_model import Verbalized, architecture_of, check_same_as_full, load_language_model
from ranksure.tasks.task import Task

CALIBRATION_ROWS = 1024
"""Rows that the classes' offsets are fitted on at most: a stratified sample of larger data."""


@dataclass(kw_only=True)
class PromptTask(Task[Rows]):
    """Texts in a template, read by a language model's verbalisers.

    Attributes:
        architecture: ``masked`` or ``causal``.
        encoder: template and tokenizer.
        words: the verbaliser of each class.
        token_ids: its token.
        max_length: tokens per prompt.
    """

    kind: ClassVar[str] = "prompt"

    architecture: Architecture
    encoder: PromptEncoder
    words: list[str]
    token_ids: list[int]
    max_length: int

    @property
    def offsets(self) -> list[float]:
        """What is added to the logit of each class."""
        assert isinstance(self.model, Verbalized)
        return self.model.offset.tolist()

    @property
    def collator(self) -> Collator:
        return Collator.of(self.tokenizer) if self.padding is None else self.padding.collate

    def prepare(self, samples: Rows) -> Encoded:
        """Prompts and their tokens."""
        encoded = self.encoder.encode(samples)
        with_embeddings(self.adapted, encoded.features, self.tokenizer)
        return encoded

    def rows(self, samples: Rows) -> list[dict[str, Any]]:
        return self.prepared(samples).features

    def lengths(self, samples: Rows) -> list[int]:
        """In tokens."""
        return [len(row["input_ids"]) for row in self.rows(samples)]

    def remarks(self, samples: Rows) -> list[str]:
        encoded: Encoded = self.prepared(samples)
        out: list[str] = []
        if cut := len(encoded.cut):
            out.append(
                f"{cut} of the {len(samples)} training texts were cut so that their prompts have at most "
                f"{self.max_length} tokens; raise `max_length` to keep more."
            )
        if masks := len(encoded.masks):
            out.append(
                f"{masks} of the {len(samples)} training texts spell the mask token {self.encoder.mask}; a space was "
                "put into it there."
            )
        return out

    def default_targets(self) -> str | Sequence[str]:
        """PEFT's for the model, else its query and value projections, else all linear layers."""
        if (known := super().default_targets()) != "all-linear":
            return known
        return self.queries_and_values(("query", "value"), ("q_proj", "v_proj"), ("q_lin", "v_lin"), ("q", "v"))

    def calibrate(self, rows: Rows) -> str:
        """Set the classes' offsets so that these rows' mean predicted shares are the classes' shares.

        Of more than :data:`CALIBRATION_ROWS` a stratified sample is looked at.

        Returns:
            What was done, in sentences, with the accuracy on these rows before and after.

        Raises:
            ModelError: no offsets give these shares.
        """
        assert isinstance(self.model, Verbalized) and self.label_names is not None
        few = rows if len(rows) <= CALIBRATION_ROWS else rows.shuffled(0).subset(range(CALIBRATION_ROWS))
        batches, back = self.batches_by_length(few)
        with torch.no_grad():
            self.model.offset.zero_()
            logits = predict(self.model, batches).double()[back]
            labels = self.labels(few)
            offset = class_offsets(logits, labels)
            self.model.offset.copy_(offset)
        before, after = (float((z.argmax(1) == labels).double().mean()) for z in (logits, logits + offset))
        shares = logits.softmax(1).mean(0).tolist()
        triples = list(zip(self.label_names, shares, offset.tolist(), strict=True))[:5]
        told = ", ".join(f"{name} {100 * share:.0f}%" for name, share, _ in triples)
        shifts = ", ".join(f"{name} {shift:+.2f}" for name, _, shift in triples)
        return (
            f"Zero-shot, the verbalisers get {100 * before:.1f}% of {len(few)} training rows right (mean predicted "
            f"shares: {told}{', ...' * (len(shares) > 5)}). Their logits were shifted ({shifts}"
            f"{', ...' * (len(shares) > 5)}) so that these shares are those of the labels, which gives "
            f"{100 * after:.1f}%."
        )

    def usage(self) -> str:
        """Text and code for an adapter's README; the code runs after the one that loads ``model``."""
        template = self.encoder.template
        own = ["text", *["pair"] * template.has_pair]
        fields = [f"{name}={name}" for name in own] + ["mask=tokenizer.mask_token"] * bool(self.encoder.mask)
        extra = "token_type_ids" in self.tokenizer.model_input_names and not self.encoder.accepts("token_type_ids")
        types = ", return_token_type_ids=False" * extra
        end = self.encoder.dropped_at_end
        cut = f"    inputs = {{key: value[:, :-{end}] for key, value in inputs.items()}}\n" * bool(end)
        at = "inputs['input_ids'][0].tolist().index(tokenizer.mask_token_id)" if self.encoder.mask else "-1"
        revision = f", revision={self.revision!r}" if self.revision else ""
        side = "start" if self.encoder.truncation_side == "left" else "end"
        return (
            f"A prompt has at most {self.max_length} tokens: the {side} of a longer text was cut, never the template. "
            f"The class is told by the logit of one token, {'at the mask' if self.encoder.mask else 'after the prompt'}"
            ", plus a fixed offset:\n\n"
            "```python\n"
            "import torch\n"
            "from transformers import AutoTokenizer\n\n"
            f"tokenizer = AutoTokenizer.from_pretrained({self.name!r}{revision})\n"
            f"TEMPLATE = {template.text!r}\n"
            f"LABELS = {self.label_names!r}\n"
            f"TOKENS = {self.token_ids!r}  # {', '.join(map(repr, self.words))}\n"
            f"OFFSETS = torch.tensor({self.offsets!r})\n\n"
            f"def classify({', '.join(own)}):\n"
            '    """Logits of the classes."""\n'
            f"    prompt = TEMPLATE.format({', '.join(fields)})\n"
            f'    inputs = tokenizer(prompt, return_tensors="pt"{types}).to(model.device)\n'
            f"{cut}"
            "    with torch.no_grad():\n"
            "        logits = model(**inputs).logits\n"
            f"    return logits[0, {at}, TOKENS].float().cpu() + OFFSETS\n"
            "```"
        )

    def record(self) -> dict[str, Any]:
        assert self.label_names is not None
        return {
            "kind": self.kind,
            "architecture": self.architecture,
            "template": self.encoder.template.text,
            "verbalizers": dict(zip(self.label_names, self.words, strict=True)),
            "verbalizer_ids": list(self.token_ids),
            "offsets": self.offsets,
            "max_length": self.max_length,
            "truncation_side": self.encoder.truncation_side,
        }


def load_prompt_task(
    model: str | os.PathLike[str] | PreTrainedModel,
    rows: Rows,
    *,
    tokenizer: Any = None,
    template: str | None = None,
    verbalizers: Verbalizers | None = None,
    calibrate: bool | Sequence[float] = True,
    max_length: int | None = None,
    **loading: Any,
) -> PromptTask:
    """Load a masked or causal language model for labelled texts.

    Args:
        model: folder, Hub id, or a language model in memory.
        rows: the training rows: their classes need a verbaliser each, and calibration looks at them.
        tokenizer: needed with a model in memory, else loaded beside the model.
        template: text around ``{text}`` (``{pair}``, ``{mask}``); as
            :func:`~ranksure.tasks.prompt_encoder.parse_template` takes it.
        verbalizers: a word per class, as
            :func:`~ranksure.tasks.prompt_encoder.parse_verbalizers` takes them.
        calibrate: fit an offset per class (one forward pass over ``rows``), leave them zero, or take these.
        max_length: tokens per prompt; by default the model's limit, at most 256.
        **loading: see :class:`~ranksure.tasks.options.Loading`.

    Raises:
        ModelError: the model cannot be found or loaded, is no language model, or has no language-model head.
        SettingError: template or verbalisers do not fit the model or the data, or the data has no classes.
        DataError: a text whose prompt has not exactly one mask.
    """
    options = Loading(**loading)
    if rows.label_names is None:
        raise SettingError(f"prompts need class labels, but {rows.source} has float targets: use `task` text")
    task = _task(model, rows, rows.label_names, tokenizer, template, verbalizers, max_length, options)
    check_same_as_full(task.model, task.rows(rows)[:2], task.collator)
    pairs = list(zip(rows.label_names, task.words, strict=True))
    told = ", ".join(f"{label} as {word!r}" for label, word in pairs[:10]) + ", ..." * (len(pairs) > 10)
    task.notes.append(f"Prompts are {task.encoder.template.text!r}; the classes are read {told}.")
    if not isinstance(calibrate, (bool, str)):
        _set_offsets(task, calibrate)
    elif calibrate:
        task.notes.append(task.calibrate(rows))
    return task


def _task(
    model: Any,
    rows: Rows,
    label_names: list[str],
    tokenizer: Any,
    template: str | None,
    verbalizers: Verbalizers | None,
    max_length: int | None,
    options: Loading,
) -> PromptTask:
    """Without offsets, and not tried yet."""
    loaded, tokenizer, name, architecture, notes = _language_model(model, tokenizer, options)
    loaded.to(device_named(options.device))  # pyright: ignore[reportArgumentType]
    settle_padding(loaded, tokenizer, name)
    most = token_limit(loaded, tokenizer, max_length)
    inputs = set(inspect.signature(loaded.forward).parameters)
    encoder = PromptEncoder(
        tokenizer, parse_template(template, architecture, rows.pairs is not None), most, inputs.__contains__
    )
    words = parse_verbalizers(verbalizers, label_names, architecture)
    ids = encoder.verbalizer_ids(words, label_names, rows)
    masked = architecture == "masked"
    return PromptTask(
        model=Verbalized(loaded, ids, int(tokenizer.mask_token_id) if masked else None),
        adapted=loaded,
        prefix="lm.",
        processor=tokenizer,
        peft_task_type=None if masked else "CAUSAL_LM",
        n_outputs=len(words),
        name=name,
        revision=options.revision,
        batch_size=options.rows_per_batch,
        label_names=label_names,
        notes=notes,
        architecture=architecture,
        encoder=encoder,
        words=words,
        token_ids=ids,
        max_length=most,
    )


def _language_model(
    model: Any, tokenizer: Any, options: Loading
) -> tuple[PreTrainedModel, Any, str, Architecture, list[str]]:
    """A language model, its tokenizer, name and architecture, and sentences for the user."""
    if isinstance(model, PreTrainedModel):
        name = name_in_memory(model, tokenizer, "tokenizer", "tokenizer")
        return model, tokenizer, name, architecture_of(model.config, tokenizer, name, type(model).__name__), []
    name = os.fspath(model)
    check_checkpoint(name, options.dtype)
    tokenizer = tokenizer or load_tokenizer(name, options.revision, options.trust_remote_code)
    loaded, architecture, notes = load_language_model(name, tokenizer, options)
    return loaded, tokenizer, name, architecture, notes


def _set_offsets(task: PromptTask, offsets: Sequence[float]) -> None:
    if len(offsets) != task.n_outputs or not all(math.isfinite(value) for value in offsets):
        raise SettingError(f"{task.n_outputs} finite offsets are needed, one per class, not {list(offsets)[:10]}")
    assert isinstance(task.model, Verbalized)
    task.model.offset.copy_(torch.tensor(list(offsets), dtype=torch.float64))


def class_offsets(logits: Tensor, labels: Tensor) -> Tensor:
    """Offsets whose shifted logits have mean predicted shares equal to the classes' shares.

    They minimise the mean cross-entropy over one bias per class, a convex function whose gradient is the difference
    of the shares. A class without rows counts as half a row, or its offset would be minus infinity.

    Args:
        logits: ``(N, K)`` float64.
        labels: ``(N,)`` class ids.

    Returns:
        ``(K,)`` float64, of mean zero.

    Raises:
        ModelError: the minimum was not found, as with logits that are not finite.
    """
    counts = torch.bincount(labels, minlength=logits.shape[1]).double().clamp(min=0.5)
    shares = counts / counts.sum()

    def function(b: Tensor) -> tuple[Tensor, Tensor]:
        z = logits + b[:, None]
        value = z.logsumexp(2).mean(1) - b @ shares
        return value, z.softmax(2).mean(1) - shares

    start = shares.log() - logits.log_softmax(1).mean(0)  # exact where all rows have the same logits
    found = minimize(function, start[None], tolerance=1e-10, max_evaluations=1000)
    if not bool(found.gradient_norm[0] <= 1e-6):
        raise ModelError(
            "the verbalisers' logits cannot be calibrated (the predicted shares stay "
            f"{float(found.gradient_norm[0]):.1g} from the labels'): leave calibration out"
        )
    return found.x[0] - found.x[0].mean()
