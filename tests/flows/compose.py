"""Runs docker-compose.yml without a container engine: the same commands, environment, host names, ports, health checks and order.

Each service gets network, process and mount namespaces of its own (Linux, root), so that nothing has to be changed for running
side by side: `redis:6379` is `redis:6379`. What an image would bring is stood in for by `IMAGES`: our own image by this checkout
and its interpreter, the others by Debian's packages and by moto, which is an S3 server as MinIO is.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SUBNET = "10.77.{number}.{host}"
POSTGRES = """
set -e; bin=$(dirname $(ls /usr/lib/postgresql/*/bin/postgres | tail -1)); data=/var/lib/postgresql/data
chown postgres $data; secret=$(mktemp); printf %s "$POSTGRES_PASSWORD" > $secret; chown postgres $secret
as() { setpriv --reuid=postgres --regid=postgres --clear-groups "$@"; }
as $bin/initdb -D $data -U $POSTGRES_USER --pwfile=$secret -A scram-sha-256 > /dev/null
as $bin/postgres --single -D $data postgres <<< "create database $POSTGRES_DB" > /dev/null
echo "host all all all scram-sha-256" >> $data/pg_hba.conf
exec setpriv --reuid=postgres --regid=postgres --clear-groups $bin/postgres -D $data -h '*' -c unix_socket_directories=
"""
# What an image runs when the compose file gives the command of its own entry point, and what its health check becomes.
IMAGES = {
    "postgres": (["bash", "-c", POSTGRES], None),
    "redis": (None, None),
    "minio/minio": (
        [str(BIN / "moto_server"), "-H", "0.0.0.0", "-p", "9000"],
        ["curl", "-sf", "http://localhost:9000/"],
    ),
}


class Compose:
    """The services of a compose file. secrets: the variables that an operator writes into .env."""

    def __init__(self, folder: Path, number: int, secrets: dict[str, str]) -> None:
        """folder: for volumes and logs. number: of the subnet, so that two can run at once."""
        self.folder = folder
        self.number = number
        self.services = interpolate(yaml.safe_load((ROOT / "docker-compose.yml").read_text()), secrets)["services"]
        self.bridge = f"ecl{number}"
        self._running: dict[str, subprocess.Popen] = {}
        self._addresses: dict[str, str] = {}
        self._made: list[Path] = []

    def __enter__(self) -> Compose:
        _ip(
            f"link add {self.bridge} type bridge",
            f"addr add {self.address(1)}/24 dev {self.bridge}",
            f"link set {self.bridge} up",
        )
        for host, name in enumerate(self.services, start=2):
            self._addresses[name] = self.address(host)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._running.values():
            process.kill()  # takes the whole process namespace with it
        for name, process in self._running.items():
            process.wait()
            subprocess.run(["ip", "netns", "del", self._space(name)], check=False)
            shutil.rmtree(Path("/etc/netns") / self._space(name), ignore_errors=True)
        _ip(f"link del {self.bridge}")
        for path in sorted(self._made, reverse=True):
            path.rmdir()

    def address(self, host: int) -> str:
        return SUBNET.format(number=self.number, host=host)

    def up(self, *names: str) -> None:
        """Starts services and, before them, what they depend on, under the conditions that the file gives."""
        for name in names or self.services:
            if name in self._running:
                continue
            for other, rule in self.services[name].get("depends_on", {}).items():
                self.up(other)
                self.wait(other, rule["condition"])
            self._start(name)

    def scale(self, name: str, copy: str) -> None:
        """One more of a service, as `--scale` gives."""
        self.services[copy] = self.services[name]
        self._addresses[copy] = self.address(len(self._addresses) + 2)
        self._start(copy)

    def wait(self, name: str, condition: str, seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        process = self._running[name]
        while not self._meets(name, condition):
            over = process.poll() is not None and condition != "service_completed_successfully"
            if over or process.poll() or time.monotonic() > end:
                raise AssertionError(f"'{name}' is not {condition}:\n{self.log(name)[-3000:]}")
            time.sleep(0.5)

    def run(self, name: str, words: list[str]) -> subprocess.CompletedProcess:
        """`docker compose exec`: a command inside the namespaces of a service, with its environment."""
        while not (children := psutil.Process(self._running[name].pid).children()):
            assert self._running[name].poll() is None, f"'{name}' has ended:\n{self.log(name)[-3000:]}"
            time.sleep(0.1)
        (inside,) = children
        enter = ["nsenter", "--target", str(inside.pid), "--all", "--wd=/opt/eclectus", *words]
        return subprocess.run(enter, env=self.environment(name), capture_output=True, text=True, check=False)

    def kill(self, name: str) -> None:
        self._running.pop(name).kill()
        subprocess.run(["ip", "netns", "del", self._space(name)], check=False)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def environment(self, name: str) -> dict[str, str]:
        """The service's variables and nothing of ours but where programs are, as the image would say."""
        ours = {
            "PATH": f"{BIN}:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "PYTHONPATH": "/opt/eclectus",
            "HOME": "/home/eclectus",
        }
        return ours | {"PYTHONDONTWRITEBYTECODE": "1", "LANG": "C.UTF-8"} | self.services[name].get("environment", {})

    def _meets(self, name: str, condition: str) -> bool:
        if condition == "service_completed_successfully":
            return self._running[name].poll() == 0
        stand_in = IMAGES.get(self.services[name]["image"].partition(":")[0], (None, None))[1]
        kind, *words = self.services[name]["healthcheck"]["test"]
        words = stand_in or (words if kind == "CMD" else ["sh", "-c", words[0]])
        return self.run(name, words).returncode == 0

    def _start(self, name: str) -> None:
        space, address = self._space(name), self._addresses[name]
        # The interface's name has at most 15 characters.
        inside, outside = (
            f"in{self.number}-{address.rpartition('.')[2]}",
            f"out{self.number}-{address.rpartition('.')[2]}",
        )
        hosts = Path("/etc/netns") / space
        hosts.mkdir(parents=True)
        lines = [f"{at} {service}" for service, at in self._addresses.items()]
        (hosts / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        # Docker's name server answers at once; one that cannot be reached would cost many seconds a look-up.
        (hosts / "resolv.conf").write_text("nameserver 127.0.0.1\n")
        _ip(
            f"netns add {space}", f"link add {outside} type veth peer name {inside}", f"link set {inside} netns {space}",
            f"link set {outside} master {self.bridge}", f"link set {outside} up", f"-n {space} link set lo up",
            f"-n {space} addr add {address}/24 dev {inside}", f"-n {space} link set {inside} up",
            f"-n {space} route add default via {self.address(1)}",
        )  # fmt: skip
        image = self.services[name]["image"].partition(":")[0]
        command = self.services[name].get("command")
        words = IMAGES.get(image, (None, None))[0] or shlex.split(command)
        with open(self.folder / f"{name}.log", "wb") as log:
            self._running[name] = subprocess.Popen(
                self._inside(name, f"hostname {name} && exec {shlex.join(words)}"),
                env=self.environment(name), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def _inside(self, name: str, command: str) -> list[str]:
        """A command in new namespaces. Ray's folder, the home, the volumes and /opt/eclectus are the service's own, as in a container."""
        script = ["set -e"]
        for own in ("/tmp/ray", "/home/eclectus"):
            self._make_mount_point(Path(own))
            script.append(f"mount -t tmpfs tmpfs {own}")
        binds = [(ROOT, "/opt/eclectus")]
        for volume in self.services[name].get("volumes", []):
            source, _, target = volume.partition(":")
            binds.append((self.folder / "volumes" / source, target))
        for source, target in binds:
            source.mkdir(parents=True, exist_ok=True)
            if not target.startswith("/home/eclectus"):
                self._make_mount_point(Path(target))
            script.append(f"mkdir -p {target}; mount --bind {source} {target}")
        unshare = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        lines = "\n".join([*script, "cd /opt/eclectus", command])
        return ["ip", "netns", "exec", self._space(name), *unshare, "bash", "-c", lines]

    def _make_mount_point(self, path: Path) -> None:
        missing = [each for each in (path, *path.parents) if not each.exists()]
        path.mkdir(parents=True, exist_ok=True)
        self._made += missing

    def _space(self, name: str) -> str:
        return f"{self.bridge}-{name}"


def interpolate(value, variables):
    """`${NAME}`, `${NAME:-default}` and `${NAME:?complaint}` as compose reads them."""
    if isinstance(value, dict):
        return {key: interpolate(each, variables) for key, each in value.items()}
    if isinstance(value, list):
        return [interpolate(each, variables) for each in value]
    if not isinstance(value, str):
        return value

    def replace(found: re.Match) -> str:
        name, operator, text = found.groups()
        if operator == ":?" and not variables.get(name):
            raise AssertionError(f"{name}: {text}")
        return variables.get(name) or (text if operator == ":-" else "")

    return re.sub(r"\$\{(\w+)(?:(:[-?])([^}]*))?\}", replace, value)


def _ip(*commands: str) -> None:
    for command in commands:
        subprocess.run(["ip", *command.split()], check=True)
