"""Two processes give what one gives."""

from __future__ import annotations

import multiprocessing

import torch

from tests.metrics import _processes


def test_two_gloo_processes_give_the_one_process_result(tmp_path):
    # Forked, since importing torch twice takes longer than the test; the children use one thread.
    fork = multiprocessing.get_context("fork")
    running = [fork.Process(target=_processes.main, args=(rank, 2, tmp_path)) for rank in range(2)]
    for process in running:
        process.start()
    for process in running:
        process.join(timeout=120)
    assert [process.exitcode for process in running] == [0, 0]
    alone = _processes.scores(0, 1)
    assert alone
    for rank in range(2):
        together = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert together.keys() == alone.keys()
        for name, expected in alone.items():
            torch.testing.assert_close(
                together[name], expected, rtol=1e-9, atol=1e-9, equal_nan=True, msg=name
            )
