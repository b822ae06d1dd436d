"""Labelled recordings: read, decoded, mixed to mono, resampled, checked and coded.

They are decoded with ``soundfile`` (wav, flac, ogg, mp3).
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

from ranksure.data import media
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
        source: as :func:`ranksure.data.media.find_inputs` takes it, which raises what it cannot use.
        audio_column: the column of recordings: paths, encoded bytes, or dictionaries with ``array`` and
            ``sampling_rate``.
        label_column: the column of labels.
        split: which split, where there are several.
        sampling_rate: in Hz; recordings of another rate are resampled to it, which ``notes`` tell.
        reporter: shown the decoding; silent by default.

    Returns:
        The recordings in the source's order (folders and files by name). Several channels are averaged, and more than
        two minutes cut; ``notes`` tell either.

    Raises:
        DataError: a recording cannot be used.
        MemoryBudgetError: the decoded recordings would take more than 4 GiB.
    """
    return _rows(media.find_inputs(source, _MEDIUM, audio_column, label_column, split), sampling_rate, reporter)


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
        labels: class ids where ``label_names`` are given, else labels as in a file.
        sampling_rate: of all of them, in Hz.
        label_names: by class id.
        source: what messages call them.

    Raises:
        DataError: a recording or label cannot be used, or their numbers differ.
    """
    values = [{"array": waveform, "sampling_rate": sampling_rate} for waveform in waveforms]
    return _rows(media.inputs_in_memory(values, labels, label_names, source, _MEDIUM.noun), sampling_rate, None)


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


_MEDIUM = media.Medium("recording", "audio", "shorter", is_audio_name)


def _rows(found: media.Found, sampling_rate: int, reporter: Reporter | None) -> SpeechRows:
    if not 1000 <= sampling_rate <= 384_000:
        raise SettingError(f"sampling rate {sampling_rate} Hz is out of range: use 1000 to 384000, as a rule 16000")

    def decode(value: Any, place: str, base: Path, seen: media.Seen) -> Waveform:
        return _waveform(value, place, base, sampling_rate, seen)

    waveforms, notes = media.decode_inputs(found, decode, _MEDIUM, MAX_BYTES, reporter)
    digests = [_digest(waveform) for waveform in waveforms]
    return SpeechRows(
        waveforms=waveforms,
        sampling_rate=sampling_rate,
        labels=found.labels,
        label_names=found.names,
        source=found.source,
        sha256=media.labelled_sha256(digests, found, f"{sampling_rate}\n".encode()),
        notes=notes,
    )


def _digest(waveform: Waveform) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(waveform).tobytes()).digest()


def _waveform(value: Any, place: str, base: Path, sampling_rate: int, seen: media.Seen) -> Waveform:
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
    value = media.given(value, place, base, _MEDIUM.noun)
    if isinstance(value, Path):
        try:
            raw = value.read_bytes()
        except OSError as error:
            raise DataError(f"{place}: {value} cannot be read: {error.strerror}") from None
    elif isinstance(value, bytes):
        raw = value
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
        raise media.undecodable(place, _MEDIUM.noun, _reason(error)) from None


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
