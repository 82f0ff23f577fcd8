#!/bin/bash
# Sets a new droplet up: Docker where it is missing, then the agent. Runs once, as root, from cloud-init's runcmd.
# Reports every phase to the provisioner, and the last output of the one that fails. README.md tells the whole story.
set -Eeuo pipefail

HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
OUTPUT=$HERE/output
ARCHIVE=$HERE/release.tar.gz
MAX_ARCHIVE_KIB=65536
DOCKER_SOCKET=/var/run/docker.sock
AGENT_CONF=/etc/dtma.conf
AGENT_UNIT=dtma-agent.service
# An agent that systemd had to start again so often, a second apart, is not going to come up.
MOST_RESTARTS=10

# Seconds a phase may take before it is ended and reported as failed. Their sum stays under the provisioner's own deadline.
declare -A DEADLINES=([network]=120 [docker]=360 [download]=120 [install]=60 [start]=120)

# shellcheck source=/dev/null
. "$HERE/settings"

say() { printf 'dtma-bootstrap: %s\n' "$*"; }

# ---- what the provisioner is told

# The end of the current phase's output as the inside of a JSON string: plain ASCII, at most 4 KiB, without the token.
output_as_json() {
    local text
    text=$(tail --bytes=4096 -- "$OUTPUT" 2>/dev/null | tr -d '\r' | LC_ALL=C tr -c '\t\n -~' '?')
    text=${text//"$ENROLMENT_TOKEN"/[token]}
    printf '%s' "$text" | sed -z -e 's/\\/\\\\/g' -e 's/"/\\"/g' -e 's/\t/\\t/g' -e 's/\n/\\n/g'
}

# post SECONDS JSON: true when the provisioner gave any answer. The token goes in through a descriptor, never as an argument.
post() {
    curl --silent --show-error --output /dev/null --max-time "$1" --data-binary "$2" \
        --header 'Content-Type: application/json' \
        --config <(printf 'header = "Authorization: Bearer %s"\n' "$ENROLMENT_TOKEN") \
        "$PUBLIC_URL/agent/v1/bootstrap-progress"
}

# A report that gets lost must not stop the set-up.
report_begun() { post 5 "{\"phase\":\"$1\",\"outcome\":\"begun\"}" || say "could not report that $1 has begun"; }

# This one is what a person will look for, so it is worth a minute of trying.
report_failed() {
    local body attempt
    body="{\"phase\":\"$1\",\"outcome\":\"failed\",\"output\":\"$(output_as_json)\"}"
    for attempt in 1 2 3 4 5; do
        if post 8 "$body"; then return; fi
        sleep "$attempt"
    done
    say "could not report that $1 has failed"
}

# ---- the phases; each runs in a process of its own, so that it can be ended when its time is up

apt_get() {
    DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 apt-get --quiet --yes \
        -o Acquire::Retries=3 -o Dpkg::Use-Pty=0 "$@"
}

install_packages() {
    # The lock timeout does not cover the lists' own lock, and a mirror may be half-way through a change.
    until apt_get update; do
        say 'the package lists could not be fetched; trying again'
        sleep 3
    done
    apt_get install --no-install-recommends "$@"
}

phase_network() {
    command -v curl >/dev/null || install_packages curl ca-certificates
    # Any answer will do: it proves the address, the route and the name.
    until post 5 '{"phase":"network","outcome":"begun"}'; do
        say "no answer from $PUBLIC_URL; trying again"
        sleep 1
    done
}

docker_answers() {
    curl --silent --fail --max-time 5 --output /dev/null --unix-socket "$DOCKER_SOCKET" http://docker/_ping
}

phase_docker() {
    local packages=()
    command -v dockerd >/dev/null || command -v docker >/dev/null || packages+=(docker.io)
    # With AppArmor in the kernel, Docker starts no container unless it can load its profile.
    if [[ $(cat /sys/module/apparmor/parameters/enabled 2>/dev/null) == Y ]]; then
        command -v apparmor_parser >/dev/null || packages+=(apparmor)
    fi
    if ((${#packages[@]})); then
        say "installing ${packages[*]}"
        install_packages "${packages[@]}"
    fi
    systemctl is-enabled --quiet docker.service || systemctl enable docker.service
    systemctl start docker.service
    # Asked on the socket, because some distributions ship the engine without its command line.
    until docker_answers; do sleep 0.2; done
}

phase_download() {
    local attempt status
    for attempt in 1 2 3 4 5; do
        status=0
        # curl only believes an announced size; the file-size limit also stops a body that never announced one.
        (
            ulimit -f "$MAX_ARCHIVE_KIB"
            exec curl --silent --show-error --fail --location --proto '=http,https' --retry 3 --retry-connrefused \
                --connect-timeout 10 --max-time 90 --max-filesize $((MAX_ARCHIVE_KIB * 1024)) \
                --output "$ARCHIVE" "$RELEASE_URL"
        ) || status=$?
        case $status in
            0) break ;;
            # An HTTP error that curl itself thinks final, and an archive past the limit.
            22 | 63 | 153) say "cannot download $RELEASE_URL"; return 1 ;;
            *) say "download $attempt of 5 ended with curl status $status"; sleep "$attempt" ;;
        esac
    done
    ((status == 0))

    local found
    found=$(sha256sum -- "$ARCHIVE" | cut -d ' ' -f 1)
    if [[ $found != "$RELEASE_SHA256" ]]; then
        rm -f -- "$ARCHIVE"
        say "the release has SHA-256 $found, but this droplet was told $RELEASE_SHA256; not unpacked"
        return 1
    fi
}

phase_install() {
    mkdir -- "$HERE/release"
    tar --extract --gzip --no-same-owner --file "$ARCHIVE" --directory "$HERE/release"
    (
        umask 077
        cat >"$AGENT_CONF.new" <<CONF
# Written at first boot. The enrolment token worked once; the agent keeps what it got for it in /var/lib/dtma.
AGENTOPIA_API_BASE_URL=$PUBLIC_URL/agent/v1
DTMA_ENROLMENT_TOKEN=$ENROLMENT_TOKEN
CONF
        mv -f -- "$AGENT_CONF.new" "$AGENT_CONF"
    )
    bash "$HERE/release/install.sh"
}

phase_start() {
    # Returns once the agent has said that it is ready. If it dies first, systemd starts it again and again.
    if ! systemctl start "$AGENT_UNIT"; then
        until systemctl is-active --quiet "$AGENT_UNIT"; do
            if (($(systemctl show --property=NRestarts --value "$AGENT_UNIT") >= MOST_RESTARTS)); then
                say "$AGENT_UNIT does not start"
                systemctl stop "$AGENT_UNIT"
                return 1
            fi
            sleep 0.5
        done
    fi
}

# ---- running them

# run PHASE SECONDS: its output goes to the console and to a file that holds this phase's output only.
run() {
    : >"$OUTPUT"
    # timeout ends the whole process group, the copying of the output included.
    timeout --kill-after=10 "$2" bash "${BASH_SOURCE[0]}" "$1"
}

# explain PHASE STATUS: what the phase itself could not say.
explain() {
    case $2 in 124 | 137) say "$1 was ended after ${DEADLINES[$1]} s" ;; esac
    case $1 in
        docker) journalctl --unit docker.service --no-pager --lines 15 --output cat || true ;;
        start) journalctl --unit "$AGENT_UNIT" --no-pager --lines 30 --output cat || true ;;
    esac
}

set_up() {
    local phase status
    for phase in network docker download install start; do
        say "$phase"
        [[ $phase == network ]] || report_begun "$phase"
        status=0
        run "$phase" "${DEADLINES[$phase]}" || status=$?
        if ((status)); then
            explain "$phase" "$status" 2>&1 | tee -a "$OUTPUT"
            report_failed "$phase"
            exit 1
        fi
    done
    say 'done'
}

if (($#)); then
    trap 'say "line $LINENO: $BASH_COMMAND: status $?"' ERR
    "phase_$1" 2>&1 | tee "$OUTPUT"
else
    umask 077
    # Whatever happens, the token's copy and the script go.
    trap 'rm -rf -- "$HERE"' EXIT
    set_up
fi
