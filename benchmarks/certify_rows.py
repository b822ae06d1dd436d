"""What a certificate of a run costs: against one epoch of full-gradient backpropagation for the same modules.

Both sides run the same batches in the same order. The other side is the plain base network with the target weights
requiring gradients, ``loss.backward()`` for each batch. Peak memory is measured in a fresh process per side, as the
rise of the resident set's high-water mark: ``python -m benchmarks.certify_rows SIDE VOCABULARY ROWS THREADS``.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.growth_rows import _resident
from benchmarks.measure import Row, Size, duration, paired, ratios
from benchmarks.setting import setting
from ranksure.adapters.loaded import read_adapter
from ranksure.network.targets import base_layer
from ranksure.records.certificate import RunCertificate
from ranksure.runs.certificate.certify import certify

TARGET = 1.3
RANK = 8
ENCODER = r".*encoder\.layer\.\d+\..*(query|key|value|dense)"
DECODER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROWS_PER_BATCH, TOKENS = 8, 128


@dataclass(frozen=True)
class Run:
    """An adapted model, the same base network without it, and the batches."""

    model: Any
    plain: Any
    targets: list[nn.Module]
    batches: list[Mapping[str, Tensor]]

    def certificate(self, **settings: Any) -> RunCertificate:
        return certify(self.model, self.batches, weight_decay=1e-3, **settings)

    def epoch(self) -> None:
        """One pass with gradients for the target weights, and for nothing else."""
        for module in self.targets:
            module.weight.grad = None
        for batch in self.batches:
            self.plain(**batch).loss.backward()


def certify_rows(size: Size) -> list[Row]:
    texts = 4 * size.samples
    run = encoder(texts)
    rows = [_row("certify vs one epoch of full-gradient backpropagation", run, size, f"MiniLM, N={texts}, batch 16")]
    # A finished run's objective is also compared with the network without its adapter: here that takes a whole pass.
    name = "certify with a whole pass without the adapter, vs one epoch"
    rows.append(_row(name, run, size, f"MiniLM, N={texts}", target=False, tolerance=0.999, probe=False))
    vocabulary, count = (50_000, 32) if size.samples >= 64 else (5_000, 8)
    run = decoder(vocabulary, count)
    what = f"vocabulary {vocabulary:,}, {count} rows of {TOKENS} tokens"
    rows.append(_row("certify vs one epoch, causal language model", run, size, what))
    del run
    peaks = {side: _memory_in_a_process(side, vocabulary, count) for side in ("certify", "epoch")}
    logits = 4 * vocabulary * TOKENS * ROWS_PER_BATCH
    note = (
        f"{peaks['certify'] / 2**20:.0f} of {peaks['epoch'] / 2**20:.0f} MiB above the model; one batch's logits take "
        f"{logits / 2**20:.0f} MiB"
    )
    share = peaks["certify"] / peaks["epoch"]
    rows.append(Row("certify vs one epoch, causal: peak memory", "of", [share], None, 0, note=note, details=peaks))
    return rows


def _row(name: str, run: Run, size: Size, what: str, target: bool = True, **settings: Any) -> Row:
    found: list[RunCertificate] = []
    processor: dict[str, list[float]] = {"ours": [], "epoch": []}  # of all threads: what other work does not disturb

    def timed(side: str, function: Callable[[], object]) -> None:
        began = time.process_time()
        function()
        processor[side].append(time.process_time() - began)

    ours, plain = paired(
        lambda: timed("ours", lambda: found.append(run.certificate(**settings))),
        lambda: timed("epoch", run.epoch),
        size.runs,
    )
    in_processor_time = statistics.median(ratios(processor["ours"][1:], processor["epoch"][1:]))
    spectral = statistics.median(sum(state.seconds for state in c.modules.values()) for c in found[1:])
    note = (
        f"{what}, {len(run.targets)} modules, r={RANK}; ours {duration(statistics.median(ours))}, of which spectral "
        f"norms {duration(spectral)}; passes 1 + {found[-1].forward_passes}; in processor time {in_processor_time:.3g}x"
    )
    details = {"ours_seconds": ours, "epoch_seconds": plain, "processor": processor, "verdict": found[-1].verdict}
    return Row(name, "x", ratios(ours, plain), "<=" if target else None, TARGET, note=note, details=details)


def encoder(n: int) -> Run:
    """All-layer query, key, value, output and MLP of MiniLM, Rotten Tomatoes."""
    chosen = setting(n, fitted=False)
    batches, low = [], 0
    for batch in chosen.batches:
        rows = len(batch["input_ids"])
        batches.append({**batch, "labels": chosen.labels[low : low + rows]})
        low += rows
    return _run(copy.deepcopy(chosen.model), ENCODER, batches)


def decoder(vocabulary: int, rows: int) -> Run:
    """Every linear layer of a random Llama-like model; a loss on every token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    ids = torch.randint(vocabulary, (rows, TOKENS))
    parts = [ids[low : low + ROWS_PER_BATCH] for low in range(0, rows, ROWS_PER_BATCH)]
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part} for part in parts]
    return _run(LlamaForCausalLM(config), DECODER, batches)


def _run(base: nn.Module, targets: str | list[str], batches: list[Mapping[str, Tensor]]) -> Run:
    plain = copy.deepcopy(base).eval().requires_grad_(False)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets)
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # as after some training
                parameter.normal_(std=0.01)
    names = list(read_adapter(model).blocks)
    modules = [base_layer(plain.get_submodule(name)).requires_grad_(True) for name in names]
    for module in modules:
        if isinstance(bias := getattr(module, "bias", None), Tensor):
            bias.requires_grad_(False)
    return Run(model, plain, modules, batches)


def _memory_in_a_process(side: str, vocabulary: int, rows: int) -> float:
    command = [sys.executable, "-m", "benchmarks.certify_rows", side, str(vocabulary), str(rows)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    threads = str(torch.get_num_threads())
    done = subprocess.run([*command, threads], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"the memory measurement of {side} failed: {done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def _measure_memory(side: str, vocabulary: int, rows: int) -> float:
    """Bytes above what is resident once the libraries, the model and its first kernels are."""
    measured = {"certify": lambda run: run.certificate(), "epoch": lambda run: run.epoch()}[side]
    measured(decoder(64, ROWS_PER_BATCH))
    run = decoder(vocabulary, rows)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    measured(run)
    return float(_resident("VmHWM") - before)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[4]))
    print(json.dumps(_measure_memory(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
