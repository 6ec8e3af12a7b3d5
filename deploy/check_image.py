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
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

WRITABLE = ("data", "cache", "tmp")
START_TIMEOUT_S = 180
STOP_TIMEOUT_S = 30
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
    def server(self, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
        environ = self.image.environment | variables
        with subprocess.Popen(self.command(self.image.entrypoint), env=environ) as process:
            try:
                yield process
            finally:
                process.kill()  # and its child, by --kill-child


def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        sys.exit(f"check_image: {name} is missing")
    return path


def mount_read_only(root: Path) -> None:
    """Binds `root` onto itself read-only, with fresh writable folders where the image has its volumes."""

    def mount(*arguments: str) -> None:
        subprocess.run([_tool("mount"), *arguments], check=True)

    owner = [(root / name).stat() for name in WRITABLE]
    mount("--bind", str(root), str(root))
    mount("--rbind", "/dev", str(root / "dev"))
    for name, was in zip(WRITABLE, owner, strict=True):
        options = f"uid={was.st_uid},gid={was.st_gid},mode={was.st_mode & 0o7777:o}"
        mount("-t", "tmpfs", "-o", options, "tmpfs", str(root / name))
    mount("-o", "remount,bind,ro", str(root))
    try:
        (root / "probe").touch()
    except OSError as error:
        if error.errno == errno.EROFS:
            return
        raise
    sys.exit("check_image: the root could not be made read-only")


def raise_loopback() -> None:
    set_flags, up = 0x8914, 0x1  # SIOCSIFFLAGS, IFF_UP
    with socket.socket() as handle:
        fcntl.ioctl(handle, set_flags, struct.pack("16sh14x", b"lo", up))


def wait_until_ready(image: Image, server: subprocess.Popen[bytes]) -> float:
    """The seconds until /readyz says yes."""
    started = time.monotonic()
    while (waited := time.monotonic() - started) < START_TIMEOUT_S:
        if server.poll() is not None:
            sys.exit(f"check_image: the server ended with status {server.returncode}")
        try:
            with urlopen(image.url("/readyz"), timeout=5):
                return round(waited, 1)
        except (URLError, OSError):  # not listening yet, or 503
            time.sleep(0.2)
    sys.exit(f"check_image: not ready after {START_TIMEOUT_S} s")


def ask(url: str, body: dict[str, object] | None = None) -> tuple[int, str]:
    data = json.dumps(body).encode() if body is not None else None
    with urlopen(Request(url, data, {"Content-Type": "application/json"}), timeout=120) as answer:
        return answer.status, answer.read().decode()


def process_1(server: subprocess.Popen[bytes]) -> int:
    """The server's process id as seen from here: the only child of `unshare`."""
    return int(Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text())


def identity_of(pid: int) -> dict[str, object]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    return {
        "command": Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1],
        "uids": status["Uid"].split(),
        "groups": status["Groups"].split(),
        "capabilities": status["CapEff"],
    }


def stop(server: subprocess.Popen[bytes]) -> dict[str, object]:
    started = time.monotonic()
    os.kill(process_1(server), signal.SIGTERM)
    status = server.wait(STOP_TIMEOUT_S)
    return {"stop_status": status, "stopped_after_s": round(time.monotonic() - started, 1)}


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
    """The container as it is started with no arguments."""
    image = container.image
    with container.server() as server:
        seen: dict[str, object] = {"ready_after_s": wait_until_ready(image, server)}
        seen |= identity_of(process_1(server))
        seen["healthz"], _ = ask(image.url("/healthz"))
        seen["healthcheck_status"] = container.run(image.healthcheck)
        _, text = ask(image.url("/v1/generate"), PROMPT)
        seen |= {"prompt": PROMPT, "generated": json.loads(text)}
        seen |= stop(server)
    seen["healthcheck_status_when_stopped"] = container.run(image.healthcheck)
    return seen


def check_serve(container: Container) -> dict[str, object]:
    """The container with a model of its own, for which the demo's has to do, and what the demo left in /data."""
    image, root = container.image, container.root
    [model] = root.glob("opt/venv/lib/python3*/site-packages/service/demo/assets/base")
    with container.server(VBLORA_MODEL=f"/{model.relative_to(root)}") as server:
        seen: dict[str, object] = {"ready_after_s": wait_until_ready(image, server)}
        seen |= identity_of(process_1(server))
        _, text = ask(image.url("/v1/adapters"))
        seen["adapters"] = [adapter["name"] for adapter in json.loads(text)["data"]]
        seen |= stop(server)
    return seen


def check(root: Path, image: Image) -> dict[str, object]:
    size = size_of(root)
    mount_read_only(root)
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
