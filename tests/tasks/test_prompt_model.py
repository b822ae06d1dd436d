"""Language models as classifiers: logits at the right place, on real models, and their gradients by capture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from ranksure.capture import capture
from ranksure.data.texts import Rows
from ranksure.losses import get_loss
from ranksure.network.logits import predict
from ranksure.network.targets import select_targets
from ranksure.operators.dense import DenseOperator
from ranksure.tasks.prompt import PromptTask, load_prompt_task
from tests.tasks.prompt_parts import (
    CHEMISTRY,
    MOLECULES,
    SENTENCES,
    agree,
    needs_albert,
    needs_smollm,
    rows_of,
    tiny,
    tiny_gpt2,
    tiny_llama,
    tiny_roberta,
)

CONTRASTS = get_loss("cross-entropy").contrasts(2)


def whole_model(task: PromptTask, rows: Rows) -> Tensor:
    """Logits of the words from transformers alone: one prompt at a time, all logits of the vocabulary."""
    tokenizer, lm = task.processor, task.adapted
    template = task.encoder.template.text
    out = []
    for index, text in enumerate(rows.texts):
        prompt = template.replace("{text}", text).replace("{mask}", str(tokenizer.mask_token))
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        assert ids.shape[1] <= task.max_length, index
        with torch.no_grad():
            logits = lm(input_ids=ids).logits[0]
        assert logits.shape == (ids.shape[1], lm.config.vocab_size)
        at = -1 if task.architecture == "causal" else ids[0].tolist().index(tokenizer.mask_token_id)
        out.append(logits[at, task.token_ids])
    return torch.stack(out)


def left_padded(task: PromptTask, rows: Rows) -> dict[str, Tensor]:
    (batch,) = task.batches(rows)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    shift = ids.shape[1] - mask.sum(1)
    moved = {
        key: torch.stack([row.roll(int(s)) for row, s in zip(value, shift, strict=True)])
        for key, value in batch.items()
    }
    assert not bool(moved["attention_mask"][:, 0].all())
    return moved


def check_logits(task: PromptTask, rows: Rows) -> None:
    """Padded batches, on either side, give what the whole model gives for each prompt alone."""
    expected = whole_model(task, rows) + torch.tensor(task.offsets, dtype=torch.float32)
    assert float(expected.std(0).min()) > 1e-4  # the rows differ, so an exchanged row would show
    assert agree(predict(task.model, task.batches(rows)), expected)
    few = rows.subset(range(min(task.batch_size, len(rows))))
    with torch.no_grad():
        assert agree(task.model(**left_padded(task, few)), expected[: len(few)])
    batches, back = task.batches_by_length(rows)
    assert agree(predict(task.model, batches)[back], expected)


# ---------------------------------------------------------------------------------------------------------------------
# logits


@needs_smollm
def test_smollm2_logits(smollm: PromptTask):
    assert smollm.architecture == "causal" and smollm.peft_task_type == "CAUSAL_LM"
    assert smollm.processor.convert_ids_to_tokens(smollm.token_ids) == ["Ġnegative", "Ġpositive"]
    check_logits(smollm, rows_of(SENTENCES))


@needs_albert
def test_albert_logits(albert_path: str):
    task = load_prompt_task(albert_path, rows_of(MOLECULES), batch_size=8, **CHEMISTRY)
    assert task.architecture == "masked" and task.peft_task_type is None
    assert task.default_targets() == ["query", "value"]
    check_logits(task, rows_of(MOLECULES))


def gemma2() -> Any:
    """Soft caps on the logits."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=600, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, head_dim=8,
        num_key_value_heads=1, max_position_embeddings=64, final_logit_softcapping=2.0, initializer_range=0.5,
        pad_token_id=1,
    )  # fmt: skip
    return Gemma2ForCausalLM(config).eval()


def cohere() -> Any:
    """A factor on the logits."""
    torch.manual_seed(0)
    config = CohereConfig(
        vocab_size=600, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, logit_scale=0.0625, initializer_range=0.5, pad_token_id=1,
    )  # fmt: skip
    return CohereForCausalLM(config).eval()


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, gemma2, cohere], ids=lambda build: build.__name__)
def test_causal_logits(build: Any):
    check_logits(tiny(build(), masked=False), rows_of(SENTENCES))


def test_the_soft_cap_is_felt():
    task = tiny(gemma2(), masked=False, calibrate=False)
    capped = predict(task.model, task.batches(rows_of(SENTENCES)))
    task.adapted.config.final_logit_softcapping = None
    plain = predict(task.model, task.batches(rows_of(SENTENCES)))
    assert float(plain.abs().max()) > 0.5 and agree(2 * torch.tanh(plain / 2), capped)
    assert not agree(plain, capped, 1e-2)


def test_roberta_logits():
    task = tiny(tiny_roberta(), masked=True)
    check_logits(task, rows_of(SENTENCES))
    assert task.default_targets() == ["query", "value"]


def test_the_output_layer_sees_one_position_per_row():
    for model, masked in ((tiny_llama(), False), (tiny_roberta(), True)):
        task = tiny(model, masked)
        layer = model.get_output_embeddings()
        seen: list[Tensor] = []
        handle = layer.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
        predict(task.model, task.batches(rows_of(SENTENCES)))
        handle.remove()
        assert [tuple(logits.shape) for logits in seen] == [(6, 1, 600)]
        assert not layer._forward_pre_hooks  # and is as it was afterwards


def test_a_model_that_does_not_show_its_output_layer():
    hidden, shown = tiny_roberta(), tiny_roberta()
    hidden.get_output_embeddings = lambda: None  # type: ignore[method-assign]
    rows = rows_of(SENTENCES)
    first, second = tiny(hidden, True), tiny(shown, True)
    assert torch.equal(
        predict(first.model, first.batches(rows)).argmax(1), predict(second.model, second.batches(rows)).argmax(1)
    )
    check_logits(first, rows)


def test_rows_of_a_model_that_looks_at_padding_share_batches_by_length():
    model = tiny_llama()
    forward = model.model.forward

    def careless(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.last_hidden_state = out.last_hidden_state + 0.1 * kwargs["input_ids"].shape[1]
        return out

    model.model.forward = careless
    task, rows = tiny(model, masked=False), rows_of(SENTENCES)
    expected = whole_model(task, rows) + torch.tensor(task.offsets, dtype=torch.float32)
    assert agree(predict(task.model, task.batches(rows)), expected)
    batches, back = task.batches_by_length(rows)
    assert agree(predict(task.model, batches)[back], expected)
    assert sum("rows of one length share a batch" in note for note in task.notes) == 1


def test_half_precision_logits_are_float32():
    task = tiny(tiny_llama().to(torch.bfloat16), masked=False)
    with torch.no_grad():
        z = task.model(**task.batches(rows_of(SENTENCES))[0])
    assert z.dtype == torch.float32 and task.model.offset.dtype == torch.float64


# ---------------------------------------------------------------------------------------------------------------------
# capture


def dense_jacobians(task: PromptTask, rows: Rows, targets: dict[str, torch.nn.Module]) -> dict[str, Tensor]:
    """``(N, 1, m, n)`` by autograd, a row at a time, unpadded."""
    out: dict[str, list[Tensor]] = {name: [] for name in targets}
    weights = [module.weight.requires_grad_(True) for module in targets.values()]
    for index in range(len(rows)):
        (batch,) = task.batches(rows.subset([index]))
        z = task.model(**batch)[0].double() @ CONTRASTS[:, 0]
        for name, grad in zip(targets, torch.autograd.grad(z, weights), strict=True):
            out[name].append(grad.detach().double()[None])
    turned = {name for name, module in targets.items() if isinstance(module, Conv1D)}  # its weight is (n, m)
    return {name: torch.stack(grads).mT if name in turned else torch.stack(grads) for name, grads in out.items()}


def check_capture(
    task: PromptTask, rows: Rows, tolerance: float, layers: Any = None, dtype: Any = torch.float64
) -> None:
    named = select_targets(task.adapted, task.default_targets(), layers, [])
    targets = {name: task.adapted.get_submodule(name) for name in named}
    captured = capture(task.model, task.batches(rows), targets, CONTRASTS, dtype=dtype)
    dense = DenseOperator.from_operator(captured.operator).jacobians()
    expected = dense_jacobians(task, rows, targets)
    assert set(dense) == set(expected) and len(expected) >= 2
    for name, jacobian in expected.items():
        scale = float(jacobian.abs().max())
        assert scale > 1e-8
        assert float((dense[name].double() - jacobian).abs().max()) <= tolerance * scale, name
    assert torch.allclose(captured.base_logits, predict(task.model, task.batches(rows)).double(), atol=1e-4)


@pytest.mark.parametrize(
    ("build", "masked", "tolerance"),
    [(tiny_gpt2, False, 1e-10), (tiny_roberta, True, 1e-10), (tiny_llama, False, 1e-5)],  # Llama's norm is in float32
)
def test_capture_against_autograd(build: Any, masked: bool, tolerance: float):
    check_capture(tiny(build().double(), masked), rows_of(SENTENCES), tolerance)


@needs_albert
def test_capture_of_shared_layers_against_autograd(albert_path: str):
    """ALBERT uses its one layer twelve times: gradients of twelve uses add up."""
    lm = AutoModelForMaskedLM.from_pretrained(albert_path).double()
    tokenizer = AutoTokenizer.from_pretrained(albert_path)
    task = load_prompt_task(lm, rows_of(MOLECULES[:4]), tokenizer=tokenizer, **CHEMISTRY)
    check_capture(task, rows_of(MOLECULES[:4]), 1e-10)


@needs_smollm
def test_capture_of_smollm2_against_autograd(smollm: PromptTask):
    check_capture(smollm, rows_of(SENTENCES[1:3]), 1e-4, layers=[28, 29], dtype=torch.float32)
