"""The hub: a small one on loopback that records what is asked of it, and a child process, since the library reads the
environment when it is imported."""

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from llama_mini.checkpoint.hf.hub import fetch_from_hub, is_hub_name
from llama_mini.errors import CheckpointPathError
from tests.checkpoint.hf.fake_hub import FAULTS, INDEX, PINNED, REPOS, SHARDS, SMALL, Hub, etag

CHILD = """
import json, os, sys
from llama_mini.checkpoint.hf.hub import fetch_from_hub
from llama_mini.errors import LlamaMiniError

def answer(name):
    if name.startswith("full:"):
        from huggingface_hub import file_download
        def http_get(*args, **kwargs):
            raise OSError(28, "No space left on device")
        file_download.http_get = http_get
    try:
        return str(fetch_from_hub(name.split(":")[-1], tokenizer_only=name.startswith("tok:")))
    except LlamaMiniError as error:
        return [type(error).__name__, str(error)]

for kind, environment, names in json.loads(sys.argv[1]):
    if os.fork() == 0:
        os.environ.update(environment)
        print(json.dumps([kind, {name: answer(name) for name in names}]), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""

Answers = dict[str, dict[str, Any]]  # by run, by name: the path, or the error's class and its message

CACHED = ["org/sharded", "org/single", "org/loose", "org/meta", "org/gguf", f"org/single@{PINNED}", "tok:org/half"]


@pytest.fixture(scope="module")
def hubs() -> Iterator[tuple[Hub, Hub]]:
    """One for the first run, one for the last."""
    with Hub() as first, Hub() as last:
        for server in (first, last):
            Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield first, last
        for server in (first, last):
            server.shutdown()


@pytest.fixture(scope="module")
def hub(hubs: tuple[Hub, Hub]) -> Hub:
    return hubs[0]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hf")


@pytest.fixture(scope="module")
def answers(home: Path, hubs: tuple[Hub, Hub]) -> Answers:
    """Runs over one cache: with a hub, forbidden by either variable, with a closed port, with a server that never
    answers, and with a hub again. `tok:` before a name asks for the tokenizer only, `full:` fills the disk."""
    repos = [name for name in REPOS if name not in ("org/half", "org/full")]
    every = ["tok:org/half", *repos, *FAULTS, "org/single@nowhere", f"org/single@{PINNED}", "full:org/full"]
    without = [*CACHED, "org/half", "org/new", f"org/new@{PINNED}"]
    with socket.socket() as closed, socket.socket() as silent:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: it refuses, and nobody else gets the port
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        refused, mute = (f"http://127.0.0.1:{s.getsockname()[1]}" for s in (closed, silent))
        runs = [
            ("online", {"HF_ENDPOINT": hubs[0].url}, every),
            ("offline", {"HF_HUB_OFFLINE": "1"}, without),
            ("transformers", {"TRANSFORMERS_OFFLINE": "1"}, without),
            ("refused", {"HF_ENDPOINT": refused}, without),
            ("silent", {"HF_ENDPOINT": mute, "HF_HUB_ETAG_TIMEOUT": "1"}, [CACHED[0], "org/new"]),
            ("again", {"HF_ENDPOINT": hubs[1].url, "HF_TOKEN": "hf_mine"}, [f"org/single@{PINNED}", "org/sharded"]),
        ]
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
        result = subprocess.run(
            [sys.executable, "-c", CHILD, json.dumps(runs)],
            env=clean | {"HF_HOME": str(home), "NO_PROXY": "127.0.0.1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert result.returncode == 0, result.stderr
    return dict(map(json.loads, result.stdout.splitlines()))


@pytest.fixture(scope="module")
def online(answers: Answers) -> dict[str, Any]:
    return answers["online"]


# --- names ---


@pytest.mark.parametrize(
    "text",
    [
        "meta-llama/Llama-3.1-8B",
        "a/b",
        "HuggingFaceTB/SmolLM2-135M@main",
        "a/b.c_d-e@refs/pr/4",
        f"a/b@{PINNED}",
        "a/b@v1.0",
        "o" * 96 + "/" + "n" * 96,
    ],
)
def test_names_of_the_hub(text: str) -> None:
    assert is_hub_name(text)


@pytest.mark.parametrize(
    "text",
    [
        *("", "gpt2", "/a/b", "a/b/c", "./b", "../b", "~/b", "a/", "/b", "a\\b", "C:/b", "a//b", "a b/c", "a/b\n"),
        *("a/b--c", "a/b..c", "a/b.git", "-a/b", "a/b.", "é/b", "a/" + "n" * 97, "https://hub/a", "a/b@", "a@b/c"),
        *("@a/b", "a/b@../../x", "a/b@/etc", "a/b@x/", "a/b@x y", "a/b@x\n", "a/b@-x", "a/b@.x", "a/b@x/.y", "a/b@é"),
        *("a/b@x:y", "a/b@x//y", "a/b@x..y", "a/b@x.", "a/b@" + "x" * 201),
    ],
)
def test_what_is_no_name(text: str) -> None:
    assert not is_hub_name(text)
    with pytest.raises(CheckpointPathError, match=r"is not a hub name; give org/name") as caught:
        fetch_from_hub(text)
    assert len(str(caught.value)) < 200


# --- only what is needed ---


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("org/sharded", [*SMALL, INDEX, *SHARDS]),
        ("org/adapter", ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"]),
        ("org/single", [*SMALL, "model.safetensors", "tokenizer.model"]),
        ("org/loose", ["config.json", "tokenizer.model", "a[1].safetensors", "b.safetensors"]),
        ("org/meta", ["params.json", "tokenizer.model", "consolidated.safetensors"]),
        ("tok:org/half", SMALL),
    ],
)
def test_only_what_is_needed_is_downloaded(online: dict[str, Any], hub: Hub, name: str, files: list[str]) -> None:
    folder, repo = Path(online[name]), name.split(":")[-1]
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == {file: REPOS[repo][file] for file in files}
    if repo != "org/single":  # which is asked for at two commits
        assert hub.files(repo) == sorted(files)


def test_the_cache_is_laid_out_as_the_library_lays_it_out(online: dict[str, Any], home: Path) -> None:
    commit = hashlib.sha1(b"org/sharded").hexdigest()
    repo = home / "hub" / "models--org--sharded"
    assert Path(online["org/sharded"]) == repo / "snapshots" / commit
    assert (repo / "refs" / "main").read_text() == commit
    for path in filter(Path.is_file, (repo / "snapshots" / commit).iterdir()):
        assert os.readlink(path) == f"../../blobs/{etag(REPOS['org/sharded'][path.name])}"


def test_a_pinned_commit_is_taken(online: dict[str, Any]) -> None:
    pinned, main = Path(online[f"org/single@{PINNED}"]), Path(online["org/single"])
    assert pinned.name == PINNED != main.name
    assert pinned.parent == main.parent


def test_of_a_single_gguf_file_the_path_is_given(online: dict[str, Any], hub: Hub) -> None:
    path = Path(online["org/gguf"])
    assert path.parts[-2:] == ("gguf", "tiny.gguf")
    assert path.read_bytes() == REPOS["org/gguf"]["gguf/tiny.gguf"]
    assert hub.files("org/gguf") == ["config.json", "gguf/tiny.gguf"]
    assert Path(online["org/projector"]).name == "tiny-q4.gguf"  # beside what turns images into its input


# --- what cannot be had ---


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("org/absent", "Path", "no repository org/absent, or it is private, and there is no such path .*hf auth login"),
        ("org/private", "Path", "no repository org/private, or it is private"),
        ("org/revisions", "Path", "org/revisions has no revision 'main'"),
        ("org/single@nowhere", "Path", "org/single has no revision 'nowhere': name one of its branches"),
        ("org/gated", "Path", r"org/gated is gated: accept its terms at http://\S+/org/gated, then .*hf auth login"),
        ("org/locked", "Path", r"refuses org/locked \(HTTP 403\)"),
        ("org/forbidden", "Path", r"refuses org/forbidden \(HTTP 403\): log in with `hf auth login`"),
        ("org/failing", "Path", r"not serve org/failing \(HTTP 500\), and the cache \S+ holds nothing of it"),
        ("full:org/full", "Path", "the disk is full and org/full incomplete: free space for"),
        ("org/pickled", "Format", r"pickles \('pytorch_model-00001-of-00002.bin'\).*llama-mini convert SRC DST`"),
        ("org/metapickled", "Format", r"pickles \('consolidated.00.pth'\)"),
        ("org/ggufs", "Path", "6 GGUF files: .*'tiny-f16.gguf', 'tiny-q2.gguf', 'tiny-q3.gguf'"),
        ("org/empty", "Incomplete", "org/empty holds no weights"),
        ("org/escaping", "Path", "index.json names '../x.safetensors'; only .* of its folder"),
        ("org/absolute", "Path", "index.json names '/etc/passwd.safetensors'"),
        ("org/naming-a-pickle", "Path", "index.json names 'pytorch_model.bin'"),
        ("org/broken-index", "Format", "index.json has no weight_map"),
        ("org/missing-shard", "Incomplete", f"lacks 1 of the 2 shards .*'{SHARDS[1]}'"),
        ("org/no-config", "Incomplete", "org/no-config holds weights but no config.json"),
    ],
)
def test_every_failure_is_one_sentence(online: dict[str, Any], name: str, kind: str, says: str) -> None:
    found, message = online[name]
    assert found == f"Checkpoint{kind}Error"
    assert "\n" not in message
    assert len(message) < 500
    assert re.search(says, message), message


@pytest.mark.parametrize("repo", ["org/pickled", "org/metapickled", "org/ggufs", "org/empty", "org/no-config"])
def test_what_is_refused_is_not_downloaded(online: dict[str, Any], hub: Hub, repo: str) -> None:
    assert hub.files(repo) == []


@pytest.mark.parametrize("repo", ["org/escaping", "org/absolute", "org/naming-a-pickle", "org/missing-shard"])
def test_no_shard_of_a_bad_index_is_downloaded(online: dict[str, Any], hub: Hub, repo: str) -> None:
    assert hub.files(repo) == sorted([*SMALL, INDEX])


# --- without a network ---


@pytest.mark.parametrize("how", ["offline", "transformers", "refused"])
@pytest.mark.parametrize("name", CACHED)
def test_what_is_cached_needs_no_network(answers: Answers, how: str, name: str) -> None:
    assert answers[how][name] == answers["online"][name]


def test_a_silent_server_is_not_waited_for(answers: Answers) -> None:
    assert answers["silent"][CACHED[0]] == answers["online"][CACHED[0]]
    kind, message = answers["silent"]["org/new"]
    assert kind == "CheckpointPathError"
    assert "ReadTimeout" in message


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("offline", "no path .* here, it cannot be downloaded from the hub while HF_HUB_OFFLINE is set"),
        ("transformers", "no path .* here, it cannot be downloaded from the hub while TRANSFORMERS_OFFLINE is set"),
        ("refused", r"cannot be fetched from http://\S+ \('ConnectError: .*refused.*\)"),
    ],
)
@pytest.mark.parametrize(
    ("name", "lacks"),
    [
        ("org/half", "holds no weights: neither .* nor model.safetensors nor"),
        ("org/new", "holds nothing of it"),
        (f"org/new@{PINNED}", "holds nothing of it"),
    ],
)
def test_what_is_not_cached_says_why_and_what_is_lacking(
    answers: Answers, how: str, why: str, name: str, lacks: str
) -> None:
    kind, message = answers[how][name]
    assert kind == "CheckpointPathError"
    assert re.search(f"{why}.*, and .*{lacks}", message), message


def test_a_cached_commit_is_not_asked_for(answers: Answers, hubs: tuple[Hub, Hub]) -> None:
    assert answers["again"].items() <= answers["online"].items()
    assert hubs[1].asked == [("org/sharded", "GET", "api")]  # a branch may have moved: one question


def test_a_token_is_sent_where_one_is_set(answers: Answers, hubs: tuple[Hub, Hub]) -> None:
    assert [hub.tokens for hub in hubs] == [{None}, {"Bearer hf_mine"}]
