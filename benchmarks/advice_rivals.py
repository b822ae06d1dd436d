"""Rivals on the same network, rows, objective and rule as :mod:`benchmarks.advice_training`.

PEFT's EVA and AdaLoRA, and a large rank that is trained and then compressed.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from peft import AdaLoraConfig, EvaConfig, LoraConfig, PeftModel, get_eva_state_dict, initialize_lora_eva_weights
from torch import Tensor

from benchmarks.advice_training import ADAPTER, Bench, Outcome, adapter_layers, nuclear_norm, trained
from benchmarks.advice_whole import in_model, labelled
from ranksure.adapters.config import exact_targets, lora_config
from ranksure.network.prefix import cached_prefix
from ranksure.network.side_path import applied
from ranksure.runs.resizing.compress import compress

EVA_RANK = 8
ADALORA_START, ADALORA_TARGET = 12, 8  # PEFT's defaults
LARGE_RANK = 16
KEPT = 0.98
"""Share of the large rank's gain that its compression keeps."""


def eva(bench: Bench) -> Outcome:
    """PEFT's EVA: LoRA started, and its ranks distributed, by the principal components of the inputs."""

    def config() -> LoraConfig:  # a new one for each start: EVA writes its ranks into it
        return LoraConfig(
            r=EVA_RANK,
            lora_alpha=EVA_RANK,
            target_modules=exact_targets(list(bench.shapes)),
            init_lora_weights="eva",
            eva_config=EvaConfig(use_label_mask=False),
        )

    batches = bench.task.batches_by_length(bench.rows)[0]

    found: list[dict[str, Tensor]] = []  # the same for every start, and slow

    def start(model: PeftModel) -> None:
        if not found:
            found.append(get_eva_state_dict(model, batches, show_progress_bar=False))
        initialize_lora_eva_weights(model, eva_state_dict=dict(found[0]))

    return bench.best("EVA", config, start, False)


def train_then_compress(bench: Bench, rate: float) -> Outcome:
    """Train at rank 16 at one learning rate (the sweep's better one), then ``ranksure compress`` to a budget."""
    began = time.process_time()
    ranks = {name: min(LARGE_RANK, *shape) for name, shape in bench.shapes.items()}
    batches, _ = labelled(bench.task, bench.rows)
    targets = in_model(bench.task, bench.shapes)
    found: list[Any] = []

    def shrink(model: PeftModel) -> None:
        network: Any = bench.task.model
        before = getattr(network, "peft_config", None)
        network.peft_config = model.peft_config  # of a network around the one that PEFT wrapped, too
        try:
            with cached_prefix(network, batches, targets) as prefix:
                found.append(
                    compress(
                        network, prefix.batches, level="budget", captured=KEPT, lam=bench.lam, loss="cross-entropy"
                    )
                )
        finally:
            if before is None:
                del network.peft_config

    rule, bench.rule = bench.rule, replace(bench.rule, learning_rates=(rate,))
    try:
        large = bench.best("compressed", lambda: lora_config(ranks, model=bench.task.adapted), None, False, shrink)
    finally:
        bench.rule = rule
    (small,) = found
    kept = {name.removeprefix(bench.task.prefix): rank for name, rank in small.ranks_after.items()}
    whole = {bench.task.prefix + name.removeprefix(bench.task.prefix): pair for name, pair in small.factors.items()}
    with applied(targets, whole):
        heldout = bench.report.all_logits()
    return replace(
        large,
        ranks=kept,
        parameters=bench.parameters(kept),
        objective=small.after.objective,
        loss=small.after.loss,
        **dict(zip(("heldout", "accuracy"), bench.held(heldout), strict=True)),
        seconds=time.process_time() - began,
    )


def adalora(bench: Bench) -> Outcome:
    """PEFT's AdaLoRA at its default ranks; its objective is taken with the nuclear norm of its update."""
    began = time.process_time()
    found: list[tuple[float, dict[str, int], float, Tensor, int, float]] = []
    steps = bench.rule.steps
    for index, rate in enumerate(bench.rule.learning_rates):
        config = AdaLoraConfig(
            target_modules=exact_targets(list(bench.shapes)),
            init_r=ADALORA_START,
            target_r=ADALORA_TARGET,
            lora_alpha=ADALORA_START,
            tinit=steps // 5,
            tfinal=2 * steps // 5,
            deltaT=5,
            total_step=steps,
        )
        with bench.adapted(config, bench.seed + index) as model, bench.kept(copies=True):
            found.append((*_run(bench, model, config, rate), rate))
    objective, ranks, loss, heldout, _, rate = min(found, key=lambda entry: entry[0])
    return Outcome(
        "AdaLoRA",
        ranks,
        bench.parameters(ranks),
        objective,
        loss,
        *bench.held(heldout),
        seconds=time.process_time() - began,
        evaluations=sum(entry[4] for entry in found),
        learning_rate=rate,
        by_rate={f"{entry[5]:g}": entry[0] for entry in found},
        converged=True,
    )


def _run(
    bench: Bench, model: PeftModel, config: AdaLoraConfig, rate: float
) -> tuple[float, dict[str, int], float, Tensor, int]:
    parameters = trained(model)
    layers = adapter_layers(bench.task.adapted)
    optimizer = torch.optim.Adam(parameters, lr=rate)
    allocator: Any = model.base_model

    def nuclear() -> float:
        total = 0.0
        for layer in layers.values():
            a, e, b = layer.lora_A[ADAPTER], layer.lora_E[ADAPTER], layer.lora_B[ADAPTER]
            scale = float(layer.scaling[ADAPTER] / (layer.ranknum[ADAPTER] + 1e-5))
            total += scale * float(nuclear_norm(b, a, e[:, 0]))
        return total

    def penalty() -> Tensor:
        # L2 on its parameters, as a weight decay is. The nuclear norm itself would hold the singular values at
        # their initial zero: random directions gain less than lambda each.
        total = torch.zeros(())
        for layer in layers.values():
            a, e, b = layer.lora_A[ADAPTER], layer.lora_E[ADAPTER], layer.lora_B[ADAPTER]
            total = total + 0.5 * bench.lam * sum(p.square().sum() for p in (a, e, b))
            for gram in (a @ a.T, b.T @ b):
                deviation = (gram - torch.eye(len(gram))).norm()
                total = total + config.orth_reg_weight * deviation / (2 * len(layers))
        return total

    for step in range(bench.rule.steps):
        optimizer.zero_grad()
        bench.mean_loss(backward=True)
        penalty().backward()
        optimizer.step()
        allocator.update_and_allocate(step)
    loss = bench.mean_loss(backward=False)
    with torch.no_grad():
        objective = loss + bench.lam * nuclear()
    ranks = {name: int((layer.lora_E[ADAPTER] != 0).sum()) for name, layer in layers.items()}
    return objective, ranks, loss, bench.report.all_logits(), bench.rule.steps
