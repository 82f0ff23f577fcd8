"""An MCP server (Python's standard library alone) that answers as fast as one in Python can, so that what lies before it shows: `stdio`,
or `http` for streamable HTTP on port 8080."""

import http.server
import json
import sys

OBJECT = {"type": "object"}


def answer(message):
    method, params, id = message.get("method"), message.get("params", {}), message.get("id")
    if id is None:
        return None
    told = {"jsonrpc": "2.0", "id": id}
    if method == "initialize":
        server = {"name": "bench", "version": "1.0.0"}
        version = params["protocolVersion"]
        told["result"] = {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": server}
    elif method == "ping":
        told["result"] = {}
    elif method == "tools/list":
        told["result"] = {"tools": [{"name": "echo", "inputSchema": OBJECT}]}
    elif method == "tools/call":
        told["result"] = {"content": [{"type": "text", "text": params["arguments"]["text"]}], "isError": False}
    else:
        told["error"] = {"code": -32601, "message": f"no method {method} here"}
    return json.dumps(told)


class Endpoint(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # An answer in one segment, and that at once.
    wbufsize = -1
    disable_nagle_algorithm = True

    def do_POST(self):
        told = answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200 if told else 202)
        body = (told or "").encode()
        if body:
            self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.send_error(405)

    do_DELETE = do_GET

    def log_message(self, *_):
        pass


if sys.argv[1] == "stdio":
    for line in sys.stdin:
        told = answer(json.loads(line))
        if told:
            sys.stdout.write(told + "\n")
            sys.stdout.flush()
else:
    http.server.ThreadingHTTPServer(("0.0.0.0", 8080), Endpoint).serve_forever()
