"""A small MCP server on the official Python SDK: three tools over streamable HTTP on port 8080, path /mcp, or with the argument `stdio` over
its standard input and output."""

import signal
import sys
from datetime import datetime, timezone

from mcp.server import MCPServer
from mcp.server.transport_security import TransportSecuritySettings

server = MCPServer("mcp-demo", version="1.0.0", log_level="WARNING")


@server.tool()
def add(a: int, b: int) -> int:
    """Add two whole numbers."""
    return a + b


@server.tool()
def echo(text: str) -> str:
    """Give the text back as it came."""
    return text


@server.tool()
def clock() -> str:
    """The time here, UTC, as RFC 3339."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


if __name__ == "__main__":
    # Until uvicorn has its own handler, SIGTERM would be ignored by a process that is PID 1.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if sys.argv[1:] == ["stdio"]:
        server.run("stdio")
        sys.exit(0)
    # The container publishes no port and only the agent reaches it, under an address nobody knows beforehand; the SDK's
    # check of the Host header is against browsers on the same machine.
    server.run(
        "streamable-http",
        host="0.0.0.0",
        port=8080,
        transport_security=TransportSecuritySettings(enable_dns_rebinding_protection=False),
    )
