#!/bin/bash
# Installs the agent from the folder this script lies in (an unpacked release), or removes it. Safe to run again.
#
#   install.sh                      install this release and make it the current one
#   install.sh --uninstall          stop the agent and remove it; settings, identity and ledger stay
#   install.sh --uninstall --purge  remove those, too
#
# Does not start a stopped agent: /etc/dtma.conf comes first. Restarts a running one.
set -Eeuo pipefail

HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
PREFIX=/opt/dtma
CONF=/etc/dtma.conf
STATE=/var/lib/dtma
UNITS=/etc/systemd/system
UNIT=dtma-agent.service
GUARD=dtma-metadata-guard.service
ACCOUNT=dtma

say() { printf 'dtma-install: %s\n' "$*"; }
fail() {
    printf 'dtma-install: %s\n' "$*" >&2
    exit 1
}

# Files are written beside their targets, brought to disk together, and then renamed: never a half-written target, not even after a
# power cut.
STAGED=()
stage() { # MODE SOURCE TARGET
    install --owner root --group root --mode "$1" -- "$2" "$3.new"
    STAGED+=("$3")
}
put_in_place() {
    local target
    sync -- "${STAGED[@]/%/.new}"
    for target in "${STAGED[@]}"; do
        mv --force --no-target-directory -- "$target.new" "$target"
    done
}

read_by_systemd() {
    [[ $(systemctl show --property=LoadState,NeedDaemonReload "$1" | sort) == $'LoadState=loaded\nNeedDaemonReload=no' ]]
}

install_release() {
    local version folder
    for file in VERSION dtma-agent "$UNIT" metadata-guard "$GUARD" dtma.conf.example; do
        [[ -f $HERE/$file ]] || fail "$HERE/$file is missing; run this from an unpacked release"
    done
    version=$(<"$HERE/VERSION")
    # It becomes a folder's name.
    [[ $version =~ ^[0-9]+\.[0-9]+\.[0-9]+([-+.][0-9A-Za-z.+-]+)?$ ]] || fail "'$version' is not a version"
    getent group docker >/dev/null || fail 'there is no group "docker"; install the Docker Engine first'

    getent passwd "$ACCOUNT" >/dev/null ||
        useradd --system --user-group --home-dir "$STATE" --no-create-home --shell /usr/sbin/nologin "$ACCOUNT"

    folder=$PREFIX/versions/$version
    install --directory --owner root --group root --mode 0755 -- "$PREFIX" "$PREFIX/versions" "$folder"
    stage 0755 "$HERE/dtma-agent" "$folder/dtma-agent"
    stage 0644 "$HERE/dtma.conf.example" "$PREFIX/dtma.conf.example"
    stage 0755 "$HERE/install.sh" "$PREFIX/install.sh"
    stage 0755 "$HERE/metadata-guard" "$PREFIX/metadata-guard"
    stage 0644 "$HERE/$GUARD" "$UNITS/$GUARD"
    stage 0644 "$HERE/$UNIT" "$UNITS/$UNIT"
    put_in_place
    # A rename is atomic, `ln --force` is not.
    ln --symbolic --force --no-dereference -- "versions/$version" "$PREFIX/current.new"
    mv --force --no-target-directory -- "$PREFIX/current.new" "$PREFIX/current"
    sync -- "$folder" "$PREFIX" "$UNITS"

    systemctl enable --quiet --no-reload "$GUARD" "$UNIT"
    # systemd reads a unit it has never seen by itself, and reading all of them again is what takes longest here.
    if ! read_by_systemd "$GUARD" || ! read_by_systemd "$UNIT"; then
        systemctl daemon-reload
    fi
    # Before the agent runs anything that could ask.
    systemctl reload-or-restart "$GUARD" || {
        journalctl --unit "$GUARD" --no-pager --lines 10 --output cat >&2 || true
        fail "$GUARD did not start, so containers would reach the metadata service; the lines above say why"
    }
    systemctl try-restart "$UNIT"
    say "version $version is installed"
    [[ -e $CONF ]] || say "next: write $CONF (see $PREFIX/dtma.conf.example), then systemctl start $UNIT"
}

uninstall() {
    local unit
    for unit in "$UNIT" "$GUARD"; do
        [[ -e $UNITS/$unit ]] || continue
        systemctl disable --quiet --now "$unit"
        rm --force -- "$UNITS/$unit"
        systemctl daemon-reload
        systemctl reset-failed "$unit" 2>/dev/null || true
    done
    rm --recursive --force -- "$PREFIX"
    if [[ $1 == purge ]]; then
        # Secrets, too: what is in memory would stay until the next boot, and belong to whoever gets the user's number.
        rm --recursive --force -- "$CONF" "$STATE" /run/dtma
        if getent passwd "$ACCOUNT" >/dev/null; then userdel "$ACCOUNT"; fi
        say 'removed, with settings, identity and ledger'
    else
        say "removed; $CONF and $STATE stay (--purge removes them)"
    fi
    say 'containers the agent has started keep running'
}

[[ $EUID -eq 0 ]] || fail 'this needs root'
case "$*" in
    '') install_release ;;
    --uninstall) uninstall keep ;;
    '--uninstall --purge') uninstall purge ;;
    *) fail "usage: install.sh [--uninstall [--purge]]" ;;
esac
