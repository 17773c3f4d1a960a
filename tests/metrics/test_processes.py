"""Two processes give what one gives."""

from __future__ import annotations

import json
import multiprocessing

from tests.metrics import _processes
from tests.metrics._cases import assert_same, images, steered


def test_two_gloo_processes_give_the_one_process_result(tmp_path):
    # Forked, since importing torch twice takes longer than the test; the children use one thread.
    fork = multiprocessing.get_context("fork")
    images(), steered()
    running = [fork.Process(target=_processes.main, args=(rank, 2, tmp_path)) for rank in range(2)]
    for process in running:
        process.start()
    for process in running:
        process.join(timeout=120)
    assert [process.exitcode for process in running] == [0, 0]
    alone = _processes.scores(0, 1)
    assert len(alone) == 3 * len(_processes.CASES)
    for rank in range(2):
        together = json.loads((tmp_path / f"{rank}.json").read_text())
        assert_same(together, json.loads(json.dumps(alone)))
