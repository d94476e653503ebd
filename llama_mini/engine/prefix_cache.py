"""Prefix reuse: a prompt that begins like an earlier one takes over the pages of its keys and values."""

import operator
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from llama_mini.engine.pages import PAGE, Pages, SequencePages, pages_of
from llama_mini.model.llama import Llama

MIN_PREFIX = 16  # tokens; a shorter prefix saves little time
ModelState = tuple[list[object], list[int]]


class Node:
    """A page of a prompt, after the pages of its parents. It holds PAGE tokens, or at the end of a prompt fewer.

    pages: one of each kind; None: that of the layers with a window was given back.
    """

    __slots__ = ("children", "ids", "pages", "parent", "used")

    def __init__(self, ids: list[int], pages: list[int | None], parent: "Node | None") -> None:
        self.ids, self.pages, self.parent = ids, pages, parent
        self.children: list[Node] = []
        self.used = 0  # when, by the cache's clock


class PrefixCache:
    """A tree of the pages of prompts, those of running requests included; for each salt a tree of its own.

    Only prompts are kept: keys and values of an answer are rounded as decoding rounds, those of a prompt as prefill
    does, and a prompt must have the same bits whether it is taken over or not. Pages that no request uses are evicted,
    the least recently used ones first: when others need them, and when there are more than `most` of a kind.
    """

    def __init__(self, kinds: list[Pages], most: int) -> None:
        self._kinds, self._most = kinds, most
        self._roots: dict[str | None, Node] = {}
        self._nodes: list[Node] = []
        self._clock = 0
        self._state: ModelState | None = None

    def take_over(self, prompt: list[int], salt: str | None, sequence: Sequence[SequencePages]) -> int:
        """Gives a sequence the pages of prompts that begin like this one, and returns how many tokens they hold.

        Whole pages are shared. Of the last one, if it is partly equal, it gets a copy.
        """
        found, length = self.find(prompt, salt)
        for pages, numbered in zip(sequence, found, strict=True):
            pages.take_over(numbered, length)
        n = length % PAGE
        if n and not all(kind.free or self.evict(i) for i, kind in enumerate(self._kinds)):  # no room for the copy
            for pages in sequence:
                pages.clear()
            return self.take_over(prompt[: length - n + 2], salt, sequence)  # the last two tokens are never found
        for pages in sequence if n else ():
            pages.own_last(n)
        return length

    def find(self, prompt: list[int], salt: str | None) -> tuple[list[list[int | None]], int]:
        """Finds the pages of other prompts that hold the first tokens of a prompt; a short match counts as none.

        Returns the pages, of each kind, and how many tokens are equal; those of the last page may be only its first.

        The last two tokens are never found. They must run through the model, which gives the next token's logits; and
        one token by itself would be rounded as decoding rounds.
        """
        node, path, length = self._roots.get(salt), list[Node](), 0
        while node is not None:
            rest = prompt[length : min(len(prompt) - 2, length + PAGE)]
            lengths = [common_prefix_length(child.ids, rest) for child in node.children]
            equal = max(lengths, default=0)
            if not equal:
                break
            node = node.children[lengths.index(equal)]
            node.used = self._tick()
            path.append(node)
            length += equal
            if equal < PAGE:
                break
        length = self._usable(path, length)
        n = pages_of(length) if length >= MIN_PREFIX else 0
        return [[node.pages[kind] for node in path[:n]] for kind in range(len(self._kinds))], length if n else 0

    def _usable(self, path: list[Node], length: int) -> int:
        """How many of the first `length` tokens can be taken over: after them a token sees no page that is missing."""
        for i in reversed(range(len(path))):
            for kind, page in zip(self._kinds, path[i].pages, strict=True):
                if page is None and i >= kind.first_seen(length):
                    length = i * PAGE
        return length

    def insert(self, prompt: list[int], sequence: Sequence[SequencePages], salt: str | None) -> None:
        """Keeps the pages of a prompt that was prefilled, as far as they are still there."""
        if len(prompt) < MIN_PREFIX:
            return
        node = self._roots.setdefault(salt, Node([], [], None))
        columns = zip(*(each.numbered for each in sequence), strict=True)
        for start, pages in zip(range(0, len(prompt), PAGE), columns, strict=False):
            ids = prompt[start : start + PAGE]
            child = next((child for child in node.children if child.ids[: len(ids)] == ids), None)
            if child is None:
                child = Node(ids, [None] * len(pages), node)
                for shorter in [each for each in node.children if each.ids == ids[: len(each.ids)]]:
                    self._remove(shorter)  # of an earlier turn of the same chat; it has no children
                node.children.append(child)
                self._nodes.append(child)
            for kind, page in enumerate(pages):
                if page is not None and child.pages[kind] is None and len(child.ids) == len(ids):
                    child.pages[kind] = self._kinds[kind].share(page)
            child.used = self._tick()
            node = child
        self.trim()

    def evict(self, kind: int) -> bool:
        """Frees the page of a kind that was used least recently and that no request uses; False if there is none."""
        windowed = self._kinds[kind].window is not None
        unused = [node for node in self._unused(kind) if windowed or not node.children]
        if not unused:
            return False
        node = min(unused, key=lambda node: node.used)
        self._give_back(node, kind)
        while node.parent is not None and not node.children and None in node.pages:  # no prompt can use it any more
            self._remove(node)
            node = node.parent
        return True

    def trim(self) -> None:
        """Frees what is more than the cache may hold."""
        for kind in range(len(self._kinds)):
            while self.n_unused(kind) > self._most and self.evict(kind):
                pass
        self._roots = {salt: root for salt, root in self._roots.items() if root.children}

    def clear(self) -> None:
        for node in self._nodes:
            self._give_back(node, *range(len(self._kinds)))
        self._nodes.clear()
        self._roots.clear()

    def check(self, model: Llama) -> None:
        """Empties the cache if the model has been changed since the last time."""
        before, self._state = self._state, model_state(model)
        if before is not None and not _same(before, self._state):
            self.clear()

    def n_unused(self, kind: int) -> int:
        return sum(1 for _ in self._unused(kind))

    def _unused(self, kind: int) -> Iterator[Node]:
        pool = self._kinds[kind]
        return (node for node in self._nodes if (page := node.pages[kind]) is not None and pool.has_one_user(page))

    def _remove(self, node: Node) -> None:
        assert node.parent is not None
        node.parent.children.remove(node)
        self._nodes.remove(node)
        self._give_back(node, *range(len(self._kinds)))

    def _give_back(self, node: Node, *kinds: int) -> None:
        for kind in kinds:
            if (page := node.pages[kind]) is not None:
                self._kinds[kind].give_back(page)
                node.pages[kind] = None

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
