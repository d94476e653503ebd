"""Builds the C++ operators, torch.ops.llama_mini, on first use, with this machine's compiler.

The library is kept in the user's cache folder, mode 0700; where that cannot be used, in the temporary folder. Its name
is a hash of all that it must match: the source, the flags, torch and the platform. The compiler is left out, so a
machine without one can use a library that was built elsewhere, and a wheel may carry it (scripts/make_wheel.py). If
none can be built or loaded, PyTorch's own operators do the same work more slowly.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache as cached
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path

import torch
from filelock import FileLock

from llama_mini.checkpoint.io.atomic import new_file
from llama_mini.errors import LlamaMiniWarning, RequestError
from llama_mini.machine import temporary_folder, user_cache
from llama_mini.validate import check_choice

KERNELS = ("auto", "off")
PREBUILT = "prebuilt"  # the folder beside native/ where a wheel has the library
_WIDE = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma", "-mf16c")
_X86_64 = {
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": _WIDE,
    "avx512_bf16": (*_WIDE, "-mavx512bf16"),
    "amx": (*_WIDE, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
}
# For ARM, GCC would load operands long before it uses them, more than there are registers.
_AARCH64 = {
    "neon": ("-march=armv8.2-a+dotprod", "-fno-schedule-insns"),
    "neon_bf16": ("-march=armv8.2-a+dotprod+bf16", "-fno-schedule-insns"),
}
Flags = Mapping[str, tuple[str, ...]]
VARIANTS_OF: Mapping[str, Flags] = {"x86_64": _X86_64, "AMD64": _X86_64, "aarch64": _AARCH64, "arm64": _AARCH64}
ISA_VARIANTS: Flags = VARIANTS_OF.get(platform.machine(), {})
# GCC warns about partly initialized vectors in its own intrinsics, and about the ABI of vector arguments.
_QUIET = ("-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized")
_FLAGS = ("-O3", "-std=c++20", "-fPIC", "-fno-math-errno", "-Wall", *_QUIET)


def load_kernels(kernels: str = "auto") -> bool:
    """Loads torch.ops.llama_mini, built first if necessary. False for `off` or, with one warning a process, on failure.

    Raises RequestError for a setting other than `auto` and `off`.
    """
    check_choice("kernels", kernels, KERNELS, RequestError)
    return kernels == "auto" and _loaded()


def expects_kernels(kernels: str = "auto") -> bool:
    """Whether `load_kernels` will very likely succeed: there is a compiler, or a library. Nothing is built."""
    check_choice("kernels", kernels, KERNELS, RequestError)
    machine = platform.machine()
    try:
        with as_file(files("llama_mini.optimize")) as package:
            return kernels == "auto" and (_found(package, _folders(machine), machine) is not None or bool(_compiler()))
    except OSError:
        return False


@cached  # a failed build would only fail again, after the same seconds
def _loaded() -> bool:
    try:
        _load()
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        reason = str(error).strip().splitlines()
        warnings.warn(
            f"the fast operators could not be built or loaded ({reason[0] if reason else type(error).__name__:.300}): "
            "PyTorch's own operators run instead, more slowly; install a C++ compiler (g++) to build the fast ones",
            LlamaMiniWarning,
            stacklevel=3,
        )
        return False
    _register_fakes()
    return True


def _load() -> None:
    try:
        torch.ops.load_library(str(built()))
    except OSError:  # it was built where the system's libraries are newer, say
        torch.ops.load_library(str(built(again=True)))


def _register_fakes() -> None:
    """The shape and dtype that each operator returns, which torch.export and torch.compile need."""
    fakes = {
        "layers": lambda x, *_: x.new_empty(x.shape),
        "attend": lambda qkv, k, *_: qkv.new_empty(len(qkv), 1, (qkv.shape[2] - 2 * k.shape[1]) * qkv.shape[3]),
        "gemv": lambda x, w, bias, rows: x.new_empty(*x.shape[:-1], rows, dtype=torch.float32),
        "gemm": lambda x, w, bias, rows: x.new_empty(*x.shape[:-1], rows),
        "dequantize_rows": lambda w, at, columns, dtype: at.new_empty(*at.shape, columns, dtype=dtype),
        "step": lambda tokens, *rest: (
            tokens.new_empty(len(tokens), rest[-4], dtype=torch.float32),
            tokens.new_empty(len(tokens)),
        ),
        "rms_norm": lambda x, gain, eps, flags: x.new_empty(x.shape),
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"llama_mini::{name}", fake, allow_override=True)


def built(cache: Path | None = None, again: bool = False, machine: str | None = None) -> Path:
    """The library's path; compiles it first if necessary, or in any case `again`. Raises OSError, SubprocessError.

    For another `machine` than this one, as `platform.machine()` names it, CXX must be a cross compiler.
    """
    machine = machine or platform.machine()
    folders = _folders(machine) if cache is None else [cache]
    with as_file(files("llama_mini.optimize")) as package:
        if not again and (found := _found(package, folders, machine)) is not None:
            return found
        source = package / "native"
        name = _name(source, machine)
        compiler = _compiler()
        problems = []
        for folder in folders:
            library = folder / name
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                _check_safe(folder)
                lock = FileLock(library.with_suffix(".lock"), mode=0o600).acquire()
            except (OSError, NotImplementedError) as error:  # it cannot be written, or its disk has no locks
                problems.append(error)
                continue
            with lock:
                if again or not _is_whole(library):
                    print("building the fast operators, once: 20 to 100 s", file=sys.stderr, flush=True)
                    _compile(source, compiler, library, machine)
            return library
    raise problems[0]


def _folders(machine: str) -> list[Path]:
    """Where a library may be built. Raises OSError for a processor that has no operators."""
    if machine not in VARIANTS_OF:
        raise OSError(f"they need x86-64 or 64-bit ARM; this processor is {machine}")
    return [user_cache() / "operators", temporary_folder() / "operators"]


def _found(package: Path, folders: Sequence[Path], machine: str) -> Path | None:
    """The library, if it is built."""
    libraries = [folder / _name(package / "native", machine) for folder in (package / PREBUILT, *folders)]
    return next((library for library in libraries if _is_whole(library)), None)


def _name(source: Path, machine: str) -> str:
    return f"operators-{_key(source, machine)}.so"


def _compiler() -> list[str]:
    """The words of CXX, as in `ccache g++`."""
    try:
        words = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    except ValueError as error:
        raise OSError(f"CXX is not a command: {error}") from None
    if shutil.which(words[0]) is None:
        raise OSError(f"no compiler {words[0]} on PATH")
    return words


def _check_safe(path: Path) -> None:
    """Raises OSError if another user, other than root, can change what is loaded from this folder or file."""
    state = path.stat()
    if hasattr(os, "getuid") and state.st_uid not in (os.getuid(), 0):
        raise OSError(f"{path} belongs to another user")
    if state.st_mode & 0o022:
        raise OSError(f"{path} is writable by other users: remove it, and it is created again")
    if hasattr(os, "statvfs") and os.statvfs(path).f_flag & os.ST_NOEXEC:
        raise OSError(f"{path} is on a disk that is mounted noexec")


def _is_whole(library: Path) -> bool:
    """Whether the library is safe to load: a truncated one could kill the process, so it ends with its hash."""
    try:
        _check_safe(library.parent)
        _check_safe(library)
        data = library.read_bytes()
    except OSError:
        return False
    return data[-32:] == hashlib.sha256(data[:-32]).digest()


def _key(source: Path, machine: str) -> str:
    version = torch.__version__.partition("+")[0]  # builds for CPUs and for CUDA have the same libtorch_cpu
    inputs = [version, sys.platform, machine, repr((VARIANTS_OF[machine], _FLAGS))]
    digest = hashlib.sha256("\0".join(inputs).encode())
    for path in sorted(source.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _compile(source: Path, compiler: list[str], library: Path, machine: str) -> None:
    """Compiles all ISA variants and the operators in parallel, links them aside, syncs the library and renames it."""
    root = Path(torch.__file__).parent
    include = [f"-I{root / 'include'}", f"-I{root / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"]
    with new_file(library) as made:
        folder = made.parent
        run = partial(_run, environment=os.environ | {"TMPDIR": str(folder)})  # the usual one may not be writable
        units = {isa: ["kernels.cpp", f"-DISA={isa}", *flags] for isa, flags in VARIANTS_OF[machine].items()}
        # -fopenmp without linking OpenMP: the library must use torch's own. Apple's clang takes it only in this form.
        openmp = ["-Xpreprocessor", "-fopenmp"] if sys.platform == "darwin" else ["-fopenmp"]
        units["operators"] = ["operators.cpp", "-O1", *openmp, *include]

        def compile_unit(unit: str) -> str:
            target = str(folder / f"{unit}.o")
            run([*compiler, *_FLAGS, *units[unit][1:], "-c", str(source / units[unit][0]), "-o", target])
            return target

        with ThreadPoolExecutor(len(units)) as pool:
            objects = list(pool.map(compile_unit, sorted(units, reverse=True)))  # the slowest first
        libraries = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
        if sys.platform == "darwin":
            libraries = ["-undefined", "dynamic_lookup"]
        elif machine != platform.machine():  # torch's libraries are not for it: empty ones stand in for them
            libraries = [f"-L{folder}", "-Wl,--no-as-needed", "-ltorch_cpu", "-lc10"]
            for name in ("libtorch_cpu.so", "libc10.so"):
                run([*compiler, "-shared", f"-Wl,-soname,{name}", "-xc", os.devnull, "-o", str(folder / name)])
        run([*compiler, "-shared", *objects, *libraries, "-o", str(made)])
        made.write_bytes((data := made.read_bytes()) + hashlib.sha256(data).digest())
        made.chmod(0o700)


def _run(command: list[str], environment: Mapping[str, str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=600, env=environment)
    if done.returncode:
        error = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
        raise OSError(f"{Path(command[0]).name} exited with {done.returncode}: {error.strip()}")
