from __future__ import annotations

import io
import json
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import soundfile
from scipy.io import wavfile

from ranksure.data import recordings as speech
from ranksure.data.recordings import SpeechRows, load_speech_rows, resampled, speech_rows
from ranksure.errors import DataError, MemoryBudgetError, RanksureError, SettingError
from ranksure.tasks.load import load_samples
from tests.refusals import refusal

RATE = 16_000


def tone(hertz: float, seconds: float = 0.5, rate: int = RATE) -> np.ndarray:
    return (0.4 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def write(path: Path, samples: np.ndarray, rate: int = RATE, **how: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, **how)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, three recordings: wav and flac, one of 8 kHz, one in stereo."""
    write(tmp_path / "high" / "a.wav", tone(3000))
    write(tmp_path / "high" / "b.flac", tone(3000, rate=8000), 8000)
    write(tmp_path / "low" / "c.wav", np.stack([tone(200), 0.5 * tone(200)], 1))
    return tmp_path


def error(what: Any, kind: type[RanksureError] = DataError, **how: Any) -> str:
    return refusal(kind, [], load_speech_rows, what, **how)


# ---------------------------------------------------------------------------------------------------------------------
# what is read


def test_class_folders(folder: Path) -> None:
    (folder / "low" / "readme.txt").write_text("x")
    rows = load_speech_rows(folder)
    assert rows.labels == [0, 0, 1] and rows.label_names == ["high", "low"]
    assert rows.sampling_rate == RATE and rows.seconds == [0.5] * 3
    assert np.allclose(rows.waveforms[0], tone(3000), atol=1e-4)
    assert np.allclose(rows.waveforms[2], 0.75 * tone(200), atol=1e-4)  # the channels' mean
    inner = slice(400, -400)  # the filter rings at the ends
    assert np.allclose(rows.waveforms[1][inner], tone(3000)[inner], atol=2e-3)  # 8 kHz, read as 16 kHz
    assert [note.split(": ", 1)[1] for note in rows.notes] == [
        "1 file that is no recording by name was left out, such as readme.txt.",
        "1 of 3 recordings have 8000 Hz and are resampled to 16000 Hz.",
        "1 of 3 recordings have 2 channels, which are averaged.",
    ]
    again = load_samples("speech", folder)
    assert isinstance(again, SpeechRows) and again.sha256 == rows.sha256
    assert again.identities() == rows.identities() and len(set(rows.identities())) == 3


def test_folders_of_splits(tmp_path: Path) -> None:
    for split, hertz in (("train", 100), ("test", 200)):
        write(tmp_path / split / "x" / "1.wav", tone(hertz)), write(tmp_path / split / "y" / "1.wav", tone(2 * hertz))
    assert np.allclose(load_speech_rows(tmp_path).waveforms[1], tone(200), atol=1e-4)
    assert np.allclose(load_speech_rows(tmp_path, split="test").waveforms[1], tone(400), atol=1e-4)
    assert "no split 'dev'" in error(tmp_path, split="dev")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_tables_of_paths(folder: Path, suffix: str) -> None:
    table = pd.DataFrame({"file": ["low/c.wav", "high/a.wav"], "language": ["it", "ru"]})
    path = folder / f"rows{suffix}"
    if suffix == ".csv":
        table.to_csv(path, index=False)
    elif suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in table.to_dict("records")))
    else:
        table.to_parquet(path)
    rows = load_speech_rows(path, audio_column="file", label_column="language")
    assert rows.label_names == ["it", "ru"] and rows.labels == [0, 1]
    assert np.allclose(rows.waveforms[1], tone(3000), atol=1e-4)
    assert "no column 'audio'; its columns are 'file', 'language'" in error(path, label_column="language")


@pytest.mark.parametrize("how", ["memory", "saved", "parquet"])
def test_data_sets_with_an_audio_feature(folder: Path, tmp_path: Path, how: str) -> None:
    """Without torchcodec: neither is it installed here, nor is it needed."""
    import datasets

    audio: list[Any] = [str(folder / "low" / "c.wav"), str(folder / "high" / "a.wav")]
    if how == "parquet":
        audio = [{"bytes": Path(path).read_bytes(), "path": None} for path in audio]
    source: Any = datasets.Dataset.from_dict({"audio": audio, "label": [1, 0]})
    source = source.cast_column("audio", datasets.Audio())
    source = source.cast_column("label", datasets.ClassLabel(names=["h", "l"]))
    if how == "saved":
        source.save_to_disk(str(tmp_path / "saved"))
        source = tmp_path / "saved"
    elif how == "parquet":
        source.to_parquet(str(tmp_path / "x.parquet"))
        source = tmp_path / "x.parquet"
    rows = load_speech_rows(source)
    assert rows.labels == [1, 0] and rows.label_names == ["h", "l"]
    assert np.allclose(rows.waveforms[1], tone(3000), atol=1e-4)


def test_arrays_in_memory() -> None:
    rows = speech_rows([tone(100), np.stack([tone(200)] * 2), (tone(300) * 2**15).astype(np.int16)], list("bab"), RATE)
    assert rows.label_names == ["a", "b"] and rows.labels == [1, 0, 1]
    for found, hertz in zip(rows.waveforms, (100, 200, 300), strict=True):
        assert found.dtype == np.float32 and np.allclose(found, tone(hertz), atol=1e-4)
    frame = pd.DataFrame({"audio": [{"array": tone(5), "sampling_rate": 8000}] * 2, "label": [0, 1]})
    assert load_speech_rows(frame).seconds == [1.0, 1.0]
    for bad, message in {
        (2, 1): "2 recordings but 1 labels",
        (0, 0): "there is no recording",
        (1, 1): "every row has the label",
    }.items():
        with pytest.raises(DataError, match=message):
            speech_rows([tone(1)] * bad[0], [0] * bad[1], RATE)
    with pytest.raises(DataError, match=r"recording 2: an array of type int64 and shape \(5,\)"):
        speech_rows([tone(1), np.arange(5)], [0, 1], RATE)
    with pytest.raises(DataError, match=r"shape \(8000, 2\); give floats .* \(channels, samples\)"):
        speech_rows([np.stack([tone(1)] * 2, 1), tone(1)], [0, 1], RATE)


def test_samples_are_stratified_and_keep_their_inputs(folder: Path) -> None:
    rows = load_speech_rows(folder)
    few = rows.shuffled(0).subset([2, 0])
    assert len(few) == 2 and all(any(w is v for v in rows.waveforms) for w in few.waveforms)
    assert [rows.identities()[i] for i in (2, 0)] == rows.subset([2, 0]).identities()
    renamed = rows.with_label_names(["low", "high"])
    assert renamed.labels == [1, 1, 0]
    with pytest.raises(DataError, match="the label 'low'"):
        rows.with_label_names(["high", "other"])


def test_resampling_keeps_a_tone() -> None:
    """Against the tone itself at the other rate; above half the new rate nothing may be left."""
    for rate, wanted in ((44_100, 16_000), (8000, 16_000), (16_000, 8000), (22_050, 16_000)):
        found = resampled(tone(440, 1, rate), rate, wanted)
        assert len(found) == wanted and found.dtype == np.float32
        assert np.abs(found - tone(440, 1, wanted))[500:-500].max() < 2e-3
    assert np.abs(resampled(tone(7000, 1), 16_000, 8000))[500:-500].max() < 2e-3


@pytest.mark.filterwarnings("ignore:Chunk .non-data. not understood")
@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_every_coding_of_wav_files(tmp_path: Path, subtype: str) -> None:
    """Against SciPy's decoder."""
    path = write(tmp_path / "a" / "1.wav", np.stack([tone(300), -tone(500)], 1), subtype=subtype)
    write(tmp_path / "b" / "1.wav", tone(5))
    samples = wavfile.read(path)[1]
    whole = samples.astype(np.float64) - (128 if samples.dtype == np.uint8 else 0)  # 24 bits come shifted into 32
    scale = 1 if samples.dtype.kind == "f" else 2.0 ** (8 * samples.dtype.itemsize - 1)
    assert np.allclose(load_speech_rows(tmp_path).waveforms[0], (whole / scale).mean(1), atol=1e-6)


def test_without_the_system_library(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no wheel brings libsndfile, importing soundfile raises OSError."""

    class Missing:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "soundfile":
                raise OSError("sndfile library not found")

    monkeypatch.delitem(sys.modules, "soundfile")
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    assert error(folder) == (
        "recordings are decoded by libsndfile, which is missing here (sndfile library not found); install it (Debian: "
        "apt-get install libsndfile1)"
    )


# ---------------------------------------------------------------------------------------------------------------------
# what cannot be used


def test_recordings_that_cannot_be_used(folder: Path) -> None:
    bad = folder / "high" / "a.wav"
    raw = bad.read_bytes()
    for damaged in (b"no sound at all", b"RIFF\x10\0\0\0WAVEjunk"):
        bad.write_bytes(damaged)
        assert error(folder).startswith(f"{bad}: the recording does not decode (")
    bad.write_bytes(b"")
    assert error(folder) == f"{bad}: the recording is empty (a file of 0 bytes); replace or remove it"
    write(bad, np.zeros(0))
    assert error(folder) == f"{bad}: the recording is empty (no samples); replace or remove it"
    write(bad, np.array([0.0, np.nan]), subtype="FLOAT")
    assert "samples that are not finite numbers" in error(folder)
    bad.write_bytes(raw[: len(raw) // 2])  # a truncated wav still plays as far as it goes
    assert len(load_speech_rows(folder).waveforms[0]) == RATE // 4 - 11


def test_long_recordings_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech, "MAX_SECONDS", 1)
    write(tmp_path / "a" / "1.wav", tone(300, 1.5, 8000), 8000), write(tmp_path / "b" / "1.wav", tone(5))
    rows = load_speech_rows(tmp_path)
    assert rows.seconds == [1.0, 0.5] and "1 of 2 recordings are longer than 1 s and are cut there" in rows.notes[0]
    monkeypatch.setattr(speech, "MAX_BYTES", 1000)
    assert "more than 0 GiB of memory once decoded (reached at recording 1 of 2)" in error(tmp_path, MemoryBudgetError)


def test_rows_that_cannot_be_used(folder: Path) -> None:
    path = folder / "rows.csv"
    for text, message in {
        "audio,label\nhigh/a.wav,x\nhigh/z.wav,y\n": f"row 2 (line 3), column 'audio': no such recording {folder}",
        "audio,label\nhigh/a.wav,x\n,y\n": "row 2 (line 3), column 'audio': the recording is missing",
        "audio,label\nhigh/a.wav,x\nlow/c.wav,\n": "row 2 (line 3), column 'label': the label",
        "audio,label\nhigh/a.wav,x\nlow/c.wav,x\n": "every row has the label 'x'",
        "audio,label\n": "has no rows",
    }.items():
        path.write_text(text)
        assert message in error(path)
    assert "both are 'label'" in error(path, SettingError, audio_column="label")
    assert "sampling rate 10 Hz is out of range" in error(folder, SettingError, sampling_rate=10)
    frame = pd.DataFrame({"audio": [3, 4], "label": [0, 1]})
    assert "3 is no recording but of type int" in error(frame)
    frame = pd.DataFrame({"audio": [{"array": tone(5), "sampling_rate": None}] * 2, "label": [0, 1]})
    assert "a sampling rate of None; give Hz as a whole number" in error(frame)


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    assert "has no class folders: put the recordings into one folder per class" in error(tmp_path)
    write(tmp_path / "a" / "1.wav", tone(5))
    assert "has one class folder (a)" in error(tmp_path)
    (tmp_path / "b").mkdir()
    assert error(tmp_path) == f"class folder {tmp_path / 'b'} holds no recording: remove it or fill it"
    write(tmp_path / "loose.wav", tone(5))
    assert "holds recordings of no class, such as loose.wav" in error(tmp_path)
    assert "holds no folders of splits" in error(tmp_path / "a", SettingError, split="test")
    assert "no such file" in error(tmp_path / "nothing.csv")


def test_the_standard_library_writes_what_is_read() -> None:
    """A wav file by Python's ``wave``, as bytes."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(RATE)
        file.writeframes((tone(440) * 32767).astype("<i2").tobytes())
    rows = load_speech_rows(pd.DataFrame({"audio": [buffer.getvalue()] * 2, "label": ["x", "y"]}))
    assert np.allclose(rows.waveforms[0], tone(440), atol=1e-4)
