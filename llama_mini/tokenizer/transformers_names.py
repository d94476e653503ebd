"""What users of transformers type on a tokenizer: the names of its tokens, or a sentence that says what to use."""

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from llama_mini.errors import RequestError
from llama_mini.tokenizer.config_files import NAMED

# Methods of transformers' tokenizers, and what does the same here.
_INSTEAD = {
    "batch_decode": "[tokenizer.decode(ids) for ids in batch]",
    "convert_ids_to_tokens": "[tokenizer.decode(id, skip_special_tokens=False) for id in ids]",
    "convert_tokens_to_ids": "tokenizer.encode(tokens, add_special_tokens=False, parse_special=True)",
    "tokenize": "[tokenizer.decode(id, skip_special_tokens=False) for id in tokenizer.encode(text)]",
}


class TransformersNames:
    """`eos_token`, `eos_token_id` and so on for all NAMED tokens, None if absent; and `len`."""

    vocab_size: int
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None

    def __len__(self) -> int:
        return self.vocab_size

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise RequestError("a Tokenizer cannot be called: tokenizer.encode(text) gives the ids of one text, as a list")

    if not TYPE_CHECKING:  # else every name would pass a type check

        def __getattr__(self, name: str) -> Any:
            if name in NAMED:
                return self._names.get(name)
            if name.removesuffix("_id") in NAMED:
                usual = {"bos_token_id": self.bos_id, "eos_token_id": self.eos_id}
                content = self._names.get(name.removesuffix("_id"))
                return usual[name] if name in usual else content and self._backend.token_id(content)
            public = [known for known in (*dir(self), *NAMED) if not known.startswith("_")]
            near = [] if name.startswith("_") else get_close_matches(name, public, n=1)
            hint = f": use {_INSTEAD[name]}" if name in _INSTEAD else f"; did you mean {near[0]!r}?" if near else ""
            raise AttributeError(f"a Tokenizer has no {name!r}{hint}")
