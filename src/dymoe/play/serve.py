"""The page's server: it listens on one address, guarded, in a thread of its own."""

import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import uvicorn

from dymoe.errors import DymoeError
from dymoe.play.ask import Runs
from dymoe.play.guard import Guard, Uploads
from dymoe.play.page import build, mount

PORTS = range(7860, 7960)  # Gradio's usual ones


@contextmanager
def serve(runs: Runs, host: str, port: int | None, room: Path) -> Iterator[str]:
    """Serve the page while the block runs; yields its address.

    Args:
        runs: in memory.
        host: address to listen on.
        port: the first free one from Gradio's usual one on when None.
        room: a folder for uploads and examples, Gradio's temporary folder; its owner removes it.

    Raises:
        DymoeError: the host is none of this machine, or the port is taken.
    """
    with _listen(host, PORTS if port is None else [port]) as listener:
        number = listener.getsockname()[1]
        uploads = Uploads(room)
        page = build(runs, Path(tempfile.mkdtemp(dir=room)), uploads)
        guard = Guard(mount(page), host, number, uploads)
        config = uvicorn.Config(guard, log_level="warning", proxy_headers=False, timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            name = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, f"[{host}]" if ":" in host else host)
            yield f"http://{name}:{number}/"
        finally:
            page.close(verbose=False)
            server.should_exit = True
            thread.join(timeout=5)


def _listen(host: str, ports: range | list[int]) -> socket.socket:
    """A socket that listens on the first free port.

    Raises:
        DymoeError: the host is none of this machine, or no port is free.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in ports:
        try:
            return socket.create_server((host, port), family=family)
        except OSError as error:
            reason = error
    where = f"{host}:{ports[0]}" if len(ports) == 1 else host
    text = f"play: {where} cannot be listened on; give another --port or --host ({reason.strerror or reason})"
    raise DymoeError(text) from None
