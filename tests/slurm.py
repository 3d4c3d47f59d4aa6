"""A Slurm of one node on the loopback address, for as long as a test takes: no root, no munge, nothing left behind."""

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jobs import free_port

PATIENCE = 60  # seconds until the node is there

CONFIG = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/none
CredType=cred/none
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
KillWait=60
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SelectType=select/linear
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs={cpus}
PartitionName=all Nodes=ALL Default=YES
"""


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Run controller and node with all their files in a folder; yield the variables by which its commands find them."""
    missing = [program for program in ("slurmctld", "slurmd", "srun", "sbatch") if shutil.which(program) is None]
    assert not missing, f"{missing} not found; install Slurm, on Debian the package slurm-wlm"
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    config = folder / "slurm.conf"
    ports = {"controller_port": free_port(), "node_port": free_port()}
    host, user, cpus = socket.gethostname().split(".")[0], getpass.getuser(), os.cpu_count()
    config.write_text(CONFIG.format(folder=folder, host=host, user=user, cpus=cpus, **ports))
    environment = os.environ | {"SLURM_CONF": str(config)}
    with (folder / "log").open("w") as log:
        daemons = [
            subprocess.Popen([program, "-D"], env=environment, stdout=log, stderr=subprocess.STDOUT)
            for program in ("slurmctld", "slurmd")
        ]
        try:
            _wait_for_node(environment, folder / "log")
            yield {"SLURM_CONF": str(config)}
        finally:
            for daemon in reversed(daemons):
                daemon.terminate()
            for daemon in daemons:
                daemon.wait(PATIENCE)


def _wait_for_node(environment: dict[str, str], log: Path) -> None:
    until = time.monotonic() + PATIENCE
    while True:
        found = subprocess.run(["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True)
        if found.stdout.strip() == "idle":
            return
        assert time.monotonic() < until, f"no node after {PATIENCE} s: {found}\n{log.read_text()}"
        time.sleep(0.2)
