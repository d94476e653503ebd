"""The results of a batch: where they go, whose they are, and what is refused so that nothing is lost."""

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_mini.engine.request import Completion
from llama_mini.generate import main
from llama_mini.machine import as_dtype, dtype_name
from llama_mini.optimize.build import load_kernels
from tests.cli.test_batch import command


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"number {i} .", "max_tokens": 3}) + "\n" for i in range(5)))
    return path


def test_results_of_other_prompts_are_left_alone(tiny_dir, prompts: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "out.jsonl"
    main(command(tiny_dir, prompts, "--output", str(output)))
    data = output.read_bytes()
    prompts.write_text(prompts.read_text(encoding="utf-8").replace("number 3 ", "number 7 "), encoding="utf-8")
    assert main(command(tiny_dir, prompts, "--output", str(output))) == 2
    assert "line 4, which has changed" in capsys.readouterr().err
    assert output.read_bytes() == data


@pytest.mark.parametrize(
    "content",
    ["no json\n", "notes", '{"a": 1}\n', '{"index": 1, "line": "of an older version"}\n', "[]\n", "\xff\n", "\xff"],
)
def test_a_file_that_holds_no_results_is_left_alone(tiny_dir, prompts: Path, tmp_path: Path, content: str) -> None:
    output = tmp_path / "out.jsonl"
    output.write_bytes(content.encode("latin-1"))
    assert main(command(tiny_dir, prompts, "--output", str(output))) == 2
    assert output.read_bytes() == content.encode("latin-1")


def test_no_such_file(tiny_dir, tmp_path: Path, capsys) -> None:
    assert main(command(tiny_dir, tmp_path / "none.jsonl")) == 2
    assert "none.jsonl cannot be read" in capsys.readouterr().err


def test_an_unwritable_result(tiny_dir, prompts: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "folder").mkdir()
    for output in (tmp_path / "none" / "out.jsonl", tmp_path / "folder", Path("/proc/out.jsonl")):
        assert main(command(tiny_dir, prompts, "--output", str(output))) == 2
        assert f"{output} cannot be written (" in capsys.readouterr().err
    assert main(command(tiny_dir, prompts, "--output", "/dev/full")) == 1
    assert "/dev/full cannot be written (No space left on device): the results so far" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["prompts.jsonl", "../prompts.jsonl", "link"])
def test_the_prompts_are_not_overwritten(tiny_dir, prompts: Path, capsys, name: str) -> None:
    (prompts.parent / "link").symlink_to(prompts)
    (prompts.parent / "folder").mkdir()
    data = prompts.read_bytes()
    output = prompts.parent / ("folder" if ".." in name else ".") / name
    assert main(command(tiny_dir, prompts, "--output", str(output))) == 2
    assert "is the file of the prompts: give another --output" in capsys.readouterr().err
    with prompts.open(encoding="utf-8") as stdin, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", stdin)
        assert main(command(tiny_dir, Path("-"), "--output", str(output))) == 2
    assert prompts.read_bytes() == data


CHANGES = [
    (["--max-tokens", "9"], "with max_tokens = the default, which is now 9"),
    (["--temperature", "1", "--seed", "4"], "with temperature = the default, which is now 1.0"),
    (["--stop", "x"], "with stop = the default, which is now ['x']"),
    (["--dtype", "bfloat16"], "with dtype = 'float32', which is now 'bfloat16'"),
    (["--quantize", "int8"], "with quantize = the default, which is now 'int8'"),
    (["--top-logprobs", "2"], "with top_logprobs = the default, which is now 2"),
]


def test_results_with_other_settings_are_left_alone(tiny_dir, tmp_path: Path, capsys) -> None:
    path, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    path.write_text('{"prompt": "a", "max_tokens": 2}\n')
    base = command(tiny_dir, path, "--output", str(output))
    assert main(base) == 0
    data = output.read_bytes()
    for options, said in CHANGES:
        assert main([*base, *options]) == 2
        assert f"out.jsonl has results made {said}: give another --output" in capsys.readouterr().err
    assert main([word for word in base if word != "--raw"]) == 2
    assert "with raw = True, which is now the default" in capsys.readouterr().err
    assert main([*base, "--threads", "1", "--kernels", "off"]) == 0  # which change no answer
    assert output.read_bytes() == data


def test_the_dtype_counts_as_it_came_out(tiny_dir, prompts: Path) -> None:
    auto = dtype_name(as_dtype("auto", torch.device("cpu"), load_kernels()))
    base = ["--model", str(tiny_dir), "--raw", "--batch", str(prompts)]
    assert main(base) == main([*base, "--dtype", auto]) == 0


def test_results_of_another_model_are_left_alone(tiny_dir, tmp_path: Path, capsys) -> None:
    path, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    path.write_text('{"prompt": "a", "max_tokens": 2}\n')
    model = shutil.copytree(tiny_dir, tmp_path / "model")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    assert main(command(model, path, "--output", str(output))) == 0
    moved = model.rename(tmp_path / "moved")
    assert main(command(moved, path, "--output", str(output))) == 0  # the same files at another place
    for name in ("model.safetensors", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
        changed = shutil.copytree(moved, tmp_path / f"changed {Path(name).name}")
        data = bytearray((changed / name).read_bytes())
        data[-1] ^= 1
        (changed / name).write_bytes(data)
        times = (moved / name).stat()
        os.utime(changed / name, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert main(command(changed, path, "--output", str(output))) == 2
        assert "has results made by another model" in capsys.readouterr().err


def test_results_beside_the_model_are_no_file_of_it(tiny_dir, prompts: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_dir, tmp_path / "model")
    for _ in range(2):
        assert main(command(model, prompts, "--output", str(model / "out.json"))) == 0


def test_two_runs_at_once_do_not_share_results(
    tiny_dir, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, codes = tmp_path / "out.jsonl", []
    words = command(tiny_dir, prompts, "--output", str(output))

    def as_json(completion: Completion) -> dict[str, Any]:
        if not codes:  # in the middle of the first run
            codes.append(None)
            codes.append(main(words))
        return {"text": completion.text}

    monkeypatch.setattr("llama_mini.cli.batch.as_json", as_json)
    assert main(words) == 0
    assert codes[1] == 2
    assert f"another run writes {output}: wait until it ends" in capsys.readouterr().err
    assert len(output.read_text().splitlines()) == 5
    assert main(words) == 0  # the lock has gone
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.jsonl", "out.jsonl"}


def test_standard_input_to_standard_output(
    tiny_dir, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('before\n{"prompt": "a", "max_tokens": 2}\n{"prompt": "b", "max_tokens": 2}\n')
    expected = []
    for output in ([], ["--output", "-"]):
        with path.open(encoding="utf-8") as stdin:
            stdin.buffer.readline()  # as a shell's `read` does
            monkeypatch.setattr("sys.stdin", stdin)
            assert main(command(tiny_dir, Path("-"), *output)) == 0
        found = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
        assert [result["index"] for result in found] == [0, 1]
        expected.append([result["token_ids"] for result in found])
    assert expected[0] == expected[1]
    assert not list(tmp_path.glob("*results*"))


def test_named_pipes(tiny_dir, tmp_path: Path) -> None:
    source, sink, read = tmp_path / "source", tmp_path / "sink", []
    os.mkfifo(source)
    os.mkfifo(sink)
    threads = [
        threading.Thread(target=lambda: source.write_text('{"prompt": "a", "max_tokens": 2}\n' * 3), daemon=True),
        threading.Thread(target=lambda: read.extend(sink.read_text().splitlines()), daemon=True),
    ]
    for thread in threads:
        thread.start()
    assert main(command(tiny_dir, source, "--output", str(sink))) == 0
    for thread in threads:
        thread.join(10)
    assert [json.loads(line)["index"] for line in read] == [0, 1, 2]
