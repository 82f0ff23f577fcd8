"""Drives a local cloud with DigitalOcean's own Python client.

Usage: pydo_client.py BASE_URL TOKEN. Exits non-zero with a traceback at the first answer the client can't use or that isn't right.
"""

import sys
import time

from azure.core.credentials import AzureKeyCredential
from azure.core.exceptions import HttpResponseError
from azure.core.pipeline.policies import AzureKeyCredentialPolicy
from pydo import Client


def refusal(call):
    """Status and body of the error a call must end in: pydo raises most of them, and hands a 404 back as a dict."""
    try:
        answer = call()
    except HttpResponseError as error:
        return error.status_code, str(error)
    assert isinstance(answer, dict) and answer.get("id") == "not_found", answer
    return 404, answer["message"]


def until(look, what, seconds=30):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (seen := look()) is not None:
            return seen
        time.sleep(0.05)
    raise AssertionError(f"never seen: {what}")


def main(base_url, token):
    credential = AzureKeyCredential(token)
    # The client's own policy refuses to send a token over plain HTTP.
    policy = AzureKeyCredentialPolicy(credential, "Authorization", prefix="Bearer")
    client = Client(token, endpoint=base_url, authentication_policy=policy, retry_total=0)

    assert client.account.get()["account"]["status"] == "active"
    assert any(region["slug"] == "nyc3" for region in client.regions.list()["regions"])
    assert any(size["slug"] == "s-1vcpu-1gb" for size in client.sizes.list()["sizes"])
    image = client.images.get("docker-debian-12")["image"]
    assert client.images.get(image["id"])["image"]["slug"] == "docker-debian-12"
    key = client.ssh_keys.list()["ssh_keys"][0]

    order = {
        "name": "pydo-1",
        "region": "nyc3",
        "size": "s-1vcpu-1gb",
        "image": image["slug"],
        "ssh_keys": [key["fingerprint"]],
        "tags": ["pydo", "attempt:1"],
        "user_data": "#cloud-config\n",
    }
    created = client.droplets.create(body=order)
    droplet_id = created["droplet"]["id"]
    action_id = created["links"]["actions"][0]["id"]

    def completed(action):
        return lambda: client.actions.get(action)["action"]["status"] == "completed" or None

    until(completed(action_id), "the create action completed")

    def public_address():
        droplet = client.droplets.get(droplet_id)["droplet"]
        found = [network["ip_address"] for network in droplet["networks"]["v4"] if network["type"] == "public"]
        return found[0] if droplet["status"] == "active" and found else None

    address = until(public_address, "an active droplet with a public address")
    tagged = until(lambda: client.droplets.list(tag_name="attempt:1")["droplets"] or None, "the droplet in the list by tag")
    assert [droplet["id"] for droplet in tagged] == [droplet_id]

    many = {**order, "names": ["pydo-2", "pydo-3"]}
    del many["name"]
    others = client.droplets.create(body=many)["droplets"]
    assert [droplet["name"] for droplet in others] == ["pydo-2", "pydo-3"]
    until(lambda: client.droplets.list(tag_name="pydo")["meta"]["total"] == 3 or None, "three droplets")
    page = client.droplets.list(tag_name="pydo", per_page=2, page=2)
    assert len(page["droplets"]) == 1 and "prev" in page["links"]["pages"]

    off = client.droplet_actions.post(droplet_id, body={"type": "power_off"})["action"]
    until(completed(off["id"]), "the power is off")
    assert client.droplets.get(droplet_id)["droplet"]["status"] == "off"
    on = client.droplet_actions.post(droplet_id, body={"type": "power_on"})["action"]
    until(completed(on["id"]), "the power is on")
    assert public_address() == address

    assert client.tags.create(body={"name": "pydo-made"})["tag"]["name"] == "pydo-made"
    resources = {"resources": [{"resource_id": str(droplet_id), "resource_type": "droplet"}]}
    client.tags.assign_resources("pydo-made", body=resources)
    assert client.tags.get("pydo-made")["tag"]["resources"]["droplets"]["count"] == 1
    client.tags.unassign_resources("pydo-made", body=resources)
    client.tags.delete("pydo-made")
    assert refusal(lambda: client.tags.get("pydo-made"))[0] == 404

    status, message = refusal(lambda: client.droplets.create(body={**order, "size": "s-huge"}))
    assert status == 422 and "size" in message, (status, message)
    assert refusal(lambda: client.droplets.get(1))[0] == 404
    stranger = AzureKeyCredentialPolicy(AzureKeyCredential("wrong"), "Authorization", prefix="Bearer")
    wrong = Client("wrong", endpoint=base_url, authentication_policy=stranger, retry_total=0)
    assert refusal(wrong.account.get)[0] == 401

    client.droplets.destroy(droplet_id)
    until(lambda: client.droplets.get(droplet_id).get("id") == "not_found" or None, "the droplet gone")
    client.droplets.destroy_by_tag(tag_name="pydo")
    until(lambda: client.droplets.list(tag_name="pydo")["meta"]["total"] == 0 or None, "all gone")
    print("pydo: every call as expected")


if __name__ == "__main__":
    main(*sys.argv[1:])
