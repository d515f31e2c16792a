"""The engine process: entry point and ties to the parent.

It must never outlive the API process: the kernel kills it when the parent dies, even inside a long
step, and it leaves by itself at the end of the socket.
"""

import ctypes
import faulthandler
import logging
import os
import signal
import socket
import sys

from ..core.config import Config
from .loop import serve

_PR_SET_PDEATHSIG = 1


def main(sock: socket.socket, config: str, engine: str, parent: int) -> None:
    """Run an engine for the process `parent` at the other end of `sock`; `config` is JSON."""
    _die_with(parent)
    # Both may reach the whole process group; the parent drains and then says stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s engine %(name)s: %(message)s"
    )
    # The codec is loaded only where there is somebody to speak to.
    from .wire import SocketChannel

    with sock:
        serve(Config.from_json(config), engine, SocketChannel(sock))


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        # It died before the line above took effect.
        sys.exit("the parent process is gone")
