"""Every route but the probes needs a key, those that do not exist included."""

import pytest
from kvfold.server.auth import OPEN_PATHS

from .scripted import config, serving

pytestmark = pytest.mark.anyio
KEYS = ("first-key", "second-key")


async def test_every_route_is_closed_unless_it_is_a_probe() -> None:
    async with serving(settings=config(api_keys=KEYS)) as client:
        routes = {
            (method, route.path.replace("{name:path}", "test"))
            for included in client.app.routes
            for route in included.original_router.routes
            for method in route.methods
        }
        assert ("POST", "/v1/completions") in routes
        assert ("GET", "/metrics") in routes
        for method, path in routes | {("GET", "/nope"), ("POST", "//livez"), ("GET", "/livez/x")}:
            reply = await client.send(method, path)
            if path in OPEN_PATHS:
                assert reply.status == 200
            else:
                assert (path, reply.status) == (path, 401)
                assert reply.error["code"] == "invalid_api_key"
                assert reply.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Bearer first-key", 200),
        ("bearer second-key", 200),
        ("Bearer third-key", 401),
        ("Bearer ", 401),
        ("first-key", 401),
        ("Basic first-key", 401),
        ("Bearer first-key second-key", 401),
        ("Bearer café", 401),
    ],
)
async def test_keys(header: str, status: int) -> None:
    async with serving(settings=config(api_keys=KEYS)) as client:
        reply = await client.get("/v1/models", headers={"authorization": header})
        assert reply.status == status


async def test_wrong_key_costs_no_body() -> None:
    async with serving(settings=config(api_keys=KEYS, max_body_bytes=10)) as client:
        assert (await client.post("/v1/completions", b"x" * 100)).status == 401


async def test_no_keys_is_open() -> None:
    async with serving() as client:
        assert (await client.get("/v1/models")).status == 200


async def test_browsers_of_listed_origins_may_call() -> None:
    origins = {"allowed_origins": ("http://ui.local",), "api_keys": KEYS}
    async with serving(settings=config(**origins)) as client:
        ask = {"origin": "http://ui.local", "access-control-request-method": "POST"}
        reply = await client.send("OPTIONS", "/v1/completions", headers=ask)
        assert reply.status == 200
        assert reply.headers["access-control-allow-origin"] == "http://ui.local"
        other = ask | {"origin": "http://evil.local"}
        assert (await client.send("OPTIONS", "/v1/completions", headers=other)).status == 400
