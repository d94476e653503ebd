"""The state of a chat: what the model is given, what is kept, what is taken back."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llama_mini import LLM, Chunk, SamplingParams
from llama_mini.cli.conversation import Conversation
from llama_mini.errors import RequestError, TokenizerError


@pytest.fixture(scope="module")
def llm(tiny_dir) -> LLM:
    return LLM(tiny_dir, dtype="float32", kernels="off", threads=1)


class Spy:
    """A model that remembers what it was given."""

    def __init__(self, llm: LLM) -> None:
        self.tokenizer, self.config = llm.tokenizer, llm.config
        self.given: list[tuple[list[int], SamplingParams]] = []
        self.streams: list[Iterator[Chunk]] = []  # kept, so that none is closed by being forgotten
        self._llm = llm

    def stream(self, ids: list[int], params: SamplingParams) -> Iterator[Chunk]:
        self.given.append((ids, params))
        self.streams.append(self._llm.stream(ids, params))
        return self.streams[-1]


def chat(llm: Any, system: str | None = None, **params: Any) -> Conversation:
    return Conversation(llm, SamplingParams(**{"max_tokens": 12, **params}), system)


def never() -> bool:
    return False


def ask(conversation: Conversation, question: str) -> str:
    texts: list[str] = []
    turn = conversation.ask(question, texts.append, never)
    assert turn is not None
    assert turn.answer == "".join(texts)
    return turn.answer


def test_every_answer_sees_the_whole_history_as_it_was_shown(llm: LLM) -> None:
    conversation = chat(llm, "Be brief.")
    messages = [{"role": "system", "content": "Be brief."}]
    for question in ("hello", "日本 😀\n  two lines ", "and?"):
        messages.append({"role": "user", "content": question})
        expected = llm.chat(messages, conversation.params).text
        assert ask(conversation, question) == expected
        messages.append({"role": "assistant", "content": expected})
    assert conversation.context_tokens == len(llm.tokenizer.apply_chat_template(messages, False))
    assert conversation.max_context == 512


def test_the_blanks_around_an_answer_stay_in_the_history(llm: LLM) -> None:
    class Blank(Spy):
        def stream(self, ids: list[int], params: SamplingParams) -> Iterator[Chunk]:
            self.given.append((ids, params))
            yield from (Chunk("\n  so", 7), Chunk(" \n", 8), Chunk("never", 9))

    spy = Blank(llm)
    conversation = chat(spy)
    for _ in range(2):
        texts: list[str] = []
        conversation.ask("hello", texts.append, lambda: len(texts) == 2)  # noqa: B023
    contents = ("user", "hello"), ("assistant", "\n  so \n"), ("user", "hello")
    messages = [{"role": role, "content": content} for role, content in contents]
    assert spy.given[1][0] == llm.tokenizer.apply_chat_template(messages)


def test_undo_and_clear(llm: LLM) -> None:
    spy = Spy(llm)
    conversation = chat(spy, "Be brief.")
    assert conversation.context_tokens > 0
    ask(conversation, "one")
    ask(conversation, "two")
    assert conversation.undo() == "two"
    ask(conversation, "two")
    assert spy.given[1] == spy.given[2]
    conversation.clear()
    assert conversation.system == "Be brief."
    ask(conversation, "one")
    assert spy.given[3] == spy.given[0]
    conversation.clear()
    conversation.system = None
    assert conversation.context_tokens == 0
    for nothing in (conversation.undo, lambda: conversation.retry(str, never)):
        with pytest.raises(RequestError, match="there is no"):
            nothing()


def test_the_system_message_changes_under_the_history(llm: LLM) -> None:
    spy = Spy(llm)
    conversation = chat(spy)
    first = ask(conversation, "hello")
    conversation.system = "Be loud."
    ask(conversation, "again")
    contents = ("system", "Be loud."), ("user", "hello"), ("assistant", first), ("user", "again")
    messages = [{"role": role, "content": content} for role, content in contents]
    assert spy.given[1][0] == llm.tokenizer.apply_chat_template(messages)


def test_retry_draws_anew_from_the_same_question(llm: LLM) -> None:
    spy = Spy(llm)
    conversation = chat(spy, temperature=1.5, seed=2**64 - 1)
    ask(conversation, "first")
    ask(conversation, "hello")
    for _ in range(2):
        conversation.retry(str, never)
    prompts, params = zip(*spy.given[1:], strict=True)
    assert prompts[0] == prompts[1] == prompts[2] != spy.given[0][0]
    assert [p.seed for p in params] == [2**64 - 1, 0, 1]
    assert [turn.question for turn in conversation.turns] == ["first", "hello"]
    assert conversation.turns[1].answer == llm.generate(prompts[2], params[2])[0].text
    assert conversation.params.seed == 2**64 - 1


def test_a_stopped_answer_keeps_what_was_shown_and_frees_the_model(llm: LLM) -> None:
    conversation = chat(Spy(llm), max_tokens=None, ignore_eos=True)
    texts: list[str] = []
    turn = conversation.ask("hello", texts.append, lambda: len(texts) == 5)
    assert turn is not None
    assert (turn.finish_reason, turn.stats, turn.n_tokens >= 5) == ("abort", None, True)
    assert turn.answer == "".join(texts) == conversation.turns[0].answer != ""
    whole = llm.generate(llm.tokenizer.apply_chat_template([{"role": "user", "content": "hello"}]), conversation.params)
    assert whole[0].text.startswith(turn.answer)
    assert len(texts) == 5


def test_an_answer_stopped_before_it_began_is_not_kept(llm: LLM) -> None:
    class Prefilling(Spy):
        def stream(self, ids: list[int], params: SamplingParams) -> Iterator[Chunk]:
            yield Chunk("", None)
            raise AssertionError("it was stopped")

    conversation = chat(Prefilling(llm))
    assert conversation.ask("hello", str, lambda: True) is None
    assert conversation.turns == []
    conversation = chat(llm)
    answer = ask(conversation, "hello")
    conversation._llm = Prefilling(llm)  # type: ignore[assignment]
    assert conversation.retry(str, lambda: True) is None
    assert conversation.turns[0].answer == answer


@pytest.mark.parametrize("asked", [True, False])
def test_a_keyboard_interrupt_is_a_stop_only_where_one_was_asked_for(llm: LLM, asked: bool) -> None:
    pressed = False

    class Slow(Spy):
        def stream(self, ids: list[int], params: SamplingParams) -> Iterator[Chunk]:
            nonlocal pressed
            yield Chunk("so", 7)
            pressed = asked
            raise KeyboardInterrupt

    conversation = chat(Slow(llm))
    if asked:
        turn = conversation.ask("hello", str, lambda: pressed)
        assert turn is not None
        assert turn.answer == "so"
    else:
        with pytest.raises(KeyboardInterrupt):
            conversation.ask("hello", str, lambda: pressed)
        assert conversation.turns == []


def test_a_question_that_does_not_fit_is_taken_back(llm: LLM) -> None:
    conversation = chat(llm, max_tokens=None)
    with pytest.raises(RequestError, match="exceed the context of 512"):
        conversation.ask("x" * 600, str, never)
    assert conversation.turns == []
    conversation.set("ignore_eos", "true")
    turn = conversation.ask("x" * 400, str, never)
    assert turn is not None
    assert turn.stats is not None
    assert turn.stats.prompt_tokens + turn.n_tokens == 512
    with pytest.raises(RequestError, match="exceed the context of 512"):
        conversation.ask("y", str, never)
    assert len(conversation.turns) == 1


def test_settings_are_typed_as_json_and_as_python_writes_them(llm: LLM) -> None:
    conversation = chat(llm)
    typed = {"temperature": ".5", "top_k": "4", "top_p": "0.5", "min_p": "1e-3", "seed": "7", "max_tokens": "None"}
    for name, text in (typed | {"ignore_eos": "True", "stop": '["a", "b"]'}).items():
        conversation.set(name, text)
    expected = SamplingParams(temperature=0.5, top_k=4, top_p=0.5, min_p=1e-3, seed=7, ignore_eos=True, stop=["a", "b"])
    assert conversation.params == expected
    settings = conversation.settings()
    assert settings.keys() >= typed.keys()
    assert not settings.keys() & {"n", "logits_processors"}
    assert (settings["max_tokens"], settings["ignore_eos"], settings["seed"]) == ("none", "true", "7")
    again = chat(llm)
    for name, text in settings.items():
        again.set(name, text)
    assert again.params == expected
    for name, text in (("stop", "END"), ("temperature", "none"), ("min_p", "NONE")):
        conversation.set(name, text)
    assert conversation.params == replace(expected, stop="END", temperature=0.0, min_p=0.0)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("temperature", "warm", "temperature must be a finite number of at least 0, not 'warm'"),
        ("temperature", "nan", "temperature must be a finite number of at least 0, not nan"),
        ("top_p", "2", "top_p must be a finite number from 0 to 1, not 2"),
        ("top_k", "1.5", "top_k must be a whole number of at least 0, not 1.5"),
        ("seed", "9" * 5000, "seed must be a whole number"),
        ("ignore_eos", "maybe", "ignore_eos must be true or false, not 'maybe'"),
        ("colour", "red", "unknown setting 'colour'; known: temperature, "),
        ("n", "2", "unknown setting 'n'; known: "),
    ],
)
def test_a_bad_setting_is_the_fields_own_sentence(llm: LLM, name: str, text: str, message: str) -> None:
    conversation = chat(llm)
    before = conversation.params
    with pytest.raises(RequestError) as error:
        conversation.set(name, text)
    assert str(error.value).startswith(message)
    assert conversation.params == before


def test_template_variables_are_settings(tiny_dir: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_dir, tmp_path / "tiny")
    (path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[-1].content }}{{ tools }}{{ date_string }}")
    spy = Spy(LLM(path, dtype="float32", kernels="off", threads=1))
    conversation = Conversation(spy, SamplingParams(max_tokens=1), None, {"date_string": "today"})

    def prompt() -> str:
        ask(conversation, "q")
        return spy.tokenizer.decode(spy.given[-1][0])

    assert prompt() == "qNonetoday"
    names = {name: text for name, text in conversation.settings().items() if name.startswith("template.")}
    assert names == {"template.date_string": '"today"', "template.tools": "none"}
    for text, shown in (("1 Jan", "1 Jan"), ('"2"', "2"), ("none", "")):
        conversation.set("template.date_string", text)
        assert prompt() == f"qNone{shown}"
    conversation.set("template.tools", '[{"name": "f"}]')
    assert prompt() == "q[{'name': 'f'}]"
    assert conversation.settings()["template.tools"] == '[{"name": "f"}]'
    for name, text, message in (
        ("template.tools", "all", "tools is str 'all', expected a list"),
        ("template.messages", "1", "unknown setting 'template.messages'; known: temperature"),
    ):
        with pytest.raises(RequestError, match=message):
            conversation.set(name, text)
        assert prompt() == "q[{'name': 'f'}]"


def test_a_checkpoint_that_cannot_chat_says_so_at_once(llm: LLM) -> None:
    class Mute:
        def apply_chat_template(self, messages: object, add_generation_prompt: bool = True) -> list[int]:
            raise TokenizerError("this checkpoint has no chat template")

    spy = Spy(llm)
    spy.tokenizer = Mute()  # type: ignore[assignment]
    with pytest.raises(TokenizerError, match="no chat template"):
        chat(spy)
