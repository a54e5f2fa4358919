"""
What kubelet does, without kubelet: Kubernetes' Container Runtime Interface (CRI) of a containerd of the test's own.

    with running_cri(tmp_path, version, sandbox_image=pause) as cri:
        cri.pull(image, username="u", password="p")
        pod = cri.run_pod("a")
        container = cri.create(pod, "c", image, ["/bin/sh", "-c", "echo hello; exec sleep 600"])
        cri.start(container)
        assert cri.exec(container, ["/bin/true"]).exit_code == 0
        assert cri.logs(pod, "c") == [("stdout", "hello")]

A call that containerd refuses raises CriError, whose `code` is gRPC's name. Calls are made by the Go program
tests/go/cri from Kubernetes' own api.proto; every method of it can be had by Cri.call. Pods left at the end are taken
away.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests import gokit
from tests.containerdkit import running_containerd
from tests.tarbuilder import TarBuilder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.containerdkit import Containerd
    from tests.convertkit import Layout

BUSYBOX = Path("/usr/bin/busybox")
IMAGE_METHODS = ("PullImage", "ListImages", "ImageStatus", "RemoveImage", "ImageFsInfo")
CALL_S = 100.0
WAIT_S = 30.0


class CriError(Exception):
    """containerd's answer to a call was an error. `code`: e.g. "NotFound"."""

    def __init__(self, method: str, code: str, message: str) -> None:
        super().__init__(f"{method}: {code}: {message}")
        self.code = code


@dataclass(frozen=True)
class Executed:
    """What a command in a container did."""

    exit_code: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Pod:
    """A pod sandbox. `config`: as it was made with, which calls about its containers repeat."""

    id: str
    config: dict[str, Any]

    @property
    def logs(self) -> Path:
        return Path(self.config["log_directory"])


@dataclass
class Cri:
    """The CRI of one containerd. `images_address`: where kubelet's --image-service-endpoint points, if it is given."""

    containerd: Containerd
    program: Path
    log_directory: Path
    images_address: Path | None = None
    pods: list[Pod] = field(default_factory=list)

    def call(self, method: str, request: dict[str, Any] | None = None) -> dict[str, Any]:
        """Make a call: field names as in api.proto, 64-bit integers are text, bytes are base64."""
        address = self.containerd.address
        if self.images_address is not None and method in IMAGE_METHODS:
            address = self.images_address
        done = subprocess.run(
            [self.program, address, method, f"{CALL_S:.0f}s"], input=json.dumps(request or {}),
            capture_output=True, text=True, check=False, timeout=CALL_S + 10)
        assert done.returncode in (0, 1), done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        if done.returncode == 1:
            raise CriError(method, answer["code"], answer["message"])
        return answer

    def wait_ready(self) -> None:
        """Until the runtime and its network are ready."""
        def ready() -> bool:
            try:
                conditions = self.call("Status")["status"]["conditions"]
            except CriError:     # "server is not initialized yet"
                return False
            return {each["type"] for each in conditions if each["status"]} >= {"RuntimeReady", "NetworkReady"}
        wait_until(ready, "the CRI is not ready")

    # --- images -------------------------------------------------------------------------------------------------------

    def pull(self, image: str, username: str = "", password: str = "") -> str:
        """Pull an image, as with imagePullSecrets; its id."""
        request: dict[str, Any] = {"image": {"image": image}}
        if username:
            request["auth"] = {"username": username, "password": password}
        reference: str = self.call("PullImage", request)["image_ref"]
        return reference

    def images(self) -> list[str]:
        """The tags of all images."""
        return sorted(tag for image in self.call("ListImages")["images"] for tag in image["repo_tags"])

    def image(self, image: str) -> dict[str, Any] | None:
        """What is known of an image: id, size, repo_tags ...; None if it is not there."""
        found: dict[str, Any] | None = self.call("ImageStatus", {"image": {"image": image}})["image"]
        return found

    def remove_image(self, image: str) -> None:
        self.call("RemoveImage", {"image": {"image": image}})

    def image_filesystem(self) -> dict[str, Any]:
        """`mountpoint`, `used_bytes` and `inodes_used` of the images' file system, as kubelet's image GC sees it."""
        found = self.call("ImageFsInfo")["image_filesystems"][0]
        return {"mountpoint": found["fs_id"]["mountpoint"], "used_bytes": int(found["used_bytes"]["value"]),
                "inodes_used": int(found["inodes_used"]["value"])}

    # --- pods ---------------------------------------------------------------------------------------------------------

    def run_pod(self, name: str, *, host_network: bool = False, **linux: Any) -> Pod:
        """Start a pod sandbox. `linux`: more fields of its LinuxPodSandboxConfig."""
        uid = uuid.uuid4().hex
        network = {"namespace_options": {"network": "NODE"}} if host_network else {}
        config = {
            "metadata": {"name": name, "uid": uid, "namespace": "test", "attempt": 0},
            "hostname": "" if host_network else name,
            "log_directory": str(self.log_directory / uid), "linux": {"security_context": network, **linux}}
        (self.log_directory / uid).mkdir(parents=True)
        pod = Pod(self.call("RunPodSandbox", {"config": config})["pod_sandbox_id"], config)
        self.pods.append(pod)
        return pod

    def pod_address(self, pod: Pod) -> str:
        """The pod's IP address."""
        status = self.call("PodSandboxStatus", {"pod_sandbox_id": pod.id})["status"]
        return str(status["network"]["ip"])

    def remove_pod(self, pod: Pod) -> None:
        """Stop and remove it, with all its containers."""
        self.call("StopPodSandbox", {"pod_sandbox_id": pod.id})
        self.call("RemovePodSandbox", {"pod_sandbox_id": pod.id})
        self.pods.remove(pod)

    # --- containers ---------------------------------------------------------------------------------------------------

    def create(self, pod: Pod, name: str, image: str, command: list[str], **config: Any) -> str:
        """Create a container; its id. `config`: more fields of its ContainerConfig."""
        request = {
            "pod_sandbox_id": pod.id, "sandbox_config": pod.config,
            "config": {"metadata": {"name": name, "attempt": 0}, "image": {"image": image}, "command": command,
                       "log_path": f"{name}.log", "linux": {"security_context": {}}, **config}}
        container: str = self.call("CreateContainer", request)["container_id"]
        return container

    def start(self, container: str) -> None:
        self.call("StartContainer", {"container_id": container})

    def run(self, pod: Pod, name: str, image: str, command: list[str], **config: Any) -> str:
        """Create and start a container; its id."""
        container = self.create(pod, name, image, command, **config)
        self.start(container)
        return container

    def state(self, container: str) -> str:
        """E.g. CONTAINER_RUNNING."""
        return str(self.call("ContainerStatus", {"container_id": container})["status"]["state"])

    def exit_code(self, container: str) -> int:
        """Wait for its end."""
        wait_until(lambda: self.state(container) == "CONTAINER_EXITED", f"container {container} runs on")
        return int(self.call("ContainerStatus", {"container_id": container})["status"]["exit_code"])

    def exec(self, container: str, command: list[str]) -> Executed:
        """Run a command in a running container, to its end."""
        answer = self.call("ExecSync", {"container_id": container, "cmd": command, "timeout": "30"})
        stdout, stderr = (base64.b64decode(answer[name]).decode() for name in ("stdout", "stderr"))
        return Executed(answer["exit_code"], stdout, stderr)

    def logs(self, pod: Pod, name: str) -> list[tuple[str, str]]:
        """The container's whole lines in the log: (stdout or stderr, text)."""
        path = pod.logs / f"{name}.log"
        fields = [line.split(" ", 3) for line in path.read_text().splitlines()] if path.exists() else []
        return [(stream, text) for _, stream, tag, text in fields if tag == "F"]

    def wait_log(self, pod: Pod, name: str, text: str) -> None:
        """Until a line of the log is `text`."""
        wait_until(lambda: any(line == text for _, line in self.logs(pod, name)), f"{name} did not log {text!r}")

    def stats(self, container: str) -> dict[str, int]:
        """`cpu_ns`, `memory_bytes`, and of its writable layer `used_bytes` and `inodes_used`."""
        found = self.call("ContainerStats", {"container_id": container})["stats"]
        layer = found["writable_layer"]
        return {"cpu_ns": int(found["cpu"]["usage_core_nano_seconds"]["value"]),
                "memory_bytes": int(found["memory"]["working_set_bytes"]["value"]),
                "used_bytes": int(layer["used_bytes"]["value"]), "inodes_used": int(layer["inodes_used"]["value"])}

    def stop(self, container: str, timeout_s: int = 1) -> None:
        self.call("StopContainer", {"container_id": container, "timeout": str(timeout_s)})

    def remove(self, container: str) -> None:
        self.call("RemoveContainer", {"container_id": container})

    def containers(self) -> list[str]:
        """The ids of all containers, running or not."""
        return sorted(each["id"] for each in self.call("ListContainers")["containers"])

    def clear(self) -> None:
        """Take away every pod that is left, with its network; containerd must serve."""
        for pod in [*self.pods]:
            self.remove_pod(pod)


def wait_until(condition: Callable[[], bool], failure: str) -> None:
    """Poll until `condition` holds, or fail."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, failure
        time.sleep(0.05)


@contextlib.contextmanager
def running_cri(
    directory: Path, version: str, *, images_address: Path | None = None, **options: Any,
) -> Iterator[Cri]:
    """A containerd with its CRI plugin, and its client. `options`: as of running_containerd."""
    program = gokit.program("cri")
    with running_containerd(directory, version, cri=True, **options) as containerd:
        cri = Cri(containerd, program, directory / "pod-logs", images_address)
        cri.wait_ready()
        try:
            yield cri
        finally:
            with contextlib.suppress(CriError, AssertionError):    # the test's own failure counts
                cri.clear()


# --- images -----------------------------------------------------------------------------------------------------------


def push_layout(layout: Layout, tag: str, destination: str, credentials: str = "") -> None:
    """Copy an image to a registry. `credentials`: user:password."""
    if shutil.which("skopeo") is None:
        pytest.skip("skopeo is not installed (apt-get install skopeo)")
    extra = ["--dest-creds", credentials] if credentials else []
    subprocess.run(["skopeo", "copy", "--quiet", "--dest-tls-verify=false", *extra, layout.reference(tag),
                    f"docker://{destination}"], check=True, env={**os.environ, "HOME": "/nonexistent"})


def add_test_images(layout: Layout) -> None:
    """`pause`: what holds a pod's namespaces. `app`: two layers, a shell and the file /greeting in the upper one."""
    if not BUSYBOX.exists():
        pytest.skip("busybox-static is not installed")
    shell = TarBuilder().directory("bin").file("bin/busybox", BUSYBOX.read_bytes(), mode=0o755)
    for name in ("sh", "true", "cat", "sleep", "echo", "ls", "dd"):
        shell.symlink(f"bin/{name}", "busybox")
    base = shell.directory("etc").file("etc/passwd", b"root:x:0:0:root:/:/bin/sh\n").build()
    layout.add_image("pause", [base], config={"config": {"Entrypoint": ["/bin/sleep", "1000000"]}})
    layout.add_image("app", [base, TarBuilder().file("greeting", b"hello\n").build()])
