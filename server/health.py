"""Probes: is the process alive, may it get work, does the engine answer."""

from fastapi import APIRouter
from fastapi.responses import Response

from .errors import json_response
from .supervisor import State, Supervisor


def routes(supervisor: Supervisor) -> APIRouter:
    """The probe routes."""
    router = APIRouter()

    def answer(is_well: bool) -> Response:
        if not is_well:
            raise supervisor.unavailable()
        return json_response({"status": str(supervisor.state)})

    @router.get("/livez")
    async def livez() -> Response:
        """The event loop turns."""
        return answer(True)

    @router.get("/readyz")
    @router.get("/ready")
    async def readyz() -> Response:
        """New work is welcome."""
        return answer(supervisor.state is State.READY)

    @router.get("/health")
    async def health() -> Response:
        """The engine answers; still true while a drain finishes what is open."""
        return answer(supervisor.has_engine)

    return router
