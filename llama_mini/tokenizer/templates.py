"""The templates of a checkpoint: which one renders a chat, and which variables it takes."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches

from llama_mini.errors import RequestError, TokenizerError
from llama_mini.tokenizer.config_files import NAMED
from llama_mini.tokenizer.sandbox import read_by
from llama_mini.validate import join_names, short_repr


class Templates:
    """Templates by name, as in transformers: "default" is for chats, "tool_use" for chats with tools."""

    def __init__(self, templates: Mapping[str, str]) -> None:
        self._templates = templates

    def choose(self, wanted: object, tools: bool) -> str:
        """The template that is wanted, by name or itself as Jinja text; else the usual one."""
        if wanted is None:
            template = self._templates.get("tool_use" if tools and "tool_use" in self._templates else "default")
            if template is not None:
                return template
            if self._templates:
                raise TokenizerError(f"no chat template of this checkpoint is the default: name one of {self._known()}")
            raise TokenizerError("this checkpoint has no chat template; complete raw text instead (--raw)")
        if isinstance(wanted, str) and wanted in self._templates:
            return self._templates[wanted]
        if isinstance(wanted, str) and "{" in wanted:
            return wanted
        name = f" or the name of one in this checkpoint: {self._known()}" if self._templates else ""
        raise RequestError(f"chat_template is {short_repr(wanted)}, expected a Jinja template{name}")

    def variables(self, template: str) -> frozenset[str]:
        """What a template reads, besides the messages and whether an answer shall begin."""
        return frozenset(read_by(template)[0]) - {"messages", "add_generation_prompt"}

    def all_variables(self) -> frozenset[str]:
        usual = (self._templates.get(name) for name in ("default", "tool_use"))
        return frozenset().union(*(self.variables(template) for template in usual if template is not None))

    def _known(self) -> str:
        return join_names(map(repr, self._templates))


def check_variables(given: Iterable[str], known: frozenset[str]) -> None:
    """Refuses variables that a template does not read. Raises RequestError."""
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            others = join_names(sorted(known.difference(NAMED))) or "no variables"
            hint = f"did you mean {near[0]!r}?" if near else f"it reads {others}"
            raise RequestError(f"the chat template does not read {name[:80]!r}; {hint}")
