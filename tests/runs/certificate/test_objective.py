"""A verdict of the callback is about the objective that the Trainer trains, or there is none and the reason is told."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, WeightedRandomSampler
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
)

from ranksure.network.batch_losses import check_own_loss
from ranksure.records.certificate import RunCertificate
from ranksure.runs.certificate.callback import CertificateCallback
from ranksure.runs.certificate.certify import certify
from ranksure.runs.certificate.objective import same_loss
from ranksure.runs.fitting.optimizer import l2_optimizer
from ranksure.runs.fitting.trainer import mean_loss_function
from tests.runs.certificate.test_callback import Net, rows, trained, weights
from tests.runs.tiny_runs import llama_config, shaken

pytestmark = pytest.mark.usefixtures("quick_collections")

FEW = {"per_device_train_batch_size": 4, "max_steps": 1, "save_strategy": "no", "report_to": "none"}
FEW |= {"disable_tqdm": True, "use_cpu": True, "remove_unused_columns": False, "label_names": ["labels"]}


def trainer_of(folder: Any, model: Any = None, data: Any = None, kind: type[Trainer] = Trainer, **more: Any) -> Trainer:
    torch.manual_seed(3)
    given = {name: more.pop(name) for name in ("compute_loss_func", "optimizers") if name in more}
    if model is None:
        model = shaken(get_peft_model(Net(), LoraConfig(r=2, target_modules=["first", "second"])))
    return kind(
        model,
        TrainingArguments(str(folder), **{**FEW, **more}),
        train_dataset=rows() if data is None else data,
        **given,
    )


def certified(trainer: Trainer, **settings: Any) -> RunCertificate:
    """The certificate of the last step; what is not checked has warned of it."""
    callback = CertificateCallback(every=1, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callback.attach(trainer)
        trainer.train()
    found = callback.certificates[-1][1]
    told = [str(entry.message) for entry in caught if "CertificateCallback" in str(entry.message)]
    assert bool(told) == (found.verdict == "not-checked")
    for reason in found.reasons:
        assert any(reason in message for message in told)
    return found


def refused(trainer: Trainer, says: str, **settings: Any) -> None:
    found = certified(trainer, **settings)
    assert found.verdict == "not-checked" and found.loss is None
    assert any(says in reason for reason in found.reasons), found.reasons


def text_rows(n: int = 8, length: int = 7, vocabulary: int = 24) -> list[dict[str, Any]]:
    ids = torch.randint(vocabulary, (n, length), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]


def llama(**more: Any) -> Any:
    torch.manual_seed(1)
    return shaken(
        get_peft_model(LlamaForCausalLM(llama_config(24, **more)), LoraConfig(r=2, target_modules=["q_proj"]))
    )


class TestWhatIsCertified:
    def test_the_loss_of_the_model(self, tmp_path):
        found = certified(trainer := trainer_of(tmp_path))
        whole = certify(trainer.model, [torch.utils.data.default_collate(rows())])  # pyright: ignore
        assert found.verdict != "not-checked" and found.n_samples == 24
        assert found.loss == pytest.approx(whole.loss, rel=1e-6)

    def test_the_loss_that_the_trainer_names(self, tmp_path):
        """Its weighting, too, which the callback was not told."""
        data = text_rows()
        for index, row in enumerate(data):  # of 1 to 6 terms: so the two means differ
            row["labels"] = torch.where(torch.arange(7) <= index % 6 + 1, row["labels"], -100)
        model = llama()
        own = mean_loss_function("cross-entropy", "sample")
        found = certified(trainer_of(tmp_path, model, data, compute_loss_func=own, learning_rate=0.0))
        model.eval()
        with torch.no_grad():
            each = [
                F.cross_entropy(model(row["input_ids"][None]).logits[0, :-1], row["labels"][1:]).double()
                for row in data
            ]
        assert found.weighting == "sample" and found.loss == pytest.approx(float(torch.stack(each).mean()), rel=1e-5)

    def test_a_subclass_that_says_that_it_changes_no_loss(self, tmp_path):
        class Logs(Trainer):
            @same_loss
            def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
                return super().compute_loss(*args, **kwargs)

        assert certified(trainer_of(tmp_path, kind=Logs)).verdict != "not-checked"

    def test_all_rows_where_training_drops_the_last(self, tmp_path):
        trainer = trainer_of(tmp_path, per_device_eval_batch_size=5, dataloader_drop_last=True)
        assert certified(trainer).n_samples == 24 and trainer.args.dataloader_drop_last is True


class Weighted(Net):
    """A network whose own loss has class weights, as some configurations ask."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_labels=3)

    def forward(self, x, labels=None):
        logits = self.second(torch.tanh(self.first(x)))
        loss = None if labels is None else F.cross_entropy(logits, labels, weight=torch.tensor([1.0, 1.0, 3.0]))
        return {"loss": loss, "logits": logits} if loss is not None else logits


class TestOtherLosses:
    def test_label_smoothing(self, tmp_path):
        trainer = trainer_of(tmp_path, llama(), text_rows(), label_smoothing_factor=0.1)
        refused(trainer, "label_smoothing_factor 0.1", lam=0.01)

    def test_label_smoothing_beside_a_named_loss_is_not_used_by_the_trainer(self, tmp_path):
        own = mean_loss_function("cross-entropy")
        found = certified(trainer_of(tmp_path, llama(), text_rows(), label_smoothing_factor=0.1, compute_loss_func=own))
        assert found.verdict != "not-checked"

    def test_class_weights(self, tmp_path):
        def weighted(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
            return F.cross_entropy(outputs["logits"] if isinstance(outputs, dict) else outputs, labels, torch.ones(3))

        refused(trainer_of(tmp_path, compute_loss_func=weighted), "compute_loss_func", loss="cross-entropy")

    def test_another_named_loss_than_the_callback_is_told(self, tmp_path):
        own = mean_loss_function("cross-entropy")
        refused(
            trainer_of(tmp_path, compute_loss_func=own), "is cross-entropy, not squared-error", loss="squared-error"
        )

    def test_class_weights_of_the_model_where_the_rows_looked_at_are_of_one_class(self, tmp_path):
        data = sorted(rows(), key=lambda row: int(row["labels"]))
        model = shaken(get_peft_model(Weighted(), LoraConfig(r=2, target_modules=["first"])))
        refused(trainer_of(tmp_path, model, data, per_device_eval_batch_size=4), "trains with another loss")
        refused(trainer_of(tmp_path, model, data), "trains with another loss", loss="cross-entropy")

    def test_another_weighting_than_the_models(self, tmp_path):
        refused(trainer_of(tmp_path, llama(), text_rows()), "every token alike", weighting="sample")

    @pytest.mark.parametrize("name", ["compute_loss", "training_step", "get_batch_samples"])
    def test_a_subclass(self, tmp_path, name):
        def override(self: Any, *args: Any, **kwargs: Any) -> Any:
            return getattr(Trainer, name)(self, *args, **kwargs)

        refused(trainer_of(tmp_path, kind=type("DPOTrainer", (Trainer,), {name: override})), f"{name} is overridden")

    def test_a_method_put_on_the_trainer(self, tmp_path):
        trainer = trainer_of(tmp_path)
        setattr(trainer, "compute_loss", lambda *args, **kwargs: Trainer.compute_loss(trainer, *args, **kwargs))  # noqa: B010
        refused(trainer, "compute_loss is overridden")

    @pytest.mark.parametrize(("loss", "fine"), [("nll", True), ("chunked_nll", True), ("dft", False), ("new", False)])
    def test_the_losses_of_trl(self, tmp_path, loss, fine):
        def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
            return Trainer.compute_loss(self, *args, **kwargs)

        compute_loss.__module__ = "trl.trainer.sft_trainer"
        trainer = trainer_of(tmp_path, kind=type("SFTTrainer", (Trainer,), {"compute_loss": compute_loss}))
        trainer.args.loss_type = loss
        if fine:
            assert certified(trainer).verdict != "not-checked"
        else:
            refused(trainer, f"the loss is '{loss}' (loss_type)")

    @pytest.mark.parametrize("coefficient", [0.02, 1e-9, 0.0])
    def test_the_loss_of_a_router(self, tmp_path, coefficient):
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = MixtralConfig(
            vocab_size=24,
            num_key_value_heads=1,
            num_local_experts=2,
            max_position_embeddings=16,
            router_aux_loss_coef=coefficient,
            output_router_logits=True,
            **sizes,
        )
        model = shaken(get_peft_model(MixtralForCausalLM(config), LoraConfig(r=2, target_modules=["q_proj"])))
        trainer = trainer_of(tmp_path, model, text_rows())
        if not coefficient:
            check_own_loss(model.eval(), torch.utils.data.default_collate(text_rows()))
            return
        refused(trainer, "auxiliary loss of its router")
        trainer.aux_loss_enabled, trainer.router_aux_loss_coef = True, coefficient  # pyright: ignore  (as TRL's)
        refused(trainer, "router_aux_loss_coef")

    def test_noise_on_the_embeddings(self, tmp_path):
        refused(trainer_of(tmp_path, llama(), text_rows(), neftune_noise_alpha=5.0), "neftune_noise_alpha 5")

    def test_accumulated_means_of_a_classifier(self, tmp_path):
        """transformers 5.23: the Trainer adds them up, so that the loss weighs twice as much against the penalty."""
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        base = BertForSequenceClassification(BertConfig(vocab_size=24, max_position_embeddings=16, **sizes))
        model = shaken(get_peft_model(base, LoraConfig(r=2, target_modules=["query"])))
        data = [{**row, "labels": torch.tensor(i % 2)} for i, row in enumerate(text_rows())]
        twice = {"gradient_accumulation_steps": 2}
        refused(trainer_of(tmp_path, model, data, **twice), "adds up those of the accumulated batches", lam=0.01)
        assert certified(trainer_of(tmp_path, model, data), lam=0.01).verdict != "not-checked"
        assert (
            certified(trainer_of(tmp_path, model, data, **twice)).verdict != "not-checked"
        )  # nothing to weigh against

    def test_a_causal_model_divides_by_what_it_is_told(self, tmp_path):
        trainer = trainer_of(tmp_path, llama(), text_rows(), gradient_accumulation_steps=2)
        assert certified(trainer, lam=0.01).verdict != "not-checked"

    def test_a_penalty_of_the_optimizer_that_the_callback_was_not_told_of(self, tmp_path):
        model = llama()
        optimizer = l2_optimizer(model, lam=0.01, lr=0.01)
        refused(trainer_of(tmp_path, model, text_rows(), optimizers=(optimizer, None)), "trains an L2 penalty")
        again = trainer_of(tmp_path, model, text_rows(), optimizers=(optimizer, None))
        assert certified(again, lam=0.01).verdict != "not-checked"
        assert certified(trainer_of(tmp_path, model, text_rows(), weight_decay=0.1)).verdict != "not-checked"  # AdamW

    @pytest.mark.parametrize("sampler", [WeightedRandomSampler([1.0, 2.0] * 12, 24), SubsetRandomSampler(range(6))])
    def test_weights_of_rows(self, tmp_path, sampler):
        def own_loader(self: Trainer) -> Any:
            return self.accelerator.prepare(DataLoader(rows(), batch_size=4, sampler=sampler))  # pyright: ignore

        own = type("Own", (Trainer,), {"get_train_dataloader": own_loader})
        refused(trainer_of(tmp_path, kind=own), f"rows are drawn by {type(sampler).__name__}")

    def test_the_weights_are_those_of_a_run_without_it(self, tmp_path):
        plain = trainer_of(tmp_path, llama(), text_rows(), label_smoothing_factor=0.1, max_steps=3)
        plain.train()
        watched = trainer_of(tmp_path, llama(), text_rows(), label_smoothing_factor=0.1, max_steps=3)
        refused(watched, "smoothed")
        found = weights(watched.model)
        assert all(torch.equal(value, found[name]) for name, value in weights(plain.model).items())


class Stream(IterableDataset):
    """Rows without a length, for ever unless ``rounds`` are given; ``read`` counts them."""

    def __init__(self, rounds: int | None = None) -> None:
        self.rounds, self.read = rounds, 0

    def __iter__(self) -> Iterator[Any]:
        data = rows()
        rounds = itertools.repeat(data) if self.rounds is None else [data] * self.rounds
        for row in itertools.chain.from_iterable(rounds):
            self.read += 1
            yield row


class Once(Stream):
    def __iter__(self) -> Iterator[Any]:  # pyright: ignore
        return self

    def __next__(self) -> Any:
        self.read += 1
        return rows(1)[0]


class TestStreams:
    def test_an_endless_one_ends_with_a_warning(self, tmp_path):
        data = Stream()
        callback = CertificateCallback(every=1, sample_every=1, sample_rows=8, stream_rows=50)
        trainer = trainer_of(tmp_path, data=data, max_steps=3)
        with pytest.warns(UserWarning, match=r"gives no verdict: .* more rows than the 50 that are read"):
            callback.attach(trainer)
            trainer.train()
        assert [found.verdict for _, found in callback.certificates] == ["not-checked"] * 3
        assert "no length" in callback.certificates[0][1].reasons[0]
        assert data.read < 100  # 51, and the rows of three steps: read once
        held = sum(len(batch["labels"]) for batch in callback._batches or [])  # pyright: ignore[reportPrivateUsage]
        assert held == 8
        assert sum("ranksure/sample_loss" in entry for entry in trainer.state.log_history) == 3

    def test_an_endless_one_of_datasets(self, tmp_path):
        def forever() -> Iterator[dict[str, Any]]:
            for row in itertools.cycle(rows()):
                yield {"x": row["x"].tolist(), "labels": int(row["labels"])}

        data = datasets.IterableDataset.from_generator(forever)
        refused(trainer_of(tmp_path, data=data), "no length", stream_rows=30)

    def test_batches_without_end(self, tmp_path):
        batch = torch.utils.data.default_collate(rows())
        refused(trainer_of(tmp_path), "no length", batches=itertools.repeat(batch), stream_rows=100)

    def test_one_that_ends_is_certified(self, tmp_path):
        found = certified(trainer_of(tmp_path, data=Stream(1)), stream_rows=24)
        assert found.verdict != "not-checked" and found.n_samples == 24

    def test_one_that_can_be_read_once_is_left_to_training(self, tmp_path):
        data = Once()
        refused(trainer_of(tmp_path, data=data), "read once only", sample_every=1)
        assert data.read < 24
        trainer = trainer_of(tmp_path, data=Once())
        with pytest.warns(UserWarning, match="read once only"):
            CertificateCallback(sample_every=1).attach(trainer)
            trainer.train()
        assert not any("ranksure/sample_loss" in entry for entry in trainer.state.log_history)

    def test_training_on_a_stream_is_not_disturbed(self, tmp_path):
        plain, _ = trained(tmp_path, steps=3)
        watched, _ = trained(
            tmp_path, CertificateCallback(iter([torch.utils.data.default_collate(rows())]), every=1), steps=3
        )
        found = weights(watched)
        assert all(torch.equal(value, found[name]) for name, value in weights(plain).items())
        runs = []
        for watch in (False, True):
            trainer = trainer_of(tmp_path, data=Stream(), max_steps=3, gradient_accumulation_steps=2)
            if watch:
                refused(trainer, "no length", stream_rows=20)
            else:
                trainer.train()
            runs.append(weights(trainer.model))
        assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())
