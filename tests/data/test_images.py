from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ranksure.data import images
from ranksure.data.images import image_rows, load_image_rows
from ranksure.errors import DataError, MemoryBudgetError, SettingError
from ranksure.tasks.load import load_samples
from tests.refusals import refusal

RED, GREY = (250, 10, 20), 77


def save(path: Path, mode: str = "RGB", colour: object = RED, size: tuple[int, int] = (5, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)  # pyright: ignore[reportArgumentType]
    return path


def folder_of(root: Path) -> Path:
    """Two classes: three red images of 5 x 4 pixels, and two blue ones."""
    for name in ("cat/1.png", "cat/2.png", "cat/deep/3.bmp"):
        save(root / name)
    for name in ("dog/1.png", "dog/2.PNG"):
        save(root / name, colour=(0, 0, 255), size=(3, 6))
    return root


def one_error(source: object, **options: str) -> str:
    return refusal(DataError, [], load_image_rows, source, **options)


# ---------------------------------------------------------------------------------------------------------------------
# folders


def test_class_folders(tmp_path: Path) -> None:
    rows = load_image_rows(folder_of(tmp_path))
    assert (rows.labels, rows.label_names, rows.notes) == ([0, 0, 0, 1, 1], ["cat", "dog"], [])
    assert [image.shape for image in rows.images] == [(4, 5, 3)] * 3 + [(6, 3, 3)] * 2
    assert all(image.dtype == np.uint8 for image in rows.images)
    assert (rows.images[0] == np.array(RED)).all() and (rows.images[4] == np.array((0, 0, 255))).all()
    assert rows.source == str(tmp_path) and rows.noun == "image"
    again = load_samples("image", str(tmp_path))
    assert again.sha256 == rows.sha256 and again.identities() == rows.identities()
    ids = rows.identities()
    assert ids[0] == ids[1] == ids[2] != ids[3] == ids[4]  # the pixels and the shape make an image
    save(tmp_path / "dog" / "2.PNG", colour=(0, 1, 255), size=(3, 6))
    assert load_image_rows(tmp_path).sha256 != rows.sha256


def test_an_image_and_its_transpose_differ() -> None:
    flat = np.zeros((2, 8), np.uint8)
    assert len(set(image_rows([flat, flat.T, flat.copy()], [0, 1, 0]).identities())) == 2


def test_numbered_folders_come_in_numeric_order(tmp_path: Path) -> None:
    for name in ("10", "9", "1"):
        save(tmp_path / name / "x.png")
    assert load_image_rows(tmp_path).label_names == ["1", "9", "10"]


def test_hidden_and_other_files(tmp_path: Path) -> None:
    folder_of(tmp_path)
    (tmp_path / "cat" / ".DS_Store").touch()
    (tmp_path / ".git").mkdir()
    (tmp_path / "dog" / "notes.txt").touch()
    (tmp_path / "readme.md").touch()
    rows = load_image_rows(tmp_path)
    assert len(rows) == 5 and rows.label_names == ["cat", "dog"]
    assert rows.notes == [f"{tmp_path}: 1 file that is no image by name was left out, such as notes.txt."]


def test_folders_of_splits(tmp_path: Path) -> None:
    folder_of(tmp_path / "train")
    save(tmp_path / "test" / "cat" / "1.png")
    save(tmp_path / "test" / "dog" / "1.png")
    assert len(load_image_rows(tmp_path)) == 5
    assert len(load_image_rows(tmp_path, split="test")) == 2
    assert one_error(tmp_path, split="dev").endswith("has no split 'dev'; its splits are test, train")
    (tmp_path / "train").rename(tmp_path / "val")
    assert "several splits and none called train" in one_error(tmp_path)
    with pytest.raises(SettingError, match="holds no folders of splits"):
        load_image_rows(tmp_path / "val", split="train")


def test_classes_called_train_and_test(tmp_path: Path) -> None:
    save(tmp_path / "train" / "1.png")
    save(tmp_path / "test" / "1.png")
    assert load_image_rows(tmp_path).label_names == ["test", "train"]


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    assert one_error(tmp_path).endswith("has no class folders: put the images into one folder per class, at least two")
    (tmp_path / "cat").mkdir()
    (tmp_path / "meta.csv").touch()
    assert "has one class folder (cat): put" in one_error(tmp_path)
    assert one_error(tmp_path).endswith("; or name one of its files (meta.csv)")
    save(tmp_path / "dog" / "1.png")
    assert one_error(tmp_path) == f"class folder {tmp_path / 'cat'} holds no image: remove it or fill it"
    save(tmp_path / "loose.jpg")
    assert f"{tmp_path} holds images of no class, such as loose.jpg" in one_error(tmp_path)
    assert "no such file" in one_error(tmp_path / "nowhere")


# ---------------------------------------------------------------------------------------------------------------------
# decoding


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"not an image", "no image format that Pillow knows"),
        (b"", "no image format that Pillow knows"),
        ("truncated", "truncated"),
    ],
)
def test_a_file_that_does_not_decode(tmp_path: Path, content: bytes | str, reason: str) -> None:
    folder_of(tmp_path)
    path = tmp_path / "cat" / "2.png"
    if isinstance(content, str):
        noise = np.random.RandomState(0).randint(0, 255, (50, 50, 3)).astype(np.uint8)
        Image.fromarray(noise).save(path)
        content = path.read_bytes()[:3000]
    path.write_bytes(content)
    message = one_error(tmp_path)
    assert message.startswith(f"{path}: the image does not decode (") and reason in message


def test_images_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15)
    assert "the image is too large" in one_error(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    with pytest.raises(MemoryBudgetError, match=r"more than 0 GiB of memory once decoded \(reached at image 2 of 5\)"):
        load_image_rows(tmp_path)


def test_mixed_modes_become_colour_and_it_is_said(tmp_path: Path) -> None:
    folder_of(tmp_path)
    save(tmp_path / "cat" / "4.png", "L", GREY)
    rows = load_image_rows(tmp_path)
    assert rows.images[2].shape == (4, 5, 3) and (rows.images[2] == GREY).all()
    assert rows.notes == [f"{tmp_path}: 1 of 6 images are greyscale and the others in colour; all are read as RGB."]


def test_greyscale_stays(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/1.png"):
        save(tmp_path / name, "L", GREY)
    rows = load_image_rows(tmp_path)
    assert rows.notes == [] and rows.images[0].shape == (4, 5) and (rows.images[0] == GREY).all()


@pytest.mark.parametrize(
    ("mode", "colour", "suffix", "expected", "note"),
    [
        ("RGBA", (*RED, 0), "png", RED, "transparent in places"),
        ("LA", (GREY, 128), "png", GREY, "transparent in places"),
        ("1", 1, "png", 255, None),
        ("CMYK", (0, 255, 255, 0), "tif", (255, 0, 0), "are CMYK"),
        ("I;16", 0x4D12, "png", 0x4D, "have 16 bits per pixel"),
        ("P", 3, "png", None, None),
    ],
)
def test_other_modes(
    tmp_path: Path, mode: str, colour: object, suffix: str, expected: object, note: str | None
) -> None:
    paths = [tmp_path / name / f"1.{suffix}" for name in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        image = Image.new(mode, (3, 2), colour)  # pyright: ignore[reportArgumentType]
        if mode == "P":
            image.putpalette([0] * 9 + list(RED))
            expected = RED
        image.save(path)
        assert Image.open(path).mode.startswith(mode)
    rows = load_image_rows(tmp_path)
    assert (rows.images[0] == np.array(expected)).all()
    assert rows.images[0].shape == ((2, 3) if isinstance(expected, int) else (2, 3, 3))
    assert len(rows.notes) == (note is not None) and (note or "") in "".join(rows.notes)


def test_floating_pixels_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(tmp_path / name / "1.tif", "F", 0.5)
    assert "pixels of 32 bits (mode F) have no agreed white" in one_error(tmp_path)


def test_turned_as_the_camera_says(tmp_path: Path) -> None:
    upright = np.zeros((4, 6, 3), np.uint8)
    upright[0] = 255
    for name in ("a", "b"):
        exif = Image.Exif()
        exif[0x0112] = 6  # turn by 90 degrees clockwise to view
        (tmp_path / name).mkdir()
        Image.fromarray(np.rot90(upright)).save(tmp_path / name / "1.png", exif=exif)
    assert (load_image_rows(tmp_path).images[0] == upright).all()


def test_first_frame_of_several(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        frames = [Image.new("L", (4, 4), value) for value in (10, 200)]
        frames[0].save(tmp_path / name / "1.tif", save_all=True, append_images=frames[1:])
    rows = load_image_rows(tmp_path)
    assert (rows.images[0] == 10).all()
    assert rows.notes == [f"{tmp_path}: 2 of 2 images have several frames, of which the first is read."]


# ---------------------------------------------------------------------------------------------------------------------
# tables


def table(path: Path, records: list[dict[str, object]]) -> Path:
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, records[0])
            writer.writeheader()
            writer.writerows(records)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        pd.DataFrame(records).to_parquet(path)
    return path


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.parquet"])
def test_paths_in_a_table(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    absolute = save(tmp_path / "elsewhere" / "x.png", colour=(1, 2, 3))
    save(tmp_path / "data" / "img" / "y.png")
    records: list[dict[str, object]] = [
        {"file": "img/y.png", "kind": "red"},
        {"file": str(absolute), "kind": "dark"},
    ]
    path = table(tmp_path / "data" / name, records)
    monkeypatch.chdir(tmp_path)  # paths are relative to the table, not to where the command runs
    rows = load_image_rows(path, image_column="file", label_column="kind")
    assert (rows.labels, rows.label_names) == ([1, 0], ["dark", "red"])
    assert (rows.images[0] == np.array(RED)).all() and (rows.images[1] == np.array((1, 2, 3))).all()
    # another image under the same name is other data
    save(tmp_path / "data" / "img" / "y.png", colour=(9, 9, 9))
    assert load_image_rows(path, image_column="file", label_column="kind").sha256 != rows.sha256


def test_bad_rows_of_a_table(tmp_path: Path) -> None:
    save(tmp_path / "y.png")
    path = table(tmp_path / "r.csv", [{"image": "y.png", "label": "a"}, {"image": "gone.png", "label": "b"}])
    assert one_error(path) == (
        f"{path}: row 2 (line 3), column 'image': no such image {tmp_path / 'gone.png'} (paths are relative to "
        f"{tmp_path})"
    )
    path = table(tmp_path / "r.csv", [{"image": "y.png", "label": "a"}, {"image": "", "label": "b"}])
    assert "row 2 (line 3), column 'image': the image is missing" in one_error(path)
    path = table(tmp_path / "r.csv", [{"image": "y.png", "label": "a"}, {"image": "y.png", "label": ""}])
    assert "the label is missing" in one_error(path)
    path = table(tmp_path / "r.csv", [{"image": "y.png", "label": "a"}, {"image": "y.png", "label": "a"}])
    assert "every row has the label 'a'" in one_error(path)
    path = table(tmp_path / "r.jsonl", [{"image": 3, "label": "a"}, {"image": "y.png", "label": "b"}])
    assert "column 'image': 3 is no image but of type int" in one_error(path)
    assert "has no column 'picture'" in one_error(path, image_column="picture")
    with pytest.raises(SettingError, match="must differ"):
        load_image_rows(path, image_column="label")
    path.write_text('{"image": "r.jsonl", "label": 0}\n{"image": "y.png", "label": 1}\n')
    assert "row 1 (line 1), column 'image': the image does not decode" in one_error(path)


def test_a_label_that_training_does_not_know(tmp_path: Path) -> None:
    rows = load_image_rows(folder_of(tmp_path / "test"))
    with pytest.raises(DataError, match=r"has the label 'dog' \(2 rows\), which the training data does not have"):
        rows.with_label_names(["bird", "cat"])
    assert rows.with_label_names(["bird", "cat", "dog"]).labels == [1, 1, 1, 2, 2]


# ---------------------------------------------------------------------------------------------------------------------
# data sets and memory


def test_a_data_set_with_an_image_feature(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y", "z"])})
    pictures = [Image.new("RGB", (5, 4), RED), Image.new("RGB", (2, 2), (0, 0, 9))]
    made = datasets.Dataset.from_dict({"image": pictures, "label": [2, 0]}, features=features)
    made.save_to_disk(str(tmp_path / "saved"))
    made.to_parquet(str(tmp_path / "made.parquet"))
    for source in (made, tmp_path / "saved", tmp_path / "made.parquet"):
        rows = load_image_rows(source)
        assert (rows.labels, rows.label_names) == ([2, 0], ["x", "y", "z"])
        assert rows.images[0].shape == (4, 5, 3) and (rows.images[0] == np.array(RED)).all()
        assert any("has no row of 'y'" in note for note in rows.notes)


def test_a_damaged_image_of_a_data_set_is_named(tmp_path: Path) -> None:
    import datasets

    good = io.BytesIO()
    Image.new("L", (3, 3)).save(good, "png")
    column = [{"bytes": good.getvalue(), "path": None}, {"bytes": b"x", "path": "b.png"}, None]
    for count, reason in ((2, "row 2, column 'image': the image does not decode"), (3, "row 2")):
        made = datasets.Dataset.from_dict({"image": column[:count], "label": ["a", "b", "c"][:count]})
        assert reason in one_error(made.cast_column("image", datasets.Image()))
    made = datasets.Dataset.from_dict({"image": [column[0], None], "label": ["a", "b"]})
    assert "row 2, column 'image': the image is missing" in one_error(made.cast_column("image", datasets.Image()))


def test_arrays_and_pictures_in_memory() -> None:
    grey = np.full((3, 4), 9, np.uint8)
    rows = image_rows([grey, grey[:, :, None], Image.new("L", (2, 2), 8)], np.array([1, 0, 1]), label_names=["a", "b"])
    assert rows.labels == [1, 0, 1] and [image.shape for image in rows.images] == [(3, 4), (3, 4), (2, 2)]
    frame = pd.DataFrame({"image": [grey, np.stack([grey] * 3, 2)], "label": ["p", "q"]})
    assert [image.shape for image in load_image_rows(frame).images] == [(3, 4, 3), (3, 4, 3)]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 3), np.float32), "pixels of type float32; give uint8"),
        (np.zeros((3, 8, 8), np.uint8), r"an array of shape \(3, 8, 8\); give .* channels last"),
        (np.zeros((0, 8), np.uint8), r"an array of shape \(0, 8\)"),
        ([[1, 300]], "pixels of type int64"),
    ],
)
def test_arrays_that_are_no_images(array: object, message: str) -> None:
    good = np.zeros((3, 3), np.uint8)
    with pytest.raises(DataError, match=f"^data frame: row 2, column 'image': {message}"):
        load_image_rows(pd.DataFrame({"image": [good, array], "label": ["a", "b"]}))


def test_numbers_that_do_not_match() -> None:
    grey = np.zeros((3, 3), np.uint8)
    with pytest.raises(DataError, match="2 images but 1 labels"):
        image_rows([grey, grey], [0])
    with pytest.raises(DataError, match="there is no image"):
        image_rows([], [])
    with pytest.raises(DataError, match="class id 2 of 2 named classes"):
        image_rows([grey, grey], [0, 2], label_names=["a", "b"])


def test_progress_is_reported(tmp_path: Path) -> None:
    from contextlib import nullcontext

    seen: list[tuple[int, int]] = []

    class Reporter:
        def stage(self, title: str):
            assert title == "Decoding 5 images"
            return nullcontext(lambda done, total: seen.append((done, total)))

    load_image_rows(folder_of(tmp_path), reporter=Reporter())
    assert seen == [(i, 5) for i in range(1, 6)]
