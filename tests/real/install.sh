#!/usr/bin/env bash
# Install Slurm, podman and Apptainer on Debian or Ubuntu, for the tests in this folder. Needs root (or sudo).
# Apptainer is not in every release: where it is missing, Debian's own package (from unstable) is unpacked into
# /opt/slmake-apptainer with the libraries it was built for, beside the system, which stays as it is.
set -euo pipefail
as_root=$([ "$(id -u)" = 0 ] || echo sudo)
export DEBIAN_FRONTEND=noninteractive

missing=()
for pair in slurmctld:slurm-wlm munged:munge podman:podman runc:runc mmdebstrap:mmdebstrap mksquashfs:squashfs-tools patchelf:patchelf newuidmap:uidmap; do
  PATH=$PATH:/usr/sbin command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
done
if [ "${#missing[@]}" -gt 0 ]; then
  $as_root apt-get update -qq
  $as_root apt-get install -qq -y --no-install-recommends "${missing[@]}" >/dev/null
fi
if command -v apptainer >/dev/null; then exit 0; fi
if apt-cache show apptainer 2>/dev/null | grep -q ^Package; then
  $as_root apt-get install -qq -y --no-install-recommends apptainer >/dev/null
  exit 0
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
mkdir -p "$work/lists/partial" "$work/deb"
mirror=$(grep -rhoE 'https?://[^ ]+/debian/?( |$)' /etc/apt/sources.list /etc/apt/sources.list.d 2>/dev/null | head -1 | tr -d ' ' || true)
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] ${mirror:-http://deb.debian.org/debian} sid main" >"$work/sid.list"
apart=(-oDir::Etc::sourcelist="$work/sid.list" -oDir::Etc::sourceparts=/dev/null -oDir::State::Lists="$work/lists" -oAPT::Sandbox::User=root)
$as_root apt-get "${apart[@]}" update -qq
(cd "$work/deb" && $as_root apt-get "${apart[@]}" download -qq apptainer libc6 libseccomp2 libsqlite3-0)

home=/opt/slmake-apptainer
$as_root rm -rf $home
for package in "$work"/deb/*.deb; do $as_root dpkg -x "$package" $home; done
libraries=$home/usr/lib/x86_64-linux-gnu
for program in $home/usr/bin/apptainer $libraries/apptainer/bin/starter; do
  $as_root patchelf --set-interpreter $libraries/ld-linux-x86-64.so.2 --force-rpath --set-rpath $libraries "$program"
done
# Moved from its place, Apptainer looks for its configuration beside itself.
$as_root cp -a $home/etc $home/usr/etc
$as_root mkdir -p $home/usr/var/lib/apptainer/mnt/session
$as_root ln -s ../var $home/usr/lib/var
$as_root ln -s ../etc $home/usr/lib/etc
# Root without every capability (in a virtual machine, say) cannot hand all of them on.
$as_root sed -i 's/^root default capabilities = .*/root default capabilities = no/' $home/usr/etc/apptainer/apptainer.conf
$as_root ln -sf $home/usr/bin/apptainer /usr/local/bin/apptainer
apptainer --version
