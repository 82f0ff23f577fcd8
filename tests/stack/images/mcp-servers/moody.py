"""A stdio MCP server (legacy era, Python's standard library alone) that does on request what servers do to their hosts by mistake.

`moody.py` serves; `moody.py MOOD` begins badly: `exit` ends at once with success, `hang` reads and never answers, `noise` writes
lines that aren't JSON between its answers all the time. Where TALLY names a file, every echo that is carried out is noted there, so
that a call carried out twice can be told from one that isn't.
"""

import collections
import json
import os
import sys
import threading
import time

OBJECT = {"type": "object"}
TOOLS = ["echo", "slow", "crash", "hang", "progress", "ask", "noise", "big", "tally"]
TALLY = os.environ.get("TALLY")

mood = sys.argv[1] if len(sys.argv) > 1 else ""
writing = threading.Lock()
tallying = threading.Lock()
# Ids of our own questions, and what waits for the answers.
asked = {}


def write(text):
    with writing:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def send(**message):
    write(json.dumps({"jsonrpc": "2.0", **message}))


def answer(to, text, error=False):
    send(id=to, result={"content": [{"type": "text", "text": text}], "isError": error})


def echo(call, arguments, _meta):
    if TALLY:
        with tallying, open(TALLY, "a", encoding="utf-8") as tally:
            tally.write(arguments["text"] + "\n")
    answer(call, arguments["text"])


def slow(call, arguments, meta):
    time.sleep(arguments["seconds"])
    echo(call, arguments, meta)


def crash(_call, arguments, _meta):
    print("crashing, as asked to", file=sys.stderr, flush=True)
    os._exit(arguments.get("code", 3))


def hang(_call, _arguments, _meta):
    pass


def progress(call, arguments, meta):
    token = meta.get("progressToken")
    for step in range(1, arguments["steps"] + 1):
        send(method="notifications/progress", params={"progressToken": token, "progress": step, "total": arguments["steps"]})
    answer(call, json.dumps(token))


def ask(call, arguments, _meta):
    """Asks the client something and answers what came of it."""
    question = f"ask-{call}"
    heard = asked[question] = [threading.Event(), None]
    message = {"role": "user", "content": {"type": "text", "text": arguments["text"]}}
    send(id=question, method="sampling/createMessage", params={"messages": [message], "maxTokens": 10})
    if heard[0].wait(20):
        answer(call, json.dumps(heard[1]))
    else:
        answer(call, "nobody answered", error=True)


def noise(call, arguments, _meta):
    for line in range(arguments["lines"]):
        write(f"line {line} of something that is no message {'.' * 200}")
    answer(call, "quiet again")


def big(call, arguments, _meta):
    answer(call, "x" * arguments["bytes"])


def tally(call, _arguments, _meta):
    with tallying, open(TALLY, encoding="utf-8") as noted:
        counts = collections.Counter(line.rstrip("\n") for line in noted)
    twice = sorted(text for text, count in counts.items() if count > 1)
    answer(call, json.dumps({"noted": sorted(counts), "twice": twice}))


def carry_out(message):
    params = message.get("params", {})
    globals()[params["name"]](message["id"], params.get("arguments", {}), params.get("_meta", {}))


def handle(message):
    method, id = message.get("method"), message.get("id")
    if method is None:
        heard = asked.pop(id, None)
        if heard:
            heard[1] = {key: message[key] for key in ("result", "error") if key in message}
            heard[0].set()
    elif id is None:
        pass
    elif method == "initialize":
        version = message["params"]["protocolVersion"]
        server = {"name": "moody", "version": str(os.getpid())}
        send(id=id, result={"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": server})
    elif method == "ping":
        send(id=id, result={})
    elif method == "tools/list":
        send(id=id, result={"tools": [{"name": name, "inputSchema": OBJECT} for name in TOOLS]})
    elif method == "tools/call" and message.get("params", {}).get("name") in TOOLS:
        threading.Thread(target=carry_out, args=(message,), daemon=True).start()
    else:
        send(id=id, error={"code": -32601, "message": f"no method {method} here"})


def keep_chattering():
    while True:
        write("chatter that is no message")
        time.sleep(0.01)


if mood == "exit":
    sys.exit(0)
if mood == "noise":
    threading.Thread(target=keep_chattering, daemon=True).start()
for line in sys.stdin:
    if mood != "hang":
        handle(json.loads(line))
