#!/bin/sh
# Keeps whatever this machine forwards, containers first of all, from the cloud's metadata service, which would hand out the user data.
# Safe to run again.
#
#   metadata-guard block    put the rule in place
#   metadata-guard lift     take it away
#
# In the raw table, before routing and before any chain of Docker's: nothing Docker does to its own rules, with whichever backend, moves
# it. What the machine itself sends passes through OUTPUT and never sees it. Every bridge is covered, ours and strangers'; a container
# that shares the host's network isn't, for it is the host.
set -eu

rule() {
    iptables --wait 10 --table raw "$1" PREROUTING --destination 169.254.169.254/32 ! --in-interface lo --jump DROP
}

case "$*" in
    block)
        command -v iptables >/dev/null || {
            echo 'metadata-guard: there is no iptables; install it, Docker needs it, too' >&2
            exit 1
        }
        rule --check 2>/dev/null || rule --insert
        ;;
    lift) while rule --check 2>/dev/null; do rule --delete; done ;;
    *)
        echo 'usage: metadata-guard block | lift' >&2
        exit 2
        ;;
esac
