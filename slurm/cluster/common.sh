# Shared by up and down: where the cluster lives, and how its daemons are found again.
# shellcheck shell=bash
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"

me=${0##*/}
marker='# Written by slurm/cluster/up. Changes are overwritten; slurm/cluster/down --purge removes it.'
# shellcheck disable=SC2034  # up reads it
daemons=(munged mariadbd slurmdbd slurmctld slurmd)

say() { echo "$me: $*" >&2; }
die() { say "$*"; exit "${code:-1}"; }

# The state directory of the user who calls: in /var/tmp because MUNGE's socket must be reachable by
# every user of the node, and because a socket's path may not be longer than 107 characters.
state=${DYNCONV_SLURM_STATE:-/var/tmp/dynconv-slurm-$EUID}

# pid_of NAME prints the daemon's process id and succeeds, if it is running from this state directory.
pid_of() {
    local pid command
    read -r pid 2>/dev/null <"$state/run/$1.pid" || return 1
    read -r command 2>/dev/null <"/proc/$pid/comm" || return 1
    # A process id can be taken by a stranger after a reboot; Debian names the controller slurmctld-wlm. slurmd2 is the
    # slurmd of node2.
    [[ $command == "${1%2}"* && $(readlink "/proc/$pid/cwd") == "$state"* ]] && echo "$pid"
}

# wait_for SECONDS COMMAND... polls until the command succeeds.
wait_for() {
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < end)) || return 1
        sleep 0.2
    done
}

# check_state refuses a directory that these scripts did not make, or that belongs to somebody else.
check_state() {
    [[ $state == /* ]] || code=2 die "got DYNCONV_SLURM_STATE=$state, wanted an absolute path"
    ((${#state} <= 80)) || code=2 die "DYNCONV_SLURM_STATE is ${#state} characters long, wanted at most 80 (socket paths are short)"
    [[ -e $state || -L $state ]] || return 0
    [[ -d $state && ! -L $state && -O $state ]] || code=2 die "$state is not a directory of $(id -un); set DYNCONV_SLURM_STATE"
    local file
    for file in "$state"/{slurm,slurmdbd}.conf; do
        if [[ -e $file ]] && ! head -n 1 "$file" | grep -qxF "$marker"; then
            code=2 die "$file was not written by slurm/cluster/up and stays as it is; set DYNCONV_SLURM_STATE to another directory"
        fi
    done
    [[ -e $state/slurm.conf || -z $(ls -A "$state") ]] || code=2 die "$state holds files of somebody else; set DYNCONV_SLURM_STATE to another directory"
}
