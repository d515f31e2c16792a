"""The ASGI application: routers, layers, and the engine's life bound to the server's."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.middleware.cors import CORSMiddleware

from .. import __version__
from ..core.config import Config
from ..engine.text import Text
from . import catalog, chat, completions, errors, health
from .api import Api
from .auth import Auth
from .guard import Guard
from .metrics import Metrics
from .supervisor import Supervisor

PING_S = 15.0


def create_app(
    config: Config,
    supervisor: Supervisor,
    text: Text,
    *,
    served_names: tuple[str, ...] = (),
    ping_s: float = PING_S,
) -> FastAPI:
    """The server as an ASGI application; its lifespan starts and stops the supervisor."""
    names = served_names or config.model.served_names or (config.model.path,)
    metrics = Metrics(
        names[0],
        stats=lambda: supervisor.stats,
        info=lambda: supervisor.info,
        n_restarts=lambda: supervisor.n_restarts,
        cache=config.cache,
        has_aliases=config.server.metrics_compat == "vllm",
    )
    api = Api(config, supervisor, text, metrics, names, ping_s)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        supervisor.start()
        try:
            yield
        finally:
            await supervisor.close()

    # The bodies are read by hand, so a generated schema would say nothing about them.
    app = FastAPI(
        title="kvfold",
        version=__version__,
        lifespan=lifespan,
        openapi_url=None,
        # A redirect would point where the Host header says.
        redirect_slashes=False,
    )
    app.state.api = api
    for router in (
        health.routes(supervisor),
        catalog.routes(api),
        completions.routes(api),
        chat.routes(api),
    ):
        for route in router.routes:
            if isinstance(route, APIRoute) and route.methods == {"GET"}:
                # As load balancers probe; uvicorn leaves the body out.
                route.methods = {"GET", "HEAD"}
        app.include_router(router)
    errors.install(app)
    # Added from the inside out.
    app.add_middleware(Auth, api_keys=config.server.api_keys)
    if config.server.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.server.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id", "x-request-timeout"],
            expose_headers=["x-request-id", "x-kvfold-ignored-params", "x-kvfold-seed"],
        )
    app.add_middleware(
        Guard,
        max_body_bytes=config.server.max_body_bytes,
        request_timeout_s=config.server.request_timeout_s,
        on_gone=metrics.client_gone,
    )
    return app
