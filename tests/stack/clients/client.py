"""The official Python client, made to do what its arguments say and to tell in JSON what came of it.

client.py TARGET ERA CALLS: TARGET is a URL (streamable HTTP), `sse:` and a URL, or `stdio:` and a command as a JSON array; ERA is
`auto` or `legacy`; CALLS is a JSON array of {"tool", "arguments"}.
"""

import asyncio
import json
import sys

from mcp import Client, StdioServerParameters
from mcp.client.sse import sse_client


def transport(target):
    if target.startswith("sse:"):
        return sse_client(target.removeprefix("sse:"))
    if target.startswith("stdio:"):
        command, *arguments = json.loads(target.removeprefix("stdio:"))
        return StdioServerParameters(command=command, args=arguments)
    return target


def text_of(result):
    return "\n".join(content.text for content in result.content if content.type == "text")


async def main(target, era, calls):
    async with Client(transport(target), mode=era, read_timeout_seconds=30) as client:
        tools = await client.list_tools()
        answers = []
        for call in calls:
            result = await client.call_tool(call["tool"], call["arguments"])
            answers.append({"text": text_of(result), "error": bool(result.is_error)})
        told = {
            "version": client.protocol_version,
            "tools": [tool.name for tool in tools.tools],
            "answers": answers,
        }
    print(json.dumps(told))


asyncio.run(main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3])))
