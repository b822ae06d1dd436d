"""``python -m benchmarks.grow_rows [--task speech] [--seeds 3] [--lr 0.01]``: growing against the higher rank at once.

A real network: all-MiniLM-L6-v2 under mean pooling on Rotten Tomatoes, DINOv2-S on ten classes of Fashion-MNIST
(``--task image``) or Whisper's encoder on spoken language (``--task speech``); 64 rows (``--samples``), query and value
of the last layer, lambda 10% of lambda_max (``--share``), PEFT's LoRA at scale 1 with an L2 decay on its matrices (full
batch; L-BFGS, or Adam with --lr). Rank 1 is trained until its certificate says rank-bound (or something else that is
final), grown, and trained on; the grown ranks are trained from the start with the same seed and data, and rank 1 is
trained on as a control. Counted are evaluations, a forward and backward pass each, to 0.1% above the lowest objective
that any run found (``--within``). The frozen layers before the last are run once.

``--compress``: in place of that, rank 8 is trained from the start, and compressed at every level.

``--linear``: the same for linear classifiers of random data (8 inputs, 6 classes, 10 rows, lambda 5% of lambda_max,
Adam), in seconds; the first eight seeds whose run at rank 1 ends rank-bound.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.setting import SHARE
from ranksure.adapters.loaded import read_adapter
from ranksure.certificate import lambda_max
from ranksure.losses import get_loss
from ranksure.network.logits import frozen, logits_of
from ranksure.operators.dense import DenseOperator
from ranksure.problem import Problem
from ranksure.runs.certificate.certify import TOLERANCE, certify
from ranksure.runs.resizing.compress import compress
from ranksure.runs.resizing.grow import grow
from ranksure.solvers.burer_monteiro import solve

CERTIFY_EVERY = 25
LEVELS: list[dict[str, Any]] = [
    {},
    {"level": "budget", "captured": 0.99},
    {"level": "budget", "captured": 0.9},
    {"level": "data-exact"},
]


class Tail(nn.Module):
    """The last layer and what reads it, on stored inputs of the last layer; a batch is a number of one.

    Args:
        layer: the last layer.
        readout: from its output and the batch's real tokens to logits.
        calls: arguments of the layer by batch.
        masks: real tokens by batch; None where all are.
    """

    def __init__(
        self, layer: nn.Module, readout: nn.Module, calls: list[tuple[Any, Any]], masks: list[Tensor | None]
    ) -> None:
        super().__init__()
        self.layer, self.readout = layer, readout
        self.calls, self.masks = calls, masks

    def forward(self, batch: Tensor) -> Tensor:
        index = int(batch[0])
        arguments, named = self.calls[index]
        out = self.layer(*arguments, **named)
        return self.readout(out[0] if isinstance(out, tuple) else out, self.masks[index])


class MeanReadout(nn.Module):
    """Mean of the real tokens, and the head."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        mask = mask.unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * mask).sum(1) / mask.sum(1))


class ImageReadout(nn.Module):
    """DINOv2's own: the last norm, and the classifier on the first token beside the mean of the patches."""

    def __init__(self, norm: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.norm, self.classifier = norm, classifier

    def forward(self, hidden: Tensor, mask: None) -> Tensor:
        hidden = self.norm(hidden)
        return self.classifier(torch.cat([hidden[:, 0], hidden[:, 1:].mean(1)], 1))


class SpeechReadout(nn.Module):
    """Whisper's own: the last norm, the projector, the mean over time and the classifier."""

    def __init__(self, norm: nn.Module, projector: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.norm, self.projector, self.classifier = norm, projector, classifier

    def forward(self, hidden: Tensor, mask: None) -> Tensor:
        return self.classifier(self.projector(self.norm(hidden)).mean(1))


TASKS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "text": ("minilm", "rotten-tomatoes", {"pooling": "mean"}),
    "image": ("dinov2", "fashion-mnist", {"task": "image", "image_size": 98}),
    "speech": ("whisper", "asterisk", {"task": "speech", "max_seconds": 2.0}),
}
"""Model, data and settings."""

TARGETS = ("query", "value", "q_proj", "v_proj")


def problem(samples: int, kind: str, share: float) -> tuple[Tail, list[dict[str, Tensor]], float]:
    """The tail, its batches, and lambda."""
    from ranksure.bundled.names import DATA, MODELS
    from ranksure.planner.prepare import linearise, prepare
    from ranksure.planner.settings import PlanSettings
    from ranksure.progress import Clock, Silent

    model_name, data_name, special = TASKS[kind]
    settings = PlanSettings(
        target_modules=["query", "value"] if kind == "text" else ["q_proj", "v_proj"],
        layers_to_transform="last",
        samples=samples,
        weight_decay=f"{share:%}",
        heldout=0,
        **special,
    )
    prepared = prepare(str(MODELS[model_name]()), DATA[data_name][1](), settings, None, Clock(Silent()))
    strongest = linearise(prepared, Clock(Silent())).lambda_max  # fits and installs the head, too
    task, rows = prepared.task, prepared.split.train
    batches, back = task.batches_by_length(rows)
    labels = task.labels(rows)[torch.argsort(back)]
    model: Any = task.model
    if kind == "text":
        last, readout = model.encoder.encoder.layer[-1], MeanReadout(model.head)
        masks: list[Tensor | None] = [batch["attention_mask"] for batch in batches]
    else:
        masks = [None] * len(batches)
        if kind == "image":
            last, readout = model.dinov2.encoder.layer[-1], ImageReadout(model.dinov2.layernorm, model.classifier)
        else:
            last = model.encoder.layers[-1]
            readout = SpeechReadout(model.encoder.layer_norm, model.projector, model.classifier)
    calls: list[tuple[Any, Any]] = []
    handle = last.register_forward_pre_hook(lambda _, args, named: calls.append((args, named)), with_kwargs=True)
    with frozen(model), torch.no_grad():
        truth = [logits_of(model, batch) for batch in batches]
    handle.remove()
    tail = Tail(last, readout, calls, masks).eval().requires_grad_(False)
    sizes = [len(logits) for logits in truth]
    numbered = [
        {"batch": torch.full((size,), index), "labels": part}
        for index, (size, part) in enumerate(zip(sizes, labels.split(sizes), strict=True))
    ]
    for index, z in enumerate(truth):
        torch.testing.assert_close(tail(numbered[index]["batch"]), z)
    return tail, numbered, share * strongest


def targets_of(tail: Tail) -> list[str]:
    """Names of the adapted modules."""
    return [name for name, _ in tail.named_modules() if name.rpartition(".")[2] in TARGETS]


def adapted(tail: Tail, ranks: dict[str, int], seed: int) -> nn.Module:
    """PEFT's own LoRA at scale 1, as it initialises it."""
    torch.manual_seed(seed)
    config = LoraConfig(r=1, lora_alpha=1, target_modules=list(ranks), rank_pattern=ranks, alpha_pattern=ranks)
    return get_peft_model(copy.deepcopy(tail), config)


class Training:
    """Full-batch descent on mean loss + (lambda / 2)(||A||^2 + ||B||^2); keeps the objective of every evaluation.

    Args:
        model: the adapted tail.
        batches: all rows.
        lam: the decay; PEFT's scale is 1 here.
        lr: Adam's learning rate; 0 for L-BFGS, which has none. An evaluation is a forward and backward pass.
    """

    def __init__(self, model: nn.Module, batches: list[dict[str, Tensor]], lam: float, lr: float) -> None:
        self.model, self.batches, self.lam = model.eval(), batches, lam
        self.parameters = [p.requires_grad_(True) for n, p in model.named_parameters() if "lora_" in n]
        self.total = sum(len(batch["labels"]) for batch in batches)
        self.adam = torch.optim.Adam(self.parameters, lr=lr) if lr else None
        self.lbfgs = torch.optim.LBFGS(
            self.parameters, history_size=20, line_search_fn="strong_wolfe", tolerance_change=0, tolerance_grad=0
        )
        self.path: list[float] = []

    def evaluate(self) -> Tensor:
        """Objective; its gradient goes to the parameters."""
        value = torch.zeros((), dtype=self.parameters[0].dtype)
        for p in self.parameters:
            p.grad = self.lam * p.detach()
            value += 0.5 * self.lam * p.detach().square().sum()
        for batch in self.batches:
            loss = F.cross_entropy(self.model(batch=batch["batch"]), batch["labels"], reduction="sum") / self.total
            loss.backward()
            value += loss.detach()
        self.path.append(float(value))
        return value

    def run(self, evaluations: int) -> list[float]:
        """At least so many more evaluations (a line search is finished); the objectives so far."""
        until = len(self.path) + evaluations
        while len(self.path) < until:
            if self.adam is not None:
                self.evaluate()
                self.adam.step()
            else:
                self.lbfgs.param_groups[0]["max_iter"] = self.lbfgs.param_groups[0]["max_eval"] = until - len(self.path)
                self.lbfgs.step(self.evaluate)
        return self.path


def until_rank_bound(training: Training, most: int, tolerance: float) -> str:
    """Train until the certificate says something else than not-converged, or for ``most`` steps."""
    verdict = "not-converged"
    while len(training.path) < most and verdict == "not-converged":
        training.run(CERTIFY_EVERY)
        found = certify(training.model, training.batches, lam=training.lam, tolerance=tolerance)
        verdict = found.verdict
        print(f"    rank 1, step {len(training.path)}: {found.objective:.5f}, {verdict}", flush=True)
    return verdict


def first_within(path: list[float], level: float) -> int | None:
    """Steps until the objective is at most ``level`` for the first time."""
    return next((step for step, value in enumerate(path) if value <= level), None)


def one_seed(
    tail: Tail, batches: list[dict[str, Tensor]], lam: float, seed: int, steps: int, lr: float, tolerance: float
) -> dict[str, Any]:
    """All runs of one seed."""
    names = targets_of(tail)
    stuck = Training(adapted(tail, dict.fromkeys(names, 1), seed), batches, lam, lr)
    verdict = until_rank_bound(stuck, 6 * steps, tolerance)
    before = certify(stuck.model, batches, lam=lam, tolerance=tolerance)
    print(
        f"  seed {seed}, rank 1: {len(stuck.path)} steps, {verdict}, gain by rank at most {before.rank_gain_bound:.5f}"
    )
    runs: dict[str, Training] = {}
    added: dict[str, int] = {}
    if verdict == "rank-bound":
        found = grow(stuck.model, batches, lam=lam, tolerance=tolerance)
        added = found.added
        with tempfile.TemporaryDirectory() as folder:
            found.save(stuck.model, Path(folder) / "grown")
            model = PeftModel.from_pretrained(copy.deepcopy(tail), str(Path(folder) / "grown"), is_trainable=True)
        runs["grown"] = Training(model, batches, lam, lr)
    ranks = {name: 1 + added.get(name, 0) for name in names} if added else dict.fromkeys(names, 2)
    runs["at once"] = Training(adapted(tail, ranks, seed), batches, lam, lr)
    runs["rank 1, on"] = stuck
    for name, training in runs.items():
        training.run(steps)
        print(f"  seed {seed}, {name}: {training.path[0]:.5f} -> {min(training.path):.5f}", flush=True)
    first = len(stuck.path) - steps
    return {
        "seed": seed,
        "verdict": verdict,
        "steps_rank_1": first,
        "objective_rank_1": before.objective,
        "rank_gain_bound": before.rank_gain_bound,
        "added": added,
        "ranks": {
            name: {n: b.rank for n, b in read_adapter(training.model).blocks.items()} for name, training in runs.items()
        },
        "paths": {
            name: training.path[first:] if training is stuck else training.path for name, training in runs.items()
        },
    }


def compressed(model: nn.Module, batches: list[dict[str, Tensor]], lam: float, **settings: Any) -> None:
    """Compress and print."""
    began = time.perf_counter()
    found = compress(model, batches, lam=lam, **settings)
    assert found.before is not None and found.after is not None
    changes = ", ".join(f"{name} {value:.1e}" for name, value in found.logit_changes.items())
    print(
        f"  {settings}: ranks {list(found.ranks_before.values())} to {list(found.ranks_after.values())}, objective "
        f"{found.before.objective:.5f} to {found.after.objective:.5f}, loss {found.before.loss:.5f} to "
        f"{found.after.loss:.5f}, update changed by {found.update_change:.3f}; logits, at most "
        f"{found.largest_logit:.2f}, changed by: {changes}; {time.perf_counter() - began:.0f} s",
        flush=True,
    )


class Linear(nn.Module):
    """A linear classifier; a batch is the numbers of its rows."""

    def __init__(self, rows: Tensor, classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(rows.shape[1], classes, bias=False, dtype=rows.dtype)
        self.rows = rows

    def forward(self, batch: Tensor) -> Tensor:
        return self.layer(self.rows[batch])


def linear(seeds: int = 8, tolerance: float = 0.02) -> None:
    """Linear classifiers: steps of Adam to 1% above the certified optimum (of rank 1: above its own end)."""
    loss, found, seed = get_loss("cross-entropy"), 0, -1
    while found < seeds:
        seed += 1
        torch.manual_seed(seed)
        net = Linear(torch.randn(10, 8, dtype=torch.float64), 6)
        labels = torch.randint(6, (10,))
        batches = [{"batch": torch.arange(10), "labels": labels}]
        jacobian = torch.einsum("kc,in->ickn", loss.contrasts(6), net.rows)
        start = net(torch.arange(10)).detach()
        exact = Problem(DenseOperator({"layer": jacobian}), start, labels, loss, {"layer": 1.0})
        exact = exact.with_penalty(0.05 * lambda_max(exact))
        lam = exact.penalty["layer"]
        level = 1.01 * solve(exact, tolerance=1e-8).certificate.objective

        def fresh(rank: int, net: nn.Module = net) -> nn.Module:
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["layer"])
            return get_peft_model(copy.deepcopy(net), config, autocast_adapter_dtype=False)

        one = Training(fresh(1), batches, lam, 0.02)
        one.run(800)
        verdict = certify(one.model, batches, lam=lam, tolerance=tolerance)
        if verdict.verdict != "rank-bound":
            continue
        found += 1
        growth = grow(one.model, batches, lam=lam, tolerance=tolerance, certificate=verdict)
        with tempfile.TemporaryDirectory() as folder:
            growth.save(one.model, Path(folder) / "grown")
            model = PeftModel.from_pretrained(copy.deepcopy(net), str(Path(folder) / "grown"), is_trainable=True)
        rank = 1 + growth.added["layer"]
        grown, once = (Training(start, batches, lam, 0.02) for start in (model, fresh(rank)))
        counts = [first_within(training.run(1500), level) for training in (grown, once)]
        print(
            f"  seed {seed}: rank 1 took {first_within(one.path, 1.01 * min(one.path))}, then grown to rank {rank} "
            f"{counts[0]}; rank {rank} at once {counts[1]}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.grow_rows", description=__doc__)
    parser.add_argument("--steps", type=int, default=150, help="most steps of every run")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--lr", type=float, default=0.0, help="Adam's learning rate (default: L-BFGS)")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="of the certificate (default: its own)")
    parser.add_argument(
        "--within", type=float, default=1e-3, help="of the lowest objective of all runs (default 0.1%%)"
    )
    parser.add_argument("--task", choices=list(TASKS), default="text", help="what the real network does")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--share", type=float, default=SHARE, help="lambda as a share of lambda_max (default 0.1)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("out/grow.json"))
    parser.add_argument("--compress", action="store_true", help="compress a run of rank 8 instead")
    parser.add_argument("--linear", action="store_true", help="linear classifiers instead")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.linear:
        linear()
        return
    began = time.perf_counter()
    tail, batches, lam = problem(options.samples, options.task, options.share)
    print(
        f"lambda {lam:.5f}, {f'Adam at {options.lr:g}' if options.lr else 'L-BFGS'}, {options.steps} steps", flush=True
    )
    if options.compress:
        eight = dict.fromkeys(targets_of(tail), 8)
        whole = Training(adapted(tail, eight, 0), batches, lam, options.lr)
        print(f"  rank 8: {whole.run(options.steps)[0]:.5f} -> {min(whole.path):.5f}", flush=True)
        for settings in LEVELS:
            compressed(whole.model, batches, lam, **settings)
        return
    found = [
        one_seed(tail, batches, lam, seed, options.steps, options.lr, options.tolerance)
        for seed in range(options.seeds)
    ]
    best = min(min(path) for one in found for path in one["paths"].values())
    level = (1 + options.within) * best
    print(f"lowest objective of all runs {best:.5f}; steps to at most {level:.5f}:")
    for one in found:
        on = {name: first_within(path, level) for name, path in one["paths"].items()}
        grown = on.get("grown")
        total = None if grown is None else one["steps_rank_1"] + grown
        print(
            f"  seed {one['seed']}: rank 1 for {one['steps_rank_1']} steps ({one['verdict']} at "
            f"{one['objective_rank_1']:.5f}), then grown {grown}, in sum {total}; those ranks at once "
            f"{on['at once']}; rank 1 trained on {on['rank 1, on']}; added {one['added']}"
        )
        one["to_level"] = {**on, "in_sum": total}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"schema": 1, "lambda": lam, "best": best, "settings": {k: str(v) for k, v in vars(options).items()}}
    options.out.write_text(json.dumps({**record, "seeds": found}) + "\n")
    print(f"{time.perf_counter() - began:.0f} s; written to {options.out}")


if __name__ == "__main__":
    main()
