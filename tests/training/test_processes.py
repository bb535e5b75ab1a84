"""What processes say to each other before they train: in threads, over a store in memory and real
sockets.
"""

import concurrent.futures
import contextlib
import itertools
import os
import re
import signal
import socket
import threading
import time
import types

import pytest
from tiny_runs import tiny_config

from llama_jax.cli.distributed import StopRequest, find_group
from llama_jax.errors import InputError
from llama_jax.parallel.hosts import AgreedStop, Hosts, call_roll, numbers, split_address
from llama_jax.training.config import RunConfig
from llama_jax.training.config_sections import DistributedConfig, wall_seconds
from llama_jax.training.consistency import describe_program, differences, require_same


class Memory:
    """The coordination service as far as it is used: a key is set once, a value is waited for."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._changed = threading.Condition()
        self.requests = 0

    def key_value_set(self, key: str, value: str) -> None:
        with self._changed:
            if key in self._values:
                raise RuntimeError(f"ALREADY_EXISTS: {key}")
            self.requests += 1
            self._values[key] = value
            self._changed.notify_all()

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        with self._changed:
            self.requests += 1
            if not self._changed.wait_for(lambda: key in self._values, timeout_in_ms / 1000):
                raise RuntimeError(f"DEADLINE_EXCEEDED: {key}")
            return self._values[key]


def together(count: int, action, seconds: float = 120, store: Memory | None = None) -> list:
    """What `action(hosts)` gives, or raises, in each of several processes."""
    store = store or Memory()

    def one(process: int):
        try:
            return action(Hosts(process, count, store, seconds))
        except InputError as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


# Agreeing


def test_all_hear_what_each_says_again_and_again():
    def talk(hosts):
        first = hosts.gather("numbers", str(hosts.process * 10))
        return (
            first,
            hosts.gather("numbers", str(hosts.process)),
            hosts.agree("name", f"of {hosts.process}"),
        )

    assert together(4, talk) == [(["0", "10", "20", "30"], ["0", "1", "2", "3"], "of 0")] * 4


def test_one_process_alone_asks_nobody():
    hosts = Hosts()
    assert hosts.gather("a", "x") == ["x"]
    assert hosts.agree("a", "x") == "x"
    assert hosts.in_turn("a", lambda: 3) == 3
    with pytest.raises(AgreedStop, match="no"):
        hosts.fail("no")


def test_requests_grow_with_the_number_of_processes_not_with_its_square():
    used = []
    for count in (4, 16):
        store = Memory()
        together(count, lambda hosts: hosts.gather("x", ""), store=store)
        used.append(store.requests)
    assert used[1] <= 4.5 * used[0]


def test_the_others_go_when_the_first_is_done():
    order = []

    def act(hosts):
        def work():
            time.sleep(0.2 if hosts.first else 0)
            order.append(hosts.process)

        hosts.in_turn("work", work)
        hosts.first_does("alone", lambda: order.append("alone"))

    together(3, act)
    assert order[0] == 0
    assert sorted(map(str, order)) == ["0", "1", "2", "alone"]


@pytest.mark.parametrize("failing", [0, 2])
def test_a_failure_of_one_stops_those_who_wait(failing):
    def act(hosts):
        if hosts.process == failing:
            hosts.fail("a reason")
        hosts.gather("meeting", "")

    assert [str(error) for error in together(3, act)] == ["a reason"] * 3


def test_two_failures_at_once_are_one():
    found = together(3, lambda hosts: hosts.fail(f"reason {hosts.process}"))
    assert [str(error) for error in found] == ["reason 0", "reason 1", "reason 2"]


def test_who_does_not_come_to_a_meeting_is_named_to_all_who_did():
    def act(hosts):
        return hosts.gather("meeting", "") if hosts.process != 1 else None

    found = together(3, act, seconds=2)
    assert [str(error) for error in found] == [
        "process 1 of 3 did not come to 'meeting' within 2 s",
        "None",
        "process 1 of 3 did not come to 'meeting' within 2 s",
    ]


def test_numbers_in_words():
    assert numbers([3], 4) == "process 3 of 4"
    assert numbers(list(range(10)), 16) == "processes 0, 1, 2, 3, 4, 5, 6, 7 and 2 more of 16"


# Being alike


def test_differences_name_who_and_what():
    same = {"jax": "1", "config data.seed": "0"}
    assert differences([same] * 3) == []
    assert differences([same, same, same | {"jax": "2"}]) == [
        "process 2 of 3 has jax 2, the others 1"
    ]
    assert differences([same | {"jax": "2"}, same, same]) == [
        "process 0 of 3 has jax 2, the others 1"
    ]
    assert differences([same, same | {"jax": "2"}]) == ["process 1 of 2 has jax 2, the others 1"]
    assert differences([same, {"jax": "1"}]) == [
        "process 1 of 2 has config data.seed nothing, the others 0"
    ]
    many = [{str(i): "a" for i in range(9)}, {str(i): "b" for i in range(9)}]
    assert differences(many)[3:] == ["6 more differences"]


def test_the_whole_config_is_compared_but_for_who_one_is(tmp_path):
    config = tiny_config(tmp_path, tmp_path)
    other = tiny_config(tmp_path, tmp_path, distributed={"process": 1}, optimizer={"eps": 2e-8})
    lines = differences([describe_program(config), describe_program(other)])
    assert lines == ["process 1 of 2 has config optimizer.eps 2e-08, the others 1e-08"]
    assert {"python", "llama_jax", "jax", "jaxlib", "config run.dir"} <= describe_program(
        config
    ).keys()


def test_all_stop_with_one_line():
    found = together(
        3, lambda hosts: require_same(hosts, "x", {"jax": "2" if hosts.process == 1 else "1"})
    )
    assert {str(error) for error in found} == {
        "the processes are not alike: process 1 of 3 has jax 2, the others 1"
    }


# The roll call


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def roll(
    address: str, process: int, count: int, seconds: float = 120, said: list[str] | None = None
) -> str:
    """How a roll call ended; what is said meanwhile is added to a list."""
    said = [] if said is None else said
    try:
        call_roll(address, address, process, count, seconds, said.append, patience=0.5)
    except InputError as error:
        return str(error)
    return ""


def wait_for(lines: list[str], pattern: str) -> None:
    """Until one of them matches."""
    end = time.monotonic() + 120
    while not any(re.fullmatch(pattern, line) for line in lines):
        assert time.monotonic() < end, f"{pattern!r} is not in {lines}"
        time.sleep(0.02)


def test_the_roll_call_ends_when_all_are_there_and_says_who_is_not():
    address, said = free_address(), {process: [] for process in range(4)}
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        ends = [pool.submit(roll, address, process, 4, said=said[process]) for process in (0, 1, 3)]
        wait_for(said[0], r"waited \d+ s for process 2 of 4; going on for \d+ s")
        wait_for(said[1], rf"process 1 waited \d+ s for process 0 at {address} and the others")
        ends.append(pool.submit(roll, address, 2, 4))
    assert [end.result() for end in ends] == [""] * 4
    with socket.socket() as again:  # JAX takes the port over
        host, port = split_address(address)
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind((host, port))


def test_strangers_twins_and_other_counts_are_refused_and_nobody_is_disturbed():
    address, said = free_address(), []
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        first = pool.submit(roll, address, 0, 3, said=said)
        one = pool.submit(roll, address, 1, 3)
        wait_for(said, r"waited \d+ s for process 2 of 3; .*")
        twin, other = pool.submit(roll, address, 1, 3), pool.submit(roll, address, 2, 4)
        with socket.create_connection(split_address(address)) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert stranger.recv(100) == b"no this is a training of llama_jax\n"
        with socket.create_connection(split_address(address)) as endless:
            endless.sendall(b"x" * 1000)
            with contextlib.suppress(ConnectionResetError):
                assert endless.recv(100) == b""
        assert (
            twin.result()
            == "refused by process 0: distributed.process: another process has the number 1"
        )
        assert (
            other.result()
            == "refused by process 0: distributed.processes: 4 given, process 0 has 3"
        )
        assert roll(address, 2, 3) == first.result() == one.result() == ""


def test_one_that_went_away_may_come_again():
    address = free_address()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(roll, address, 0, 3)
        assert roll(address, 1, 3, seconds=0.7).startswith("process 1 waited 0.7 s for process 0")
        one = pool.submit(roll, address, 1, 3)
        assert roll(address, 2, 3) == one.result() == first.result() == ""


def test_who_does_not_come_is_named_when_the_time_is_over(monkeypatch):
    said, looks = [], itertools.count()
    monkeypatch.setattr(
        "llama_jax.parallel.hosts.time", types.SimpleNamespace(monotonic=lambda: next(looks) / 10)
    )
    end = roll(free_address(), 0, 12, seconds=1.2, said=said)
    assert (
        end == "processes 1, 2, 3, 4, 5, 6, 7, 8 and 3 more of 12 did not come within 1.2 s; "
        "start all of them"
    )
    assert len(said) == 2


def test_an_address_that_is_not_ours_is_said():
    assert "process 0 cannot listen at 192.0.2.1:8476 (" in roll("192.0.2.1:8476", 0, 2)
    for address in ("host", ":80", "host:", "host:0", "host:65536", "host:x"):
        with pytest.raises(InputError, match="HOST:PORT expected"):
            split_address(address)
    assert split_address("[::1]:80") == ("::1", 80)


# Who there is


def test_the_group_comes_from_the_config_or_the_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM", "OMPI", "KUBERNETES"))]:
        monkeypatch.delenv(name)
    given = DistributedConfig(coordinator="10.0.0.1:80", processes=2, process=1)
    assert find_group(given, {}) == ("10.0.0.1:80", "10.0.0.1:80", 2, 1, None)
    assert find_group(given, {"JAX_COORDINATOR_BIND_ADDRESS": "0.0.0.0:80"}).bind == "0.0.0.0:80"
    told = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}
    assert find_group(DistributedConfig(), told) == ("a:1", "a:1", 3, 2, None)
    assert find_group(DistributedConfig(process=0), told).process == 0
    assert find_group(DistributedConfig(mode="off"), told) is None
    assert find_group(DistributedConfig(), {}) is None
    for config, environment in (
        (DistributedConfig(mode="on"), {}),
        (DistributedConfig(processes=2, process=0), {}),
    ):
        with pytest.raises(InputError, match=r"distributed\.coordinator: none given"):
            find_group(config, environment)
    with pytest.raises(InputError, match=r"distributed.process: 2 given, a number from 0 to 1"):
        find_group(DistributedConfig(process=2, coordinator="a:1"), {"JAX_NUM_PROCESSES": "2"})


def test_slurm_is_found_out(monkeypatch):
    slurm = {
        "JOB_ID": "7",
        "STEP_NODELIST": "node[03-04]",
        "NTASKS": "2",
        "PROCID": "1",
        "LOCALID": "0",
        "STEP_NUM_NODES": "2",
    }
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    group = find_group(DistributedConfig(), {})
    assert (group.coordinator, group.bind) == ("node03:61447", "[::]:61447")
    assert group[2:] == (2, 1, (0,))
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert find_group(DistributedConfig(), {}) is None


@pytest.mark.parametrize(
    "values",
    [
        {"processes": 0},
        {"process": -1},
        {"processes": 2, "process": 2},
        {"heartbeat_seconds": 0},
        {"processes": True},
    ],
)
def test_what_makes_no_group_is_refused(values):
    with pytest.raises(InputError, match=rf"distributed\.{list(values)[-1]}: .* expected"):
        DistributedConfig(**values)


# When to end


@pytest.mark.parametrize(
    ("given", "seconds"),
    [("03:50:00", 13800), ("3:50:00", 13800), (13800, 13800), ("90", 90), ("100:00:01", 360001)],
)
def test_times(given, seconds):
    assert wall_seconds(RunConfig(max_time=given).max_time) == seconds


@pytest.mark.parametrize("given", ["", "1:2", "01:60:00", 0, -5, True, "1h", "00:00:00"])
def test_what_is_no_time(given):
    with pytest.raises(InputError, match=r"run\.max_time: .* HH:MM:SS"):
        RunConfig(max_time=given)


@pytest.fixture
def _handlers():
    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_handlers")
class TestStopRequest:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
    def test_a_signal_asks_and_only_ctrl_c_soon_after_interrupts(
        self, tmp_path, number, monkeypatch
    ):
        stop = StopRequest(tmp_path)
        assert not stop(1)
        os.kill(os.getpid(), number)
        assert stop(2)
        for again in (signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), again)
            assert stop(3)
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 6)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop(4)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)

    def test_time_and_file(self, tmp_path):
        assert StopRequest(tmp_path, deadline=time.monotonic() - 1)(1)
        assert not StopRequest(tmp_path, deadline=time.monotonic() + 100)(1)
        (tmp_path / "STOP").touch()
        assert not StopRequest(tmp_path, looks=False)(1)
        stop = StopRequest(tmp_path)
        assert stop(1)
        stop.close()
        assert list(tmp_path.iterdir()) == []

    def test_with_others_every_request_becomes_a_sigterm_and_they_decide(self, tmp_path):
        got: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))  # in JAX's place
        stop = StopRequest(tmp_path, reached=lambda step: step == 7)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert got == [signal.SIGTERM]
        assert [stop(step) for step in (6, 7)] == [False, True]
        stop = StopRequest(tmp_path, deadline=time.monotonic() - 1, reached=lambda step: False)
        assert [stop(step) for step in (1, 2)] == [False, False]
        assert got == [signal.SIGTERM] * 2
