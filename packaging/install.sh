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
MEMORY=/var/lib/dtma-update
UNIT=dtma-agent.service
GUARD=dtma-metadata-guard.service
ACCOUNT=dtma
COMMAND=/usr/local/bin/dtma-agent
UPDATER=(dtma-update.service dtma-update-undo.service dtma-update.path dtma-update.timer)
FILES=(VERSION dtma-agent "$UNIT" "${UPDATER[@]}" metadata-guard "$GUARD" dtma.conf.example install.sh)

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

# A link is changed by renaming: `ln --force` is not atomic.
point() { # TARGET LINK
    ln --symbolic --force --no-dereference -- "$1" "$2.new"
    mv --force --no-target-directory -- "$2.new" "$2"
}

link_unit() { # UNIT LINK
    point "$PREFIX/$2/$1" "$UNITS/$1"
}

want() { # UNIT TARGET
    mkdir --parents -- "$UNITS/$2.wants"
    point "$UNITS/$1" "$UNITS/$2.wants/$1"
}

install_release() {
    local version folder file before
    for file in "${FILES[@]}"; do
        [[ -f $HERE/$file ]] || fail "$HERE/$file is missing; run this from an unpacked release"
    done
    version=$(<"$HERE/VERSION")
    # It becomes a folder's name.
    [[ $version =~ ^[0-9]+\.[0-9]+\.[0-9]+([-+.][0-9A-Za-z.+-]+)?$ ]] || fail "'$version' is not a version"
    getent group docker >/dev/null || fail 'there is no group "docker"; install the Docker Engine first'

    getent passwd "$ACCOUNT" >/dev/null ||
        useradd --system --user-group --home-dir "$STATE" --no-create-home --shell /usr/sbin/nologin "$ACCOUNT"

    install --directory --owner root --group root --mode 0755 -- "$PREFIX" "$PREFIX/versions" "$MEMORY"
    # Not while the updater has a version on trial.
    # Whoever may open it may hold it.
    (umask 077 && : >>"$MEMORY/lock") && chmod 0600 -- "$MEMORY/lock"
    exec {lock}>>"$MEMORY/lock"
    flock --timeout 30 "$lock" || fail 'an update is under way; see: dtma-agent update --status, and try again'

    folder=$PREFIX/versions/$version
    install --directory --owner root --group root --mode 0755 -- "$folder"
    for file in "${FILES[@]}"; do
        case $file in
            dtma-agent | metadata-guard | install.sh) stage 0755 "$HERE/$file" "$folder/$file" ;;
            *) stage 0644 "$HERE/$file" "$folder/$file" ;;
        esac
    done
    put_in_place
    # What a person installs is good by that person's word; what it replaces can be gone back to.
    before=$(readlink "$PREFIX/good" || readlink "$PREFIX/current" || true)
    [[ -z $before || $before == "versions/$version" ]] || point "$before" "$PREFIX/previous"
    point "versions/$version" "$PREFIX/current"
    point "versions/$version" "$PREFIX/good"
    # The agent's unit belongs to the version in use, so that both change at once; all others to the one that is good.
    link_unit "$UNIT" current
    for file in "$GUARD" "${UPDATER[@]}"; do link_unit "$file" good; done
    want "$UNIT" multi-user.target
    want "$GUARD" multi-user.target
    want "$GUARD" docker.service
    want dtma-update-undo.service multi-user.target
    want dtma-update.path multi-user.target
    want dtma-update.timer timers.target
    point "$PREFIX/good/dtma-agent" "$COMMAND"
    point good/install.sh "$PREFIX/install.sh"
    point good/dtma.conf.example "$PREFIX/dtma.conf.example"
    sync -- "$folder" "$PREFIX" "$UNITS"

    # systemd reads a unit it has never seen by itself, and reading all of them again is what takes longest here.
    if [[ $before ]]; then
        systemctl daemon-reload
    else
        for file in "$UNIT" "$GUARD" "${UPDATER[@]}"; do
            read_by_systemd "$file" || { systemctl daemon-reload; break; }
        done
    fi
    # Before the agent runs anything that could ask.
    systemctl reload-or-restart "$GUARD" || {
        journalctl --unit "$GUARD" --no-pager --lines 10 --output cat >&2 || true
        fail "$GUARD did not start, so containers would reach the metadata service; the lines above say why"
    }
    systemctl start dtma-update.path dtma-update.timer ||
        fail 'the agent is installed, but could not be updated: its updater does not start (journalctl --unit dtma-update.path)'
    systemctl try-restart "$UNIT" ||
        fail "version $version is installed, but does not start: journalctl --unit $UNIT says why"
    say "version $version is installed"
    [[ -e $CONF ]] || say "next: write $CONF (see $PREFIX/dtma.conf.example), then systemctl start $UNIT"
}

uninstall() {
    local unit
    # The updater first: it would bring back what goes.
    for unit in dtma-update.timer dtma-update.path dtma-update.service dtma-update-undo.service "$UNIT" "$GUARD"; do
        [[ -e $UNITS/$unit || -L $UNITS/$unit ]] || continue
        systemctl stop "$unit"
        rm --force -- "$UNITS/$unit" "$UNITS"/*.wants/"$unit"
        systemctl daemon-reload
        systemctl reset-failed "$unit" 2>/dev/null || true
    done
    rm --recursive --force -- "$PREFIX" "$COMMAND"
    if [[ $1 == purge ]]; then
        # Secrets, too: what is in memory would stay until the next boot, and belong to whoever gets the user's number.
        rm --recursive --force -- "$CONF" "$STATE" "$MEMORY" /run/dtma
        if getent passwd "$ACCOUNT" >/dev/null; then userdel "$ACCOUNT"; fi
        say 'removed, with settings, identity and ledger'
    else
        say "removed; $CONF, $STATE and $MEMORY stay (--purge removes them)"
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
