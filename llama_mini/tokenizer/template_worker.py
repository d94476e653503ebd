"""The worker process of sandbox.py. Chat templates are untrusted programs, so it first limits its own resources.

It is started by its path, `python -I -S FILE MEMORY SECONDS FOLDER...`: bytes of address space, seconds of processor
time for each render, and the folders of jinja2 and markupsafe. It answers requests until its standard input ends. A
message is its length in four bytes, then JSON.
"""

import sys

if __name__ == "__main__":
    sys.stdout.buffer.write(b"ready\n")
    sys.stdout.flush()
    sys.path.extend(sys.argv[3:])  # after the standard library: nothing beside jinja2 can replace its modules

import json
import mmap
import signal
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.parser
import jinja2.sandbox
from jinja2 import nodes

try:
    import resource
except ImportError:  # Windows: the parent's limits on time and output still hold
    resource = None  # type: ignore[assignment]

MAX_ERROR_CHARS = 1000
MAX_GROWTH = 32 << 20  # bytes that compiled templates and fragments of the heap may take before the worker is replaced


def main() -> None:
    memory, seconds = int(sys.argv[1]), float(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in ("RLIMIT_CORE", "RLIMIT_FSIZE", "RLIMIT_NPROC"):
        _limit(name, 0, 0)
    first_size = _address_space()
    while len(head := sys.stdin.buffer.read(4)) == 4:
        # Each render may take as much memory as the first, whatever the ones before have left behind.
        _limit("RLIMIT_AS", memory + _address_space() - first_size, memory + MAX_GROWTH)
        _limit_processor_time(seconds)
        data = _reply(sys.stdin.buffer.read(int.from_bytes(head)), memory, first_size)
        _limit_processor_time(0)
        sys.stdout.buffer.write(len(data).to_bytes(4) + data)
        sys.stdout.flush()


def _reply(request: bytes, memory: int, first_size: int) -> bytes:
    try:
        reply = answer(json.loads(request.decode("utf-8", "surrogatepass")), f"{memory >> 20} MiB")
        keep = "error" not in reply and _address_space() - first_size < MAX_GROWTH
        return json.dumps({"keep": keep, **reply}, ensure_ascii=False).encode("utf-8", "surrogatepass")
    except MemoryError:
        return json.dumps(_no_memory(f"{memory >> 20} MiB")).encode()


def answer(request: dict[str, Any], memory: str = "there is") -> dict[str, Any]:
    """The text, or what the template reads if no variables are given, or an error.

    A template is a program, so it fails in every way that Python can.
    """
    try:
        if "variables" not in request:
            tree = _environment().parse(request["template"])
            return {"names": sorted(jinja2.meta.find_undeclared_variables(tree)), "content": _content_form(tree)}
        return {"text": rendered(request["template"], request["variables"], request["max_chars"])}
    except MemoryError:
        return _no_memory(memory)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARS]}


def _no_memory(memory: str) -> dict[str, str]:
    return {"error": f"MemoryError: it needs more than {memory}"}


def rendered(source: str, variables: dict[str, Any], max_chars: int) -> str:
    """The template's text, as transformers renders it."""
    pieces: list[str] = []
    size = 0
    for piece in _compiled(source).generate(variables):
        size += len(piece)
        if size > max_chars:
            raise OverflowError(f"it writes more than {max_chars:,} characters")
        pieces.append(piece)
    return "".join(pieces)


def _content_form(tree: nodes.Template) -> str:
    """What a template takes as the content of a message: "text", "parts", or "either" if it tests for a string.

    It takes parts if it loops over the content, or indexes it, and reads a field of what it gets. Names are followed
    through variables and macros without regard to their scope.
    """
    contents: set[str] = set()
    parts: set[str] = set()

    def is_content(node: Any) -> bool:
        match node:
            case nodes.Name(name=name):
                return name in contents
            case nodes.Getattr(attr="content") | nodes.Getitem(arg=nodes.Const(value="content")):
                return True
            case nodes.Call(node=nodes.Getattr(attr="get"), args=[nodes.Const(value="content"), *_]):
                return True
            case nodes.Getitem(node=inner, arg=nodes.Slice()) | nodes.Filter(node=inner):
                return is_content(inner)
            case nodes.CondExpr(expr1=one, expr2=other) | nodes.Or(left=one, right=other):
                return is_content(one) or is_content(other)
        return False

    def is_part(node: Any) -> bool:
        match node:
            case nodes.Name(name=name):
                return name in parts
            case nodes.Getitem(arg=nodes.Slice() | nodes.Const(value=str())):
                return False
            case nodes.Getitem(node=inner) | nodes.Filter(node=inner, name="first" | "last") | nodes.For(iter=inner):
                return is_content(inner)
        return False

    def reads_field(node: Any) -> bool:
        match node:
            case nodes.Getattr(node=inner, attr=attr):
                return is_part(inner) and not hasattr(str, attr)  # content[0].isupper()
            case nodes.Getitem(node=inner, arg=nodes.Const(value=str())):
                return is_part(inner)
            case nodes.Filter(node=inner, name="map", kwargs=[nodes.Keyword(key="attribute"), *_]):
                return is_content(inner)
        return False

    macros = {macro.name: macro.args for macro in tree.find_all(nodes.Macro)}
    bound: list[tuple[Any, nodes.Node]] = [(node.target, node.node) for node in tree.find_all(nodes.Assign)]
    bound += [(loop.target, loop) for loop in tree.find_all(nodes.For)]
    for call in tree.find_all(nodes.Call):
        names = macros.get(getattr(call.node, "name", ""), [])
        bound += zip(names, call.args, strict=False)
        bound += [(name, given.value) for given in call.kwargs for name in names if name.name == given.key]
    before = None
    while before != (before := (len(contents), len(parts))):
        for target, value in bound:
            if isinstance(target, nodes.Name) and (is_part(value) or is_content(value)):
                (parts if is_part(value) else contents).add(target.name)
    if not any(map(reads_field, tree.find_all(nodes.Expr))):
        return "text"
    tested = (test.node for test in tree.find_all(nodes.Test) if test.name == "string")
    return "either" if any(map(is_content, tested)) else "parts"


def _address_space() -> int:
    """The bytes that RLIMIT_AS counts; 0 on platforms that do not report them, which do not limit them either."""
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    return 0


def _limit_processor_time(seconds: float) -> None:
    """SIGPROF ends this process after `seconds` of processor time; 0 cancels that."""
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _limit(name: str, soft: int, hard: int) -> None:
    """Lowers a limit where the platform can: a process may not raise one, and macOS refuses RLIMIT_AS."""
    kind = getattr(resource, name, None)
    if kind is None:
        return
    known = resource.getrlimit(kind)[1]
    if known != resource.RLIM_INFINITY:
        soft, hard = min(soft, known), min(hard, known)
    try:
        resource.setrlimit(kind, (soft, hard))
    except (OSError, ValueError):
        return


@lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    return _environment().from_string(source)


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": _TemplateDict(),
        "namespace": _Namespace,
    }
    return environment


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's part for training; here it renders its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Any) -> str:
        return caller()


class _TemplateDict:
    """`dict` as a template may use it: to make dictionaries, with no way to the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without names that start with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `namespace(self=...)` is legal
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}, which starts with an underscore")


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


if __name__ == "__main__":
    main()
