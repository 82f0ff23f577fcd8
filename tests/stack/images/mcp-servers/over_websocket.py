"""A server on the official Python SDK's websocket transport, which versions before 2 have, on port 8080: each connection is a session."""

import os
import signal
import sys

# In front of the other folder, which has a later version of the SDK and what both need.
sys.path.insert(0, "/opt/mcp-servers/site-mcp-1")

import uvicorn
from mcp.server.lowlevel import Server
from mcp.server.websocket import websocket_server
from mcp.types import TextContent, Tool

WORDS = {"type": "object", "properties": {"words": {"type": "array", "items": {"type": "string"}}}, "required": ["words"]}

server = Server("over-websocket", version="1.0.0")


@server.list_tools()
async def list_tools():
    return [Tool(name="join", description="Joins words.", inputSchema=WORDS)]


@server.call_tool()
async def call_tool(name, arguments):
    return [TextContent(type="text", text="-".join(arguments["words"]))]


async def serve(scope, receive, send):
    async with websocket_server(scope, receive, send) as (read, write):
        await server.run(read, write, server.create_initialization_options())


# Until uvicorn has its own handler, SIGTERM would be ignored by a process that is PID 1.
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
uvicorn.run(serve, host="0.0.0.0", port=int(os.environ["PORT"]), log_level="warning", lifespan="off")
