"""Imports run one way: no circle of files or of folders, and nothing imports what stands above it. No file is long."""

import ast
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [  # from the ground up; those of one floor may import each other, as long as there is no circle
    "errors",
    "validate",
    "machine",
    "model",
    "checkpoint memory",
    "tokenizer optimize",
    "engine",
    "eval lab server",
    "cli",
    "__main__ generate score serve eval.__main__ lab.__main__",  # the commands
]
UPWARDS = {  # Llama.from_pretrained and save_pretrained, when they are called
    ("model.llama", "checkpoint.load"),
    ("model.llama", "checkpoint.open"),
}


def modules(root: Path) -> dict[str, Path]:
    """Dotted names below the package, `model.norm`, and their files; a folder's __init__ has the folder's name."""
    files = (root / "llama_mini").rglob("*.py")
    names = {".".join(file.relative_to(root / "llama_mini").with_suffix("").parts): file for file in files}
    return {name.removesuffix(".__init__"): file for name, file in names.items() if name != "__init__"}


def imports(name: str, file: Path, known: Iterable[str]) -> set[str]:
    """What a file imports of the package anywhere in it: in functions and for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    inside = {target.removeprefix("llama_mini.") for target in found if target.startswith("llama_mini.")}
    return {target for target in inside if target in known and target != name}


def graph(root: Path = ROOT) -> dict[str, set[str]]:
    """Every module and what it imports; of a folder and a file in it, both of which an import names, the file."""
    files = modules(root)
    found = {name: imports(name, file, files) for name, file in files.items()}
    return {name: {t for t in targets if not _names_a_folder(t, targets)} for name, targets in found.items()}


def _names_a_folder(name: str, targets: set[str]) -> bool:
    return any(other.startswith(f"{name}.") for other in targets)


def floor(name: str) -> int:
    rooms = [floor.split() for floor in FLOORS]
    exact = [i for i, names in enumerate(rooms) if name in names]
    return exact[-1] if exact else next(i for i, names in enumerate(rooms) if name.split(".")[0] in names)


def going_up(arrows: Mapping[str, set[str]]) -> set[tuple[str, str]]:
    return {(name, target) for name, targets in arrows.items() for target in targets if floor(target) > floor(name)}


def circle(arrows: Mapping[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def folders(arrows: Mapping[str, set[str]], files: Mapping[str, Path]) -> dict[str, set[str]]:
    """Arrows between folders, neither of which lies in the other."""

    def home(name: str) -> str:
        return name if files[name].stem == "__init__" else name.rpartition(".")[0]

    found: dict[str, set[str]] = {}
    for name, targets in arrows.items():
        if floor(name) == len(FLOORS) - 1:
            continue
        for target in targets:
            a, b = home(name), home(target)
            if a and b and a != b and not f"{a}.".startswith(f"{b}.") and not f"{b}.".startswith(f"{a}."):
                found.setdefault(a, set()).add(b)
    return found


def test_every_module_has_a_floor() -> None:
    assert all(floor(name) >= 0 for name in modules(ROOT))
    assert {name.split(".")[0] for name in modules(ROOT)} == {
        name for names in FLOORS for name in names.split() if "." not in name
    }


def test_nothing_imports_what_stands_above_it() -> None:
    assert going_up(graph()) == UPWARDS


def test_checkpoint_builds_the_class_it_is_given() -> None:
    assert not [name for name, targets in graph().items() if floor(name) == 4 and "model.llama" in targets]


def test_there_is_no_circle_of_files() -> None:
    arrows = graph()
    for name, target in UPWARDS:
        arrows[name].remove(target)
    assert circle(arrows) == []


def test_there_is_no_circle_of_folders() -> None:
    arrows = graph()
    for name, target in UPWARDS:
        arrows[name].remove(target)
    assert circle(folders(arrows, modules(ROOT))) == []


@pytest.mark.parametrize(
    ("file", "line", "fault"),
    [
        ("model/norm.py", "from llama_mini.engine.llm import LLM", "up"),
        ("model/norm.py", "def late():\n    import llama_mini.checkpoint.load", "up"),
        ("model/norm.py", "from llama_mini.model import config", "circle"),
        ("tokenizer/backend.py", "from llama_mini.optimize import fuse", "folders"),
    ],
)
def test_a_wrong_import_is_seen(file: str, line: str, fault: str, tmp_path: Path) -> None:
    sources = {
        "model/norm.py": "",
        "model/config.py": "import llama_mini.model.norm",
        "optimize/fuse.py": "from llama_mini.tokenizer import tokenizer",
        "tokenizer/backend.py": "",
        "tokenizer/tokenizer.py": "",
        "engine/llm.py": "",
        "checkpoint/load.py": "",
    }
    for name, text in (sources | {file: line}).items():
        path = tmp_path / "llama_mini" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        (path.parent / "__init__.py").touch()
    arrows = graph(tmp_path)
    faults = {
        "up": bool(going_up(arrows)),
        "circle": bool(circle(arrows)),
        "folders": bool(circle(folders(arrows, modules(tmp_path)))),
    }
    assert faults[fault]


def test_no_file_has_more_than_300_lines() -> None:
    folders = [ROOT / name for name in ("llama_mini", "scripts", "tests")]
    files = [file for folder in folders for file in folder.rglob("*") if file.suffix in (".py", ".h", ".cpp")]
    assert len(files) > 400
    lines = {str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    assert {name: n for name, n in lines.items() if n > 300} == {}
