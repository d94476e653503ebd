"""Writes the line counts into README's tree, so that no size in it is typed by hand; --check only compares."""

import argparse
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
SOURCES = (".py", ".h", ".cpp")
ENTRY = re.compile(r"^(?P<indent> *)(?P<name>[\w./]+)(?P<gap> +)(?P<lines>\d+)(?P<rest>  .*)$")


def lines_of(path: Path) -> int:
    files = [file for file in path.rglob("*") if file.suffix in SOURCES] if path.is_dir() else [path]
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def updated(text: str) -> str:
    """The README with the count in each line of its tree set to that of the file or folder the line names."""
    head, tree, tail = re.split(r"(?<=```tree\n)(.*?)(?=```)", text, maxsplit=1, flags=re.DOTALL)
    out, folder = [], ROOT
    for line in tree.splitlines():
        if entry := ENTRY.match(line):
            path = (folder if entry["indent"] else ROOT) / entry["name"]
            folder = folder if entry["indent"] else path
            width = len(entry["gap"] + entry["lines"])
            line = f"{entry['indent']}{entry['name']}{lines_of(path):>{width}}{entry['rest']}"
        out.append(line)
    return head + "\n".join(out) + "\n" + tail


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if README is out of date, and write nothing")
    text = README.read_text(encoding="utf-8")
    new = updated(text)
    if parser.parse_args().check and new != text:
        raise SystemExit("README.md is out of date: run python scripts/update_readme.py")
    README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
