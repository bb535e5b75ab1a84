"""Work in several processes: its order, its errors, and a process that dies at the worst moment."""

import itertools
import os
import time

import pytest

from llama_jax.data.workers import WorkerDied, Workers


def make_uneven():
    """Squares; the even ones take longer."""

    def work(number, report):
        report(number)
        time.sleep(0.02 * (number % 2 == 0))
        return number**2

    return work


def make_failing():
    def work(number, report):
        report(number)
        if number == 7:
            raise ValueError("seven")
        return number

    return work


class DiesWhenSent:
    """A result larger than a pipe holds, whose process dies when half of it is handed over."""

    def __reduce__(self):
        return bytes, (b"x" * (1 << 22),)


def make_dying():
    from multiprocessing.connection import Connection

    whole = Connection._send

    def half(self, buffer, write=os.write):
        if len(buffer) > 1 << 20:
            write(self._handle, bytes(buffer[: 1 << 15]))
            os._exit(9)
        whole(self, buffer)

    Connection._send = half
    return lambda number, report: DiesWhenSent() if number == 3 else number


def test_results_come_in_the_order_of_the_work_and_few_items_are_held():
    taken = []
    numbers = (taken.append(number) or number for number in range(40))
    amounts = []
    with Workers(make_uneven, 3) as workers:
        for number, (item, result) in enumerate(workers.results(numbers, amounts.append)):
            assert (item, result) == (number, number**2)
            assert len(taken) - number <= 3 * 3
    assert number == 39
    assert amounts == sorted(amounts)
    assert amounts[-1] == sum(range(40))


def test_an_error_comes_at_its_turn():
    with Workers(make_failing, 2) as workers:
        results = workers.results(range(20))
        assert [item for item, _ in itertools.islice(results, 7)] == list(range(7))
        with pytest.raises(ValueError, match="seven"):
            next(results)


def test_one_that_dies_while_it_hands_over_is_noticed():
    """A pool of the standard library waits for ever here: the rest of the result never comes."""
    with Workers(make_dying, 2) as workers, pytest.raises(WorkerDied):
        list(workers.results(range(10)))


def test_no_work():
    with Workers(make_uneven, 2) as workers:
        assert list(workers.results([])) == []
