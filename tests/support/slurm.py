"""A Slurm cluster of Debian's packages on this machine: a controller and two nodes, each with namespaces of its own.

The machines are those of tests/support/compose.py. All share the folder /shared, in which their configuration and the
home are. Like there, everything ends with the process that started it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from tests.support.compose import Cluster

PROGRAMS = {
    "ip": "iproute2",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
}
NODES = 2
# cred_expire: a requeued job waits for as long before it starts again.
CONFIGURATION = """
ClusterName=test
SlurmctldHost=control
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
StateSaveLocation=/var/lib/slurm-state
SlurmdSpoolDir=/var/spool/slurmd
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
KillWait=30
SlurmctldDebug=info
SlurmdDebug=info
NodeName=node-[1-2] CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
START = """
mkdir -p /run/munge /var/log/munge /var/lib/munge /var/lib/slurm-state /var/spool/slurmd /var/log/slurm
chown munge:munge /run/munge /var/log/munge /var/lib/munge
chmod 0755 /run/munge
cp /shared/slurm.conf /etc/slurm/slurm.conf
echo CgroupAutomount=no > /etc/slurm/cgroup.conf
setpriv --reuid=munge --regid=munge --clear-groups munged
exec "$@"
"""


def missing() -> str:
    """Why Slurm cannot be started here; empty when it can."""
    if os.geteuid():
        return "only root makes the namespaces in which Slurm's nodes run"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    absent = {package for program, package in PROGRAMS.items() if not shutil.which(program, path=path)}
    if absent:
        return f"missing: {' '.join(sorted(absent))}; `make services` installs them on Debian"
    tried = subprocess.run(["unshare", "-mnpui", "--fork", "true"], capture_output=True, text=True, check=False)
    return tried.stderr.strip()


def slurm_cluster(folder: Path) -> Cluster:
    """The cluster, not yet started; `instances["control"].run([...])` calls its commands."""
    (folder / "volumes" / "shared").mkdir(parents=True)
    configuration = CONFIGURATION.format(cpus=os.cpu_count() or 1)
    (folder / "volumes" / "shared" / "slurm.conf").write_text(configuration.lstrip())
    # "build": the working directory is the checkout.
    common = {"init": True, "volumes": ["shared:/shared"], "build": ".", "shm_size": "512m"}
    started = {"timeout": "10s", "start_period": "10s", "retries": 30}
    control = {
        "command": ["bash", "-ec", START, "start", "slurmctld", "-D"],
        "healthcheck": {"test": ["CMD-SHELL", "scontrol ping | grep -q UP"], **started},
    }
    node = {
        "command": ["bash", "-ec", START, "start", "slurmd", "-D"],
        "healthcheck": {"test": ["CMD-SHELL", "sinfo -h -N -n $(hostname) -o %T | grep -q idle"], **started},
        "depends_on": {"control": {"condition": "service_healthy"}},
    }
    return Cluster(folder, {"node": NODES}, services={"control": common | control, "node": common | node})
