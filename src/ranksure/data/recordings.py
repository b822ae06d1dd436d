"""Labelled recordings: read, decoded, mixed to mono, resampled, checked and coded.

:func:`load_speech_rows` turns a folder of class folders, a table of paths, or a data set into :class:`SpeechRows`;
whatever cannot be used is one clear :class:`~ranksure.errors.DataError`. Recordings are decoded with ``soundfile``
(wav, flac, ogg, mp3).
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.signal import resample_poly

from ranksure.data.media import Found, Seen, decode_inputs, find_inputs, inputs_in_memory
from ranksure.data.samples import Samples
from ranksure.errors import DataError, SettingError, one_line, shown
from ranksure.progress import Reporter

if TYPE_CHECKING:
    import datasets
    import pandas as pd

Waveform = NDArray[np.float32]

SAMPLING_RATE = 16_000
"""In Hz: what nearly every pretrained speech encoder reads."""
MAX_SECONDS = 120
"""Longer recordings are cut there when they are read; a task cuts further, to its own window."""
MAX_BYTES = 4 * 2**30
"""Decoded recordings are held in memory; more than this is refused."""
SUFFIXES = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au"}


@dataclass(frozen=True, kw_only=True)
class SpeechRows(Samples):
    """Labelled recordings.

    Attributes:
        waveforms: one float32 array ``(samples,)`` per row, mono, full scale 1; lengths differ.
        sampling_rate: of all of them, in Hz.
    """

    columns: ClassVar[tuple[str, ...]] = ("waveforms",)
    noun: ClassVar[str] = "recording"

    waveforms: list[Waveform]
    sampling_rate: int

    def identities(self) -> list[Hashable]:
        """A hash of each recording's samples."""
        return [_digest(waveform) for waveform in self.waveforms]

    @property
    def seconds(self) -> list[float]:
        """The duration of each recording."""
        return [len(waveform) / self.sampling_rate for waveform in self.waveforms]


def load_speech_rows(
    source: str | Path | pd.DataFrame | datasets.Dataset | datasets.DatasetDict,
    *,
    audio_column: str = "audio",
    label_column: str = "label",
    split: str | None = None,
    sampling_rate: int = SAMPLING_RATE,
    reporter: Reporter | None = None,
) -> SpeechRows:
    """Read labelled recordings.

    Args:
        source: a folder with one folder of recordings per class (or, one level up, a folder with such a folder for
            each split); a ``.csv``, ``.tsv``, ``.jsonl``, ``.json`` or ``.parquet`` file with a column of paths
            (relative to the file's folder) or of encoded recordings; a folder that ``datasets.save_to_disk`` wrote; a
            Hub id (``owner/name``, or ``owner/name:configuration``); a data frame; a data set.
        audio_column: the column of recordings: paths, encoded bytes, or dictionaries with ``array`` and
            ``sampling_rate``.
        label_column: the column of labels, as for :func:`ranksure.data.texts.load_rows`.
        split: which split, where there are several; by default ``train``, or the only one.
        sampling_rate: in Hz; recordings of another rate are resampled to it, which ``notes`` tell.
        reporter: shown the decoding; silent by default.

    Returns:
        The recordings in the source's order (folders and files by name). Several channels are averaged, and more than
        two minutes cut; ``notes`` tell either.

    Raises:
        DataError: the source cannot be read, or a recording or label cannot be used.
        MemoryBudgetError: the decoded recordings would take more than 4 GiB.
        SettingError: the arguments contradict each other.
    """
    found = find_inputs(
        source,
        column=audio_column,
        label_column=label_column,
        split=split,
        noun="recording",
        kind="audio",
        is_input=is_audio_name,
    )
    return _rows(found, sampling_rate, reporter)


def speech_rows(
    waveforms: Sequence[NDArray[Any]],
    labels: Sequence[Any],
    sampling_rate: int,
    *,
    label_names: Sequence[str] | None = None,
    source: str = "recordings in memory",
) -> SpeechRows:
    """Recordings in memory as rows, at their own sampling rate.

    Args:
        waveforms: float arrays ``(samples,)`` or ``(channels, samples)``, or int16 ones.
        labels: one per recording: class ids where ``label_names`` are given, else labels as in a file.
        sampling_rate: of all of them, in Hz.
        label_names: the name of each class id.
        source: what messages call them.

    Raises:
        DataError: a recording or label cannot be used, or their numbers differ.
    """
    values = [{"array": waveform, "sampling_rate": sampling_rate} for waveform in waveforms]
    return _rows(inputs_in_memory(values, labels, label_names, source, "recording"), sampling_rate, None)


def resampled(waveform: Waveform, rate: int, wanted: int) -> Waveform:
    """A waveform at another rate, by a polyphase filter (``scipy.signal.resample_poly``, Kaiser window)."""
    if rate == wanted:
        return waveform
    common = math.gcd(rate, wanted)
    return resample_poly(waveform, wanted // common, rate // common).astype(np.float32)


def is_audio_name(path: Path) -> bool:
    """Whether a file is a recording by its name."""
    return path.suffix.lower() in SUFFIXES


def soundfile() -> Any:
    """The library ``soundfile``, imported when a recording is read.

    Raises:
        DataError: it brings no libsndfile for this machine, and the system has none.
    """
    try:
        import soundfile
    except OSError as error:
        raise DataError(
            f"recordings are decoded by libsndfile, which is missing here ({one_line(error)}); install it (Debian: "
            "apt-get install libsndfile1)"
        ) from None
    return soundfile


# ---------------------------------------------------------------------------------------------------------------------
# decoding


def _rows(found: Found, sampling_rate: int, reporter: Reporter | None) -> SpeechRows:
    if not 1000 <= sampling_rate <= 384_000:
        raise SettingError(f"sampling rate {sampling_rate} Hz is out of range: use 1000 to 384000, as a rule 16000")
    labels, names = found.labels, found.names

    def decode(value: Any, place: str, base: Path, seen: Seen) -> Waveform:
        return _waveform(value, place, base, sampling_rate, seen)

    waveforms, notes = decode_inputs(
        found, decode, noun="recording", smaller="shorter", most=MAX_BYTES, reporter=reporter
    )
    digest = hashlib.sha256(f"{sampling_rate}\n".encode())
    for waveform, label in zip(waveforms, labels, strict=True):
        digest.update(_digest(waveform) + names[label].encode() + b"\n")
    return SpeechRows(
        waveforms=waveforms,
        sampling_rate=sampling_rate,
        labels=labels,
        label_names=names,
        source=found.source,
        sha256=digest.hexdigest(),
        notes=notes,
    )


def _digest(waveform: Waveform) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(waveform).tobytes()).digest()


def _waveform(value: Any, place: str, base: Path, sampling_rate: int, seen: Seen) -> Waveform:
    """A path, encoded bytes or an array as mono float32 at the wanted rate."""
    array, rate = _decoded(value, place, base)
    if array.ndim == 2 and array.shape[1] > 1:
        seen.converted[f"have {array.shape[1]} channels, which are averaged"] += 1
    mono = array if array.ndim == 1 else array.mean(1)
    if not len(mono):
        raise DataError(f"{place}: the recording is empty (no samples); replace or remove it")
    if not np.isfinite(mono).all():
        raise DataError(f"{place}: the recording has samples that are not finite numbers; replace or remove it")
    if len(mono) > MAX_SECONDS * rate:
        seen.converted[f"are longer than {MAX_SECONDS} s and are cut there"] += 1
        mono = mono[: MAX_SECONDS * rate]
    if rate != sampling_rate:
        seen.converted[f"have {rate} Hz and are resampled to {sampling_rate} Hz"] += 1
    return np.ascontiguousarray(resampled(mono.astype(np.float32), rate, sampling_rate))


def _decoded(value: Any, place: str, base: Path) -> tuple[NDArray[Any], int]:
    """Samples ``(n,)`` or ``(n, channels)`` at full scale 1, and their rate in Hz."""
    if isinstance(value, dict) and "array" in value:
        return _array(value["array"], value.get("sampling_rate"), place)
    if isinstance(value, dict) and set(value) >= {"bytes", "path"}:  # as datasets keeps a recording
        value = value["bytes"] if value["bytes"] is not None else value["path"]
    if value is None or (isinstance(value, (str, bytes)) and not value):
        raise DataError(f"{place}: the recording is missing; remove the row or fill it in")
    if isinstance(value, bytes):
        raw = value
    elif isinstance(value, (str, Path)):
        file = base / Path(value).expanduser()
        if not file.is_file():
            relative = "" if Path(value).is_absolute() else f" (paths are relative to {base.resolve()})"
            raise DataError(f"{place}: no such recording {file}{relative}")
        try:
            raw = file.read_bytes()
        except OSError as error:
            raise DataError(f"{place}: {file} cannot be read: {error.strerror}") from None
    else:
        raise DataError(
            f"{place}: {shown(value)} is no recording but of type {type(value).__name__}; give a path, or a dictionary "
            "with array and sampling_rate"
        )
    if not raw:
        raise DataError(f"{place}: the recording is empty (a file of 0 bytes); replace or remove it")
    library = soundfile()
    try:
        return library.read(io.BytesIO(raw), dtype="float32")
    except Exception as error:  # whatever a damaged file makes the library raise
        raise DataError(f"{place}: the recording does not decode ({_reason(error)}); replace or remove it") from None


def _reason(error: Exception) -> str:
    """Libsndfile's message without the name of the stream in memory."""
    return one_line(error).rpartition(">: ")[2].rstrip(".") or type(error).__name__


def _array(array: Any, rate: Any, place: str) -> tuple[NDArray[Any], int]:
    if not isinstance(rate, (int, np.integer)) or not 1000 <= rate <= 384_000:
        raise DataError(f"{place}: a sampling rate of {shown(rate)}; give Hz as a whole number, such as 16000")
    samples = np.asarray(array)
    if samples.dtype == np.int16:
        samples = samples / np.float32(2**15)
    if samples.dtype.kind != "f" or samples.ndim not in (1, 2) or (samples.ndim == 2 and len(samples) > 32):
        raise DataError(
            f"{place}: an array of type {samples.dtype} and shape {samples.shape}; give floats at full scale 1 (or "
            "int16), as (samples,) or (channels, samples)"
        )
    return (samples.T if samples.ndim == 2 else samples), int(rate)
