"""Runs the service of a model: the packages it needs, the port, the log, and a clean end."""

from __future__ import annotations

import logging
import signal
import socket
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from slimformer.errors import ExtraError, OutputError
from slimformer.serving.answering import served_model
from slimformer.serving.batching import Limits

_log = logging.getLogger(__name__)

SERVE_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
LOOPBACK = ("127.0.0.1", "::1", "localhost")
GRACE = 30  # seconds that requests have to end once the server is told to


def serve(
    path: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    threads: int | None = None,
    max_length: int | None = None,
    limits: Limits | None = None,
) -> None:
    """Serves a model over HTTP until it is told to end (Ctrl-C, SIGTERM); requests that came in before are answered.

    Args:
        path: A folder that `slimformer compress` wrote, one with ONNX files of other tools, or one .onnx file.
        host: The address to listen on: by default only this machine reaches it. There are no passwords: put a proxy before it.
        port: The port; 0 takes a free one.
        threads: Threads that the runtime uses; all cores by default.
        max_length: Tokens that a text may have; by default as many as the folder was made for.
        limits: What one caller may ask for, and how much may wait.

    Raises:
        ModelError: There is no such model, or one that answers what no endpoint asks for.
        ExtraError: The extra `serve` is not installed.
        OutputError: The port is taken.

    Example:
        >>> serve("small", port=8000)  # doctest: +SKIP
    """
    lacking = next((name for name in SERVE_PACKAGES if find_spec(name) is None), None)
    if lacking is not None:
        raise ExtraError(f"serving needs the package {lacking}.", help="pip install 'slimformer[serve]'")
    import uvicorn

    from slimformer.serving.web import app_of

    served = served_model(Path(path), max_length)
    app = app_of(served, threads=threads, limits=limits)
    listening = _listening(host, port)
    shown_host = f"[{host}]" if ":" in host else host
    _log.info("%s answers at http://%s:%s%s", served.name, shown_host, listening.getsockname()[1], served.answerer.path)
    if host not in LOOPBACK:
        _log.warning("whoever reaches %s may ask this server: it has no passwords. Put a proxy with some before it.", host)
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE, server_header=False)
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn ends by it, and raises it once more when it has ended
    with listening, suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens; OutputError if the address or the port cannot be had."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OutputError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}.",
            help="choose another one with --port or --host.",
        ) from None
