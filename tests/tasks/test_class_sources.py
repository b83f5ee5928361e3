"""A source returns the examples that it was made from."""

import io
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from metaopt import tasks
from metaopt.tasks import _class_sources

X = np.arange(6 * 4, dtype=np.uint8).reshape(6, 2, 2)
Y = np.array(["b", "a", "c", "a", "b", "b"])


def test_labels_and_groups_are_numbered_in_their_order():
    source = tasks.from_arrays(X, Y, group=[7, 5, 5, 7, 9, 9], superclass=["v", "u", "v"])
    assert source.class_names == ("a", "b", "c") and source.num_classes == source.num_groups == 3
    np.testing.assert_array_equal(source.y, [1, 0, 2, 0, 1, 1])
    np.testing.assert_array_equal(source.group, [1, 0, 0, 1, 2, 2])
    np.testing.assert_array_equal(source.superclass, [1, 0, 1])
    assert tasks.from_arrays(X, Y, group=[-1] * 6).group is None  # a single group does not count


def test_keep_selects_classes_rows_and_classes_with_enough_rows():
    source = tasks.from_arrays(X, Y, group=[7, 5, 5, 7, 9, 9], superclass=["v", "u", "w"])
    kept = source.keep(classes=["c", "b"])
    assert kept.class_names == ("b", "c")
    np.testing.assert_array_equal(kept.x, X[[0, 2, 4, 5]])
    np.testing.assert_array_equal(kept.y, [0, 1, 0, 0])
    np.testing.assert_array_equal(kept.group, [1, 0, 2, 2])
    np.testing.assert_array_equal(kept.superclass, [0, 1])
    assert source.keep(min_examples=2).class_names == ("a", "b")
    assert source.keep(rows=[0, 1, 4], min_examples=2).class_names == ("b",)


@pytest.mark.parametrize(
    "rows",
    [
        slice(1, 5, 2),
        slice(-5, -2, 2),
        np.array([False, True, False, True, False, False]),
        [False, True, False, True, False, False],
        np.array([3, 1, 3]),
        np.array([1, 3], np.uint8),
        range(1, 4, 2),
        (1, 3),
        jnp.array([3, 1]),
    ],
    ids=repr,
)
def test_keep_takes_slices_masks_and_numbers_of_rows(rows):
    kept = tasks.from_arrays(X, Y).keep(rows=rows)
    np.testing.assert_array_equal(kept.x, X[[1, 3]])
    assert [kept.class_names[y] for y in kept.y] == [str(Y[i]) for i in (1, 3)]


def test_turned_classes_are_classes_of_their_own():
    source = tasks.from_arrays(X, Y, group=[0, 0, 0, 1, 1, 1], superclass=[0, 1, 1]).with_rotations()
    assert source.num_classes == 12 and source.class_names[5] == "c@90" and source.num_groups == 2
    np.testing.assert_array_equal(source.x[6 + 2], [[X[2, 0, 1], X[2, 1, 1]], [X[2, 0, 0], X[2, 1, 0]]])
    assert source.class_names[source.y[6 + 2]] == "c@90"
    np.testing.assert_array_equal(source.superclass, [0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 7, 7])


def test_rows_of_all_sources_are_numbered_through():
    a, b = tasks.from_arrays(X, Y, name="a"), tasks.from_arrays(X[:3], [9, 8, 9], name="b")
    rows = _class_sources.labelled_rows([a, b])
    np.testing.assert_array_equal(rows["y"], [1, 0, 2, 0, 1, 1, 4, 3, 4])
    np.testing.assert_array_equal(rows["source"], [0] * 6 + [1] * 3)
    np.testing.assert_array_equal(rows["x"], np.concatenate([X, X[:3]]))


def test_whole_numbers_and_strings_are_classes():
    for y in ([0.0, 1.0] * 3, np.array(["nan", "b"] * 3), ["1", "2"] * 3, np.array([False, True] * 3)):
        assert tasks.from_arrays(X, y).num_classes == 2


def test_large_labels_stay_different():
    for labels in ([2**63, 2**63 + 1, -1], [2**53, 2**53 + 1, 5], np.array([2**63, 2**63 + 1, 5], np.uint64)):
        source = tasks.from_arrays(np.arange(6), [*labels, *labels], group=[*labels, *labels], superclass=labels)
        order = np.argsort(np.array([int(label) for label in labels], object))
        assert source.class_names == tuple(str(labels[i]) for i in order)
        np.testing.assert_array_equal(source.y, np.tile(np.argsort(order), 2))
        np.testing.assert_array_equal(source.group, source.y)
        assert source.superclass.tolist() != [0, 0, 0] and len(set(source.superclass.tolist())) == 3


def test_a_folder_of_images(tmp_path):
    for k, name in enumerate(("greek/alpha", "greek/beta", "latin/a")):
        (tmp_path / name).mkdir(parents=True)
        for drawer in (1, 2):
            pixels = np.full((4, 4, 3), 60 * k, np.uint8)
            pixels[:2, :2] = 40 * drawer
            Image.fromarray(pixels).save(tmp_path / name / f"{drawer}.png")
    (tmp_path / "greek" / "alpha" / "readme.txt").write_text("no image")
    source = tasks.from_image_folder(tmp_path, size=2, levels=2, group_fn=lambda path: path.stem, name="letters")
    assert source.class_names == ("greek/alpha", "greek/beta", "latin/a") and source.name == "letters"
    np.testing.assert_array_equal(source.superclass, [0, 0, 1])
    np.testing.assert_array_equal(source.group, [0, 1] * 3)
    np.testing.assert_array_equal(source.x[3], [[80, 60], [60, 60]])
    flat = tasks.from_image_folder(tmp_path / "greek", size=4, channels=3)
    assert flat.x.shape == (4, 4, 4, 3) and flat.class_names == ("alpha", "beta") and flat.superclass is None
    beta = [tmp_path / "greek" / "beta" / f"{drawer}.png" for drawer in (2, 1)]
    np.testing.assert_array_equal(tasks.read_images(beta, size=4, channels=3), flat.x[[3, 2]])
    with pytest.raises(ValueError, match="has no images"):
        tasks.from_image_folder(tmp_path, size=2)
    with pytest.raises(ValueError, match="There is no folder .*missing"):
        tasks.from_image_folder(tmp_path / "missing", size=2)


def test_hidden_files_are_skipped_and_a_folder_without_images_gives_a_warning(tmp_path):
    for color, name in enumerate(("a/1.png", "b/1.png", ".checkpoints/1.png", "b/.2.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (2, 2), color).save(tmp_path / name)
    source = tasks.from_image_folder(tmp_path, size=2)
    assert source.class_names == ("a", "b") and len(source.x) == 2
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "1.heic").write_bytes(b"of a phone")
    with pytest.warns(UserWarning, match="1 folders have no images .*: 'c'"):
        assert tasks.from_image_folder(tmp_path, size=2).class_names == ("a", "b")


@pytest.mark.parametrize(
    ("name", "color", "message"),
    [
        ("a/2.png", 1, r"1 of 3 images are equal to others, such as .*b/1.png and .*a/2.png"),
        ("a/in/2.png", 2, r"1 images do not lie in \*/ and are left out, such as .*a/in/2.png"),
        ("2.png", 2, "1 images do not lie in"),
    ],
)
def test_copies_and_images_in_other_places_give_a_warning(tmp_path, name, color, message):
    for each, gray in (("a/1.png", 0), ("b/1.png", 1), (name, color)):
        (tmp_path / each).parent.mkdir(exist_ok=True)
        Image.new("L", (2, 2), gray).save(tmp_path / each)
    with pytest.warns(UserWarning, match=message):
        assert len(tasks.from_image_folder(tmp_path, size=2).x) == 3 - ("in" in name or "/" not in name)


def test_an_error_names_all_files_that_cannot_be_read(tmp_path):
    names = [f"a/{k}.png" for k in range(8)]
    (tmp_path / "a").mkdir()
    Image.new("L", (2, 2)).save(tmp_path / names[0])
    for name in names[1:]:
        (tmp_path / name).write_bytes(b"no image")
    with pytest.raises(ValueError, match="2 more files cannot be read. Repair or remove") as caught:
        tasks.from_image_folder(tmp_path, size=2)
    assert all(name in str(caught.value) for name in names[1:6]) and names[0] not in str(caught.value)
    assert "BytesIO" not in str(caught.value)


@pytest.mark.parametrize("turn", range(10))
def test_images_are_rotated_as_the_camera_says(turn, tmp_path):
    pixels, exif = np.arange(4, dtype=np.uint8).reshape(2, 2), Image.Exif()
    exif[0x0112] = turn  # "orientation", such as 6: the first row of the file is the right side of the picture
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    expected = {
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.T,
        6: [[2, 0], [3, 1]],
        7: [[3, 1], [2, 0]],
        8: [[1, 3], [0, 2]],
    }.get(turn, pixels)
    np.testing.assert_array_equal(tasks.read_images([tmp_path / "a.png"], size=2)[0], expected)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # by Pillow
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0junk and more", b"Exif\0\0MM\0*\0\0\0\x08\0", b"Exif\0\0MM", b"Exif\0\0MM\0*"]
)
def test_images_with_damaged_camera_data_are_read(exif, tmp_path):
    pixels = np.arange(4, dtype=np.uint8).reshape(2, 2)
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(tasks.read_images([tmp_path / "a.png"], size=2)[0], pixels)


SHAPE = np.pad(np.full((2, 2), 255, np.uint8), 1)  # the alpha channel of a square


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["LA", "RGBA", "P", "L"])
def test_a_black_drawing_on_a_transparent_ground_is_black_on_white(mode, channels, tmp_path):
    # All bands but alpha are zero, so that without it there is no drawing.
    if mode.endswith("A"):
        image, options = Image.fromarray(np.stack([*[0 * SHAPE] * (len(mode) - 1), SHAPE], -1)), {}
    else:
        image, options = Image.fromarray(np.where(SHAPE, 0, 7).astype(np.uint8)), {"transparency": 7}
        image = image.convert("RGB").quantize() if mode == "P" else image
        options = {"transparency": image.getpixel((0, 0))}
    assert image.mode == mode
    image.save(tmp_path / "a.png", **options)
    pixels = tasks.read_images([tmp_path / "a.png"], size=4, channels=channels)[0]
    np.testing.assert_array_equal(pixels.reshape(4, 4, channels), 255 - np.stack([SHAPE] * channels, -1))


def test_gray_of_16_bits_keeps_its_contrast_and_32_bits_are_rejected(tmp_path):
    pixels = np.arange(0, 256, 16, dtype=np.uint8).reshape(4, 4)
    Image.fromarray(pixels.astype(np.uint16) * 257).save(tmp_path / "a.png")
    np.testing.assert_array_equal(tasks.read_images([tmp_path / "a.png"], size=4)[0], pixels)
    Image.fromarray(pixels.astype(np.uint16) * 257).save(tmp_path / "a.png", transparency=16 * 257)
    clear = tasks.read_images([tmp_path / "a.png"], size=4)[0]  # the second pixel is transparent
    np.testing.assert_array_equal(clear, np.where(pixels == 16, 255, pixels))
    for kind in (np.int32, np.float32):
        Image.fromarray(pixels.astype(kind)).save(tmp_path / "a.tif")
        with pytest.raises(ValueError, match=r"a\.tif is not an image .* its pixels are 32-bit numbers .mode '[IF]'."):
            tasks.read_images([tmp_path / "a.tif"], size=4)


class Builder:
    """What `from_tfds` asks of tfds."""

    def __init__(self, name, data_dir=None, file_format=None):
        assert file_format == "array_record"
        label = types.SimpleNamespace(names=["ant", "bee", "cat"])
        features = {"image": None, "label": label, "order": None, "by": None}
        self.data_dir = data_dir
        self.info = types.SimpleNamespace(features=features, splits={} if data_dir == "empty" else {"train": 3})

    def as_data_source(self, split):
        pixels = [np.full((2 + (split == "odd") * k, 2, 1), k, np.uint8) for k in range(3)]
        return [{"image": pixels[k], "label": [2, 0, 2][k], "order": [1, 0, 1][k], "by": k % 2} for k in range(3)]


def test_a_data_set_of_tfds(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", types.SimpleNamespace(builder=Builder))
    source = tasks.from_tfds("insects:1.0.0")
    assert source.name == "insects" and source.class_names == ("ant", "cat") and source.x.shape == (3, 2, 2)
    np.testing.assert_array_equal(source.y, [1, 0, 1])
    np.testing.assert_array_equal(source.x[:, 0, 0], [0, 1, 2])
    assert source.group is None and source.superclass is None
    source = tasks.from_tfds("insects", split="odd", size=2, group="by", superclass="order")
    assert source.x.shape == (3, 2, 2)
    np.testing.assert_array_equal(source.group, [0, 1, 0])
    np.testing.assert_array_equal(source.superclass, [0, 1])
    with pytest.raises(ValueError, match="different values of 'by', so this feature cannot be"):
        builder = lambda *args, **options: types.SimpleNamespace(
            info=Builder(*args, **options).info, as_data_source=lambda split: [
                {"image": np.zeros((2, 2, 1), np.uint8), "label": 0, "by": by} for by in range(2)
            ],
        )  # fmt: skip
        monkeypatch.setitem(sys.modules, "tensorflow_datasets", types.SimpleNamespace(builder=builder))
        tasks.from_tfds("insects", superclass="by")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", types.SimpleNamespace(builder=Builder))
    with pytest.raises(ValueError, match="must have the same shape"):
        tasks.from_tfds("insects", split="odd")
    with pytest.raises(
        FileNotFoundError, match=r"'insects' is not prepared in empty.*, data_dir='empty', .*download_and_prepare\("
    ):
        tasks.from_tfds("insects", data_dir="empty")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match=r"metaopt-jax\[episodes\]"):
        tasks.from_tfds("insects")


@pytest.mark.once
@pytest.mark.filterwarnings("ignore")
def test_a_data_set_that_tfds_itself_prepared_and_reads(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")
    image = pytest.importorskip("PIL.Image")

    class Insects(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            label = tfds.features.ClassLabel(names=["ant", "bee", "cat"])
            features = {"image": tfds.features.Image(shape=(4, 4, 1)), "label": label}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(6):
                stream = io.BytesIO()
                image.fromarray(np.full((4, 4), 10 * i, np.uint8)).save(stream, "PNG")
                stream.seek(0)
                yield i, {"image": stream, "label": i % 3}

    builder = Insects(data_dir=tmp_path, file_format="array_record")
    with pytest.raises(FileNotFoundError, match="'insects' is not prepared"):
        tasks.from_tfds("insects", data_dir=tmp_path)
    builder.download_and_prepare(file_format="array_record")
    source = tasks.from_tfds("insects", data_dir=tmp_path)
    assert source.x.shape == (6, 4, 4) and source.class_names == ("ant", "bee", "cat")
    np.testing.assert_array_equal(source.x[:, 0, 0] // 10 % 3, source.y)
    np.testing.assert_array_equal(np.sort(source.x[:, 0, 0]), 10 * np.arange(6))
    assert "tensorflow" not in sys.modules
