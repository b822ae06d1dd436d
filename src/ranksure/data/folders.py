"""Folders with one folder of inputs per class, as ``datasets`` calls them ``audiofolder`` and ``imagefolder``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ranksure.errors import DataError, SettingError

_SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test")


def is_saved_data_set(folder: Path) -> bool:
    """Whether ``datasets.save_to_disk`` wrote the folder."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def class_folders(
    folder: Path, split: str | None, noun: str, is_input: Callable[[Path], bool]
) -> tuple[list[Path], list[int], list[str], list[str]]:
    """Files, class ids, class names and notes of a folder of class folders.

    Classes come in the order of their names, in numeric order where all are numbers; files by path.
    The folder may hold one such folder per split (``train``, ``validation``, ``test``).

    Raises:
        DataError: inputs of no class, fewer than two classes, or a class without inputs.
        SettingError: a split is asked for where there are none.
    """
    folder = _split_folder(folder, split)
    entries = _visible(folder)
    loose = [entry for entry in entries if entry.is_file() and is_input(entry)]
    folders = [entry for entry in entries if entry.is_dir()]
    if loose:
        raise DataError(
            f"{folder} holds {noun}s of no class, such as {loose[0].name}: put each into the folder of its class, or "
            "name a .csv file with a column of paths and a column of labels"
        )
    if len(folders) < 2:
        tables = [entry.name for entry in entries if entry.suffix.lower() in {".csv", ".jsonl", ".parquet"}]
        hint = f"; or name one of its files ({', '.join(tables[:5])})" if tables else ""
        found = f"one class folder ({folders[0].name})" if folders else "no class folders"
        raise DataError(f"{folder} has {found}: put the {noun}s into one folder per class, at least two{hint}")
    if all(entry.name.isdecimal() for entry in folders):
        folders.sort(key=lambda entry: (int(entry.name), entry.name))
    files: list[Path] = []
    labels: list[int] = []
    others: list[Path] = []
    for label, entry in enumerate(folders):
        inside = sorted(file for file in entry.rglob("*") if file.is_file() and not file.name.startswith("."))
        chosen = [file for file in inside if is_input(file)]
        if not chosen:
            raise DataError(f"class folder {entry} holds no {noun}: remove it or fill it")
        files += chosen
        labels += [label] * len(chosen)
        others += [file for file in inside if not is_input(file)]
    notes = []
    if others:
        count = f"1 file that is no {noun}" if len(others) == 1 else f"{len(others)} files that are no {noun}s"
        verb = "was" if len(others) == 1 else "were"
        notes.append(f"{folder}: {count} by name {verb} left out, such as {others[0].name}.")
    return files, labels, [entry.name for entry in folders], notes


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _split_folder(folder: Path, split: str | None) -> Path:
    """The folder itself, or the one of its splits that is asked for."""
    names = [entry.name for entry in _visible(folder) if entry.is_dir()]
    splits = [name for name in names if name.lower() in _SPLITS and any(e.is_dir() for e in _visible(folder / name))]
    if not splits or splits != names:  # a class may be called "test"
        if split is not None:
            raise SettingError(f"split {split!r} was asked of {folder}, which holds no folders of splits: leave it out")
        return folder
    chosen = split or ("train" if "train" in splits else splits[0])
    if chosen not in splits or (split is None and len(splits) > 1 and chosen != "train"):
        asked = f"no split {chosen!r}" if split else "several splits and none called train"
        raise DataError(f"{folder} has {asked}; its splits are {', '.join(splits)}")
    return folder / chosen
