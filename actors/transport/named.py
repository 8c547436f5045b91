"""Transports by name: the built-in ones, and a user's own."""

from sdft.actors.shared.own_code import own_class
from sdft.actors.transport.protocol import WeightTransport

# By import path: a process imports only the transport that it uses.
BUILT_IN = {
    "memory": "sdft.actors.transport.memory:MemoryTransport",
    "changes": "sdft.actors.transport.changes:ChangesTransport",
    "broadcast": "sdft.actors.transport.broadcast:BroadcastTransport",
    "ipc": "sdft.actors.transport.ipc:IpcTransport",
}


def transport_class(name: str) -> type[WeightTransport]:
    """Return the class that `weights.transport` names. Raises NotImportable."""
    return own_class(BUILT_IN.get(name, name), WeightTransport)
