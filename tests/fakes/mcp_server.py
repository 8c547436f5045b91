"""An MCP server of a few lines: python tests/fakes/mcp_server.py"""

from mcp.server.mcpserver import MCPServer

server = MCPServer("numbers")
total = 0


@server.tool()
def add(number: int) -> str:
    """Add a number to the total."""
    global total
    total += number
    return f"the total is {total}"


@server.tool()
def fail() -> str:
    """Raise an error."""
    raise RuntimeError("the drawer is stuck")


@server.tool()
def flood() -> str:
    """Return a long text."""
    return "x" * 50_000


if __name__ == "__main__":
    server.run()
