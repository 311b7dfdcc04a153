"""The service's address: taken early, so that one that is taken already is reported at once."""

import socket

from service.settings import SettingsError


def bind(host: str, port: int, *, is_shared: bool = False) -> socket.socket:
    """A bound socket that does not listen yet.

    Args:
        host: Address.
        port: 0 takes a free one.
        is_shared: Whether other sockets of this user may listen there, too: the kernel deals new
            connections out among them.

    Raises:
        SettingsError: The address cannot be listened on.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((host, port))
    except OSError as exc:
        listener.close()
        raise SettingsError(
            f"CTR_HOST, CTR_PORT: cannot listen on {host}:{port}: {exc.strerror}"
        ) from exc
    return listener


def reserve_port(host: str, port: int) -> socket.socket:
    """A shared socket that never listens: it keeps the port for workers that do.

    Raises:
        SettingsError: Something listens there, be it another service that shares its port.
    """
    with bind(host, port) as probe:
        port = probe.getsockname()[1]
    return bind(host, port, is_shared=True)


def listening_url(listener: socket.socket) -> str:
    """The URL of the address a socket is bound to."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
