"""The callback changes nothing, reaches every reporter, and gives verdicts from full passes only."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from ranksure.adapters.loaded import read_adapter
from ranksure.errors import SettingError
from ranksure.runs.certificate.callback import STOPPED, CertificateCallback
from ranksure.runs.certificate.certify import certify, certify_adapter
from ranksure.runs.certificate.settings import CertifySettings
from ranksure.runs.fitting.optimizer import l2_optimizer
from ranksure.runs.fitting.trainer import mean_loss_function

pytestmark = pytest.mark.usefixtures("quick_collections")


class Net(nn.Module):
    """Dropout and batch norm: what evaluation mode must leave alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.2)
        self.second = nn.Linear(8, 3)

    def forward(self, x, labels=None):
        logits = self.second(self.drop(torch.tanh(self.norm(self.first(x)))))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits} if loss is not None else logits


def rows(n: int = 24):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 6, generator=generator)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
    return [{"x": x[i], "labels": y[i]} for i in range(n)]


class Noisy(TrainerCallback):
    """Draws from every stream at every step, so that a stream that was moved shows in the weights."""

    def __init__(self, data) -> None:
        self.data = data

    def on_step_end(self, args, state, control, **kwargs):
        draw = random.random() + float(np.random.rand()) + float(torch.rand(()))
        self.data[state.global_step % len(self.data)]["x"] += 0.01 * draw


class Reporter(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def trained(folder, callback=None, *, bf16=False, steps=9, callbacks=(), optimizer=None, **more):
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    model = get_peft_model(Net(), LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1, target_modules=["first", "second"]))
    data = rows()
    arguments = {
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "logging_steps": 3,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "max_grad_norm": 0.0,
        "bf16": bf16,
        **more,
    }
    trainer = Trainer(
        model,
        TrainingArguments(str(folder), **arguments),
        train_dataset=data,
        callbacks=[Noisy(data), *callbacks],
        optimizers=(optimizer(model) if optimizer else l2_optimizer(model, lam=0.01, lr=0.05), None),
        compute_loss_func=mean_loss_function("cross-entropy"),
    )
    if callback is not None:
        callback.attach(trainer)
    trainer.train()
    return model, trainer


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("bf16", [False, True])
def test_the_final_weights_are_bitwise_those_without_it(tmp_path, bf16):
    """Dropout, batch norm, gradient accumulation, autocast and noise that depends on the random states."""
    plain, _ = trained(tmp_path, bf16=bf16)
    callback = CertificateCallback(every=2, sample_every=3, sample_rows=8, lam=0.01)
    watched, _ = trained(tmp_path, callback, bf16=bf16)
    assert [step for step, _ in callback.certificates] == [2, 4, 6, 8]
    found = weights(watched)
    for name, value in weights(plain).items():
        assert torch.equal(value, found[name]), name
    assert {n: p.requires_grad for n, p in plain.named_parameters()} == {
        n: p.requires_grad for n, p in watched.named_parameters()
    }


OPTIMIZERS = {
    "Riemannian": (lambda m: create_riemannian_optimizer(m, torch.optim.SGD, lr=0.01, weight_decay=0.1), "riemannian"),
    "Riemannian without decay": (lambda m: create_riemannian_optimizer(m, torch.optim.SGD, lr=0.01), None),
    "LoRA-FA": (lambda m: create_lorafa_optimizer(m, r=2, lora_alpha=4, lr=0.01, weight_decay=0.1), "lorafa"),
    "LoRA+": (
        lambda m: create_loraplus_optimizer(
            m, torch.optim.SGD, lr=0.01, loraplus_lr_ratio=4.0, loraplus_weight_decay=0.1
        ),
        None,
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_decay_beside_a_preconditioner_is_no_nuclear_norm(tmp_path, name):
    optimizer, reason = OPTIMIZERS[name]
    callback = CertificateCallback(every=2, lam=0.01)
    trained(tmp_path, callback, steps=2, optimizer=optimizer)
    ((_, found),) = callback.certificates
    assert (found.verdict == "not-checked") == (reason is not None)
    if reason is not None:
        assert reason in found.reasons[0] and "no nuclear norm" in found.reasons[0]


def test_a_loader_that_shuffles_is_read_once_and_moves_no_stream(tmp_path):
    data = rows()
    loader = torch.utils.data.DataLoader(data, batch_size=5, shuffle=True)
    callback = CertificateCallback(loader, every=2, lam=0.01)
    watched, _ = trained(tmp_path, callback)
    plain, _ = trained(tmp_path)
    for name, value in weights(plain).items():
        assert torch.equal(value, watched.state_dict()[name]), name
    assert all(found.n_samples == 24 for _, found in callback.certificates)


def test_the_certificate_is_that_of_the_weights_of_the_step(tmp_path):
    data = rows()
    batches = torch.utils.data.default_collate(data)
    callback = CertificateCallback([batches], every=9, lam=0.01)
    model, _ = trained(tmp_path, callback)
    ((step, found),) = callback.certificates
    own = certify(model, [batches], lam=0.01)
    assert step == 9
    assert found.objective == own.objective and found.rank_gain_bound == own.rank_gain_bound
    assert found.verdict == own.verdict


def test_logs_reach_reporters_that_were_there_before_and_after(tmp_path):
    """Also where the Trainer logs in the same step: its own log is not lost."""
    before, after = Reporter(), Reporter()
    callback = CertificateCallback(every=3, sample_every=2, sample_rows=8, lam=0.01)
    _, trainer = trained(tmp_path, callback, callbacks=[before])
    assert not after.seen
    history = trainer.state.log_history
    full = [entry for entry in history if "ranksure/loss" in entry]
    sample = [entry for entry in history if "ranksure/sample_loss" in entry]
    losses = [entry for entry in history if "loss" in entry]
    assert [entry["step"] for entry in full] == [3, 6, 9]
    assert [entry["step"] for entry in sample] == [2, 4, 6, 8]
    assert [entry["step"] for entry in losses] == [3, 6, 9]
    assert sum("ranksure/loss" in logs for logs in before.seen) == 3
    verdicts = ("first_order_optimal", "rank_bound", "not_converged", "failed_loudly", "not_checked")
    for entry in full:
        assert sum(entry[f"ranksure/{name}"] for name in verdicts) == 1
        assert all(isinstance(value, (int, float)) for value in entry.values())
    for entry in sample:
        if entry["step"] != 6:  # a sample gives figures, never a verdict
            assert not any(f"ranksure/{name}" in entry for name in verdicts)
        assert not any(f"ranksure/sample_{name}" in entry for name in verdicts)


def test_a_sample_takes_its_rows_only(tmp_path):
    callback = CertificateCallback(sample_every=9, sample_rows=8, lam=0.01)
    model, trainer = trained(tmp_path, callback, eval_strategy="no", per_device_eval_batch_size=4)
    assert callback.certificates == []
    (entry,) = [entry for entry in trainer.state.log_history if "ranksure/sample_loss" in entry]
    part = torch.utils.data.default_collate(trainer.train_dataset[:8])
    assert entry["ranksure/sample_loss"] == pytest.approx(certify(model, [part], lam=0.01).loss, rel=1e-6)


def test_it_stops_on_a_verdict_of_a_full_pass(tmp_path):
    callback = CertificateCallback(every=4, stop={"not-converged", "first-order-optimal", "rank-bound"}, lam=0.01)
    _, trainer = trained(tmp_path, callback)
    assert trainer.state.global_step == 4
    assert callback.stopped == callback.certificates[-1][1].verdict
    assert any(entry.get(STOPPED) == 1.0 for entry in trainer.state.log_history)
    other = CertificateCallback(every=4, stop={"failed-loudly"}, lam=0.01)
    _, trainer = trained(tmp_path, other)
    assert trainer.state.global_step == 9 and other.stopped is None


def test_one_that_is_not_attached_says_so(tmp_path):
    with pytest.raises(SettingError, match=r"callback\.attach\(trainer\)"):
        trained(tmp_path, callbacks=[CertificateCallback(every=2)])


def test_attaching_twice_or_beside_callbacks_runs_it_once(tmp_path):
    callback = CertificateCallback(every=3, lam=0.01)
    _, trainer = trained(tmp_path, callback, steps=3)
    callback.attach(trainer)
    assert sum(entry is callback for entry in trainer.callback_handler.callbacks) == 1
    _, other = trained(tmp_path, steps=1)
    with pytest.raises(SettingError, match="another Trainer"):
        callback.attach(other)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, "every="),
        ({"every": -1}, "at least 0"),
        ({"every": 1, "sample_rows": 0}, "sample_rows"),
        ({"every": 1, "stop": {"done"}}, "unknown verdict 'done'"),
        ({"sample_every": 1, "stop": {"rank-bound"}}, "full passes"),
    ],
)
def test_what_is_refused(settings, reason):
    with pytest.raises(SettingError, match=reason):
        CertificateCallback(**settings)


def test_a_run_without_weight_decay_is_not_stopped_at_its_start(tmp_path):
    """The Trainer's default: the first updates are tiny, and so is all that can be gained by updates of their size."""
    callback = CertificateCallback(every=2, sample_every=3, sample_rows=8, stop=["first-order-optimal", "rank-bound"])
    trained(tmp_path, callback, steps=8)
    assert [step for step, _ in callback.certificates] == [2, 4, 6, 8] and callback.stopped is None
    for _, found in callback.certificates:
        assert found.verdict == "not-converged" and found.radius >= found.first.length > 0
        assert 0 < found.rank_gain_bound <= found.loss


def test_what_is_known_of_another_start_is_not_taken(tmp_path):
    batches = [torch.utils.data.default_collate(rows())]
    model, _ = trained(tmp_path, steps=2)
    read, asked = read_adapter(model), CertifySettings()
    before = certify_adapter(model, read, batches, asked)
    again = certify_adapter(model, read, batches, asked, before=[before])
    assert again.first is before.first and again.rank_gain_bound == before.rank_gain_bound
    fewer = [{name: value[:9] for name, value in batches[0].items()}]
    moved = copy.deepcopy(model)
    next(p for name, p in moved.named_parameters() if "lora_" not in name).data.mul_(1.5)
    for network, data in ((model, fewer), (moved, batches)):
        own = certify_adapter(network, read_adapter(network), data, asked)
        other = certify_adapter(network, read_adapter(network), data, asked, before=[before])
        assert other.first == own.first and other.first.key != before.first.key
        assert other.radius == own.radius
    with read.without():
        loss = nn.functional.cross_entropy(model.eval()(batches[0]["x"]), batches[0]["labels"])
    assert before.first.loss == pytest.approx(float(loss.detach()), rel=1e-5)
