"""Writes the line counts into the trees of the READMEs, so that no size is typed by hand; --check only compares.

A tree is a block marked ```tree. Each line names a file or folder, its lines of code, and what it is. Paths start at
the README's folder; an indented line lies in the folder above it.
"""

import argparse
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = (".py", ".h", ".cpp")
TREE = re.compile(r"(?<=```tree\n)(.*?)(?=```)", re.DOTALL)
ENTRY = re.compile(r"^(?P<indent> *)(?P<name>[\w./-]+)(?P<gap> +)(?P<lines>\d+)(?P<rest>  .*)$", re.MULTILINE)


def documents() -> list[Path]:
    """Every page in Markdown of the project; not those of checkpoints in weights/."""
    top = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "weights/README.md")]
    folders = [ROOT / name for name in ("llama_mini", "scripts", "tests")]
    return top + sorted(path for folder in folders for path in folder.rglob("*.md"))


def count_lines(path: Path) -> int:
    """Of one file, or of all source files below a folder."""
    files = [file for file in path.rglob("*") if file.suffix in SOURCES] if path.is_dir() else [path]
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def with_counts(text: str, folder: Path) -> str:
    """The text of a README in `folder`, with the counts in its trees as they are now."""

    def tree(block: re.Match[str]) -> str:
        parents: dict[int, Path] = {}

        def entry(line: re.Match[str]) -> str:
            indent = len(line["indent"])
            path = next((parents[i] for i in sorted(parents, reverse=True) if i < indent), folder) / line["name"]
            for deeper in [i for i in parents if i >= indent]:
                del parents[deeper]
            parents[indent] = path
            width = len(line["gap"] + line["lines"])
            return f"{line['indent']}{line['name']}{count_lines(path):>{width}}{line['rest']}"

        return ENTRY.sub(entry, block[0])

    return TREE.sub(tree, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if a README is out of date, and write nothing")
    check = parser.parse_args().check
    for path in documents():
        text = path.read_text(encoding="utf-8")
        new = with_counts(text, path.parent)
        if check and new != text:
            raise SystemExit(f"{path.relative_to(ROOT)} is out of date: run python scripts/update_readme.py")
        if not check:
            path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
