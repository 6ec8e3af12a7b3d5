"""Runs an image as a container engine would, asks it for a text, and reports what happened.

    unshare --mount --net --pid --fork --mount-proc check_image.py ROOT IMAGE_JSON REPORT_JSON

ROOT is the image's unpacked root folder, IMAGE_JSON what `buildah inspect --type image` prints about it.
User, environment, entry point and health check are the image's own. The root is mounted read-only, the
network is a loopback and nothing else, and the server is process 1. It alters the namespaces it runs in:
start it in fresh ones, as above.
"""

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.request import Request, urlopen

WRITABLE = ("data", "cache", "tmp")
DEVICES = ("null", "zero", "full", "random", "urandom")
START_TIMEOUT_S = 180
ANSWER_TIMEOUT_S = 120
STOP_TIMEOUT_S = 60
QUIET_S = 5
LAST_WORDS_S = 3
PROMPT = {"prompt": "select name from", "max_new_tokens": 8}


@dataclass(frozen=True)
class Image:
    """What of an image's configuration decides how it runs."""

    entrypoint: list[str]
    healthcheck: list[str]
    environment: dict[str, str]
    user: str
    folder: str

    @classmethod
    def read(cls, path: Path) -> "Image":
        config = json.loads(path.read_text(encoding="utf-8"))["Docker"]["config"]
        return cls(
            entrypoint=config["Entrypoint"],
            healthcheck=config["Healthcheck"]["Test"][1:],  # the first says how: CMD
            environment=dict(entry.split("=", 1) for entry in config["Env"]),
            user=config["User"],
            folder=config["WorkingDir"],
        )

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.environment.get('VBLORA_PORT', '8000')}{path}"


@dataclass(frozen=True)
class Container:
    image: Image
    root: Path

    def command(self, argv: list[str]) -> list[str]:
        """`argv` as process 1 of a process namespace of its own, as the image's user, unable to gain rights."""
        user, group = self.image.user.split(":")
        return [
            *(_tool("setpriv"), "--no-new-privs"),
            *(_tool("unshare"), "--pid", "--fork", "--kill-child", "--mount-proc"),
            *("--root", str(self.root), "--wd", self.image.folder, "--setgid", group, "--setuid", user),
            *argv,
        ]

    def run(self, argv: list[str]) -> int:
        return subprocess.run(self.command(argv), env=self.image.environment, timeout=START_TIMEOUT_S).returncode

    @contextmanager
    def server(self, **variables: str) -> Iterator["Server"]:
        """The image as it is started with no arguments. What it said is printed when it has ended."""
        environ = self.image.environment | variables
        with (
            tempfile.NamedTemporaryFile() as log,
            subprocess.Popen(
                self.command(self.image.entrypoint), env=environ, stdout=log, stderr=subprocess.STDOUT
            ) as process,
        ):
            try:
                yield Server(self.image, process, Path(log.name))
            finally:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(LAST_WORDS_S)
                process.kill()  # and its child, by --kill-child
                print(Path(log.name).read_text(encoding="utf-8", errors="replace"), flush=True)


@dataclass(frozen=True)
class Server:
    """A running container. `process` is `unshare`, whose only child is the server."""

    image: Image
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        return int(Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text())

    def ask(self, path: str, body: Mapping[str, object] | None = None) -> tuple[int, str]:
        data = json.dumps(body).encode() if body is not None else None
        request = Request(self.image.url(path), data, {"Content-Type": "application/json"})
        with urlopen(request, timeout=ANSWER_TIMEOUT_S) as answer:
            return answer.status, answer.read().decode()

    def wait_until_ready(self) -> float:
        """The seconds until /readyz says yes."""
        started = time.monotonic()
        while (waited := time.monotonic() - started) < START_TIMEOUT_S:
            if self.process.poll() is not None:
                sys.exit(f"check_image: the server ended with status {self.process.returncode}")
            try:
                self.ask("/readyz")
                return round(waited, 1)
            except OSError:  # not listening yet, or 503
                time.sleep(0.2)
        sys.exit(f"check_image: not ready after {START_TIMEOUT_S} s")

    def wait_until_quiet(self) -> None:
        """Until it has said nothing for a while: the demo uses its own server to show itself."""
        length, since = -1, time.monotonic()
        while time.monotonic() - since < QUIET_S:
            if (now := self.log.stat().st_size) != length:
                length, since = now, time.monotonic()
            time.sleep(0.2)

    def identity(self) -> dict[str, object]:
        proc = Path(f"/proc/{self.pid}")
        status = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines() if ":\t" in line)
        return {
            "command": (proc / "cmdline").read_text().split("\0")[:-1],
            "uids": status["Uid"].split(),
            "groups": status["Groups"].split(),
            "capabilities": status["CapEff"],
        }

    def stop(self) -> dict[str, object]:
        started = time.monotonic()
        os.kill(self.pid, signal.SIGTERM)
        status = self.process.wait(STOP_TIMEOUT_S)
        return {"stop_status": status, "stopped_after_s": round(time.monotonic() - started, 1)}


def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        sys.exit(f"check_image: {name} is missing")
    return path


def mount(*arguments: object) -> None:
    subprocess.run([_tool("mount"), *map(str, arguments)], check=True)


def prepare(root: Path) -> None:
    """Makes of `root` what a container sees: fresh volumes, a few devices, its own /etc/hosts, the rest read-only."""
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n", encoding="utf-8")
    owners = [(root / name).stat() for name in WRITABLE]
    mount("--bind", root, root)
    for name, was in zip(WRITABLE, owners, strict=True):
        options = f"uid={was.st_uid},gid={was.st_gid},mode={was.st_mode & 0o7777:o}"
        mount("-t", "tmpfs", "-o", options, "tmpfs", root / name)
    mount_devices(root / "dev")
    mount("-o", "remount,bind,ro", root)
    try:
        (root / "probe").touch()
    except OSError as error:
        if error.errno == errno.EROFS:
            return
        raise
    sys.exit("check_image: the root could not be made read-only")


def mount_devices(folder: Path) -> None:
    mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", folder)
    for name in DEVICES:
        (folder / name).touch()
        mount("--bind", Path("/dev") / name, folder / name)
    (folder / "shm").mkdir()
    mount("-t", "tmpfs", "-o", "mode=1777", "tmpfs", folder / "shm")


def raise_loopback() -> None:
    set_flags, up = 0x8914, 0x1  # SIOCSIFFLAGS, IFF_UP
    with socket.socket() as handle:
        fcntl.ioctl(handle, set_flags, struct.pack("16sh14x", b"lo", up))


def size_of(root: Path) -> int:
    measured = subprocess.run(
        [_tool("du"), "--summarize", "--one-file-system", "--block-size=1", str(root)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return int(measured.stdout.split()[0])


def written_below(root: Path) -> list[str]:
    return sorted(
        f"/{path.relative_to(root)}" for name in WRITABLE for path in (root / name).rglob("*") if path.is_file()
    )


def check_demo(container: Container) -> dict[str, object]:
    """The container that is told nothing."""
    with container.server() as server:
        seen: dict[str, object] = {"ready_after_s": server.wait_until_ready()}
        seen |= server.identity()
        seen["healthz"], _ = server.ask("/healthz")
        seen["page_status"], seen["page"] = server.ask("/")
        seen["healthcheck_status"] = container.run(container.image.healthcheck)
        _, text = server.ask("/v1/generate", PROMPT)
        seen |= {"prompt": PROMPT, "generated": json.loads(text)}
        server.wait_until_quiet()
        seen |= server.stop()
    seen["healthcheck_status_when_stopped"] = container.run(container.image.healthcheck)
    return seen


def check_serve(container: Container) -> dict[str, object]:
    """The container with a model, for which the demo's has to do, and what the demo left in /data."""
    [model] = container.root.glob("opt/venv/lib/python3*/site-packages/service/demo/assets/base")
    with container.server(VBLORA_MODEL=f"/{model.relative_to(container.root)}") as server:
        seen: dict[str, object] = {"ready_after_s": server.wait_until_ready()}
        seen |= server.identity()
        _, text = server.ask("/v1/adapters")
        seen["adapters"] = [adapter["name"] for adapter in json.loads(text)["data"]]
        seen |= server.stop()
    return seen


def check(root: Path, image: Image) -> dict[str, object]:
    size = size_of(root)
    prepare(root)
    raise_loopback()
    container = Container(image, root)
    return {
        "size_bytes": size,
        "user": image.user,
        "inspect_help_status": container.run([*image.entrypoint, "inspect", "--help"]),
        "demo": check_demo(container),
        "serve": check_serve(container),
        "written": written_below(root),
    }


def main(root: str, image: str, report: str) -> None:
    seen = json.dumps(check(Path(root), Image.read(Path(image))), indent=2)
    Path(report).write_text(seen + "\n", encoding="utf-8")
    print(seen)


if __name__ == "__main__":
    main(*sys.argv[1:])
