"""Mistral's tekken.json, since Mistral Nemo: tokens with ranks, encoded by tiktoken, after the control tokens.

The format is that of mistral-common (tokens/tokenizers/tekken.py), in its versions up to 15.
"""

import base64
from pathlib import Path
from typing import Any

from llama_mini.errors import TokenizerError
from llama_mini.tokenizer.tiktoken_file import RankedTokens, check_bytes
from llama_mini.validate import check_whole, short_repr

_SPECIAL = (  # of files that list none: the older versions, up to 7
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"),
    *("[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
_WITHOUT_LIST = ("v1", "v2", "v3", "v7")
MAX_SPECIAL = 65_536  # a file may claim any number, and each would get a name; Mistral's have 1,000


def is_tekken(spec: dict[str, Any]) -> bool:
    """Whether JSON is a tekken.json; otherwise, it may be a tokenizer.json."""
    return "model" not in spec and "vocab" in spec and isinstance(spec.get("config"), dict)


class TekkenFile(RankedTokens):
    """A tekken vocabulary: `default_num_special_tokens` control tokens, then the tokens by rank."""

    def __init__(self, spec: dict[str, Any], path: Path) -> None:
        """`spec`: content of the file. Raises TokenizerError if it is not such a vocabulary."""
        config, names = spec["config"], {"bos_token": "<s>", "eos_token": "</s>"}
        n_special, n_tokens = config.get("default_num_special_tokens"), config.get("default_vocab_size")
        check_whole(f"{path}: default_num_special_tokens", n_special, TokenizerError, 3, MAX_SPECIAL)
        check_whole(f"{path}: default_vocab_size", n_tokens, TokenizerError, n_special + 256)
        try:
            special = _special_ids(spec.get("special_tokens"), config.get("version"), n_special)
            super().__init__(config["pattern"], _ranks(spec["vocab"], n_tokens - n_special), n_special, special, names)
        except (AttributeError, KeyError, TypeError) as error:
            raise TokenizerError(f"{path} is not a known form of tekken.json ({error!r}); restore it") from error
        except ValueError as error:
            raise TokenizerError(f"{path}: {error}; restore the file") from error


def _special_ids(listed: list[dict[str, Any]] | None, version: Any, count: int) -> dict[str, int]:
    """Control token -> id. Ids without a name get one, as in mistral-common."""
    if listed is None:
        if version not in _WITHOUT_LIST:
            known = ", ".join(_WITHOUT_LIST)
            raise ValueError(f"it has version {short_repr(version)} and no special_tokens; only {known} may lack them")
        listed = [{"rank": id, "token_str": content} for id, content in enumerate(_SPECIAL[:count])]
    contents = {token["rank"]: token["token_str"] for token in listed}
    if sorted(contents) != list(range(len(listed))) or len(listed) > count:
        raise ValueError(f"its special_tokens do not have the ranks 0 to {len(listed) - 1}, at most {count} of them")
    ids = {contents.get(id, f"<SPECIAL_{id}>"): id for id in range(count)}
    if missing := [name for name in ("<s>", "</s>") if name not in ids]:
        raise ValueError(f"its special_tokens lack {missing[0]}")
    if len(ids) != count or not all(isinstance(content, str) and content for content in ids):
        raise ValueError("its special_tokens have a name that is repeated, empty or not text")
    return ids


def _ranks(vocab: list[dict[str, Any]], count: int) -> dict[bytes, int]:
    """Token bytes -> rank, of the first `count` tokens: files hold more than models use."""
    if len(vocab) < count:
        raise ValueError(f"its vocab has {len(vocab)} tokens, but default_vocab_size needs {count}")
    ranks = {_decoded(token["token_bytes"]): token["rank"] for token in vocab[:count]}
    if list(ranks.values()) != list(range(count)):
        raise ValueError(f"its first {count} tokens do not have the ranks 0 to {count - 1}, each with bytes of its own")
    check_bytes(ranks)
    return ranks


def _decoded(token: str) -> bytes:
    try:
        return base64.b64decode(token, validate=True)
    except ValueError:
        raise ValueError(f"the token_bytes {short_repr(token)} is not base64") from None
