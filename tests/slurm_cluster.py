"A real Slurm of one machine, for as long as a test lasts: `with SlurmOnOneMachine(folder) as slurm: slurm.run('sinfo')`."

import contextlib
import ctypes
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

DEBIAN = "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "sinfo", "squeue", "scontrol", "scancel")
PATH = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"  # daemons are not on everybody's
LONGEST_SOCKET = 100  # the kernel's limit for the path of a Unix socket is 108

# select/linear would give a job the whole machine; config_overrides lets one machine of 2 CPUs claim more.
# KillWait is the time between SIGTERM and SIGKILL, GraceTime the one between a preemption's warning and its SIGTERM.
SLURM_CONF = """
ClusterName=onemachine
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_min_interval=0,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=30
InactiveLimit=0
MinJobAge=300
KillWait={kill_wait}
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=low Nodes={host} Default=YES MaxTime=60 PriorityTier=1 GraceTime=0
PartitionName=patient Nodes={host} MaxTime=60 PriorityTier=1 GraceTime={grace_time}
PartitionName=high Nodes={host} MaxTime=60 PriorityTier=9 PreemptMode=OFF
"""


def what_is_missing() -> str | None:
    "Why no Slurm can be started here, with the remedy; None where it can."
    if missing := [c for c in NEEDED if not shutil.which(c, path=PATH)]:
        return f"no {', '.join(missing)} here: {DEBIAN}"
    try:
        socket.getaddrinfo(None, 1, socket.AF_INET, flags=socket.AI_PASSIVE | socket.AI_ADDRCONFIG)
    except socket.gaierror:
        return "slurmd finds no address of this machine: it needs a network interface beside the loopback"
    return None


class SlurmOnOneMachine:
    "munged, slurmctld and slurmd with everything of theirs under one folder. No systemd, no cgroups, no root needed."

    def __init__(self, folder, cpus: int = 4, kill_wait: int = 60, grace_time: int = 20):
        self.folder, self.daemons = Path(folder).resolve(), {}
        self.conf = self.folder / "slurm.conf"
        self.environ = {**os.environ, "SLURM_CONF": str(self.conf), "PATH": PATH}
        self.settings = dict(cpus=cpus, kill_wait=kill_wait, grace_time=grace_time)

    def __enter__(self):
        if len(str(self.folder / "munge.socket")) > LONGEST_SOCKET:
            raise ValueError(f"{self.folder}: the path is too long for a socket, take a folder directly under /tmp")
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def start(self) -> None:
        for name in ("state", "spool", "log"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.write_configuration()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {"key-file": key, "socket": "munge.socket", "pid-file": "munged.pid", "seed-file": "munged.seed"}
        places = [f"--{name}={self.folder / file}" for name, file in files.items()]
        self.launch("munged", "--foreground", "--force", f"--log-file={self.folder / 'log/munged'}", *places)
        self.wait_until(lambda: (self.folder / "munge.socket").exists(), "munged opens its socket")
        self.launch("slurmctld", "-D", "-i", "-f", self.conf)
        self.launch("slurmd", "-D", "-f", self.conf)
        asked = ("sinfo", "--noheader", "--partition=low", "--format=%t")
        self.wait_until(lambda: "idle" in self.run(*asked, check=False), "the node is idle")

    def write_configuration(self) -> None:
        host = socket.gethostname().split(".")[0]
        with socket.socket() as a, socket.socket() as b:  # both open at once, or they might be the same
            a.bind(("127.0.0.1", 0))
            b.bind(("127.0.0.1", 0))
            ports = dict(control_port=a.getsockname()[1], node_port=b.getsockname()[1])
        text = SLURM_CONF.format(host=host, user=getpass.getuser(), folder=self.folder, **ports, **self.settings)
        self.conf.write_text(text)
        version = re.search(r"(\d+)\.(\d+)", self.run("slurmctld", "-V"))
        if (int(version[1]), int(version[2])) >= (24, 5):  # older ones do not know the word
            (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")

    def launch(self, name: str, *arguments) -> None:
        command = [shutil.which(name, path=PATH), *map(str, arguments)]
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            options = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
            self.daemons[name] = subprocess.Popen(command, env=self.environ, preexec_fn=die_with_parent, **options)

    def wait_until(self, condition, what: str, seconds: float = 30) -> None:
        "Poll; raises RuntimeError with the end of every log when a daemon dies or time is up."
        end = time.monotonic() + seconds
        while not condition():
            dead = [name for name, process in self.daemons.items() if process.poll() is not None]
            if dead or time.monotonic() > end:
                logs = "\n".join(p.read_text(errors="replace")[-3000:] for p in sorted(self.folder.glob("log/*")))
                raise RuntimeError(f"waited in vain until {what}; dead daemons: {dead}\n{logs}")
            time.sleep(0.1)

    def run(self, *command, check: bool = True) -> str:
        "What a Slurm command prints; raises RuntimeError with what it complained about."
        words = [str(c) for c in command]
        done = subprocess.run(words, env=self.environ, capture_output=True, text=True, timeout=30)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def show(self, job: str) -> dict[str, str]:
        "What the controller knows about a job: JobState, Restarts, ExitCode, BatchHost ..."
        told = self.run("scontrol", "-o", "show", "job", job).split()
        return dict(field.split("=", 1) for field in told if "=" in field)

    def jobs(self) -> list[str]:
        return self.run("squeue", "--noheader", "--format=%i", check=False).split()

    def processes(self) -> list[int]:
        "Everything that runs with this cluster's configuration in its environment."
        mark, found = f"SLURM_CONF={self.conf}".encode(), []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        return found

    def __exit__(self, *_) -> None:
        "End jobs, daemons and what is left of either. Nothing runs afterwards; the folder is the caller's."
        # The controller goes first, or it would start what waits; scancel would take KillWait for a job that is deaf.
        for name in ("slurmctld", "slurmd", "munged"):
            if process := self.daemons.get(name):
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                process.kill()
                process.wait()
            for pid in set(self.processes()) - {process.pid for process in self.daemons.values()}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def die_with_parent() -> None:
    "A daemon whose test is killed must not outlive it."
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
