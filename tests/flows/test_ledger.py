from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy.exc import IntegrityError

from flows.ledger import ASKED, DONE, FAILED, Ledger, Trial

ROOT = Path(__file__).parents[2]


@pytest.fixture
def ledger(tmp_path):
    opened = Ledger(tmp_path, "search-1")
    yield opened
    opened.close()


def asked(trial: int, lr: float, l1: float) -> Trial:
    return Trial(trial, ASKED, lr, l1, None, None, None, None, None)


def test_a_new_search_has_no_trials(ledger):
    assert ledger.rows() == []


def test_trials_are_numbered_in_the_order_they_are_asked_for(ledger):
    ledger.ask([(1e-3, 2.0), (2e-3, 4.0)])
    ledger.ask([(3e-3, 8.0)])
    assert ledger.rows() == [asked(0, 1e-3, 2.0), asked(1, 2e-3, 4.0), asked(2, 3e-3, 8.0)]


def test_a_trial_that_ended_well_keeps_its_point_and_gets_its_result(ledger):
    ledger.ask([(1e-3, 2.0), (2e-3, 4.0)])
    ledger.done(1, sae="abc", fvu=0.25, l0=31.5, objective=0.25)
    assert ledger.rows() == [
        asked(0, 1e-3, 2.0),
        Trial(1, DONE, 2e-3, 4.0, "abc", 0.25, 31.5, 0.25, None),
    ]


def test_a_trial_that_failed_has_an_error_and_no_result(ledger):
    ledger.ask([(1e-3, 2.0)])
    ledger.failed(0, "UserError: the loss is not finite")
    message = "UserError: the loss is not finite"
    assert ledger.rows() == [Trial(0, FAILED, 1e-3, 2.0, None, None, None, None, message)]


def test_a_trial_tried_again_with_success_has_no_error(ledger):
    ledger.ask([(1e-3, 2.0)])
    ledger.failed(0, "lost")
    ledger.done(0, sae="abc", fvu=0.5, l0=20.0, objective=0.5)
    assert ledger.rows() == [Trial(0, DONE, 1e-3, 2.0, "abc", 0.5, 20.0, 0.5, None)]


def test_numbers_come_back_bit_for_bit(ledger):
    lr, l1 = 0.1 + 0.2, 1 / 3
    ledger.ask([(lr, l1)])
    ledger.done(0, sae="a", fvu=2 / 3, l0=1e-300, objective=5e-324)
    (row,) = ledger.rows()
    assert (row.lr, row.l1, row.fvu, row.l0, row.objective) == (lr, l1, 2 / 3, 1e-300, 5e-324)


def test_rows_survive_reopening(ledger, tmp_path):
    ledger.ask([(1e-3, 2.0), (2e-3, 3.0), (3e-3, 4.0)])
    ledger.done(0, sae="abc", fvu=0.25, l0=30.0, objective=0.25)
    ledger.failed(1, "lost")
    before = ledger.rows()
    ledger.close()
    again = Ledger(tmp_path, "search-1")
    assert again.rows() == before
    again.ask([(5e-3, 5.0)])
    assert [row.trial for row in again.rows()] == [0, 1, 2, 3]
    again.close()


def test_rows_survive_a_kill(tmp_path):
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from flows.ledger import Ledger\n"
        "ledger = Ledger(Path(sys.argv[1]), 'search-1')\n"
        "ledger.ask([(1e-3, 2.0), (2e-3, 4.0)])\n"
        "ledger.done(0, sae='abc', fvu=0.5, l0=20.0, objective=0.5)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT, timeout=60).returncode == -9
    ledger = Ledger(tmp_path, "search-1")
    assert ledger.rows() == [
        Trial(0, DONE, 1e-3, 2.0, "abc", 0.5, 20.0, 0.5, None),
        asked(1, 2e-3, 4.0),
    ]
    ledger.close()


def test_two_searches_in_one_database_do_not_see_each_other(ledger, tmp_path):
    other = Ledger(tmp_path, "search-2")
    ledger.ask([(1e-3, 2.0)])
    other.ask([(7e-3, 7.0), (8e-3, 8.0)])
    other.failed(0, "lost")
    ledger.done(0, sae="abc", fvu=0.5, l0=20.0, objective=0.5)
    assert [row.state for row in ledger.rows()] == [DONE]
    assert [row.state for row in other.rows()] == [FAILED, ASKED]
    other.close()


def test_a_round_is_written_down_whole_or_not_at_all(ledger):
    with pytest.raises(IntegrityError):
        ledger.ask([(1e-3, 2.0), (None, 4.0)])  # type: ignore[list-item]
    assert ledger.rows() == []
