"""A real SLURM cluster of several nodes on this machine: munge, slurmctld and a slurmd a node, in about a second.

Root, no systemd, nothing of /etc touched; ports and directories of its own. What is not installed is installed with apt-get
where that is possible.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PACKAGES = ("slurm-wlm", "munge")
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool/%n
SlurmctldPidFile={directory}/run/slurmctld.pid
SlurmdPidFile={directory}/run/slurmd.%n.pid
SlurmctldLogFile={directory}/log/slurmctld.log
SlurmdLogFile={directory}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,sched_min_interval=0,default_queue_depth=100,bf_continue
MinJobAge=3600
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=5
JobRequeue=1
PropagateResourceLimits=NONE
GresTypes=gpu
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=8 RealMemory=4000 Gres=gpu:8 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 State=UP
"""


def unavailable() -> str:
    """Why no cluster can be started here; empty if one can. Installs SLURM where it is missing and may be installed."""
    if os.getuid() != 0:
        return "SLURM TESTS SKIPPED: they start slurmd, which needs root"
    if not (shutil.which("slurmctld") and shutil.which("munged")):
        if not shutil.which("apt-get"):
            return "SLURM TESTS SKIPPED: no slurmctld or munged here, and no apt-get to install them with"
        apt = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update", "-qq"], env=apt, check=False, timeout=120)
        install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES]
        done = subprocess.run(install, env=apt, capture_output=True, text=True, check=False, timeout=240)
        if done.returncode != 0:
            return f"SLURM TESTS SKIPPED: apt-get install {' '.join(PACKAGES)} failed: {done.stderr[-300:]}"
    return ""


class Cluster:
    """`command` and `environment` run SLURM's commands against it."""

    def __init__(self, directory: Path, nodes: int = 4) -> None:
        self.directory, self.nodes = directory, [f"n{i}" for i in range(1, nodes + 1)]
        for name in ("dev", "state", "log", "run", "spool", "munge"):
            (directory / name).mkdir(parents=True)
        directory.chmod(0o755)
        (directory / "munge").chmod(0o711)
        key = directory / "munge" / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        first = _free_ports(nodes + 1)
        conf = CONF.format(host=socket.gethostname().split(".")[0], directory=directory, nodes=nodes, port=first,
                           first=first + 1, last=first + nodes)  # fmt: skip
        (directory / "slurm.conf").write_text(conf)
        for i in range(8):
            os.mknod(directory / "dev" / f"gpu{i}", 0o20666, os.makedev(1, 3))
        devices = [f"Name=gpu File={directory}/dev/gpu{i}\n" for i in range(8)]
        (directory / "gres.conf").write_text("".join(devices))
        self.environment = {**os.environ, "SLURM_CONF": str(directory / "slurm.conf")}
        munge = directory / "munge"
        self.command(
            "munged", f"--key-file={key}", f"--socket={munge}/munge.sock", f"--pid-file={munge}/munged.pid",
            f"--log-file={munge}/munged.log", f"--seed-file={munge}/munged.seed", "--num-threads=2", "--force",
        )  # fmt: skip
        self.command("slurmctld", "-c")
        for node in self.nodes:
            self.start_node(node)
        self.wait_until_idle()

    def command(self, *words: str, timeout: float = 20) -> str:
        """What the command prints; its stderr is in the error if it fails. Daemons must not hold a pipe open."""
        with (self.directory / "log" / "commands").open("a+b") as errors:
            done = subprocess.run(words, env=self.environment, stdout=subprocess.PIPE if words[0].startswith("s") and
                                  words[0] not in ("slurmd", "slurmctld") else errors, stderr=errors, timeout=timeout,
                                  stdin=subprocess.DEVNULL, check=False)  # fmt: skip
            errors.seek(0)
            assert done.returncode == 0, f"{words}: {errors.read().decode()[-2000:]}"
        return (done.stdout or b"").decode()

    def start_node(self, node: str) -> None:
        self.command("slurmd", "-N", node, "-c")

    def kill_node(self, node: str) -> None:
        """The death of a node as far as SLURM can see: its daemon is gone, its processes live on."""
        os.kill(self.pid_of(f"slurmd.{node}"), signal.SIGKILL)

    def wait_until_idle(self, timeout: float = 60) -> None:
        deadline = time.monotonic() + timeout
        while self.command("sinfo", "-h", "-N", "-o", "%t").split() != ["idle"] * len(self.nodes):
            assert time.monotonic() < deadline, self.command("sinfo", "-N", "-l")
            time.sleep(0.1)

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` knows of it."""
        shown = self.command("scontrol", "--oneliner", "show", "job", job).splitlines()[0]
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def wait(self, job: str, timeout: float = 120) -> dict[str, str]:
        """Waits for the end of the job."""
        deadline = time.monotonic() + timeout
        while True:
            found = self.job(job)
            if found["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"):
                return found
            assert time.monotonic() < deadline, found
            time.sleep(0.2)

    def pid_of(self, daemon: str) -> int:
        return int((self.directory / "run" / f"{daemon}.pid").read_text())

    def stop(self) -> None:
        """Every daemon and whatever jobs have left, by the cluster's own configuration in its environment."""
        with_conf = f"SLURM_CONF={self.directory / 'slurm.conf'}".encode()
        munge = (self.directory / "munge" / "munged.pid").read_text()
        for process in Path("/proc").iterdir():
            if process.name.isdigit() and int(process.name) != os.getpid():
                try:
                    if with_conf in (process / "environ").read_bytes().split(b"\0") or process.name == munge.strip():
                        os.kill(int(process.name), signal.SIGKILL)
                except OSError:
                    continue


def _free_ports(count: int) -> int:
    """The first of so many free ports in a row."""
    for first in range(21000 + os.getpid() % 5000, 32000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("", port))
        except OSError:
            continue
        return first
    raise RuntimeError("no free ports")
