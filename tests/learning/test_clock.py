"""Seconds that other work on the machine does not change."""

import time

import torch

from dymoe.learning import clock
from dymoe.learning.conditions import machine


def test_without_an_accelerator_the_cpus_time_is_counted(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    began, used = clock.seconds(), time.process_time()
    time.sleep(0.3)
    while time.process_time() < used + 0.2:
        sum(range(10_000))
    assert 0.1 <= clock.seconds() - began < 0.2, "sleep does not count, and two threads share the time"
    assert machine()["clock"] == "cpu"


def test_with_an_accelerator_it_is_the_time_on_the_wall(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    began = clock.seconds()
    time.sleep(0.1)
    assert clock.seconds() - began >= 0.1
    assert machine()["clock"] == "wall"
