"""What the study's plan may cost: rates that its own first runs choose, and the seeds of its first sessions."""

import math

import pytest
from stage_tables import ALL, BEST_LATER, STAGES, Rates, shown

COUNT = 250  # sweeps; tests/stage_tables.py has the whole tables


def test_rates_that_counted_runs_choose_bias_nothing_and_cost_little() -> None:
    """Chosen by the first seed of 11M, which is counted; the later seeds of 3M and 11M at the best rate alone."""
    known = shown(ALL, Rates("known"), COUNT)
    found = shown(ALL, Rates(scatter=0.1, all_rates=BEST_LATER), COUNT)
    assert abs(found.bias) < 4 * found.sd / math.sqrt(COUNT)
    assert found.coverage > 0.91
    assert found.half_width == pytest.approx(known.half_width, rel=0.25)


@pytest.mark.parametrize("session", ["1", "2"])
def test_what_the_first_sessions_leave_has_an_interval_that_holds(session: str) -> None:
    found = shown(STAGES[session], Rates(all_rates=BEST_LATER), COUNT)
    assert abs(found.bias) < 4 * found.sd / math.sqrt(COUNT)
    assert found.coverage > 0.91
