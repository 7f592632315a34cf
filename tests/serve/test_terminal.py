"""``whalefall chat``, with a scripted standard input: a server's answers, and a network's own."""

import json
import os
import signal
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from serve.conftest import Running, ScriptedEngine
from tiny import TINY
from typer.testing import CliRunner, Result

import whalefall
from whalefall.cli.chat import Conversation, chat, with_changes
from whalefall.cli.speakers import Cost, Messages, Piece
from whalefall.data.chat import ChatTemplate, Message
from whalefall.data.tokenizer import Tokenizer
from whalefall.engine.engine import Engine
from whalefall.engine.sampling import SamplingParams
from whalefall.errors import UserError
from whalefall.model.transformer import Transformer


def talk(*arguments: object, said: str = "") -> Result:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(chat)
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=said)


def prompts(engine: ScriptedEngine) -> list[str]:
    return [engine.tokenizer.decode(request.prompt) for request in engine.requests]


def test_a_conversation_with_a_server(server: Running, engine: ScriptedEngine) -> None:
    result = talk(server.url, "seed=3", "--system", "Be brief.", said="One\n\nTwo\n")
    assert result.exit_code == 0, result.output
    assert result.stdout == "Hello, 漢字!\nHello, 漢字!\n"
    assert result.stderr.count("14 tokens · ") == 2
    assert [request.params.seed for request in engine.requests] == [3, 3]
    assert prompts(engine)[1] == "Be brief.OneHello, 漢字!Two"


def test_commands_change_what_is_asked(
    server: Running, engine: ScriptedEngine, tmp_path: Path
) -> None:
    file = tmp_path / "talk.json"
    said = f"""\
/set temperature=0.25 stop=', 漢'
One
/set stop=null
/set
/system Be kind.
/reset
Two
 /usr is a folder
/save {file}
/save {file}
/help
"""
    result = talk(server.url, said=said)
    assert result.stdout == "Hello\nHello, 漢字!\nHello, 漢字!\n"
    assert 'temperature=0.25 stop=", 漢"' in result.stderr and "/reset" in result.stderr
    assert prompts(engine)[1:] == ["Be kind.Two", "Be kind.TwoHello, 漢字!/usr is a folder"]
    saved = json.loads(file.read_text())
    assert [message["role"] for message in saved] == ["system", *["user", "assistant"] * 2]


def test_thoughts_are_told_apart_from_content(server: Running, engine: ScriptedEngine) -> None:
    engine.script = lambda _: engine.tokenizer.encode("Hm.</think>Yes.")
    result = talk(server.url, "--think", said="One\n/think\n")
    assert result.stdout == "Hm.Yes.\n"
    assert "answers at once" in result.stderr
    talk(server.url, "--think", said="One\nTwo\n")
    assert prompts(engine)[-1].startswith("OneYes.Two")


def test_a_message_of_several_lines(server: Running, engine: ScriptedEngine) -> None:
    talk(server.url, said='"""def f():\n/set\n    pass"""\nTwo\n')
    assert prompts(engine)[0].startswith("def f():\n/set\n    pass")


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("/nothing\n", "there is no command /nothing"),
        ("/set heat=1\n", "'heat=1' is no setting; set temperature"),
        ("/set temperature\n", "no setting"),
        ("/set temperature=-1\n", "temperature is -1; must be"),
        ("/set top_k=[\n", "no value"),
        ("/set stop='\n", "does not close it"),
        ("/save\n", "needs the name of a file"),
        ("/save /\n", "exists already"),
        ("/save /nowhere/talk\n", "cannot be written"),
        ("x" * 5000 + "\n", "context"),
    ],
)
def test_what_is_wrong_costs_one_line(
    server: Running, engine: ScriptedEngine, said: str, error: str
) -> None:
    result = talk(server.url, said=f"{said}Fine\n")
    assert result.exit_code == 0
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert error in line
    assert result.stdout.endswith("Hello, 漢字!\n")
    assert prompts(engine) == ["Fine"]


def test_no_server_no_folder_no_setting() -> None:
    for arguments in (["http://127.0.0.1:9"], ["nowhere"], ["nowhere", "heat=1"]):
        assert isinstance(talk(*arguments).exception, UserError)


def test_settings_are_typed_and_can_be_taken_away() -> None:
    settings = with_changes({"seed": 1}, ["temperature=0", "seed=null", "stop=end"])
    assert settings == {"temperature": 0, "stop": "end"}


class Interrupted:
    """A speaker whose user presses Ctrl-C in the middle of the first answer."""

    name = "interrupted"

    def __init__(self) -> None:
        self.asked: list[list[Mapping[str, str]]] = []
        self.closed = False

    def answer(
        self, messages: Messages, settings: Mapping[str, Any], *, thinking: bool
    ) -> Generator[Piece | Cost, None, None]:
        self.asked.append(list(messages))
        try:
            yield Piece("\x1b[2JHalf\r an", is_thought=False)
            if len(self.asked) == 1:
                raise KeyboardInterrupt
            yield Piece(" answer", is_thought=False)
            yield Cost(9, 4, 2, 8, 6)
        finally:
            self.closed = True


def test_ctrl_c_stops_the_answer_and_keeps_what_came() -> None:
    speaker = Interrupted()
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(lambda: Conversation(speaker, {}, system="", thinking=False).run())
    result = CliRunner().invoke(app, input="One\nTwo\n")
    # Nothing that a model writes moves the cursor.
    assert result.stdout == "[2JHalf an\n[2JHalf an answer\n"
    assert "stopped" in result.stderr and "75% of drafts accepted" in result.stderr
    assert speaker.closed
    assert [message["role"] for message in speaker.asked[1]] == ["user", "assistant", "user"]


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 256}
    config = TINY.model_copy(update=changes)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "small"
    whalefall.save(Transformer(config), tokenizer, path)
    return path


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_network_in_a_folder_answers_as_the_engine_does(folder: Path, drafts: int) -> None:
    result = talk(folder, "temperature=0", "max_tokens=20", "--drafts", drafts, said="One\nTwo\n")
    assert result.exit_code == 0, result.exception
    network, tokenizer = whalefall.load(folder)
    engine, template = Engine(network, tokenizer), ChatTemplate(tokenizer)
    messages: list[Message] = []
    expected = ""
    for said in ("One", "Two"):
        messages.append(Message("user", said))
        prompt = template.prompt(messages).tokens
        (answer,) = engine.generate([prompt], SamplingParams(max_tokens=20, temperature=0.0))
        messages.append(Message("assistant", answer.text))
        expected += f"{answer.text}\n"
    shown = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
    assert result.stdout == expected.translate(shown)
    assert result.stderr.count("prompt tokens cached") == 2


def test_a_conversation_longer_than_the_context_is_refused_and_can_go_on(folder: Path) -> None:
    result = talk(folder, "max_tokens=5", said=f"{'x' * 400}\nHi\n")
    assert "exceed the context of 256 tokens" in result.stderr
    assert result.stderr.count("5 tokens · ") == 1


def test_ctrl_c_waits_for_the_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is whole afterwards: the next answer is the one it would have given."""
    step, steps = Engine.step, []

    def interrupted_step(engine: Engine) -> object:
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(engine)

    monkeypatch.setattr(Engine, "step", interrupted_step)
    said = "One\n/reset\nOne\n"
    result = talk(folder, "temperature=0", "max_tokens=10", said=said)
    assert result.exit_code == 0
    assert "stopped" in result.stderr and "10 tokens" in result.stderr
    monkeypatch.setattr(Engine, "step", step)
    plain = talk(folder, "temperature=0", "max_tokens=10", said="One\n").stdout
    assert result.stdout.endswith(f"\n{plain}")
    assert plain.startswith(result.stdout.removesuffix(f"\n{plain}"))
