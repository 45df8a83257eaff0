#!/usr/bin/env bash
# A Slurm cluster of one node on the loopback interface, for the tests in this folder.
#   tests/real/slurm.sh start FOLDER    configuration, state and logs go to FOLDER
#   tests/real/slurm.sh stop FOLDER
# /etc/slurm/slurm.conf becomes a link to it (needs root): Snakemake's job steps forget SLURM_CONF.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin
command=$1
mkdir -p "$2"
folder=$(cd "$2" && pwd)
export SLURM_CONF=$folder/slurm.conf
system=/etc/slurm/slurm.conf

stop() {
  scancel --full --user "$(id -un)" 2>/dev/null || true
  for name in slurmctld slurmd munged; do
    if [ -s "$folder/$name.pid" ]; then kill "$(cat "$folder/$name.pid")" 2>/dev/null || true; fi
  done
  if [ "$(readlink $system)" = "$SLURM_CONF" ]; then rm $system; fi
}

start() {
  if [ -e $system ]; then
    echo "slurm: $system is there: this machine belongs to a cluster, or another test runs." >&2
    exit 1
  fi
  mkdir -p /etc/slurm
  ln -sfn "$SLURM_CONF" $system
  mkdir -p "$folder"/{state,spool,munge}
  chmod 755 "$folder"
  chmod 700 "$folder/munge"
  (umask 077 && head -c 1024 /dev/urandom >"$folder/munge/key")
  munged --force --key-file="$folder/munge/key" --seed-file="$folder/munge/seed" --log-file="$folder/munge/log" \
    --pid-file="$folder/munged.pid" --socket="$folder/munge.socket"
  memory=$(awk '/MemTotal/ {m = int($2 / 1024 * 0.9); print m < 64000 ? m : 64000}' /proc/meminfo)
  cat >"$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket=$folder/munge.socket
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=batch_sched_delay=0,sched_interval=2
MinJobAge=600
KillWait=10
MessageTimeout=60
SlurmdTimeout=0
ReturnToService=2
GresTypes=gpu
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$(env -u OMP_NUM_THREADS nproc) RealMemory=$memory Gres=gpu:1 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
  # A device that is none: jobs that ask for a GPU are placed, and find out that there is no driver.
  echo "NodeName=$(hostname -s) Name=gpu File=/dev/null" >"$folder/gres.conf"
  slurmctld
  slurmd -f "$folder/slurm.conf"
  for _ in $(seq 120); do
    if [ "$(sinfo --noheader --format %T 2>/dev/null)" = idle ]; then return; fi
    sleep 0.5
  done
  echo "slurm: the node does not come up:" >&2
  sinfo --long >&2 || true
  tail -n 20 "$folder"/slurm*.log >&2
  stop
  exit 1
}

$command
