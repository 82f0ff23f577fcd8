"""Keeps what schemathesis sends within this machine and within a few minutes, and the agent up.

Nothing is left out: whether a request is valid stays as it was. A valid image reference becomes one of a registry on loopback, so that Docker
asks no other; a valid name one of a few, so that requests meet instances that are there; streams are asked to end and waits to be short.
"""

import itertools
import os
import re
import time

import requests
import schemathesis

BASE = os.environ["AGENT_URL"]
KEY = {"Authorization": "Bearer " + os.environ["AGENT_KEY"]}
IMAGES = os.environ["AGENT_IMAGES"].split()
NAMES = os.environ["AGENT_NAMES"].split()
GROUPS = ["group-one", "group-two"]
IMAGE = re.compile(os.environ["IMAGE_PATTERN"])
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{1,127}")
IDENTIFIER = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


def one_of(choices, text, number=0):
    """The same for the same text; another for another number."""
    return choices[(sum(text.encode("utf-8", "surrogatepass")) + number) % len(choices)]


def deploys(body):
    """Every deploy in a body: the body itself, or the servers of a group."""
    if isinstance(body, dict):
        if "dockerImageUrl" in body:
            yield body
        for value in body.values():
            yield from deploys(value)
    elif isinstance(body, list):
        for value in body:
            yield from deploys(value)


@schemathesis.hook
def before_call(context, case, kwargs):
    if isinstance(case.query, dict):
        if "wait" in case.query and str(case.query["wait"]).isdigit():
            case.query["wait"] = min(int(case.query["wait"]), 2)
        described = {parameter["name"] for parameter in case.operation.definition.raw.get("parameters", [])}
        if "wait" in described:
            case.query.setdefault("wait", 2)
        for endless in ("follow", "stream"):
            if endless in described and case.query.get(endless) in (None, True, "true", "", 1, "1"):
                case.query[endless] = "false"
    if isinstance(case.path_parameters, dict):
        for parameter, known in (("ref", NAMES), ("id", GROUPS), ("groupId", GROUPS)):
            if parameter in case.path_parameters:
                reference = str(case.path_parameters[parameter])
                # One of these came out of an earlier answer, and is meant.
                if reference not in known:
                    case.path_parameters[parameter] = one_of(known + [reference], reference)
    for number, deploy in enumerate(deploys(case.body)):
        image, name = deploy.get("dockerImageUrl"), deploy.get("instanceNameOnToolbox")
        identifier = deploy.get("accountToolInstanceId")
        if isinstance(image, str) and len(image) <= 512 and IMAGE.fullmatch(image):
            deploy["dockerImageUrl"] = one_of(IMAGES, repr(deploy))
        if isinstance(name, str) and NAME.fullmatch(name):
            deploy["instanceNameOnToolbox"] = one_of(NAMES, repr(deploy), number)
            if isinstance(identifier, str) and IDENTIFIER.fullmatch(identifier):
                deploy["accountToolInstanceId"] = "id-of-" + deploy["instanceNameOnToolbox"]
    if isinstance(case.body, dict) and isinstance(case.body.get("groupId"), str) and NAME.fullmatch(case.body["groupId"]):
        case.body["groupId"] = one_of(GROUPS, case.body["groupId"])


@schemathesis.hook
def after_call(context, case, response):
    if case.path == "/restart" and response.status_code == 202:
        wait_until_ready()
    if case.path in ("/tools", "/mcp/groups") and case.method == "POST":
        # For the test to see that deploys weren't only refused.
        with open("deploys", "a", encoding="utf-8") as statuses:
            statuses.write(f"{response.status_code}\n")
        if "instance_exists" in response.text:
            make_room()


def make_room(often=itertools.count(1)):
    """There are few names: when they are often taken, all are given back."""
    if next(often) % 5 == 0:
        for name in NAMES:
            requests.delete(f"{BASE}/tools/{name}?wait=10", headers=KEY, timeout=20)


def wait_until_ready():
    """Until the agent that is started in place of the one that ends has looked at Docker."""
    begun = time.monotonic()
    while time.monotonic() - begun < 20:
        try:
            if requests.get(BASE + "/ready", headers=KEY, timeout=5).status_code == 200:
                return
        except requests.ConnectionError:
            pass
        time.sleep(0.02)
    raise AssertionError("the agent did not come back after POST /restart")
