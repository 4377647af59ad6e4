"""docker-compose.yml without a container engine: its commands, environments, names, ports, volumes, health checks.

A service is a process with namespaces of its own (network, mounts, processes, host name). Its root is an overlay over
this machine's, so what it writes is discarded. A bridge connects the services, and /etc/hosts has every name of the
file. Our services have the capabilities that the file leaves them. Everything ends with the process that started it,
however that ends, because the kernel kills a namespace with its first process.

Unlike in a container, the image is this machine with the virtual environment, its user is root without capabilities,
memory and CPUs are not limited, nothing is restarted, and health is checked more often than `interval` says. Third-
party images are Debian's PostgreSQL and Redis and, in place of MinIO, which Debian lacks, moto's server on the same
port.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docker-compose.yml"
SECRETS = {
    "POSTGRES_PASSWORD": "postgres-secret",
    "REDIS_PASSWORD": "redis-secret",
    "MINIO_USER": "eclectus",
    "MINIO_PASSWORD": "minio-secret",
    "PREFECT_AUTH": "admin:prefect-secret",
    "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef",
}
PROGRAMS = {"ip": "iproute2", "nsenter": "util-linux", "unshare": "util-linux", "redis-server": "redis-server"}
KINDS = ("net", "mnt", "pid", "uts", "ipc")
PROBE_EVERY = 2.0
WATCH_EVERY = 5.0
DOCKERS_GRACE = 10.0
POSTGRES = max(glob.glob("/usr/lib/postgresql/*/bin"), default="")
PATH = f"{Path(sys.executable).parent}:{POSTGRES}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
# What the Dockerfile sets, or the images that it builds on. PYTHONPATH: the checkout is what the image has installed.
IMAGE = {
    "PATH": PATH, "HOME": "/home/eclectus", "LANG": "C.UTF-8", "PYTHONUNBUFFERED": "1", "PYTHONPATH": "/opt/eclectus",
}  # fmt: skip

# What third-party images do at their start, with Debian's programs.
START_POSTGRES = """
initdb -D $PGDATA -U $POSTGRES_USER --auth-host=scram-sha-256 --pwfile=<(echo $POSTGRES_PASSWORD) > /dev/null
echo "host all all all scram-sha-256" >> $PGDATA/pg_hba.conf
postgres --single -D $PGDATA postgres <<< "create database $POSTGRES_DB"
exec postgres -D $PGDATA -c listen_addresses='*' -c unix_socket_directories=/tmp
"""
AS_POSTGRES = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
COMMANDS = {
    "postgres": [*AS_POSTGRES, "env", "PGDATA=/var/lib/postgresql/data", "bash", "-ec", START_POSTGRES],
    "minio": ["moto_server", "-H", "0.0.0.0", "-p", "9000"],
}
PROBES = {"minio": ["python", "-c", "import urllib.request as r; r.urlopen('http://localhost:9000/moto-api/')"]}
STOP_SIGNALS = {"postgres": signal.SIGINT}

# Docker's `init: true`: hands SIGTERM on, reaps what is left behind, ends with the command.
INIT = """
import os, signal, subprocess, sys
child = subprocess.Popen(sys.argv[1:], process_group=0)
signal.signal(signal.SIGTERM, lambda *_: child.send_signal(signal.SIGTERM))
while (ended := os.wait())[0] != child.pid: pass
sys.exit(os.waitstatus_to_exitcode(ended[1]) % 256)
"""
# The root of a service. It waits until its network is there.
SETUP = """
read -r _
exec < /dev/null
mount -t tmpfs tmpfs {stage}
mkdir {stage}/upper {stage}/work {stage}/root {stage}/code {stage}/code-work
root={stage}/root
mount -t overlay overlay -o lowerdir=/,upperdir={stage}/upper,workdir={stage}/work $root
mount --rbind /dev $root/dev
mount -t tmpfs -o size={shm},mode=1777 shm $root/dev/shm
mount -t proc proc $root/proc
mount --rbind /sys $root/sys
mkdir -p $root/opt/eclectus
mount -t overlay overlay -o lowerdir={code},upperdir={stage}/code,workdir={stage}/code-work $root/opt/eclectus
{binds}
cp {hosts} $root/etc/hosts
: > $root/etc/resolv.conf
hostname {name}
exec chroot $root env --default-signal --chdir={directory} setpriv --no-new-privs {rights} "$@"
"""


def read(variables: dict[str, str] = SECRETS) -> dict:
    """The services of the file, with variables in their places."""
    return interpolate(yaml.safe_load(FILE.read_text()), variables)["services"]


def interpolate(value, variables):
    """`${NAME}`, `${NAME:-default}`, `${NAME:?complaint}` and `$$` as compose reads them."""
    if isinstance(value, dict):
        return {key: interpolate(each, variables) for key, each in value.items()}
    if isinstance(value, list):
        return [interpolate(each, variables) for each in value]
    if not isinstance(value, str):
        return value

    def replace(found: re.Match) -> str:
        name, operator, text = found.groups()
        if not name:
            return "$"
        if operator == ":?" and not variables.get(name):
            raise AssertionError(f"{name}: {text}")
        return variables.get(name) or (text if operator == ":-" else "")

    return re.sub(r"\$\$|\$\{(\w+)(?:(:[-?])([^}]*))?\}", replace, value)


def missing() -> str:
    """Why services cannot be started here; empty when they can."""
    if os.geteuid():
        return "only root makes network namespaces"
    absent = {package for program, package in PROGRAMS.items() if not shutil.which(program)}
    absent |= set() if POSTGRES else {"postgresql"}
    if absent:
        return f"missing: {' '.join(sorted(absent))}; `make services` installs them on Debian"
    tried = subprocess.run(["unshare", "-mnpui", "--fork", "true"], capture_output=True, text=True, check=False)
    return tried.stderr.strip()


def seconds(text: str | None, default: float) -> float:
    return float(text.removesuffix("s")) if text else default


def processes_in(namespaces: set[str]) -> list[str]:
    """The processes of this machine that are in one of these namespaces."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if namespaces & {os.readlink(f"/proc/{process.pid}/ns/{kind}") for kind in KINDS}:
                found.append(f"{process.pid} {' '.join(process.cmdline())[:80]}")
    return found


@dataclass
class Instance:
    """A running service. first: the process that the others of its namespaces descend from and end with."""

    name: str
    service: dict
    folder: Path
    address: str
    outer: subprocess.Popen
    first: psutil.Process
    started: float = field(default_factory=time.monotonic)
    healthy: bool = False
    failures: int = 0
    asked: float = 0.0

    @property
    def environment(self) -> dict[str, str]:
        return IMAGE | {"HOSTNAME": self.name} | self.service.get("environment", {})

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def run(self, words: list[str], timeout: float = 120) -> subprocess.CompletedProcess:
        """Runs a command in the service, as `docker compose exec` does."""
        inside = ["nsenter", f"--target={self.first.pid}", "-m", "-n", "-p", "-u", "-i", "-r", "-w"]
        return subprocess.run(
            [*inside, *words], env=self.environment, capture_output=True, text=True, timeout=timeout, check=False
        )

    def processes(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            return [self.first, *self.first.children(recursive=True)]
        return []

    def level(self) -> None:
        """Resets the niceness of Ray's workers: in a container it matters among its processes only, here among all."""
        for process in self.processes():
            with contextlib.suppress(OSError, psutil.Error):
                for thread in process.threads() if process.nice() > 0 else ():
                    os.setpriority(os.PRIO_PROCESS, thread.id, 0)

    def memory(self) -> int:
        """Bytes; what processes share is counted once among them all."""
        total = 0
        for process in self.processes():
            with contextlib.suppress(OSError):
                told = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
                total += 1024 * int(re.search(r"^Pss:\s+(\d+)", told, re.MULTILINE)[1])
        return total


class Cluster:
    """Services of the file, and the bridge between them. A context: all have ended when it is left."""

    def __init__(
        self,
        folder: Path,
        scale: dict[str, int] | None = None,
        only: set[str] | None = None,
        environment: dict[str, str] | None = None,
        services: dict[str, dict] | None = None,
    ):
        """scale: instances of a service. only: services to start; all by default. environment: more of it, for all.

        services: in the form of the file's, in their place.
        """
        self.folder = folder
        self.services = {
            name: service | {"environment": service.get("environment", {}) | (environment or {})}
            for name, service in (read() if services is None else services).items()
            if "profiles" not in service and (only is None or name in only)
        }
        self.names = {
            f"{name}-{number}" if name in (scale or {}) else name: name
            for name in self.services
            for number in range(1, (scale or {}).get(name, 1) + 1)
        }
        self.network, self.uplink = f"198.18.{os.getpid() % 250}", f"ecl{os.getpid()}"
        self.instances: dict[str, Instance] = {}
        self.started: list[tuple[subprocess.Popen, psutil.Process]] = []
        self.ended: dict[str, int] = {}
        self.stopped: dict[str, float | None] = {}
        self.most_memory: dict[str, int] = {}
        self.watched = 0.0

    def __enter__(self) -> Cluster:
        try:
            self._make_bridge()
            self.up()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def up(self) -> None:
        """Starts each service when its dependencies are met; returns when all are healthy or, if jobs, done."""
        while set(self.names) != {name for name in self.names if self._is(name, "well")}:
            for name, service in self.names.items():
                wanted = self.services[service].get("depends_on", {})
                conditions = {other: condition["condition"] for other, condition in wanted.items()}
                known = {other: condition for other, condition in conditions.items() if other in self.services}
                if name not in self.instances and all(self._is(*each) for each in known.items()):
                    self.instances[name] = self._start(name)
            for instance in self.instances.values():
                self._look_after(instance)
            time.sleep(0.1)

    def watch(self) -> None:
        """Notes how much memory services take. Raises AssertionError for one that has ended."""
        for instance in self.instances.values():
            self._look_after(instance)
        if time.monotonic() > self.watched + WATCH_EVERY:
            for name, instance in self.instances.items():
                self.most_memory[name] = max(self.most_memory.get(name, 0), instance.memory())
                instance.level()
            self.watched = time.monotonic()

    def namespaces(self) -> set[str]:
        """Of everything that was started and has not ended."""
        return {
            os.readlink(f"/proc/{first.pid}/ns/{kind}")
            for _, first in self.started
            if first.is_running()
            for kind in KINDS
        } - {os.readlink(f"/proc/self/ns/{kind}") for kind in KINDS}

    def stop(self, names: set[str] | None = None) -> dict[str, float | None]:
        """Stops all or some, dependents first. Returns the seconds each took; None for what had to be killed."""
        left = {
            name: each
            for name, each in self.instances.items()
            if each.outer.poll() is None and (names is None or name in names)
        }
        while left:
            needed = {other for name in left for other in self.services[self.names[name]].get("depends_on", {})}
            level = {name: each for name, each in left.items() if self.names[name] not in needed}
            begun = time.monotonic()
            for name, each in level.items():
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.first.send_signal(STOP_SIGNALS.get(name, signal.SIGTERM))
            for name, each in level.items():
                grace = seconds(each.service.get("stop_grace_period"), DOCKERS_GRACE)
                try:
                    each.outer.wait(max(0.0, begun + grace - time.monotonic()))
                    self.stopped[name] = time.monotonic() - begun
                except subprocess.TimeoutExpired:
                    self.stopped[name] = None
                    each.outer.kill()
                    each.outer.wait()
                del left[name]
        return self.stopped

    def _is(self, name: str, condition: str) -> bool:
        """Whether a service (all of its instances) meets a condition of `depends_on`, or is as well as it can be."""
        names = [each for each, service in self.names.items() if name in (each, service)]
        started = [self.instances[each] for each in names if each in self.instances]
        if len(started) < len(names):
            return False
        if condition == "service_completed_successfully":
            return all(self.ended.get(each.name) == 0 for each in started)
        return all(each.healthy or self.ended.get(each.name) == 0 for each in started)

    def _look_after(self, instance: Instance) -> None:
        """Asks for its health when it is time to. Raises AssertionError for what ended or stays ill."""
        code = instance.outer.poll()
        if code is not None and instance.name not in self.ended:
            job = instance.service.get("restart") == "no"
            assert job and code == 0, f"{instance.name} ended with {code}:\n{instance.log[-4000:]}"
            self.ended[instance.name] = code
        check, now = instance.service.get("healthcheck"), time.monotonic()
        if not check:
            instance.healthy = instance.service.get("restart") != "no"
        elif not instance.healthy and now >= instance.asked + PROBE_EVERY:
            test = PROBES.get(instance.name, check["test"])
            words = {"CMD": test[1:], "CMD-SHELL": ["sh", "-c", *test[1:]]}.get(test[0], test)
            said = ""
            try:
                answer = instance.run(words, timeout=seconds(check["timeout"], 30))
                instance.healthy, said = answer.returncode == 0, answer.stderr
            except subprocess.TimeoutExpired:
                said = "no answer in time"
            instance.asked = time.monotonic()
            instance.failures += not instance.healthy and now > instance.started + seconds(check["start_period"], 0)
            assert instance.failures < check["retries"], f"{instance.name} is unhealthy: {said}\n{instance.log[-4000:]}"

    def _start(self, name: str) -> Instance:
        service, folder = self.services[self.names[name]], self.folder / name
        (folder / "stage").mkdir(parents=True)
        (folder / "hosts").write_text(self._hosts(name))
        script = SETUP.format(
            name=name,
            stage=shlex.quote(str(folder / "stage")),
            hosts=shlex.quote(str(folder / "hosts")),
            code=shlex.quote(str(ROOT)),
            shm=service.get("shm_size", "64m"),
            binds="\n".join(
                "mkdir -p $root{0}\nmount --bind {1} $root{0}".format(shlex.quote(target), shlex.quote(str(source)))
                for target, source in self._binds(name, folder).items()
            ),
            directory="/opt/eclectus" if "build" in service else "/",
            rights="--inh-caps=-all --bounding-set=-all" if service.get("cap_drop") == ["ALL"] else "",
        )
        written = service.get("command", [])
        command = COMMANDS.get(name) or (shlex.split(written) if isinstance(written, str) else written)
        if service.get("init") or name == "minio":
            command = ["python", "-S", "-c", INIT, *command]
        environment = IMAGE | {"HOSTNAME": name} | service.get("environment", {})
        outer, first = self._unshare("-mnpui", ["bash", "-ec", script, "bash", *command], folder / "log", environment)
        self._connect(name, first.pid)
        outer.stdin.write(b"\n")
        outer.stdin.close()
        return Instance(name, service, folder, self._address(name), outer, first)

    def _binds(self, name: str, folder: Path) -> dict[str, Path]:
        """Bind mounts of a service: its own folders, the file's volumes, and Python, which those may hide."""
        binds = {"/tmp": folder / "tmp", "/home/eclectus": folder / "home"}
        for volume in self.services[self.names[name]].get("volumes", []):
            source, target = volume.split(":")
            binds[target] = self.folder / "volumes" / source
        for source in binds.values():
            source.mkdir(parents=True, exist_ok=True)
        binds["/tmp"].chmod(0o1777)
        if name == "postgres":
            shutil.chown(binds["/var/lib/postgresql/data"], "postgres", "postgres")
        return binds | {prefix: Path(prefix) for prefix in (sys.base_prefix, sys.prefix)}

    def _connect(self, name: str, pid: int) -> None:
        port = f"port{list(self.names).index(name)}"
        _ip(None, f"link add {port} netns {self.switch.pid} type veth peer name eth0 netns {pid}")
        _ip(self.switch.pid, f"link set {port} master bridge", f"link set {port} up")
        _ip(
            pid, "link set lo up", f"address add {self._address(name)}/24 dev eth0", "link set eth0 up",
            f"route add default via {self.network}.1",
        )  # fmt: skip

    def _make_bridge(self) -> None:
        """A namespace that only holds the bridge, and a way to it from this process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        _, self.switch = self._unshare("-n", ["sleep", "infinity"], self.folder / "bridge", {})
        _ip(None, f"link add {self.uplink} type veth peer name uplink netns {self.switch.pid}")
        _ip(
            self.switch.pid, "link add bridge type bridge", f"address add {self.network}.1/24 dev bridge",
            "link set bridge up", "link set uplink master bridge", "link set uplink up",
        )  # fmt: skip
        _ip(None, f"address add {self.network}.254/24 dev {self.uplink}", f"link set {self.uplink} up")

    def _unshare(self, spaces: str, words: list[str], log: Path, environment: dict[str, str]):
        """(outer process, first process in the new namespaces); both end with this process."""
        with open(log, "wb") as handle:
            outer = subprocess.Popen(
                ["setpriv", "--pdeathsig=KILL", "unshare", spaces, "--fork", "--kill-child", *words],
                stdin=subprocess.PIPE, stdout=handle, stderr=subprocess.STDOUT, env={"PATH": PATH} | environment,
                start_new_session=True,
            )  # fmt: skip
        while not (found := psutil.Process(outer.pid).children()):
            assert outer.poll() is None, log.read_text()
            time.sleep(0.01)
        self.started.append((outer, found[0]))
        return outer, found[0]

    def _address(self, name: str) -> str:
        return f"{self.network}.{list(self.names).index(name) + 2}"

    def _hosts(self, own: str) -> str:
        lines = ["127.0.0.1 localhost", f"{self._address(own)} {own}"]
        return "\n".join([*lines, *(f"{self._address(name)} {name} {self.names[name]}" for name in self.names)]) + "\n"

    def close(self) -> None:
        """Kills what runs."""
        for outer, first in self.started:
            with contextlib.suppress(psutil.NoSuchProcess):
                first.kill()
            outer.wait()


def _ip(pid: int | None, *lines: str) -> None:
    inside = ["nsenter", f"--target={pid}", "-n"] if pid else []
    subprocess.run([*inside, "ip", "-batch", "-"], input="\n".join(lines), text=True, check=True, capture_output=True)
