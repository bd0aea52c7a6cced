#!/usr/bin/env bash
# usage: eval "$(up.sh DIR [NODES])"  starts munged, slurmctld and a slurmd for each node on this host with all state under DIR.
# Each node has two fake GPUs; one node is this host, more are called n2, n3, .. and listen beside it.
# needs: apt-get install -y --no-install-recommends slurm-wlm munge
set -euo pipefail
D=$1; N=${2:-1}; H=$(hostname -s); P=$((16716 + 100 * N)); names=$H; for i in $(seq 2 "$N"); do names+=,n$i; done
C=$(nproc --all); M=$(awk '/MemTotal/{print int($2/1024*0.8)}' /proc/meminfo)
mkdir -p "$D"/{state,spool,log,run,munge}; chmod 700 "$D/munge"; chmod 755 "$D" "$D/run"
dd if=/dev/urandom of="$D/munge/key" bs=1024 count=1 status=none; chmod 600 "$D/munge/key"
cat > "$D/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$H(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$D/run/munge.sock,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool-%n
SlurmctldPidFile=$D/run/slurmctld.pid
SlurmdPidFile=$D/run/slurmd-%n.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd-%n.log
SlurmctldPort=$P
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$D/log/jobcomp.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=256
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
ReturnToService=2
JobRequeue=1
KillWait=2
InactiveLimit=0
MinJobAge=600
SlurmctldTimeout=30
SlurmdTimeout=30
UnkillableStepTimeout=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
GresTypes=gpu
$(for i in $(seq "$N"); do echo "NodeName=$(echo "$names" | cut -d, -f"$i") NodeAddr=127.0.0.1 NodeHostname=$H Port=$((P + i)) CPUs=$C RealMemory=$M Gres=gpu:2 State=UNKNOWN"; done)
PartitionName=debug Nodes=$names Default=YES MaxTime=60 State=UP OverSubscribe=NO PriorityTier=1 PreemptMode=REQUEUE GraceTime=5
PartitionName=high Nodes=$names MaxTime=60 State=UP OverSubscribe=NO PriorityTier=10 PreemptMode=OFF
CONF
echo "CgroupPlugin=cgroup/v1
CgroupAutomount=no
ConstrainCores=no
ConstrainRAMSpace=no" > "$D/cgroup.conf"
mknod "$D/run/gpu0" c 1 3 2>/dev/null || true; mknod "$D/run/gpu1" c 1 3 2>/dev/null || true
printf "Name=gpu File=%s/run/gpu0\nName=gpu File=%s/run/gpu1\n" "$D" "$D" > "$D/gres.conf"
export SLURM_CONF="$D/slurm.conf"
munged --socket="$D/run/munge.sock" --key-file="$D/munge/key" --pid-file="$D/run/munged.pid" --log-file="$D/log/munged.log" --seed-file="$D/munge/seed" --num-threads=2
slurmctld -f "$SLURM_CONF" -c
for name in ${names//,/ }; do slurmd -N "$name" -f "$SLURM_CONF" -c; done
for i in $(seq 60); do [ "$(sinfo -h -N -p debug -o %t 2>/dev/null | sort -u)" = idle ] && { echo "export SLURM_CONF=$SLURM_CONF"; exit 0; }; sleep 0.25; done
sinfo -N -l; tail -20 "$D"/log/*.log; exit 1
