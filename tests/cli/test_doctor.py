"""`doctor`: what it says of this machine, and that it notices what is broken."""

import json
import subprocess
import sys
import time

import jax
import pytest

from llama_jax.cli import doctor
from llama_jax.cli.doctor import Late, disk_check, environment_checks, main, within
from llama_jax.cli.main import run_program
from llama_jax.training import consistency as collective
from llama_jax.training.consistency import collective_test


def report(capsys, *arguments, status=0) -> dict[str, dict]:
    assert run_program(lambda: main([*map(str, arguments), "--json"])) == status
    result = json.loads(capsys.readouterr().out)
    assert result["ok"] == (status == 0)
    return {check["name"]: check for check in result["checks"]}


def test_a_healthy_machine(tmp_path, capsys):
    found = report(capsys, "--dir", tmp_path)
    assert {name for name, check in found.items() if check["status"] == "ok"} >= {
        "python",
        "devices",
        "collectives",
        "disk",
    }
    assert jax.__version__ in found["packages"]["text"]
    assert "8 x cpu (cpu)" in found["devices"]["text"]
    assert "no MFU" in found["devices"]["text"]
    assert "8 devices" in found["collectives"]["text"]
    assert list(tmp_path.iterdir()) == []


def test_lines(tmp_path, capsys):
    assert main(["--dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ok       python       3.")
    assert all(line.split()[0] in ("ok", "note", "warning", "failed") for line in lines)


def test_a_device_that_miscalculates(tmp_path, capsys, monkeypatch):
    right = collective._multiplies
    monkeypatch.setattr(collective, "_multiplies", lambda device: device.id != 3 and right(device))
    found = report(capsys, "--dir", tmp_path, status=1)
    assert found["collectives"]["status"] == "failed"
    assert str(jax.devices()[3]) in found["collectives"]["text"]


def test_a_sum_that_loses_a_device(monkeypatch):
    monkeypatch.setattr(jax.lax, "psum", lambda x, axis: jax.lax.pmax(x, axis))
    assert len(collective_test(jax.devices()).wrong) == 8


def test_one_device():
    assert collective_test(jax.devices()[:1]).wrong == []


def test_devices_that_do_not_answer(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: time.sleep(0.5))
    (check,) = doctor.device_checks(0.05)
    assert (check.name, check.status) == ("devices", "failed")
    assert "no answer in 0.05 s; does another process hold them" in check.text
    time.sleep(0.6)


def test_a_collective_that_hangs_ends_the_program():
    """As a process of its own: it says so, and its end does not wait for the thread that hangs."""
    code = """if True:
        import time, sys
        import llama_jax.training.consistency as collective
        collective.collective_test = lambda devices: time.sleep(3600)
        from llama_jax.cli.doctor import main
        sys.exit(main(["--seconds", "0.2"]))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "failed   collectives" in done.stdout
    assert "no answer in 0.2 s" in done.stdout


def test_within():
    assert within(300, lambda: 7) == 7
    with pytest.raises(Late):
        within(0.01, lambda: time.sleep(0.1))
    time.sleep(0.2)  # a thread that hangs would end this process in the next test
    with pytest.raises(KeyError):
        within(300, lambda: {}["x"])


def test_a_directory_that_is_none(tmp_path, capsys):
    found = report(capsys, "--dir", tmp_path / "none", status=1)
    assert found["disk"]["status"] == "failed"
    assert "No such file or directory" in found["disk"]["text"]


def test_a_disk_that_forgets(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "write_test", lambda directory: None)
    assert disk_check(tmp_path).status == "failed"


def test_the_environment_without_secrets(monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_a=1\n--xla_b=2")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    texts = [check.text for check in environment_checks()]
    assert "LIBTPU_INIT_ARGS=--xla_a=1 --xla_b=2" in texts
    assert not any("secret" in text for text in texts)
