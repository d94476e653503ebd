"""Renders one chat template in a process of its own: an untrusted program, so memory and time are limited first.

`chat.render` runs this file by its path, `python -I -S FILE MEMORY SECONDS FOLDER...`: bytes of address space, seconds
of processor time, and where jinja2 and markupsafe are. It reads one JSON request and writes one JSON answer.
"""

import json
import sys
from datetime import datetime
from typing import Any

sys.path.extend(sys.argv[3:])  # behind the standard library, so that nothing beside jinja2 can stand in for it

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

try:
    import resource
except ImportError:  # Windows: the parent's limits on time and output still hold
    resource = None  # type: ignore[assignment]

MAX_ERROR_CHARS = 1000


def main() -> None:
    memory, seconds = map(int, sys.argv[1:3])
    if resource is not None:
        _limit("RLIMIT_AS", memory, memory)
        _limit("RLIMIT_CPU", seconds, seconds + 1)  # SIGXCPU tells the parent why; a second later comes SIGKILL
        for name in ("RLIMIT_CORE", "RLIMIT_FSIZE", "RLIMIT_NPROC"):
            _limit(name, 0, 0)
    try:
        request = json.loads(sys.stdin.buffer.read().decode("utf-8", "surrogatepass"))
        answer = {"text": rendered(request["template"], request["variables"], request["max_chars"])}
    except MemoryError:
        answer = {"error": f"MemoryError: it needs more than {memory >> 20} MiB"}
    except Exception as error:  # a template is a program: it fails in every way that Python can
        answer = {"error": f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARS]}
    sys.stdout.buffer.write(json.dumps(answer, ensure_ascii=False).encode("utf-8", "surrogatepass"))


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


def _limit(name: str, soft: int, hard: int) -> None:
    """Lower a limit as far as the platform has it: a process may not raise one, and macOS refuses RLIMIT_AS."""
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


def _compiled(source: str) -> jinja2.Template:
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
    return environment.from_string(source)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's part for training; here it renders its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

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
