"""Prefix reuse: a prompt that begins like an earlier one takes over the pages of its keys and values."""

import operator
from collections.abc import Iterator

from torch import Tensor, nn

from llama_mini.engine.pages import PAGE, Pages
from llama_mini.model.llama import Llama

MIN_PREFIX = 16  # tokens; a shorter prefix saves little time
ModelState = tuple[list[object], list[int]]


class Node:
    """A page of a prompt, after the pages of its parents. It holds PAGE tokens, or at the end of a prompt fewer."""

    __slots__ = ("children", "ids", "page", "parent", "used")

    def __init__(self, ids: list[int], page: int, parent: "Node | None") -> None:
        self.ids, self.page, self.parent = ids, page, parent
        self.children: list[Node] = []
        self.used = 0  # when, by the cache's clock


class PrefixCache:
    """A tree of the pages of prompts, those of running requests included; for each salt a tree of its own.

    Only prompts are kept: keys and values of an answer are rounded as decoding rounds, those of a prompt as prefill
    does, and a prompt must have the same bits whether it is taken over or not. Pages that no request uses are evicted,
    the least recently used ones first: when others need them, and when there are more than `most`.
    """

    def __init__(self, pages: Pages, most: int) -> None:
        self._pages, self._most = pages, most
        self._roots: dict[str | None, Node] = {}
        self._nodes: list[Node] = []
        self._clock = 0
        self._state: ModelState | None = None

    def find(self, prompt: list[int], salt: str | None) -> tuple[list[int], int, int]:
        """Finds the pages of other prompts that hold the first tokens of a prompt; a short match counts as none.

        Returns (whole, partial, equal): the pages whose tokens are all equal; the page after these, of which the first
        `equal` tokens are equal, or -1; and `equal`.

        The last two tokens are never found. They must run through the model, which gives the next token's logits; and
        one token by itself would be rounded as decoding rounds.
        """
        node, whole, partial, equal = self._roots.get(salt), list[int](), -1, 0
        while node is not None:
            rest = prompt[len(whole) * PAGE : min(len(prompt) - 2, (len(whole) + 1) * PAGE)]
            lengths = [common_prefix_length(child.ids, rest) for child in node.children]
            equal = max(lengths, default=0)
            if not equal:
                break
            node = node.children[lengths.index(equal)]
            node.used = self._tick()
            if equal < PAGE:
                partial = node.page
                break
            whole.append(node.page)
            equal = 0
        return (whole, partial, equal) if len(whole) * PAGE + equal >= MIN_PREFIX else ([], -1, 0)

    def insert(self, prompt: list[int], pages: list[int], salt: str | None) -> None:
        """Keeps the pages of a prompt that was prefilled."""
        if len(prompt) < MIN_PREFIX:
            return
        node = self._roots.setdefault(salt, Node([], -1, None))
        for start in range(0, len(prompt), PAGE):
            ids = prompt[start : start + PAGE]
            child = next((child for child in node.children if child.ids[: len(ids)] == ids), None)
            if child is None:
                child = Node(ids, self._pages.share(pages[start // PAGE]), node)
                for shorter in [each for each in node.children if each.ids == ids[: len(each.ids)]]:
                    self._remove(shorter)  # of an earlier turn of the same chat; it has no children
                node.children.append(child)
                self._nodes.append(child)
            child.used = self._tick()
            node = child
        self.trim()

    def evict(self) -> bool:
        """Frees the page that was used least recently and that no request uses; False if there is none."""
        unused = [node for node in self._unused() if not node.children]
        if unused:
            self._remove(min(unused, key=lambda node: node.used))
        return bool(unused)

    def trim(self) -> None:
        """Frees what is more than the cache may hold."""
        for _ in range(self.n_unused - self._most):
            self.evict()
        self._roots = {salt: root for salt, root in self._roots.items() if root.children}

    def clear(self) -> None:
        for node in self._nodes:
            self._pages.give_back(node.page)
        self._nodes.clear()
        self._roots.clear()

    def check(self, model: Llama) -> None:
        """Empties the cache if the model has been changed since the last time."""
        before, self._state = self._state, model_state(model)
        if before is not None and not _same(before, self._state):
            self.clear()

    @property
    def n_unused(self) -> int:
        return sum(1 for _ in self._unused())

    def _unused(self) -> Iterator[Node]:
        return (node for node in self._nodes if self._pages.has_one_user(node.page))

    def _remove(self, node: Node) -> None:
        assert node.parent is not None
        node.parent.children.remove(node)
        self._nodes.remove(node)
        self._pages.give_back(node.page)

    def _tick(self) -> int:
        self._clock += 1
        return self._clock


def common_prefix_length(a: list[int], b: list[int]) -> int:
    """The number of equal tokens at the start of two lists."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # Python compares slices in C, many times faster than a loop over the tokens
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def model_state(model: Llama) -> ModelState:
    """What computes the outputs: modules, their hooks and tensors, and PyTorch's counts of the tensors' changes."""
    modules: list[nn.Module] = [model]
    hooks: list[object] = []
    tensors: list[Tensor | None] = []
    for module in modules:  # which grows meanwhile: three times faster than `modules()` and `parameters()`
        modules += [child for child in module._modules.values() if child is not None]
        hooks += [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        tensors += [*module._parameters.values(), *module._buffers.values()]
    versions = [0 if x is None or x.is_inference() else x._version for x in tensors]
    return [*modules, *hooks, *tensors], versions


def _same(a: ModelState, b: ModelState) -> bool:
    return a[1] == b[1] and len(a[0]) == len(b[0]) and all(map(operator.is_, a[0], b[0]))
