"""Spoken-language identification on the voice prompts of Asterisk, from Debian ``asterisk-core-sounds-*-wav``.

Each package holds the same few hundred telephone prompts ("Please enter your password") in one language, spoken by one
voice, 8 kHz; the label is the package's language. English and Spanish share their voice (Allison Smith), so that
for the two default languages the speaker does not tell the language; French, Italian and Russian have a voice each,
where it does. Licences: CC BY-SA 3.0 (English, Spanish, French) and CC BY 3.0 (Italian, Russian).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from ranksure.bundled.packages import PACKAGES, package_path, verified_folder
from ranksure.data.recordings import SAMPLING_RATE, SpeechRows, Waveform, resampled, soundfile
from ranksure.data.samples import listed
from ranksure.errors import SettingError
from ranksure.progress import Reporter, Silent

SOUNDS = "usr/share/asterisk/sounds"
ORIGINAL_RATE = 8000

VOICES = {
    "en": "en_US_f_Allison",
    "es": "es_MX_f_Allison",
    "fr": "fr_CA_f_June",
    "it": "it_IT_m_Carlo",
    "ru": "ru_RU_f_IvrvoiceRU",
}
"""Languages, and the folder of each one's voice."""

SOUNDS_SHA256 = {
    "en": "f91f9ce0c2bf34eee254042c2e67187786f08961d1366f2a82b631fbb9036805",
    "es": "05b41770c843b22a84e553277f50c838d59b92c6b78b186651a085f2679f1a54",
    "fr": "f61a586db3fc64dc6b22cb97139f05db5247de3c7bd953b37c039e4e2ec5abb8",
    "it": "d26660026f72cd018449f6caaacf0e9f4684fe93fc19a43440cfc6fcebd92f98",
    "ru": "0f6769437537fb74ee770ed5208a084c95a9786a71b0f98c31a23b5314bb2711",
}
"""Of all wav files and their names, as :func:`~ranksure.bundled.packages.tree_sha256` reads them."""

NOT_SPEECH = {
    "ascending-2tone",
    "beep",
    "beeperr",
    "confbridge-join",
    "confbridge-leave",
    "descending-2tone",
    "tt-monkeys",
}
"""Tones and animals: the same recording in several packages."""

NO_LANGUAGE = ("silence/", "phonetic/")
"""Folders whose content is of no language: silence, and the spelling alphabet (bravo, whiskey, zulu in several)."""

REPEATED = {
    "en": {"privacy-thankyou", "seconds"},
    "es": {"conf-lockednow", "minutes", "pbx-invalid", "seconds", "vm-and", "vm-pls-try-again"},
    "fr": {"second-time", "vm-and", "vm-message"},
    "it": {"spy-iax2"},
    "ru": set[str](),
}
"""Second copies of a recording under another name. The largest normalised cross-correlation of such a pair is above
0.95; that of any other pair of like length and loudness over time stays below 0.8, within a language and across."""


def asterisk_languages(
    languages: Sequence[str] = ("en", "es"), *, sampling_rate: int = SAMPLING_RATE, reporter: Reporter | None = None
) -> SpeechRows:
    """Prompts of several languages, labelled with their language.

    Left out, by name: tones, silence, the spelling alphabet, second copies of a recording, and recordings without
    samples. What remains holds no recording twice.

    Args:
        languages: two to five of ``en``, ``es``, ``fr``, ``it``, ``ru``; class ids follow this order.
        sampling_rate: in Hz; the recordings have 8000 and are resampled to it.
        reporter: shown the downloads (about 18 MB each, once) and the reading.

    Returns:
        The recordings by language, then by name: take samples with ``shuffled``.

    Raises:
        DataError: a package cannot be fetched, or its files are not those expected.
        SettingError: fewer than two languages, one twice, or an unknown one.
    """
    languages = list(languages)
    for language in languages:
        if language not in VOICES:
            raise SettingError(f"there are no recordings in language {language!r}: choose from {', '.join(VOICES)}")
    if len(set(languages)) < max(2, len(languages)):
        raise SettingError(f"languages {', '.join(languages)}: give at least two different ones")
    waveforms: list[Waveform] = []
    labels: list[int] = []
    digest = hashlib.sha256(f"{sampling_rate}\n".encode())
    left_out = 0
    for label, language in enumerate(languages):
        digest.update(f"{language} {PACKAGES[_package(language)].sha256}\n".encode())
        spoken, silent = _prompts(language, sampling_rate, reporter)
        waveforms += spoken
        labels += [label] * len(spoken)
        left_out += silent
    notes = [
        f"{left_out} of {left_out + len(labels)} recordings were left out: tones, silence, the spelling alphabet, and "
        "second copies."
    ]
    if sampling_rate != ORIGINAL_RATE:
        notes.append(f"All recordings have {ORIGINAL_RATE} Hz and are resampled to {sampling_rate} Hz.")
    if single := [language for language in languages if language not in ("en", "es")]:
        notes.append(
            f"One voice speaks each language, and no other one, in {listed(single)}: there a model may recognise the "
            "speaker instead of the language."
        )
    return SpeechRows(
        waveforms=waveforms,
        sampling_rate=sampling_rate,
        labels=labels,
        label_names=languages,
        source=f"Asterisk prompts ({', '.join(languages)})",
        sha256=digest.hexdigest(),
        notes=notes,
    )


def is_used(name: str, language: str) -> bool:
    """Whether a recording (its path below the voice's folder, without suffix) is among the rows."""
    return not (name in NOT_SPEECH or name.startswith(NO_LANGUAGE) or name in REPEATED[language])


def _package(language: str) -> str:
    return f"asterisk-core-sounds-{language}-wav"


def _prompts(language: str, sampling_rate: int, reporter: Reporter | None) -> tuple[list[Waveform], int]:
    """The recordings in use, by name and at the wanted rate, and how many are left out."""
    package = _package(language)
    root = package_path(package, reporter)
    below = f"{SOUNDS}/{VOICES[language]}"
    folder = verified_folder(package, root, below, "*.wav", SOUNDS_SHA256[language], "recordings")
    paths = sorted(folder.rglob("*.wav"), key=lambda path: path.relative_to(folder).as_posix())
    spoken = []
    with (reporter or Silent()).stage(f"Reading the prompts in {language}") as advance:
        for index, path in enumerate(paths):
            if is_used(path.relative_to(folder).with_suffix("").as_posix(), language) and len(samples := _read(path)):
                spoken.append(resampled(samples, ORIGINAL_RATE, sampling_rate))
            advance(index + 1, len(paths))
    return spoken, len(paths) - len(spoken)


def _read(path: Path) -> Waveform:
    return soundfile().read(path, dtype="float32")[0]  # 16 bits, one channel, ORIGINAL_RATE: its checksum was verified
