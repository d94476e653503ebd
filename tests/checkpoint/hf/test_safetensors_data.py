"""safetensors files: tensors are read once and as they were announced, and written one at a time."""

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llama_mini.checkpoint.hf.safetensors_data import read_rows, write_file
from llama_mini.checkpoint.io.atomic import new_directory
from llama_mini.checkpoint.io.safetensors_header import SafetensorsTensor, read_header
from llama_mini.errors import CheckpointError, CheckpointFormatError, CheckpointPathError


def random_tensors(seed: int = 0) -> dict[str, Tensor]:
    """Of all dtypes and odd shapes, so that in this order some lie where their dtype is not aligned."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 5), "scalar": (), "none": (0, 4), "b": (7,), "wide": (2, 1, 3), "long": (1000,)}
    dtypes = [torch.bfloat16, torch.float32, torch.float16, torch.float64]
    return {
        f"{name}.{dtype}": torch.randn(shape, generator=generator).to(dtype)
        for name, shape in shapes.items()
        for dtype in dtypes
    }


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    entries = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    write_file(path, entries, iter(tensors.values()))


def read_whole(found: Iterable[SafetensorsTensor]) -> Iterator[tuple[SafetensorsTensor, Tensor]]:
    return ((tensor, values) for tensor, _, values in read_rows(found))


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype is tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_tensors_are_read_file_after_file_in_order_and_once(tmp_path: Path) -> None:
    files = {tmp_path / "b.safetensors": random_tensors(1), tmp_path / "a.safetensors": random_tensors(2)}
    infos = []
    for path, tensors in files.items():
        save_file(tensors, path)
        infos.append(list(read_header(path).values()))
    shuffled = [info for pair in zip(*map(reversed, infos), strict=True) for info in pair]
    read = list(read_whole(shuffled))
    assert [info for info, _ in read] == infos[0] + infos[1]
    for path, tensors in files.items():
        assert_equal({info.name: tensor for info, tensor in read if info.file == path}, tensors)


@pytest.mark.parametrize("at_once", [1, 2, 3, 100])
def test_rows_are_those_of_the_whole_tensor(tmp_path: Path, at_once: int) -> None:
    path, tensors = tmp_path / "model.safetensors", random_tensors()
    save_file(tensors, path)
    found: dict[str, list[Tensor]] = {name: [] for name in tensors}
    for info, first, rows in read_rows(read_header(path).values(), lambda _: at_once):
        assert first == sum(map(len, found[info.name]))
        assert rows.ndim != 2 or len(rows) <= at_once
        found[info.name].append(rows)
    whole = {name: torch.cat(rows) if len(rows) > 1 else rows[0] for name, rows in found.items()}
    assert_equal(whole, tensors)
    assert len(found["a.torch.bfloat16"]) == -(-3 // at_once)


def test_rows_are_read_into_their_destination(tmp_path: Path) -> None:
    """More than is read at once, in pieces by two threads; not into memory of another dtype, or not contiguous."""
    path, rng = tmp_path / "model.safetensors", torch.Generator().manual_seed(0)
    sizes = {"a": (3000, 700), "b": (5,), "c": (900, 1100), "d": (64, 64), "e": (64, 64), "f": (0, 4)}
    tensors = {name: torch.randn(size, generator=rng).bfloat16() for name, size in sizes.items()}
    save_file(tensors, path)
    out = {name: torch.empty_like(tensor) for name, tensor in tensors.items() if name != "c"}
    out["d"], out["e"] = out["d"].float(), out["e"].T
    read = []

    def place(name: str, first: int, shape: tuple[int, ...]) -> Tensor | None:
        return out[name][first : first + shape[0]] if name in out else None

    for info, first, rows in read_rows(read_header(path).values(), lambda _: 1024, place):
        assert torch.equal(rows, tensors[info.name][first : first + len(rows)])
        there = place(info.name, first, tuple(rows.shape))
        if there is not None and there.data_ptr() == rows.data_ptr():
            read.append((info.name, first))
    assert read == [("a", 0), ("a", 1024), ("a", 2048), ("b", 0), ("f", 0)]
    assert all(torch.equal(out[name], tensors[name]) for name in ("a", "b"))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 8)


def cut_to_nothing(path: Path) -> None:
    os.truncate(path, 0)


def replace_by_another(path: Path) -> None:
    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    path.unlink()
    save_file(tensors, path)


def move_tensors(path: Path) -> None:
    tensors = {f"0{name}" if "scalar" in name else name: tensor for name, tensor in load_file(path).items()}
    path.unlink()
    save_file(tensors, path)


def overwrite(path: Path) -> None:
    """Same sizes, other values; the clock of files has moved on."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\1\2\3\4")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**7))


@pytest.mark.parametrize("change", [cut, cut_to_nothing, replace_by_another, move_tensors, Path.unlink])
def test_a_file_that_changed_after_its_header_is_refused(tmp_path: Path, change: Callable[[Path], None]) -> None:
    path = tmp_path / "model.safetensors"
    save_file(random_tensors(), path)
    infos = read_header(path).values()
    change(path)
    with pytest.raises(CheckpointError, match=str(path)):
        list(read_whole(infos))


@pytest.mark.parametrize("change", [cut, cut_to_nothing, overwrite, replace_by_another, Path.unlink])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, change: Callable[[Path], None]) -> None:
    path = tmp_path / "model.safetensors"
    save_file(random_tensors(), path)
    tensors = read_whole(read_header(path).values())
    next(tensors)
    change(path)
    with pytest.raises(CheckpointFormatError, match=f"{path}: it changed while it was read; load it again"):
        list(tensors)


@pytest.mark.parametrize("backend", ["pread", "mmap"])
def test_what_is_written_is_read_by_the_library(tmp_path: Path, backend: str) -> None:
    path, tensors = tmp_path / "model.safetensors", random_tensors()
    tensors["turned"] = tensors["a.torch.float32"].T
    tensors['日本 " \\ \n'] = torch.randn(2, generator=torch.Generator().manual_seed(3))
    write(path, tensors)
    with safe_open(path, framework="pt", backend=backend) as file:
        assert file.metadata() == {"format": "pt"}
        assert_equal({name: file.get_tensor(name) for name in file.keys()}, tensors)  # noqa: SIM118  (not a dict)
    assert_equal(load_file(path), tensors)
    assert [info.name for info in read_header(path).values() if 0 not in info.shape] == [
        name for name, tensor in tensors.items() if tensor.numel()
    ]
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    assert path.stat().st_mode & 0o777 == 0o666 & ~safetensors_umask()


def safetensors_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_transformers_reads_what_is_written(tmp_path: Path, tiny_dir: Path) -> None:
    shutil.copytree(tiny_dir, tmp_path / "tiny")
    write(tmp_path / "tiny" / "model.safetensors", load_file(tiny_dir / "model.safetensors"))
    found, expected = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "tiny", tiny_dir))
    assert_equal(found.state_dict(), expected.state_dict())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([torch.zeros(2, 3)], "b was announced, but there is no further tensor"),
        ([torch.zeros(2, 3), torch.zeros(4), torch.zeros(4)], "there are more tensors than the 2 that were announced"),
        ([torch.zeros(3, 2), torch.zeros(4)], r"a was announced as torch.float32 of shape \(2, 3\), but is .*\(3, 2\)"),
        ([torch.zeros(2, 3).half(), torch.zeros(4)], "a was announced as torch.float32 .*, but is torch.float16"),
    ],
    ids=["too few", "too many", "another shape", "another dtype"],
)
def test_tensors_that_were_not_announced_are_refused(tmp_path: Path, tensors: list[Tensor], message: str) -> None:
    entries = [("a", torch.float32, (2, 3)), ("b", torch.float32, (4,))]
    with pytest.raises(ValueError, match=message):
        write_file(tmp_path / "model.safetensors", entries, iter(tensors))


@pytest.mark.parametrize("name", ["a", "__metadata__"])
def test_a_name_is_announced_once(tmp_path: Path, name: str) -> None:
    entries = [("a", torch.float32, (1,)), (name, torch.float32, (1,))]
    with pytest.raises(ValueError, match=f"the name {name} is announced twice or is reserved"):
        write_file(tmp_path / "model.safetensors", entries, iter([torch.zeros(1)] * 2))


@pytest.mark.parametrize("n", [1, 10**6])
def test_a_full_disk_is_one_sentence(n: int) -> None:
    message = r"cannot write /dev/full: No space left on device; make room for \d+ bytes or give another path"
    with pytest.raises(CheckpointPathError, match=message):
        write(Path("/dev/full"), {"a": torch.zeros(n)})


@pytest.fixture
def small_files() -> Iterator[None]:
    """Files of this process end at 1 MB; Python ignores the signal that comes with it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_files")
def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointPathError, match=r"model.safetensors: File too large; make room for 8000\d{3} bytes"),
        new_directory(tmp_path / "model") as directory,
    ):
        write(directory / "model.safetensors", {name: torch.ones(10**6) for name in "ab"})
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_memory_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    script = """
import sys, torch
from pathlib import Path
from llama_mini.checkpoint.hf.safetensors_data import write_file

def peak():  # getrusage would count the process that this one was forked from
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])  # KiB

entries = [(str(i), torch.float32, (2**23,)) for i in range(6)]  # 32 MiB each
tensors = (torch.full((2**23,), float(i)) for i in range(6))
before = peak()
write_file(Path(sys.argv[1]), entries, tensors)
print((peak() - before) // 1024)
"""
    path = tmp_path / "model.safetensors"
    child = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert int(child.stdout) < 1.5 * 32
    assert [tensor[0].item() for _, tensor in read_whole(read_header(path).values())] == list(range(6))
