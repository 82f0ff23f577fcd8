#!/bin/sh
# Turns a fresh Debian root file system ($1) into a droplet's. Runs outside it, as mmdebstrap's customize hook; files that come from
# the building machine lie beside this script.
set -eu
root=$1
here=$(dirname "$0")

# cloud-init: one data source, so it doesn't search; the network and the package source are set up before it starts. The modules are
# those of Debian's own cloud.cfg, in its order, less the ones for disks, boot loaders, SSH, passwords and locales, which a droplet of
# this cloud doesn't have: each would only cost boot time or fail.
mkdir -p "$root/etc/cloud/cloud.cfg.d"
cat > "$root/etc/cloud/cloud.cfg.d/90_local_cloud.cfg" <<'CLOUD'
datasource_list: [ NoCloud ]
network: { config: disabled }
apt: { preserve_sources_list: true }
cloud_init_modules: [ bootcmd, write-files, set_hostname, update_hostname, update_etc_hosts, ca-certs, users-groups ]
cloud_config_modules: [ ntp, timezone, apt-configure, runcmd ]
cloud_final_modules:
  - package-update-upgrade-install
  - write-files-deferred
  - scripts-vendor
  - scripts-per-once
  - scripts-per-boot
  - scripts-per-instance
  - scripts-user
  - phone-home
  - final-message
  - power-state-change
CLOUD

# Units that drive hardware, terminals or the machine's own kernel settings. A droplet shares its kernel with this machine, so
# systemd-sysctl would change the settings of both.
systemctl --root="$root" --quiet mask \
  getty.target console-getty.service getty-static.service systemd-logind-varlink.socket \
  systemd-sysctl.service systemd-modules-load.service systemd-remount-fs.service systemd-timesyncd.service \
  systemd-networkd-wait-online.service systemd-update-utmp.service systemd-update-utmp-runlevel.service \
  dev-hugepages.mount dev-mqueue.mount sys-kernel-debug.mount sys-kernel-tracing.mount sys-kernel-config.mount \
  sys-fs-fuse-connections.mount modprobe@configfs.service modprobe@dm_mod.service modprobe@drm.service \
  modprobe@efi_pstore.service modprobe@fuse.service modprobe@loop.service \
  systemd-journald-audit.socket e2scrub_reap.service e2scrub_all.timer fstrim.timer \
  apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer cloud-init-hotplugd.socket
systemctl --root="$root" --quiet set-default multi-user.target

# The journal survives a power cut, as on a real machine.
mkdir -p "$root/var/log/journal"

# Extra authorities this machine trusts, so that a droplet reaches what the machine reaches.
if [ -d "$here/ca-certificates" ]; then
  cp "$here"/ca-certificates/*.crt "$root/usr/local/share/ca-certificates/"
  chroot "$root" update-ca-certificates > /dev/null
fi

# Each droplet gets its own.
: > "$root/etc/machine-id"
rm -f "$root/etc/hostname"
