"""The socket of a service."""

import socket

from sdft.services.config.service import HttpConfig
from sdft.services.serving.start import _listening


def test_small_pieces_are_sent_at_once() -> None:
    """Otherwise each waits for the acknowledgement of the one before: 40 ms between two tokens of a stream."""
    with _listening(HttpConfig(port=0)) as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
