"""packaging/ci/lazyfs-ci and the recipe around it, run as a CI would: against a registry with a password."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lazyfs.registry import RegistryOptions
from tests.convertkit import Layout, Lazy, tar_of
from tests.mountkit import Machine
from tests.ports import free_port
from tests.registrykit import Registry, running_registry
from tests.runnerkit import BUSYBOX, Profiler, require_runc
from tests.tarbuilder import TarBuilder

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.mount
RECIPES = Path(__file__).resolve().parents[2] / "packaging/ci"
PASSWORD = "a-secret-of-the-ci"
RUN_S = 120.0
_CONTAINERFILE = """\
FROM scratch
COPY bin /bin
COPY data /data
CMD ["/bin/busybox", "cat", "/data/f2", "/data/f0"]
"""


@dataclass
class Project:
    """A repository with the recipe in it. `said`: stderr of the last call."""

    directory: Path
    machine: Machine
    registry: Registry
    profiler: Profiler
    said: str = ""
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def image(self) -> str:
        return self.settings["LAZYFS_IMAGE"]

    def call(self, *words: str, code: int = 0, **settings: str) -> str:
        """Run the recipe (with words: the script); its standard output."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**self.machine.environment, "PATH": path, **self.settings, **settings}
        command = ["ci/lazyfs-ci", *words] if words else ["sh", "ci/plain.sh"]
        with subprocess.Popen(command, cwd=self.directory, env=environment, stdin=subprocess.DEVNULL, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            self.profiler.pids.append(process.pid)
            try:
                out, self.said = process.communicate(timeout=RUN_S)
            except BaseException:
                process.kill()
                raise
        assert process.returncode == code, self.said
        assert "Traceback" not in self.said
        reports = "".join(path.read_text() for path in (self.directory / "lazyfs-reports").glob("*.json"))
        assert PASSWORD not in out + self.said + reports
        assert not list(Path(environment["TMPDIR"]).glob("tmp.*")), "the password's directory is gone"
        return out

    def report(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.directory / f"lazyfs-reports/{name}.json").read_text())
        return found

    def pushed(self) -> Lazy:
        return Lazy(self.image, registry=RegistryOptions(username="ci", password=PASSWORD))


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    require_runc()
    if shutil.which("buildah") is None:
        pytest.skip("buildah is not installed")
    directory = tmp_path / "project"
    for name in ("ci", "bin", "data"):
        (directory / name).mkdir(parents=True)
    for name in ("lazyfs-ci", "plain.sh"):
        shutil.copy(RECIPES / name, directory / "ci" / name)
    shutil.copy(BUSYBOX, directory / "bin/busybox")
    for number in range(4):
        (directory / f"data/f{number}").write_bytes(os.urandom(200_000))
    (directory / "Containerfile").write_text(_CONTAINERFILE)
    (tmp_path / "tmp").mkdir()
    storage = tmp_path / "storage.conf"
    storage.write_text(f'[storage]\ndriver = "vfs"\ngraphroot = "{tmp_path}/graph"\nrunroot = "{tmp_path}/runroot"\n')
    machine = Machine(tmp_path)
    with running_registry(tmp_path / "registry", username="ci", password=PASSWORD) as registry:
        made = Project(directory, machine, registry, Profiler(machine, ""), settings={
            "LAZYFS_IMAGE": f"{registry.host}/team/app:1", "LAZYFS_STOP": "--until-exit", "LAZYFS_RUNS": "1",
            "LAZYFS_PAUSE_S": "0", "REGISTRY_USER": "ci", "REGISTRY_PASSWORD": PASSWORD,
            "TMPDIR": str(tmp_path / "tmp"), "CONTAINERS_STORAGE_CONF": str(storage), "BUILDAH_ISOLATION": "chroot"})
        yield made
        made.profiler.assert_nothing_left()


def test_built_converted_recorded_pushed_and_the_next_time_by_the_list(project: Project) -> None:
    digest = project.call().strip().splitlines()[-1]
    pushed = project.pushed()
    assert pushed.document.digest.text == digest
    assert pushed.manifest.hot is not None
    assert pushed.read(b"data/f1") == (project.directory / "data/f1").read_bytes()
    recorded = (project.directory / "start.prefetch").read_text()
    assert recorded.index("data/f2") < recorded.index("data/f0")
    assert "data/f1" not in recorded
    assert project.report("convert")["profile"]["runs"][0]["exitCode"] == 0
    assert project.report("check")["differences"] == []

    # the next build, where nothing can be recorded; the list is in git
    (project.directory / "data/f1").write_bytes(b"changed")
    after = project.call(PATH=without_runc(project)).strip().splitlines()[-1]
    assert after != digest
    assert project.pushed().document.digest.text == after
    assert project.pushed().read(b"data/f1") == b"changed"
    assert project.report("coverage")["coverage"] == 1.0
    assert project.report("convert")["images"][0]["hot"]["digest"] == pushed.manifest.hot.digest.text
    assert (project.directory / "start.prefetch").read_text() == recorded


def without_runc(project: Project) -> str:
    """A PATH as usual, but for runc."""
    folder = project.directory.parent / "programs"
    folder.mkdir(exist_ok=True)
    for place in (str(Path(sys.executable).parent), *os.environ["PATH"].split(":")):
        for path in Path(place).glob("*") if Path(place).is_dir() else ():
            if path.name not in ("runc", "crun") and not (folder / path.name).is_symlink():
                (folder / path.name).symlink_to(path)
    return str(folder)


@pytest.fixture
def built(project: Project) -> Project:
    """What another job has built."""
    layout = Layout(project.directory / "built")
    files = {f"data/{path.name}": path.read_bytes() for path in (project.directory / "data").iterdir()}
    program = TarBuilder().directory("bin").file("bin/busybox", BUSYBOX.read_bytes(), mode=0o755)
    layout.add_image("app", [program.build(), tar_of(files)])
    project.settings["LAZYFS_SOURCE"] = layout.reference("app")
    return project


def test_a_list_that_is_too_old_is_recorded_anew_where_that_can_be(built: Project) -> None:
    project = built
    old = "data/gone 0-99999\ndata/f0 0-4095\n"
    (project.directory / "start.prefetch").write_text(old)
    project.call(code=56, PATH=without_runc(project))
    assert project.pushed().manifest.hot is not None
    assert project.report("check")["differences"] == []
    project.call("/bin/busybox", "cat", "/data/f3")
    assert "is too old" in project.said
    recorded = (project.directory / "start.prefetch").read_text()
    assert "data/f3" in recorded
    assert "data/gone" not in recorded


def test_what_fails_is_told_by_the_exit_code_and_pushes_nothing(built: Project) -> None:
    project = built
    project.call("/bin/busybox", "false", code=60)
    project.call(code=22, REGISTRY_PASSWORD=f"not-{PASSWORD}")
    assert not (project.registry.storage / "docker/registry/v2/repositories/team/app/_manifests/tags").exists()
    project.call(code=20, LAZYFS_SOURCE=f"127.0.0.1:{free_port()}/team/app:1")
    assert len(re.findall("once more, after exit code 20", project.said)) == 2
