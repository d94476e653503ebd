"""A file of a checkpoint lies inside its directory: plain names and links that stay, and the Hugging Face hub's own."""

from pathlib import Path

import pytest

from llama_mini.checkpoint.io.files import inside, read_json
from llama_mini.errors import CheckpointPathError


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "a/b", "a/", "./a", "a/../b", "", ".", "..", "a\0b", "\0", "\ud800", "x/" * 10**6],
)
def test_a_name_that_is_not_plain_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointPathError, match="is not a plain file name") as caught:
        inside(tmp_path, name)
    assert str(caught.value).startswith(str(tmp_path))
    assert len(str(caught.value).encode()) < len(str(tmp_path)) + 200


def test_a_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointPathError) as caught:
        read_json(inside(tmp_path, "x" * 5000))
    assert len(str(caught.value)) < 5200


@pytest.mark.parametrize("name", ["model.safetensors", "a b", "..a", "日本", "a\\b", "-", "~", "$HOME"])
@pytest.mark.parametrize("there", [True, False])
def test_a_plain_name_is_inside(tmp_path: Path, name: str, there: bool) -> None:
    if there:
        (tmp_path / name).write_text("")
    assert inside(tmp_path, name) == tmp_path / name


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A checkpoint directory beside a file that is none of it."""
    (tmp_path / "secret").write_text("")
    (tmp_path / "model" / "sub").mkdir(parents=True)
    (tmp_path / "model" / "file").write_text("")
    (tmp_path / "model" / "sub" / "file").write_text("")
    return tmp_path / "model"


@pytest.mark.parametrize("target", ["file", "sub/file", "sub/../file", "{directory}/file", "../model/file"])
def test_a_link_that_stays_inside_is_followed(directory: Path, target: str) -> None:
    (directory / "link").symlink_to(target.format(directory=directory))
    (directory / "link of a link").symlink_to("link")
    for name in ("link", "link of a link"):
        assert inside(directory, name).is_file()


@pytest.mark.parametrize("target", ["../secret", "{directory}/../secret", "/etc/passwd", "sub/out", "..", "/"])
def test_a_link_that_leaves_is_refused(directory: Path, target: str) -> None:
    (directory / "sub" / "out").symlink_to("../../secret")
    (directory / "link").symlink_to(target.format(directory=directory))
    with pytest.raises(CheckpointPathError, match=f"{directory}/link is a symbolic link out of its directory, to /"):
        inside(directory, "link")


@pytest.mark.parametrize("target", ["absent", "../absent", "/absent", "link"])
def test_a_dangling_link_counts_as_missing(directory: Path, target: str) -> None:
    (directory / "link").symlink_to(target)
    assert not inside(directory, "link").is_file()


def test_the_directory_itself_may_be_a_link(directory: Path) -> None:
    alias = directory.parent / "alias"
    alias.symlink_to(directory)
    (directory / "link").symlink_to("file")
    (directory / "out").symlink_to("../secret")
    assert inside(alias, "link") == alias / "link"
    with pytest.raises(CheckpointPathError, match="out of its directory"):
        inside(alias, "out")


SHARED = "0123456789abcdef" * 4


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """The Hugging Face hub's cache: a model whose blob is a file, and one that lies in the store that models share."""
    cache = tmp_path / "hub"
    model = cache / "models--org--name"
    for folder in (model / "blobs", model / "snapshots" / "abc" / "original", cache / "blobs" / SHARED[:2]):
        folder.mkdir(parents=True)
    (model / "blobs" / "etag").write_text("")
    (cache / "blobs" / SHARED[:2] / SHARED).write_text("")
    (model / "blobs" / "shared").symlink_to(f"../../blobs/{SHARED[:2]}/{SHARED}")
    return cache


@pytest.mark.parametrize("blob", ["etag", "shared"])
@pytest.mark.parametrize("folder", ["abc", "abc/original"])
@pytest.mark.parametrize("way", ["relative", "absolute", "through a link"])
def test_a_link_of_the_hubs_cache_is_followed(cache: Path, blob: str, folder: str, way: str) -> None:
    model = cache / "models--org--name"
    directory = model / "snapshots" / folder
    alias = cache.parent / "alias"
    alias.symlink_to(cache)
    up = "../" * (2 + folder.count("/"))
    base = {"relative": up, "absolute": f"{model}/", "through a link": f"{alias}/{model.name}/"}[way]
    (directory / "model.safetensors").symlink_to(f"{base}blobs/{blob}")
    assert inside(directory, "model.safetensors").is_file()
    other = cache.parent / "elsewhere"
    other.symlink_to(directory)
    assert inside(other, "model.safetensors") == other / "model.safetensors"


@pytest.mark.parametrize(
    "target",
    [
        "../../refs/main",
        "../../../models--org--other/blobs/etag",
        "../../blobs/sub/etag",
        "../../blobs/out",
        "../../blobs/chain",
        f"../../../blobs/{SHARED[:2]}/{SHARED}",  # past the model's own blobs
        "../../blobs/wrong prefix",
        "../../blobs/short",
    ],
)
def test_any_other_link_of_a_snapshot_is_refused(cache: Path, target: str) -> None:
    model = cache / "models--org--name"
    for file in ("refs/main", "../models--org--other/blobs/etag", "blobs/sub/etag", "../../secret", "../blobs/00/00"):
        (model / file).parent.mkdir(parents=True, exist_ok=True)
        (model / file).write_text("")
    (cache / "blobs" / "00" / SHARED).write_text("")
    (model / "blobs" / "out").symlink_to(cache.parent / "secret")
    (model / "blobs" / "chain").symlink_to("../refs/main")
    (model / "blobs" / "wrong prefix").symlink_to(f"../../blobs/00/{SHARED}")
    (model / "blobs" / "short").symlink_to("../../blobs/00/00")
    (model / "snapshots" / "abc" / "link").symlink_to(target)
    assert (model / "snapshots" / "abc" / "link").is_file()
    with pytest.raises(CheckpointPathError, match="out of its directory"):
        inside(model / "snapshots" / "abc", "link")


@pytest.mark.parametrize("name", ["datasets--org--name", "name"])
def test_the_hubs_layout_of_another_name_is_refused(cache: Path, name: str) -> None:
    (cache / "models--org--name").rename(cache / name)
    directory = cache / name / "snapshots" / "abc"
    (directory / "model.safetensors").symlink_to("../../blobs/etag")
    with pytest.raises(CheckpointPathError, match="out of its directory"):
        inside(directory, "model.safetensors")
