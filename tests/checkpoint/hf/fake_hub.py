"""A Hugging Face hub on loopback, of small random files, that records what is asked of it."""

import hashlib
import json
import random
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
TOKENIZER = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]
TOKENIZER += ["chat_template.json", "additional_chat_templates/rag.jinja"]
SMALL = ["config.json", "generation_config.json", "quantize_config.json", *TOKENIZER]
CLUTTER = [
    "README.md",
    ".gitattributes",
    "pytorch_model.bin",
    "consolidated.safetensors",
    "original/consolidated.00.pth",
    "original/model.safetensors",
    "original/params.json",
    "onnx/model.onnx",
    "params.json",
    "training_args.bin",
    "additional_chat_templates/README.md",
]
PINNED = hashlib.sha1(b"an older commit").hexdigest()


def index_of(*shards: str) -> bytes:
    return json.dumps({"weight_map": {f"tensor.{i}": shard for i, shard in enumerate(shards)}}).encode()


def random_files(*names: str) -> dict[str, bytes]:
    return {name: random.Random(name).randbytes(100 + len(name)) for name in names}


REPOS: dict[str, dict[str, bytes]] = {
    "org/sharded": random_files(*SMALL, *SHARDS, *CLUTTER, "model-00003-of-00003.safetensors")
    | {INDEX: index_of(SHARDS[1], f"./{SHARDS[0]}", SHARDS[1])},
    "org/single": random_files(*SMALL, *CLUTTER, "model.safetensors", "extra.safetensors", "tokenizer.model"),
    "org/loose": random_files("config.json", "tokenizer.model", *CLUTTER, "a[1].safetensors", "b.safetensors"),
    "org/meta": random_files("params.json", "tokenizer.model", "consolidated.safetensors", "other.safetensors"),
    "org/half": random_files(*SMALL, "model.safetensors", *CLUTTER),
    "org/pickled": random_files("config.json", "tokenizer.json", "pytorch_model-00001-of-00002.bin", "README.md"),
    "org/metapickled": random_files("params.json", "consolidated.00.pth"),
    "org/ggufs": random_files("config.json", *(f"tiny-{kind}.gguf" for kind in ("f16", "q2", "q3", "q4", "q5", "q8"))),
    "org/gguf": random_files("config.json", "README.md", "gguf/tiny.gguf"),
    "org/projector": random_files("config.json", "tiny-q4.gguf", "mmproj-f16.gguf"),
    "org/adapter": random_files("adapter_config.json", "adapter_model.safetensors", "tokenizer.json"),
    "org/empty": random_files("README.md"),
    "org/escaping": random_files(*SMALL) | {INDEX: index_of(SHARDS[0], "../x.safetensors")},
    "org/absolute": random_files(*SMALL) | {INDEX: index_of("/etc/passwd.safetensors")},
    "org/naming-a-pickle": random_files(*SMALL, "pytorch_model.bin") | {INDEX: index_of("pytorch_model.bin")},
    "org/broken-index": random_files(*SMALL) | {INDEX: b'{"weight_map": [1]}'},
    "org/missing-shard": random_files(*SMALL, SHARDS[0]) | {INDEX: index_of(*SHARDS)},
    "org/gated": random_files(*SMALL, "model.safetensors"),
    "org/locked": random_files(*SMALL, "model.safetensors"),
    "org/full": random_files("config.json", "tokenizer.json", "model.safetensors"),
    "org/no-config": random_files("tokenizer.json", "model.safetensors"),
}
FAULTS = {  # the API's answer: status, X-Error-Code
    "org/absent": (401, "RepoNotFound"),
    "org/private": (404, "RepoNotFound"),
    "org/revisions": (404, "RevisionNotFound"),
    "org/forbidden": (403, ""),
    "org/failing": (500, ""),
}


class Hub(ThreadingHTTPServer):
    """The endpoints that huggingface_hub calls: a revision's facts, its tree, and the files."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, str, str]] = []  # repository, method, file or `api`
        self.tokens: set[str | None] = set()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def files(self, repo: str) -> list[str]:
        return sorted(file for asked, method, file in self.asked if (asked, method) == (repo, "GET") and file != "api")


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        owner, name, kind, revision, *file = parts[2:] if api else parts
        repo = f"{owner}/{name}"
        self.server.asked.append((repo, self.command, "api" if api else "/".join(file)))
        self.server.tokens.add(self.headers["Authorization"])
        if repo in FAULTS:
            return self.answer(FAULTS[repo][0], {"X-Error-Code": FAULTS[repo][1], "X-Error-Message": "no"})
        commit = revision if revision == PINNED else hashlib.sha1(repo.encode()).hexdigest()
        if revision not in ("main", commit):
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        if api and kind == "revision":
            facts = {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in REPOS[repo]]}
            return self.answer(200, {}, json.dumps(facts).encode())
        if api:
            tree = [{"type": "file", "path": name, "size": len(REPOS[repo][name]), "oid": "0"} for name in REPOS[repo]]
            return self.answer(200, {}, json.dumps(tree).encode())
        if repo in ("org/gated", "org/locked"):  # what is in it is no secret, the files are
            return self.answer(403, {"X-Error-Code": "GatedRepo"} if repo == "org/gated" else {})
        content = REPOS[repo]["/".join(file)]
        return self.answer(200, {"ETag": f'"{etag(content)}"', "X-Repo-Commit": commit}, content)

    do_HEAD = do_GET

    def answer(self, status: int, headers: dict[str, str], content: bytes = b"") -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def etag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# What is imported before the fork is shared; the hub's library comes after it, with the environment of the run.
