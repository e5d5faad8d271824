"""Data as others leave it: archives, tables without types, names, pages, sizes; and notes on what is left out."""

import io
import json
import os
import resource
import tarfile
import tempfile
import zipfile

import datasets
import numpy as np
import pandas
import pytest
from PIL import Image

from dia_diffusion.data.columns import find_image_column
from dia_diffusion.data.loading import describe_data, hold_out, load_pixels
from dia_diffusion.data.pixels import describe_images
from dia_diffusion.data.preparation import prepare_pixels
from dia_diffusion.data.sources import load_dataset_splits, load_digits_dataset
from dia_diffusion.errors import UsageError
from dia_diffusion.options.model import DataOptions
from dia_diffusion.options.training import configure_here


def encoded(value, kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(file, format=kind)
    return file.getvalue()


def load(folder, **options):
    folder.mkdir(exist_ok=True)
    return load_pixels(DataOptions(train_data_dir=str(folder), resolution=8, **options))[0]


def greys(pixels):
    return sorted(pixels.images_at(range(len(pixels)))[:, 0, 0, 0].tolist())


@pytest.mark.parametrize("archives", [1, 2])
def test_a_webdataset_of_two_kinds_of_images_is_used_whole(tmp_path, archives):
    for number in range(archives):
        files = {}
        for index in range(number, 8, archives):
            kind = ("png", "jpg")[index % 2]
            content = encoded(10 * index, {"png": "PNG", "jpg": "JPEG"}[kind])
            files |= {f"{index}.{kind}": content, f"{index}.cls": str(index % 3).encode()}
        write_archive(tmp_path / f"{number}.tar", files)
    pixels = load(tmp_path, class_conditional=True)
    assert greys(pixels) == [10 * index for index in range(8)]
    assert np.bincount(pixels.labels).tolist() == [3, 3, 2]


@pytest.mark.parametrize("form", ["bytes", "struct"])
def test_a_table_as_pandas_writes_it_holds_images_and_text_is_names_of_classes(tmp_path, form):
    cells = [encoded(value) if form == "bytes" else {"bytes": encoded(value), "path": "x.png"} for value in (1, 2, 3)]
    table = pandas.DataFrame({"picture": cells, "code": [b"no image"] * 3, "kind": ["dog", "cat", "dog"]})
    table.to_parquet(tmp_path / "a.parquet")
    pixels = load(tmp_path, class_conditional=True, label_column="kind")
    assert greys(pixels) == [1, 2, 3]
    assert (pixels.class_names, pixels.labels.tolist()) == (["cat", "dog"], [1, 0, 1])
    with pytest.raises(UsageError, match="column 'code' holds no classes"):
        load(tmp_path, class_conditional=True, label_column="code")


def write_archive(path, files):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("kind", ["tar", "tgz", "zip"])
def test_folders_in_an_archive_are_splits_and_classes_as_elsewhere(tmp_path, kind):
    places = {"train/cat": (1, 2), "train/dog": (3,), "val/dog": (4,), "val/cat": (5,)}
    files = {f"pets/{place}/{v}.png": encoded(v) for place, values in places.items() for v in values}
    write_archive(tmp_path / f"pets.{kind}", files)
    data, held_out = load_pixels(DataOptions(train_data_dir=str(tmp_path), resolution=8, class_conditional=True))
    assert (greys(data), greys(held_out)) == ([1, 2, 3], [4, 5])
    for pixels in (data, held_out):
        found = dict(zip(pixels.images_at(range(len(pixels)))[:, 0, 0, 0].tolist(), pixels.labels, strict=True))
        assert pixels.class_names == ["cat", "dog"]
        assert all((found[value] == 1) == (value in (3, 4)) for value in found)


def test_classes_in_archives_may_be_text_and_may_be_missing(tmp_path, capsys):
    files = {"0.png": encoded(0), "1.png": encoded(1), "1.cls": b"cat\n", "2.png": encoded(2), "2.cls": b"a dog"}
    write_archive(tmp_path / "a.tar", files | {"3.input.png": encoded(3), "3.target.png": encoded(4), "3.cls": b"cat"})
    pixels = load(tmp_path, class_conditional=True, on_bad_image="skip")
    assert (pixels.class_names, pixels.labels.tolist()) == (["a dog", "cat"], [1, 0, 1])
    assert greys(load(tmp_path)) == [0, 1, 2, 3]
    assert "1 more images of samples that have several" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["folder", "a.zip", "a.tar", "beside a.zip", "beside a.tar"])
@pytest.mark.parametrize("kind", ["dataset.json", "metadata.csv", "metadata.jsonl", "metadata.parquet"])
def test_tables_name_the_classes_in_folders_and_archives(tmp_path, capsys, place, kind):
    names = [f"0000{value // 2}/{value}.png" for value in range(4)]
    table = pandas.DataFrame({"file_name": names, "label": ["a", "b", "b", "a"]})
    written = {
        "dataset.json": lambda: json.dumps({"labels": table.to_numpy().tolist()}).encode(),
        "metadata.csv": lambda: table.to_csv(index=False).encode(),
        "metadata.jsonl": lambda: table.to_json(orient="records", lines=True).encode(),
        "metadata.parquet": table.to_parquet,
    }
    files = {name: encoded(value) for value, name in enumerate(names)}
    tables = {kind: written[kind]()}
    if place == "folder":
        for name, content in (files | tables).items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(content)
    elif place.startswith("beside"):
        write_archive(tmp_path / place.split()[1], files)
        (tmp_path / kind).write_bytes(tables[kind])
    else:
        write_archive(tmp_path / place, files | tables)
    pixels = load(tmp_path, class_conditional=True)
    assert (greys(pixels), pixels.class_names, pixels.labels.tolist()) == ([0, 1, 2, 3], ["a", "b"], [0, 1, 1, 0])
    assert "not read" not in capsys.readouterr().out


def test_a_dataset_json_of_another_kind_is_passed_over(tmp_path):
    files = {f"{value}.png": encoded(value) for value in range(2)}
    for content in ('{"labels": null}', '{"labels": [{"a": 1, "b": 2}]}', '["a"]', "{"):
        # Also between the images.
        write_archive(tmp_path / "edm.zip", {"0.png": files["0.png"], "dataset.json": content.encode(), **files})
        assert greys(load(tmp_path)) == [0, 1]


@pytest.mark.parametrize("ending", ["tar", "zip"])
def test_json_beside_an_image_of_an_archive_tells_its_class(tmp_path, ending):
    # Also values that no column of a table holds.
    said = [
        b'{"label": 10, "kind": "cat", "box": [1, 2], "id": 99999999999999999999}',
        b"2",
        b'{"label": 2, "kind": "dog", "text": "\\ud83d"}',
        b'{"label": "10"}',
    ]
    files = {f"{v}.{kind}": c for v, text in enumerate(said) for kind, c in (("png", encoded(v)), ("json", text))}
    write_archive(tmp_path / f"a.{ending}", files)
    pixels = load(tmp_path, class_conditional=True)
    assert (pixels.class_names, pixels.labels.tolist()) == (["2", "10"], [1, 0, 0, 1])
    kinds = load(tmp_path, class_conditional=True, label_column="kind", on_bad_image="skip")
    assert (kinds.class_names, greys(kinds)) == (["cat", "dog"], [0, 2])


def test_a_table_beside_several_archives_is_named(tmp_path, capsys):
    for number in range(2):
        write_archive(tmp_path / f"{number}.zip", {f"{number}.png": encoded(number)})
    (tmp_path / "metadata.csv").write_text("file_name,label\n0.png,a\n1.png,b\n")
    assert greys(load(tmp_path)) == [0, 1]
    assert "metadata.csv', which lies beside 2 archives. Put such a file into" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["a.tar", "a.tgz", "a.zip"])
def test_a_damaged_archive_is_named(tmp_path, name):
    write_archive(tmp_path / name, {f"{value}.png": encoded(value) for value in range(9)})
    whole = (tmp_path / name).read_bytes()
    for content in (whole[: len(whole) // 2], b"none"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=rf"the archive '.*{name}' cannot be read"):
            load(tmp_path)


def test_a_pipe_among_the_images_is_passed_over(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(1))
    os.mkfifo(tmp_path / "b.png")
    assert greys(load(tmp_path)) == [1]


def test_tables_without_rows_and_with_other_columns(tmp_path):
    pandas.DataFrame({"image": [encoded(1)]}).to_parquet(tmp_path / "a.parquet")
    pandas.DataFrame({"image": []}).to_parquet(tmp_path / "b.parquet")
    assert greys(load(tmp_path)) == [1]
    pandas.DataFrame({"image": [encoded(2)], "more": [1]}).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(UsageError, match="their columns are not the same"):
        load(tmp_path)
    (tmp_path / "a.parquet").unlink()
    pandas.DataFrame({"image": []}).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(UsageError, match="its parquet files hold no rows"):
        load(tmp_path)


def test_metadata_as_spreadsheets_write_it(tmp_path):
    for value in (1, 2):
        (tmp_path / f"{value}.png").write_bytes(encoded(value))
    table = tmp_path / "metadata.csv"
    table.write_text("\ufefffile_name;label\n1.png;10\n2.png;9\n")
    pixels = load(tmp_path, class_conditional=True)
    assert (pixels.class_names, pixels.labels.tolist()) == (["9", "10"], [1, 0])
    table.write_bytes("file_name,label\n1.png,caf\u00e9\n2.png,b\n".encode("latin-1"))
    with pytest.raises(UsageError, match=r"metadata.csv' is not UTF-8 \(column 'label'\)"):
        load(tmp_path)
    # The last one would count, in silence.
    table.write_text("file_name,label\n1.png,a\n2.png,b\n1.png,c\n")
    with pytest.raises(UsageError, match=r"describes '1\.png' again and differently"):
        load(tmp_path)


def test_text_of_held_out_images_has_the_numbers_of_training(tmp_path):
    for split, names in (("train", ["b", "a", None]), ("test", ["c", "b", "a"])):
        table = {"image": [encoded(value) for value in range(3)], "label": names}
        pandas.DataFrame(table).to_parquet(tmp_path / f"{split}.parquet")
    options = {"resolution": 8, "class_conditional": True, "on_bad_image": "skip"}
    data, held_out = load_pixels(DataOptions(dataset_name=str(tmp_path), **options))
    assert (data.class_names, data.labels.tolist(), held_out.labels.tolist()) == (["a", "b"], [1, 0], [1, 0])


def test_names_of_files_on_other_systems(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "deep" / name).write_bytes(encoded(5))
    (tmp_path / "metadata.csv").write_text("file_name,label\ndeep\\a.png,x\ndeep\\b.png,y\n")
    assert load(tmp_path, class_conditional=True).class_names == ["x", "y"]
    odd = tmp_path / "odd"
    for folder in (b"caf\xe9", b"bar"):
        place = odd / os.fsdecode(folder)
        place.mkdir(parents=True)
        (place / os.fsdecode(b"\xff.png")).write_bytes(encoded(len(folder)))
    pixels = load(odd, class_conditional=True)
    assert (greys(pixels), pixels.class_names) == ([3, 4], ["bar", "caf\ufffd"])
    (odd / "bar" / os.fsdecode(b"\xfe.png")).write_bytes(b"\x89PNG broken")
    with pytest.raises(UsageError, match=r"\ufffd.png' \(number . of the data set\) cannot be.*_image skip"):
        load(odd)
    assert len(load(odd, on_bad_image="skip")) == 2


def test_what_is_left_out_is_said(tmp_path, capsys):
    pages = [Image.new("L", (8, 8), value) for value in range(4)]
    for number in range(4):
        pages[0].save(tmp_path / f"{number}.tiff", save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "b.gif", save_all=True, append_images=pages[1:3])
    (tmp_path / "labels.csv").write_text("name,label\n0.tiff,x\n")
    pixels = load(tmp_path)
    told = describe_images(pixels, "scans")
    assert "5 images" in told
    assert "14 more pages or frames of 5 of the files are not used, only the first of each" in told
    assert "1 table ('labels.csv'). A table with a column file_name describes" in capsys.readouterr().out


def test_large_images_are_taken_up_to_our_own_limit(tmp_path):
    """Pillow itself refuses more than 179 megapixels."""
    Image.new("1", (20_000, 10_000)).save(tmp_path / "a.png")
    assert len(load(tmp_path)) == 1
    Image.new("1", (30_000, 10_000)).save(tmp_path / "b.png")
    with pytest.raises(UsageError, match=r"30000x10000 pixels, more than 268 million.*--on_bad_image skip"):
        load(tmp_path)
    rows = load_dataset_splits(train_data_dir=str(tmp_path))[0]
    with pytest.raises(UsageError, match="Repair or remove it") as caught:
        prepare_pixels(rows, 8)
    assert "--on_bad_image" not in str(caught.value)


def test_the_output_of_a_run_is_no_data(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(encoded(1))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples.png").write_bytes(encoded(2))
    assert greys(load(tmp_path)) == [1, 2]
    (tmp_path / "run" / "training_config.yaml").touch()
    assert greys(load(tmp_path)) == [1]
    assert "run', which is the output of a run" in capsys.readouterr().out
    with pytest.raises(UsageError, match="is the folder of the images"):
        configure_here({"train_data_dir": str(tmp_path), "output_dir": f"{tmp_path}/."})


@pytest.mark.parametrize("name", ["a.png", "a.parquet", "a.tar"])
def test_a_pointer_of_git_lfs_is_called_one(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UsageError, match="pointer of Git LFS"):
        load(tmp_path)


def test_a_folder_without_images_is_described(tmp_path):
    datasets.Dataset.from_dict({"image": []}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UsageError, match="it holds no rows"):
        load(tmp_path / "saved")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.heic").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"1 other file \(1 of .heic\). Unpack archives, and convert images"):
        load(tmp_path / "other")


def test_a_file_in_place_of_a_folder_is_called_one(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(1))
    for option in ("train_data_dir", "dataset_name"):
        with pytest.raises(UsageError, match=f"--{option} '.*a.png' is a file: name the folder"):
            load_pixels(DataOptions(**{option: str(tmp_path / "a.png")}))


def test_classes_of_columns_of_images_that_do_not_complete_each_other_stay():
    features = datasets.Features(left=datasets.Image(), right=datasets.Image())
    both = datasets.Dataset.from_dict({"left": [Image.new("L", (2, 2))], "right": [Image.new("L", (2, 2))]}, features)
    assert find_image_column(both, "right") == "right"


def test_a_split_holds_out_each_class_in_proportion_and_always_the_same(tmp_path):
    digits = prepare_pixels(load_digits_dataset()["train"], 8, with_labels=True)
    data, held_out = hold_out(digits, 0.1)
    assert (len(data), len(held_out)) == (1437 - 144, 144)
    exact = np.bincount(digits.labels) * 0.1
    assert np.abs(np.bincount(held_out.labels) - exact).max() < 1
    assert hold_out(digits, 0.1)[1].digest() == held_out.digest()
    images = [{image.tobytes() for image in part.images_at(range(len(part))).numpy()} for part in (data, held_out)]
    assert len(images[0] | images[1]) == len({i.tobytes() for i in digits.images_at(range(1437)).numpy()})
    assert (data.class_names, data.labels.tolist()) == (
        digits.class_names,
        [
            label
            for label, image in zip(digits.labels, digits.images_at(range(1437)).numpy(), strict=True)
            if image.tobytes() in images[0]
        ],
    )
    for name, value in (("a", 1), ("b", 2)):
        (tmp_path / f"{name}.png").write_bytes(encoded(value))
    options = DataOptions(train_data_dir=str(tmp_path), resolution=8, validation_split=0.1)
    data, held_out = load_pixels(options)
    assert (len(data), len(held_out)) == (1, 1)
    options.validation_split = 0.0
    assert "--validation_split 0.1" in describe_data(options, *load_pixels(options))["Held out"]
    with pytest.raises(UsageError, match="1 images are too few"):
        hold_out(data, 0.5)


def test_a_cache_that_cannot_be_written_is_read_and_another_place_is_named(tmp_path, monkeypatch, capsys):
    """Without permissions: the process of the tests may be that of root, whom permissions do not stop."""
    from dia_diffusion.data import cache

    cache._temporary.cache_clear()
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.png").write_bytes(encoded(1))
    (tmp_path / "table").mkdir()
    pandas.DataFrame({"image": [encoded(2)]}).to_parquet(tmp_path / "table" / "a.parquet")
    # A file in place of a folder cannot be written into by anyone.
    (tmp_path / "cache").write_text("")
    assert greys(load(images, cache_dir=str(tmp_path / "cache"))) == [1]
    said = capsys.readouterr().out
    assert f"The cache '{tmp_path / 'cache'}' cannot be written" in said
    assert "--cache_dir or HF_DATASETS_CACHE" in said
    assert greys(load(tmp_path / "table", cache_dir=str(tmp_path / "cache"))) == [2]
    assert load(images, cache_dir=str(tmp_path / "there")).fingerprint
    capsys.readouterr()
    # All that is needed is there: nothing is written.
    monkeypatch.setattr(cache, "make_folder", lambda folder: 1 / 0)
    assert greys(load(images, cache_dir=str(tmp_path / "there"))) == [1]


def test_a_full_disk_is_named_with_what_to_do(tmp_path):
    rows = load_digits_dataset()["test"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UsageError, match=r"cannot keep prepared images in '.*dia_pixels.*Make room.*--cache_dir"):
            prepare_pixels(rows, 64, cache_dir=str(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(prepare_pixels(rows, 64, cache_dir=str(tmp_path))) == 360
