// The official TypeScript client, made to do what its arguments say and to tell in JSON what came of it: as client.py, which says how.

import { Client, SSEClientTransport, StreamableHTTPClientTransport } from "@modelcontextprotocol/client";
import { StdioClientTransport } from "@modelcontextprotocol/client/stdio";

const [target, era, calls] = process.argv.slice(2);

function transport() {
  if (target.startsWith("sse:")) return new SSEClientTransport(new URL(target.slice("sse:".length)));
  if (target.startsWith("stdio:")) {
    const [command, ...args] = JSON.parse(target.slice("stdio:".length));
    return new StdioClientTransport({ command, args });
  }
  return new StreamableHTTPClientTransport(new URL(target));
}

const client = new Client({ name: "story", version: "1.0.0" }, { versionNegotiation: { mode: era } });
await client.connect(transport());
const { tools } = await client.listTools();
const answers = [];
for (const call of JSON.parse(calls)) {
  const result = await client.callTool({ name: call.tool, arguments: call.arguments }, { timeout: 30_000 });
  const texts = result.content.filter((content) => content.type === "text").map((content) => content.text);
  answers.push({ text: texts.join("\n"), error: result.isError === true });
}
const version = client.getNegotiatedProtocolVersion?.() ?? null;
await client.close();
console.log(JSON.stringify({ version, tools: tools.map((tool) => tool.name), answers }));
