"""/tokenize and /detokenize, in vLLM's shapes."""

from typing import Any

from llama_mini.engine.llm import LLM
from llama_mini.errors import RequestError
from llama_mini.server.fields import TEMPLATE, check_fields, flag
from llama_mini.validate import check_token_ids, is_token, short_repr

TOKENIZE_FIELDS = frozenset(
    ("model", "prompt", "content", "messages", "tools", "add_special_tokens", "return_token_strs", *TEMPLATE)
)
DETOKENIZE_FIELDS = frozenset(("model", "tokens"))


def tokenize(body: dict[str, Any], llm: LLM) -> dict[str, Any]:
    """The ids of a text, `prompt` (in llama.cpp `content`), or of a chat, `messages`. Raises RequestError."""
    check_fields(body, TOKENIZE_FIELDS, {})
    given = [name for name in ("prompt", "content", "messages") if name in body]
    if len(given) != 1:
        found = f", not {given}" if given else ""
        raise RequestError(f"the body must have either prompt, a text, or messages{found}")
    special = flag(body, "add_special_tokens", given != ["messages"])
    if given == ["messages"]:
        variables = {name: body[name] for name in (*TEMPLATE, "tools") if name in body}
        ids = llm.tokenizer.apply_chat_template(body["messages"], **variables)
    else:
        if not isinstance(text := body[given[0]], str):
            raise RequestError(f"{given[0]} must be a text, not {short_repr(text)}")
        ids = llm.tokenizer.encode(text, special)
    pieces = [llm.tokenizer.decode(id, False) for id in ids] if flag(body, "return_token_strs") else None
    return {"count": len(ids), "max_model_len": llm.config.max_seq_len, "tokens": ids, "token_strs": pieces}


def detokenize(body: dict[str, Any], llm: LLM) -> dict[str, Any]:
    """The text of ids. Raises RequestError."""
    check_fields(body, DETOKENIZE_FIELDS, {})
    ids = body.get("tokens")
    if not isinstance(ids, list) or not all(map(is_token, ids)):
        raise RequestError(f"tokens must be a list of token ids, not {short_repr(ids)}")
    check_token_ids(ids, llm.config.vocab_size, RequestError)
    return {"prompt": llm.tokenizer.decode(ids, skip_special_tokens=False)}
