"""A process that has used a model is forked: the child answers as its parent does. See pytorch#17199, gunicorn#2478.

Each parent is a process of its own, since pytest's own must not fork while it has threads. It ends when its children
have answered, or is killed.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llama_mini.optimize.build import load_kernels

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")

# `forked(f)` is f() in a forked child; 30 s without an answer are a failure. Two threads: a forked child has neither
# PyTorch's second thread nor the process that renders templates.
PARENT = """
import multiprocessing as mp, sys, threading, warnings
import torch
from llama_mini import LLM, SamplingParams
from llama_mini.errors import RequestError
warnings.simplefilter("error")
context = mp.get_context("fork")

def put(queue, f):
    queue.put(f())

def forked(f):
    queue = context.Queue()
    child = context.Process(target=put, args=(queue, f), daemon=True)
    child.start()
    return queue.get(timeout=30)

def text():
    llm.forget()
    return llm.generate("Hello there my friend " * 20, SamplingParams(max_tokens=8))[0].text

def chat(content="hi"):
    return llm.chat([{{"role": "user", "content": content}}], SamplingParams(max_tokens=4)).token_ids

def large():  # PyTorch's own parallel operators
    return float(torch.ones(300, 3000).exp().sum()), float((torch.ones(300, 300) @ torch.ones(300, 300)).sum())

if __name__ == "__main__":
    path = {path!r}
    llm = LLM(path, threads=2, kernels={kernels!r})
"""


def run(tiny_dir: Path, code: str, kernels: str = "auto") -> None:
    load_kernels()  # a child that builds them says so on standard error
    source = PARENT.format(path=str(tiny_dir), kernels=kernels)
    source += "".join(f"    {line}\n" for line in code.strip().splitlines())
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("kernels", ["auto", pytest.param("off", marks=pytest.mark.slow)])
def test_children_of_a_parent_that_has_generated_answer(tiny_dir: Path, kernels: str) -> None:
    """One after the other; then as with gunicorn --preload, all at once: they must not share a template's process."""
    code = """
want = text(), chat(), large()
assert [forked(text), forked(chat), forked(large)] == [*want]
assert forked(torch.get_num_threads) == 2
assert len(forked(lambda: LLM(path, threads=2).generate([5], SamplingParams(max_tokens=3))[0].token_ids)) == 3
want = {content: chat(content) for content in "abcd"}
def chats(contents="abcd"):
    return [{content: chat(content) for content in contents} for _ in range(10)]
queue = context.Queue()
for _ in range(2):
    context.Process(target=put, args=(queue, chats), daemon=True).start()
assert chats("dcba") == queue.get(timeout=30) == queue.get(timeout=30) == [want] * 10
class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return 2
    def __getitem__(self, index):
        return text()
loader = torch.utils.data.DataLoader(Texts(), None, num_workers=2, multiprocessing_context="fork", timeout=30)
assert [*loader] == [text()] * 2
"""
    run(tiny_dir, code, kernels)


@pytest.mark.slow
def test_a_fork_during_a_generation_gives_an_answer_or_a_sentence(tiny_dir: Path) -> None:
    code = """
def answer():
    try:
        return text()
    except RequestError as error:
        return str(error)
def check(answer):
    assert answer == want or "busy" in answer
want = text()
stream = llm.stream("Hello there", SamplingParams(max_tokens=200, ignore_eos=True))
next(stream)
check(forked(answer))
stream.close()
stop = threading.Event()
def generate():
    while not stop.is_set():
        large(), answer()
thread = threading.Thread(target=generate, daemon=True)
thread.start()
for _ in range(5):
    assert forked(large)
    check(forked(answer))
stop.set()
thread.join()
"""
    run(tiny_dir, code)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["spawn", "forkserver"])
def test_new_processes_of_other_kinds_answer(tiny_dir: Path, tmp_path: Path, start: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import multiprocessing as mp
from llama_mini import LLM, SamplingParams

def text():
    return LLM({str(tiny_dir)!r}, threads=2).generate("Hello", SamplingParams(max_tokens=8))[0].text

if __name__ == "__main__":
    want = text()
    with mp.get_context({start!r}).Pool(1) as pool:
        assert pool.apply_async(text).get(timeout=60) == want
"""
    )
    subprocess.run([sys.executable, str(script)], timeout=100, check=True)
