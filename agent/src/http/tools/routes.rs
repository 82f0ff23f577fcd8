//! Every `/tools` route but `/tools/status`, events and the MCP endpoints.

use axum::extract::DefaultBodyLimit;
use axum::handler::Handler as _;
use dtma_api::exec::{ExecAnswer, ExecRequest};
use dtma_api::instance::{DeployAnswer, DeployRequest, InstanceAnswer, InstanceList, RemovalAnswer, UpdateRequest};
use dtma_api::output::OutputItem;
use dtma_api::usage::{StatsAnswer, UsageItem};
use serde_json::json;

use super::super::table::{CHANGING, Failing, NAMED, Operation, RUNNING, Table};
use super::{deploy, exec, list, logs, remove, restart, show, start, stats, stop, update};

/// Largest body of a deploy.
pub(in crate::http) const MAX_BODY: usize = 1024 * 1024;

/// What is wrong with a deploy's body.
pub(in crate::http) const NOT_VALID: [Failing; 3] = [
    (400, "invalid_request", "the body is not valid; `details` is a list of `Fault`s, all there are"),
    (413, "invalid_request", "the body is longer than 1 MiB"),
    (422, "forbidden_option", "it asks for what would give the container the host; `details` is a list of `Fault`s"),
];

pub(in crate::http) fn routes<T: Table>(table: T) -> T {
    table
        .get("/tools", list, || {
            Operation::new("Every instance")
                .answers::<InstanceList>(200, "By name; as the agent's last look found them.")
        })
        .post("/tools", deploy.layer(DefaultBodyLimit::max(MAX_BODY)), deploying)
        .get("/tools/{ref}", show, || {
            Operation::new("One instance")
                .described(
                    "With what its MCP server says of itself: `server` has its name, its capabilities and the names of its tools, as the \
                     last probes found them. They are asked for when it has started and every five minutes from then on.",
                )
                .answers::<InstanceAnswer>(200, "The instance.")
                .fails(&NAMED)
        })
        .put("/tools/{ref}", update.layer(DefaultBodyLimit::max(MAX_BODY)), updating)
        .delete("/tools/{ref}", remove, || {
            Operation::new("Removes an instance")
                .flag(
                    "volumes",
                    false,
                    "Its named volumes go too; otherwise they are kept for the next instance of this name.",
                )
                .waits()
                .answers::<RemovalAnswer>(200, "Nothing of it is left.")
                .answers::<RemovalAnswer>(202, "It is being removed.")
                .fails(&NAMED)
                .fails(&CHANGING)
        })
        .post("/tools/{ref}/start", start, || {
            bringing("Starts an instance, and keeps it so", "It runs; if it did already, the message says so.")
                .fails(&RUNNING)
        })
        .post("/tools/{ref}/stop", stop, || {
            bringing(
                "Stops an instance; it stays so, also after a reboot",
                "It is stopped; if it was already, the message says so.",
            )
        })
        .post("/tools/{ref}/restart", restart, restarting)
        .post("/mcp/servers/{ref}/restart", restart, restarting)
        .get("/tools/{ref}/logs", logs::logs, output)
        .get("/mcp/servers/{ref}/logs", logs::logs, output)
        .get("/tools/{ref}/stats", stats::stats, || {
            Operation::new("What an instance uses")
                .described("Measured for the answer: that takes half a second, and up to three where Docker is slow.")
                .flag("stream", false, "Go on, once a second, as server-sent events, until the instance stops.")
                .answers::<StatsAnswer>(200, "Its figures.")
                .streams::<UsageItem>(
                    200,
                    "With `stream`: one event for each measurement; an event `error` with a `Failure` where it stopped or broke off.",
                )
                .fails(&NAMED)
                .fails(&INSIDE)
                .fails(&[(
                    503,
                    "no_figures",
                    "it runs, and Docker can't read its control groups; `error` says what to look at",
                )])
        })
        .post("/tools/{ref}/exec", exec::exec.layer(DefaultBodyLimit::max(exec::MAX_BODY)), executing)
}

fn restarting() -> Operation {
    bringing("Stops an instance's server and starts it anew", "It runs again.").fails(&RUNNING)
}

fn output() -> Operation {
    Operation::new("What an instance's server wrote")
        .count("tail", "How many of the last lines; 1000 without `since`, otherwise all.")
        .time("since", "Only lines written then or later.")
        .flag("follow", false, "Go on with what is written from now on, as server-sent events.")
        .flag("timestamps", true, "Say when each line was written.")
        .lists::<OutputItem>(
            200,
            "One line of JSON for each line of output; a `BrokenOff` at the end where it broke off.",
        )
        .streams::<OutputItem>(
            200,
            "With `follow`: one event for each line; an event `error` with a `BrokenOff` where it broke off.",
        )
        .fails(&NAMED)
        .fails(&[
            (409, "busy", "its container was just removed; try again"),
            (500, "docker_failed", "the Docker Engine could not read the log"),
            (503, "docker_unavailable", "the Docker Engine does not answer"),
        ])
}

/// For operations that look into a running container.
const INSIDE: [Failing; 5] = [
    (409, "not_running", "the instance does not run"),
    (409, "busy", "its container was just removed; try again after `Retry-After`"),
    (500, "docker_failed", "the Docker Engine failed; the agent's log has what it said"),
    (503, "busy", "as much of this goes on at once as may; try again after `Retry-After`"),
    (503, "docker_unavailable", "the Docker Engine does not answer; try again after `Retry-After`"),
];

fn executing() -> Operation {
    Operation::new("Runs a command inside an instance's container")
        .described(
            "As the container's user, with no more than the container may, without a terminal and with nothing to read. Four commands run \
             at once. Of each output the first 1 MiB is kept. A command whose time is over is killed together with its children where \
             there is a shell in the container to do that; Docker itself can't. One whose caller goes away runs on for as long as it may.",
        )
        .takes::<ExecRequest>("The command. Fields that are not known are refused.")
        .example(
            "listing",
            "A shell's text, with more time than usual",
            json!({ "command": ["/bin/sh", "-c", "ls -l /data | head"], "timeout_seconds": 60 }),
        )
        .answers::<ExecAnswer>(200, "It ran and ended; whether it did what it should is in `exit_code`.")
        .fails(&NAMED)
        .fails(&INSIDE)
        .fails(&[
            (400, "invalid_request", "the body is not valid; `details` is a list of `Fault`s, all there are"),
            (413, "invalid_request", "the body is longer than 256 KiB"),
            (422, "cannot_start", "the container has no such program, or it can't be run; `error` has Docker's words"),
            (504, "exec_timeout", "it did not end in time; `details` is an `ExecTimeout` with what it wrote and what became of it"),
        ])
}

fn bringing(summary: &'static str, reached: &'static str) -> Operation {
    Operation::new(summary)
        .waits()
        .answers::<InstanceAnswer>(200, reached)
        .answers::<InstanceAnswer>(202, "Not yet; `GET /tools/{ref}` tells how far it is.")
        .fails(&NAMED)
        .fails(&CHANGING)
}

fn deploying() -> Operation {
    Operation::new("Deploys an instance")
        .described(
            "Waits until it runs and, where it is an MCP server, answers its probe. A deploy that fails leaves nothing behind; its reason \
             stays readable in `GET /events`. Repeating a deploy is safe.",
        )
        .takes::<DeployRequest>("What to run. Unknown fields are ignored with a warning.")
        .example(
            "mcp-server",
            "An MCP server that speaks streamable HTTP",
            json!({
                "dockerImageUrl": "registry.example.com/calculator:1.4.0",
                "instanceNameOnToolbox": "calculator",
                "accountToolInstanceId": "6f0b3a52-1f0e-4d4e-9a55-6d2c2f6a9a10",
                "mcpTransportType": "http",
                "mcpPort": 8080,
                "environmentVariables": { "LOG_LEVEL": "info" },
                "resourceLimits": { "memory": "256m", "cpu": 0.5 },
            }),
        )
        .example(
            "as-before",
            "What the platform's edge function sends",
            json!({
                "dockerImageUrl": "registry.example.com/calculator:1.4.0",
                "instanceNameOnToolbox": "calculator",
                "accountToolInstanceId": "6f0b3a52-1f0e-4d4e-9a55-6d2c2f6a9a10",
                "baseConfigOverrideJson": {
                    "Env": ["LOG_LEVEL=info"],
                    "HostConfig": { "PortBindings": { "8080/tcp": [{ "HostPort": "30000" }] }, "RestartPolicy": { "Name": "always" } },
                },
            }),
        )
        .waits()
        .answers::<DeployAnswer>(200, "The same was deployed before.")
        .answers::<DeployAnswer>(201, "It runs.")
        .answers::<DeployAnswer>(202, "Not yet; `GET /tools/{ref}` tells how far it is.")
        .fails(&NOT_VALID)
        .fails(&CHANGING)
        .fails(&RUNNING)
        .fails(&[
            (409, "agent_outdated", "an instance with this name was deployed with a newer version of the agent, and is left as it is"),
            (409, "instance_exists", "the name or the `accountToolInstanceId` belongs to another specification; `details` says to whom"),
        ])
}

fn updating() -> Operation {
    Operation::new("Brings an instance to another specification")
        .described(
            "The new version's image is pulled and its container made while the old one serves; then the old one is stopped and the new one \
             started, and it has to pass `healthGate`. When it doesn't, everything it brought is taken back and the old version serves \
             again. A stopped instance runs afterwards, or is stopped again. The same specification again is a success that does nothing, \
             unless `pullPolicy` is `always`. While an update is under way, everything else but its removal and the same update is \
             answered with `busy`.",
        )
        .takes::<UpdateRequest>("What it is to be. Unknown fields are ignored with a warning.")
        .waits()
        .answers::<DeployAnswer>(200, "It runs like this.")
        .answers::<DeployAnswer>(202, "Not yet; `GET /tools/{ref}` tells how far it is, and its `last_update` how it ended.")
        .fails(&NAMED)
        .fails(&NOT_VALID)
        .fails(&CHANGING)
        .fails(&RUNNING)
        .fails(&[
            (409, "id_fixed", "the instance has another `accountToolInstanceId`, and keeps it"),
            (409,
            "update_rolled_back",
            "the new version failed and the old one is back; `details` has `cause` (the code a deploy would have failed with), `reason` and \
             the new server's last lines as `log`",
        )])
}
