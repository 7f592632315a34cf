"""A scripted engine behind a real server: what is generated, and when, is up to the test."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx
import pytest
from tiny import TINY

from whalefall.config.engine import EngineConfig
from whalefall.config.serve import ServeConfig
from whalefall.data.chat import ChatTemplate
from whalefall.data.tokenizer import SMALLEST_VOCABULARY, Tokenizer
from whalefall.engine.engine import Engine
from whalefall.engine.grammar import Grammars
from whalefall.engine.live import AsyncEngine
from whalefall.engine.request import Delta, Request, TokenLogprobs
from whalefall.engine.text import StreamedText
from whalefall.model.transformer import Transformer
from whalefall.serve.app import create_app
from whalefall.serve.main import Server, listen
from whalefall.serve.main import make_service as service_of
from whalefall.serve.metrics import EngineNumbers, Metrics
from whalefall.serve.service import Model, Service

CONTEXT = 4096


class ScriptedEngine:
    """Continues every request with ``script(request)``, ``step`` tokens at a time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.reset()

    def reset(self) -> None:
        self.script: Callable[[Request], list[int]] = lambda _: self.tokenizer.encode(
            "Hello, 漢字!"
        )
        self.step = 1
        self.pause = 0.0
        """Seconds before each step."""
        self.error: Exception | None = None
        """Raised in place of the first step."""
        self.requests: list[Request] = []
        self.aborted: list[Request] = []

    async def stream(self, request: Request) -> AsyncIterator[Delta]:
        self.requests.append(request)
        text = StreamedText(self.tokenizer, request.params.stop)
        script, params = self.script(request), request.params
        if params.prompt_logprobs is not None:
            scored = [logprobs_of(token, params.prompt_logprobs) for token in request.prompt[1:]]
            request.prompt_logprobs = [None, *scored]
        try:
            while request.finish_reason is None:
                await asyncio.sleep(self.pause)
                if self.error is not None:
                    raise self.error
                done = len(request.tokens)
                stop = min(done + self.step, params.max_tokens)
                tokens = script[done:stop]
                request.tokens += tokens
                if len(request.tokens) == params.max_tokens:
                    request.finish_reason = "length"
                elif len(request.tokens) == len(script):
                    request.finish_reason = "stop"
                piece = text.read(request.tokens, ended=request.finish_reason is not None)
                if text.stopped:
                    request.finish_reason = "stop"
                scored = [
                    logprobs_of(t, params.logprobs) for t in tokens if params.logprobs is not None
                ]
                request.logprobs += scored
                yield Delta(request, piece, tokens, scored, request.finish_reason)
        finally:
            if request.finish_reason is None:
                request.finish_reason = "abort"
                self.aborted.append(request)


def logprobs_of(token: int, top: int) -> TokenLogprobs:
    """Made up, but different for every token; the token itself is never the likeliest."""
    logprob = -1.0 - token / 1000
    return TokenLogprobs(token, logprob, [(token + 1, -0.5), (token + 2, -0.75)][:top])


class Running:
    """A server in a thread, on a port of its own."""

    def __init__(self, service: Service, stop: Callable[[], None] = lambda: None) -> None:
        self.service = service
        listener = listen(service.config)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.server = Server(service, create_app(service, stop))
        self.thread = threading.Thread(target=self.server.run, args=([listener],))
        self.thread.start()
        while not self.server.started:
            time.sleep(0.005)

    def client(self, **options: object) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, **options)  # type: ignore[arg-type]

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()


def make_service(engine: ScriptedEngine, /, **settings: object) -> Service:
    tokenizer = engine.tokenizer
    model = Model(
        name="tiny",
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size,
        context=CONTEXT,
        template=ChatTemplate(tokenizer),
    )
    config = ServeConfig.model_validate({"port": 0, "name": "tiny", **settings})
    grammars = Grammars(tokenizer, tokenizer.vocab_size)
    return Service(engine, model, config, Metrics(EngineNumbers), grammars.compile)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Single bytes, so that every character beyond ASCII is split; DeepSeek-V3's dialect."""
    return Tokenizer.train([], SMALLEST_VOCABULARY)


@pytest.fixture(scope="session")
def thinking_tokenizer(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The same with tokens for thoughts: V3.1's dialect."""
    return with_thoughts(tokenizer, tmp_path_factory.mktemp("tokenizer"))


def with_thoughts(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    tokenizer.save(folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    for spelling in ("<think>", "</think>"):
        token = {**spec["added_tokens"][-1], "content": spelling, "special": False}
        token["id"] = len(spec["model"]["vocab"])
        spec["added_tokens"].append(token)
        spec["model"]["vocab"][spelling] = token["id"]
    return Tokenizer(json.dumps(spec))


@pytest.fixture(scope="session")
def _engine(tokenizer: Tokenizer) -> ScriptedEngine:
    return ScriptedEngine(tokenizer)


@pytest.fixture
def engine(_engine: ScriptedEngine) -> ScriptedEngine:
    """The one behind ``server``, as new."""
    _engine.reset()
    return _engine


@pytest.fixture(scope="session")
def server(_engine: ScriptedEngine) -> Iterator[Running]:
    running = Running(make_service(_engine, keep_alive_seconds=0.2))
    # A scripted failure of the engine must not end the server that the other tests share.
    running.service.admission.fail = lambda: None  # type: ignore[method-assign]
    yield running
    running.stop()


@pytest.fixture
def client(server: Running, engine: ScriptedEngine) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture
def start(tokenizer: Tokenizer) -> Iterator[Callable[..., tuple[Running, ScriptedEngine]]]:
    """Start a server with other settings, and an engine of its own."""
    started: list[Running] = []

    def _start(**settings: object) -> tuple[Running, ScriptedEngine]:
        engine = ScriptedEngine(tokenizer)
        started.append(Running(make_service(engine, **settings)))
        return started[-1], engine

    yield _start
    for running in started:
        running.stop()


@pytest.fixture(scope="session")
def network() -> Transformer:
    """Weights large enough that what it writes varies."""
    changes = {
        "vocab_size": SMALLEST_VOCABULARY,
        "num_hidden_layers": 2,
        "initializer_range": 0.4,
        "max_position_embeddings": 512,
    }
    return Transformer.create(TINY.model_copy(update=changes))


@pytest.fixture(scope="session")
def live(network: Transformer, tokenizer: Tokenizer) -> Iterator[Running]:
    """A server with the real engine and multi-token prediction."""
    config = ServeConfig(port=0, engine=EngineConfig(drafts=1, max_running=8))
    engine = AsyncEngine(Engine(network, tokenizer, config.engine))
    running = Running(service_of(engine, config, "tiny"), engine.stop)
    yield running
    running.stop()


def events(response: httpx.Response) -> list[dict[str, object]]:
    """The chunks of a stream, which must be whole."""
    lines = [line for line in response.iter_lines() if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines)
    *chunks, last = [line.removeprefix("data: ") for line in lines]
    assert last == "[DONE]"
    return [json.loads(chunk) for chunk in chunks]
