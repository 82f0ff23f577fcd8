"""Keeps what schemathesis sends within this machine and within a few minutes, and the agent up.

Nothing is left out: whether a request is valid stays as it was. A valid image reference becomes one of a registry on loopback, so that Docker
asks no other; a valid name one of a few, so that requests meet instances that are there; streams are asked to end and waits to be short.
"""

import os
import re
import time

import requests
import schemathesis

BASE = os.environ["AGENT_URL"]
KEY = {"Authorization": "Bearer " + os.environ["AGENT_KEY"]}
IMAGES = os.environ["AGENT_IMAGES"].split()
NAMES = os.environ["AGENT_NAMES"].split()
IMAGE = re.compile(os.environ["IMAGE_PATTERN"])
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{1,127}")


def one_of(choices, text):
    return choices[sum(text.encode("utf-8", "surrogatepass")) % len(choices)]


@schemathesis.hook
def before_call(context, case, kwargs):
    if isinstance(case.query, dict):
        if "wait" in case.query and str(case.query["wait"]).isdigit():
            case.query["wait"] = min(int(case.query["wait"]), 2)
        described = {parameter["name"] for parameter in case.operation.definition.raw.get("parameters", [])}
        if "wait" in described:
            case.query.setdefault("wait", 2)
        if "follow" in described and case.query.get("follow") in (None, True, "true", "", 1, "1"):
            case.query["follow"] = "false"
    if isinstance(case.path_parameters, dict) and "ref" in case.path_parameters:
        reference = str(case.path_parameters["ref"])
        case.path_parameters["ref"] = one_of(NAMES + [reference], reference)
    if isinstance(case.body, dict):
        image, name = case.body.get("dockerImageUrl"), case.body.get("instanceNameOnToolbox")
        if isinstance(image, str) and len(image) <= 512 and IMAGE.fullmatch(image):
            case.body["dockerImageUrl"] = one_of(IMAGES, image)
        if isinstance(name, str) and NAME.fullmatch(name):
            case.body["instanceNameOnToolbox"] = one_of(NAMES, name)


@schemathesis.hook
def after_call(context, case, response):
    if case.path == "/restart" and response.status_code == 202:
        wait_until_ready()
    # For the test to see that deploys weren't only refused.
    if case.path == "/tools" and response.status_code == 201:
        with open("deployed", "a", encoding="utf-8") as deployed:
            deployed.write(response.text + "\n")


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
