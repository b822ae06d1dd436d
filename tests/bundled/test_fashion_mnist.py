from __future__ import annotations

import gzip
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ranksure.bundled import fashion_mnist as module
from ranksure.bundled import packages
from ranksure.bundled.fashion_mnist import CLASSES, FILES, FOLDER, fashion_mnist
from ranksure.errors import DataError, SettingError
from ranksure.tasks.load import load_samples
from tests.refusals import refusal


def test_both_splits() -> None:
    """Counts and the first labels as the authors publish them; the IDX files are read by hand here."""
    train, test = fashion_mnist("train"), fashion_mnist("test")
    assert (len(train), len(test)) == (60_000, 10_000)
    assert Counter(train.labels) == dict.fromkeys(range(10), 6000)
    assert Counter(test.labels) == dict.fromkeys(range(10), 1000)
    assert train.label_names == test.label_names == list(CLASSES)
    assert [CLASSES[label] for label in train.labels[:4]] == ["Ankle boot", "T-shirt/top", "T-shirt/top", "Dress"]
    assert [CLASSES[label] for label in test.labels[:4]] == ["Ankle boot", "Pullover", "Trouser", "Trouser"]
    folder = packages.package_path(module.PACKAGE) / FOLDER
    for rows, split in ((train, "train"), (test, "test")):
        raw = gzip.decompress((folder / FILES[split][0]).read_bytes())
        assert raw[:4] == b"\0\0\x08\x03" and len(raw) == 16 + len(rows) * 784
        for index in (0, 17, len(rows) - 1):
            image = rows.images[index]
            assert image.shape == (28, 28) and image.dtype == np.uint8
            assert image.tobytes() == raw[16 + 784 * index : 16 + 784 * (index + 1)]
    assert train.sha256 != test.sha256 and train.notes == []


def test_no_training_image_is_in_the_test_split() -> None:
    known = set(fashion_mnist("train").identities())
    assert len(known) == 60_000  # no image is twice in training either
    assert not known & set(fashion_mnist("test").identities())


def test_samples_are_stratified_and_repeatable() -> None:
    rows = fashion_mnist("test")
    first = rows.shuffled(3).subset(range(40))
    assert Counter(first.labels) == dict.fromkeys(range(10), 4)
    assert first.identities() == rows.shuffled(3).subset(range(40)).identities()
    assert first.identities() != rows.shuffled(4).subset(range(40)).identities()
    assert load_samples("image", first) is first


def test_no_such_split() -> None:
    refusal(SettingError, "no split 'validation': use train or test", fashion_mnist, "validation")


@pytest.mark.parametrize("how", ["changed", "missing"])
def test_changed_files_are_refused(how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir(parents=True)
    if how == "changed":
        (tmp_path / FOLDER / FILES["test"][0]).write_bytes(gzip.compress(b"\0\0\x08\x03"))
    monkeypatch.setattr(module, "package_path", lambda name, reporter: tmp_path)
    message = {"changed": "is not Fashion-MNIST's", "missing": "cannot be read"}[how]
    with pytest.raises(DataError, match=f"t10k-images.*{message}.*run: rm -r '{tmp_path}'"):
        fashion_mnist("test")
