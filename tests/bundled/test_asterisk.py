"""The prompts of Asterisk: what is a row, what is not. Needs the packages (fetched once, or installed)."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from scipy.io import wavfile
from scipy.signal import correlate, resample_poly

from ranksure.bundled import asterisk
from ranksure.bundled.packages import PACKAGES, package_path
from ranksure.data.recordings import SpeechRows
from ranksure.errors import DataError, SettingError
from tests.refusals import refusal


def folder(language: str) -> Path:
    try:
        return package_path(f"asterisk-core-sounds-{language}-wav") / asterisk.SOUNDS / asterisk.VOICES[language]
    except DataError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def rows() -> SpeechRows:
    folder("en"), folder("es")
    return asterisk.asterisk_languages()


def test_labels_order_and_rate(rows: SpeechRows) -> None:
    assert rows.label_names == ["en", "es"] and rows.labels == sorted(rows.labels)
    assert [rows.labels.count(i) for i in (0, 1)] == [522, 477]
    assert rows.sampling_rate == 16_000 and all(w.dtype == np.float32 and w.ndim == 1 for w in rows.waveforms)
    assert 0.05 < np.median([np.abs(w).max() for w in rows.waveforms]) <= 1
    assert "left out" in rows.notes[0] and "8000 Hz and are resampled to 16000 Hz" in rows.notes[1]
    assert len(rows.notes) == 2  # the two share their voice: no word of caution
    assert {"asterisk-core-sounds-en-wav", "asterisk-core-sounds-es-wav"} <= set(PACKAGES)


def test_the_samples_are_those_of_the_files(rows: SpeechRows) -> None:
    """Against another decoder, for a prompt of each language."""
    for language, label in (("en", 0), ("es", 1)):
        rate, whole = wavfile.read(folder(language) / "vm-goodbye.wav")
        assert rate == 8000 and whole.dtype == np.int16
        samples = whole / np.float32(2**15)
        same = [
            w for w, y in zip(rows.waveforms, rows.labels, strict=True) if y == label and len(w) == 2 * len(samples)
        ]
        assert any(np.allclose(w, resample_poly(samples, 2, 1), atol=1e-6) for w in same)


def test_no_recording_is_in_train_and_test(rows: SpeechRows) -> None:
    assert len(set(rows.identities())) == len(rows)
    again = asterisk.asterisk_languages()
    assert again.identities() == rows.identities() and again.sha256 == rows.sha256
    mixed = rows.shuffled(3)
    train, test = mixed.subset(range(64)), mixed.subset(range(64, len(rows)))
    assert train.labels.count(0) in (33, 34) and not set(train.identities()) & set(test.identities())


def test_what_is_left_out_is_there_and_does_not_speak() -> None:
    for language, repeated in asterisk.REPEATED.items():
        for name in repeated:
            assert asterisk.is_used("digits/7", language) and not asterisk.is_used(name, language)
    assert not asterisk.is_used("silence/3", "en") and not asterisk.is_used("phonetic/b_p", "es")
    assert not asterisk.is_used("beep", "ru")
    english = folder("en")
    for name in asterisk.NOT_SPEECH | asterisk.REPEATED["en"]:
        assert (english / f"{name}.wav").is_file()
    quiet = [asterisk._read(path) for path in english.glob("silence/*.wav")]
    assert len(quiet) == 10 and max(np.abs(w).max() for w in quiet) < 1e-4


def like(a: np.ndarray, b: np.ndarray) -> float:
    """The largest normalised cross-correlation."""
    return float(np.abs(correlate(a, b, method="fft")).max() / np.sqrt((a @ a) * (b @ b)))


def test_repeated_recordings_are_repeated() -> None:
    pairs = {"en": [("auth-thankyou", "privacy-thankyou"), ("queue-seconds", "seconds")]}
    pairs["es"] = [("digits/and", "vm-and"), ("conf-locked", "conf-lockednow"), ("invalid", "pbx-invalid")]
    pairs["es"] += [("vm-minutes", "minutes"), ("queue-seconds", "seconds"), ("please-try-again", "vm-pls-try-again")]
    for language, known in pairs.items():
        assert {second for _, second in known} == asterisk.REPEATED[language]
        for first, second in known:
            a, b = (asterisk._read(folder(language) / f"{name}.wav") for name in (first, second))
            assert like(a, b) > 0.95 and asterisk.is_used(first, language), (first, second)


@pytest.mark.slow
def test_no_other_recording_is_repeated(rows: SpeechRows) -> None:
    """All pairs of like length and loudness, within a language and across the two that share a voice."""
    halved = [w[::2].astype(np.float64) for w in rows.waveforms]  # every other sample is the original one, filtered
    found = [w for w in sorted(halved, key=len)]
    envelopes = [np.log1p(1e3 * np.sqrt(np.square(w[: len(w) // 160 * 160]).reshape(-1, 160).mean(1))) for w in found]
    compared = 0
    for i, (a, ea) in enumerate(zip(found, envelopes, strict=True)):
        for b, eb in zip(found[i + 1 :], envelopes[i + 1 :], strict=True):
            if len(b) - len(a) > 800:
                break
            near = (
                max(
                    float(np.corrcoef(ea[max(0, s) : max(0, s) + n], eb[max(0, -s) : max(0, -s) + n])[0, 1])
                    for s in (-1, 0, 1)
                    if (n := min(len(ea) - max(0, s), len(eb) - max(0, -s))) > 5
                )
                if len(ea) > 8
                else 1.0
            )
            if near > 0.95:
                compared += 1
                assert like(a, b) < 0.85
    assert compared > 50


def test_five_languages() -> None:
    for language in asterisk.VOICES:
        folder(language)
    rows = asterisk.asterisk_languages(["ru", "it", "fr", "es", "en"], sampling_rate=8000)
    assert rows.label_names == ["ru", "it", "fr", "es", "en"] and rows.sampling_rate == 8000
    assert [rows.labels.count(i) for i in range(5)] == [530, 554, 515, 477, 522]
    assert len(set(rows.identities())) == len(rows) and min(map(len, rows.waveforms)) > 800
    assert all(a <= b for a, b in pairwise(rows.labels))
    assert "recognise the speaker" in rows.notes[-1] and "'ru', 'it', 'fr'" in rows.notes[-1]


def test_bad_requests() -> None:
    with pytest.raises(SettingError, match=r"no recordings in language 'de': choose from en, es, fr, it, ru"):
        asterisk.asterisk_languages(["en", "de"])
    for languages in (["en"], ["en", "en"], []):
        refusal(SettingError, "at least two different ones", asterisk.asterisk_languages, languages)


def test_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    voice = tmp_path / asterisk.SOUNDS / asterisk.VOICES["en"]
    voice.mkdir(parents=True)
    shutil.copy(folder("en") / "hello.wav", voice)
    monkeypatch.setattr(asterisk, "package_path", lambda name, reporter: tmp_path)
    with pytest.raises(DataError, match=r"does not hold the recordings of asterisk-core-sounds-en-wav 1\.6\.1-1"):
        asterisk.asterisk_languages()
