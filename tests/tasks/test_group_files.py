"""Local copies of Waterbirds and CelebA, made small in their published layouts."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest
import torch

import vision_plugin as vp
from tests._images import image
from vision_plugin.tasks import read_celeba, read_waterbirds

SIZES = {0: (6, 2, 2, 6), 1: (1, 1, 1, 1), 2: (30, 30, 30, 30)}
"""Images of each group in the splits, which both data sets call 0, 1 and 2."""


@pytest.fixture(scope="module")
def model():
    return vp.load_model("demo")


def listed() -> list[tuple[int, int, int]]:
    """Split, label and nuisance of each image."""
    return [
        (split, group // 2, group % 2)
        for split, sizes in SIZES.items()
        for group, n in enumerate(sizes)
        for _ in range(n)
    ]


@pytest.fixture(scope="module")
def waterbirds(tmp_path_factory) -> Path:
    """img_id,img_filename,y,split,place,place_filename, and a folder for each species."""
    root = tmp_path_factory.mktemp("waterbirds")
    with (root / "metadata.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["img_id", "img_filename", "y", "split", "place", "place_filename"])
        for number, (split, y, place) in enumerate(listed(), 1):
            name = f"{y:03d}.Bird/Bird_{number:04d}.jpg"
            (root / name).parent.mkdir(exist_ok=True)
            image(number).save(root / name)
            writer.writerow([number, name, y, split, place, f"/o/ocean/{number:08d}.jpg"])
    return root


ATTRIBUTES = ("Blond_Hair", "Male", "Smiling")


def celeba(root: Path, *, as_csv: bool) -> Path:
    rows = listed()
    folder = root / "img_align_celeba"
    folder = folder / "img_align_celeba" if as_csv else folder  # as Kaggle has it
    folder.mkdir(parents=True)
    names = [f"{number:06d}.jpg" for number in range(1, len(rows) + 1)]
    for number, name in enumerate(names):
        image(number).save(folder / name)
    marks = [[2 * y - 1, 2 * a - 1, 1 if i % 3 else -1] for i, (_, y, a) in enumerate(rows)]
    if as_csv:
        with (root / "list_attr_celeba.csv").open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerows([["image_id", *ATTRIBUTES]])
            writer.writerows([[n, *m] for n, m in zip(names, marks, strict=True)])
        with (root / "list_eval_partition.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows(
                [["image_id", "partition"], *([n, r[0]] for n, r in zip(names, rows, strict=True))]
            )
    else:
        lines = [str(len(rows)), " ".join(ATTRIBUTES) + " "]
        lines += [
            f"{n} " + "".join(f"{m:3d}" for m in mark) for n, mark in zip(names, marks, strict=True)
        ]
        (root / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")
        (root / "list_eval_partition.txt").write_text(
            "".join(f"{n} {r[0]}\n" for n, r in zip(names, rows, strict=True))
        )
    return root


def test_waterbirds_is_read(model, waterbirds) -> None:
    data = read_waterbirds(model, waterbirds, most=None)
    assert (data.kind, data.nuisance) == ("bird", "place")
    assert data.group_names[1] == "landbird, water"
    assert data.train.sizes == SIZES[0]
    assert data.validation.sizes == SIZES[1]
    assert data.test.sizes == SIZES[2]
    name = "000.Bird/Bird_0007.jpg"  # the first landbird on water
    expected = model.preprocess([vp.open_images(str(waterbirds / "000.Bird"))[6]])
    assert (waterbirds / name).is_file()
    torch.testing.assert_close(data.train.pixels[6:7], expected)


def test_a_part_keeps_the_bias_of_training_and_balances_the_rest(
    model, waterbirds, tmp_path
) -> None:
    many = tmp_path / "many"
    shutil.copytree(waterbirds, many)
    lines = (many / "metadata.csv").read_text().splitlines()
    twice = [line for line in lines if line.split(",")[2:5] in (["0", "2", "0"], ["0", "0", "0"])]
    (many / "metadata.csv").write_text("\n".join([*lines, *twice]))
    whole, part = (read_waterbirds(model, many, most=n) for n in (None, 120))
    assert whole.test.sizes == (60, 30, 30, 30)
    assert whole.train.sizes == part.train.sizes == (12, 2, 2, 6)
    assert part.test.sizes == (30, 30, 30, 30)
    with pytest.raises(ValueError, match=r"test split has 2 images .* too few for an interval"):
        read_waterbirds(model, waterbirds, most=8)
    with pytest.raises(ValueError, match="most=3 must be at least 4"):
        read_waterbirds(model, waterbirds, most=3)


@pytest.mark.parametrize("as_csv", [False, True])
def test_celeba_is_read(model, tmp_path: Path, as_csv) -> None:
    root = celeba(tmp_path, as_csv=as_csv)
    data = read_celeba(model, root, others=("Smiling", "Male"))
    assert data.group_names == (
        "not Blond_Hair, not Male", "not Blond_Hair, Male", "Blond_Hair, not Male",
        "Blond_Hair, Male",
    )  # fmt: skip
    assert (data.train.sizes, data.test.sizes) == (SIZES[0], SIZES[2])
    assert data.train.others["Smiling"].tolist()[:4] == [0, 1, 1, 0]
    assert set(data.train.others) == {"Smiling"}
    turned = read_celeba(model, root, label="Male", nuisance="Blond_Hair", others=())
    assert turned.train.sizes == (6, 2, 2, 6)
    assert turned.kind == "Male"
    with pytest.raises(ValueError, match=r"no attribute 'Bald': use some of Blond_Hair, Male"):
        read_celeba(model, root, label="Bald", others=())
    with pytest.raises(ValueError, match="name two attributes"):
        read_celeba(model, root, label="Male")


def test_a_copy_without_groups_is_refused(model, waterbirds, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a folder that exists"):
        read_waterbirds(model, tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"no metadata.csv, which Waterbirds has"):
        read_waterbirds(model, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"list_attr_celeba.txt or list_attr_celeba.csv"):
        read_celeba(model, waterbirds)
    table = tmp_path / "metadata.csv"
    lines = (waterbirds / "metadata.csv").read_text().splitlines()
    for text, message in (
        ("img_id,img_filename,y,split\n", "no column 'place', so it says no groups"),
        (f"{lines[0]}\n1,a.jpg,2,0,0,x\n", "line 2: y is '2', not one of 0, 1"),
        (f"{lines[0]}\n1,a.jpg\n", "line 2 has not as many fields as the header"),
        (f"{lines[0]}\n1,a.jpg,0,0,0,x\n", r"train split has no image of the group \(landbird, w"),
        ("\n".join(lines), "does not exist, but the table lists it"),
        ("\n".join(lines).replace("000.Bird/", "../"), "leads out of"),
    ):
        table.write_text(text)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            read_waterbirds(model, tmp_path)


def test_a_broken_image_of_a_copy_is_named(model, tmp_path: Path) -> None:
    root = celeba(tmp_path, as_csv=False)
    (root / "img_align_celeba" / "000002.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"000002\.jpg cannot be read .* replace it"):
        read_celeba(model, root, others=())
    partition = root / "list_eval_partition.txt"
    partition.write_text(partition.read_text().replace("000003.jpg", "999999.jpg"))
    with pytest.raises(ValueError, match=r"list_eval_partition has no line for '000003.jpg'"):
        read_celeba(model, root, others=())
