"""``whalefall serve``: load, listen, and stop without leaving anyone behind."""

import socket
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from whalefall.api import load
from whalefall.config.serve import ServeConfig
from whalefall.data.chat import ChatTemplate
from whalefall.engine.engine import Engine
from whalefall.engine.generate import generate
from whalefall.engine.live import AsyncEngine
from whalefall.engine.sampling import SamplingParams
from whalefall.errors import UserError
from whalefall.serve.app import create_app
from whalefall.serve.metrics import Metrics, numbers_of
from whalefall.serve.service import Model, Service

_LAST_SECONDS = 2
"""For the last bytes of answers, once everything is generated or the time for it is over."""
_IDLE_SECONDS = 75
"""Longer than clients keep an idle connection: one that is closed just as it is used is an error
to them."""


def serve(model: Path, config: ServeConfig) -> None:
    """Serve a model until a signal ends it.

    Raises:
        UserError: the address is taken, the model cannot be loaded, or its cache does not fit.
    """
    # Before the weights are read, which may take minutes; it answers when they are there.
    with listen(config) as listener:
        network, tokenizer = load(model, fp8=config.fp8)
        engine = AsyncEngine(Engine(network, tokenizer, config.engine))
        if network.lm_head.weight.is_cpu:
            # Compiles the CPU's kernels, the first time for seconds: not in somebody's request.
            generate(network, tokenizer, "x", SamplingParams(max_tokens=2))
        service = make_service(engine, config, config.name or model.resolve().name)
        host, port = listener.getsockname()[:2]
        pool = engine.engine.pool
        print(
            f"{service.model.name} at http://{f'[{host}]' if ':' in host else host}:{port} with a "
            f"context of {service.model.context:,} and a cache of {pool.pages * pool.page_size:,} "
            "tokens",
            flush=True,
        )
        Server(service, create_app(service, engine.stop)).run([listener])
    if service.admission.failed:
        raise SystemExit("error: the engine has failed")


def make_service(engine: AsyncEngine, config: ServeConfig, name: str) -> Service:
    """A service in front of an engine, which needs a tokenizer.

    Raises:
        UserError: the engine has none.
    """
    inner = engine.engine
    if inner.tokenizer is None or inner.grammars is None:
        raise UserError("an engine without a tokenizer cannot be served")
    try:
        template = ChatTemplate(inner.tokenizer)
    except UserError:  # a model that only completes texts
        template = None
    model = Model(
        name=name,
        tokenizer=inner.tokenizer,
        vocab_size=inner.model.config.vocab_size,
        context=min(inner.context, inner.pool.pages * inner.pool.page_size),
        template=template,
    )
    metrics = Metrics(lambda: numbers_of(inner))
    return Service(engine, model, config, metrics, inner.grammars.compile)


def listen(config: ServeConfig) -> socket.socket:
    """A socket bound to the configured address.

    Raises:
        UserError: it is taken, or none of this machine's.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise UserError(
            f"cannot listen at {config.host} port {config.port}: {error.strerror}"
        ) from None
    return listener


class Server(uvicorn.Server):
    """Drains at the first SIGTERM or SIGINT, and stops at once at the second."""

    def __init__(self, service: Service, app: FastAPI) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                timeout_keep_alive=_IDLE_SECONDS,
                timeout_graceful_shutdown=_LAST_SECONDS,
            )
        )
        self._admission = service.admission

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """New requests are refused from now on; the process ends with status 0."""
        self.should_exit = self._admission.is_draining
        self._admission.drain()

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._admission.is_drained
