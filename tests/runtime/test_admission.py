"""What requests will hold together, against a simulation token by token."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("numpy")

from memento_sgl.admission.forecast import (
    BlockStats,
    Estimate,
    Forecast,
    Retry,
    tokens_ahead,
    until_closed,
)


def simulate(requests: list[Estimate]) -> int:
    """Highest number of slots taken at once, one token of each request at a time."""
    peak = 0
    for step in range(int(max(r.ahead for r in requests)) + 1):
        total = 0
        for r in requests:
            held, opened, closed = r.need, r.opened, 0
            for _ in range(min(step, int(r.ahead))):
                held, opened = held + 1, opened + 1
                if r.cycle and opened == r.cycle:
                    opened, closed = 0, closed + 1
                    held -= int(r.gone) if closed > r.kept else 0
            total += r.need - r.frees if r.frees is not None and step > r.ahead else held
        peak = max(peak, total)
    return peak


def test_without_blocks_it_is_what_sglang_reserves() -> None:
    running = [Estimate(300.0), Estimate(20.5), Estimate(0.0)]
    assert Forecast(running).peak == pytest.approx(320.5)
    assert Forecast([]).peak == 0
    assert Forecast(running).peak_with(Estimate(900.0, need=60, peak_need=60)) == pytest.approx(
        1280.5
    )


@pytest.mark.parametrize("seed", range(8))
def test_a_forecast_is_never_below_the_simulation_and_not_far_above(seed: int) -> None:
    rng = random.Random(seed)
    requests = [
        Estimate(
            ahead=rng.randint(100, 700),
            cycle=60,
            gone=48,
            opened=rng.randrange(60),
            kept=rng.choice([0, 0, 2]),
            need=rng.choice([0, 30]),
        )
        for _ in range(12)
    ]
    true = simulate(requests)
    assert true <= Forecast(requests).peak <= 1.15 * true


def test_requests_in_different_places_of_their_blocks_need_less_than_together() -> None:
    def peak(spread: int) -> float:
        return Forecast([Estimate(80, 80, 70, opened=spread * i) for i in range(8)]).peak

    assert peak(10) < 0.75 * peak(0)


def test_a_known_end_gives_its_slots_to_the_others() -> None:
    ending = Estimate(100, 50, 40, frees=300)
    lasting = Estimate(1000, 50, 40)
    alone = Forecast([lasting]).peak
    assert Forecast([ending, lasting]).peak < alone
    assert Forecast([ending._replace(frees=None), lasting]).peak > alone


def test_adding_one_by_one_is_the_same_as_all_at_once() -> None:
    rng = random.Random(1)
    requests = [Estimate(rng.randint(50, 900), 60, 40, rng.randrange(60)) for _ in range(20)]
    grown = Forecast(requests[:5], 10.0)
    for request in requests[5:]:
        expected = grown.peak_with(request)
        grown.add(request)
        assert grown.peak == pytest.approx(expected)
    assert grown.peak == pytest.approx(Forecast(requests, 10.0).peak, rel=0.03)


def test_deviation_is_reserved_by_its_square_root() -> None:
    requests = [Estimate(100, 50, 40)] * 16 + [Estimate(100)] * 9
    assert Forecast(requests, 10.0).peak - Forecast(requests).peak == pytest.approx(80)


def test_a_block_that_is_late_takes_as_long_again() -> None:
    assert [until_closed(100, opened) for opened in (0, 60, 100, 150, 400)] == [100, 40, 0, 50, 300]
    never = [Forecast([Estimate(2000, 100, 80, opened)]).peak for opened in (0, 400, 1500)]
    assert never == sorted(never)


def test_the_open_block_is_always_reserved() -> None:
    assert tokens_ahead(1000, 5.0, cycle=100, opened=30) == 70
    assert tokens_ahead(20, 5.0, cycle=100, opened=30) == 20
    assert tokens_ahead(1000, 400.0, cycle=100, opened=30) == 400
    assert tokens_ahead(1000, 5.0, cycle=100, certain=True) == 1000


def test_a_prefill_in_segments_counts_with_its_highest_row() -> None:
    waiting = Estimate(10, 100, 80, need=40, peak_need=300)
    assert Forecast([waiting]).peak == 300
    assert Forecast([waiting._replace(peak_need=41)]).peak == 50


def test_block_stats_trust_many_blocks_more_than_few_and_follows_the_traffic() -> None:
    block_stats = BlockStats()
    deviations = []
    for _ in range(40):
        block_stats.learn(120, 100)
        deviations.append(block_stats.deviation)
    assert (block_stats.count, block_stats.cycle, block_stats.gone) == (40, 120, 100)
    assert deviations[0] == 120
    assert deviations == sorted(deviations, reverse=True)
    assert deviations[-1] < 20
    for _ in range(2000):
        block_stats.learn(60, 40)
    assert block_stats.cycle == pytest.approx(60, abs=1)
    assert block_stats.gone == pytest.approx(40, abs=1)


def test_evictions_ask_for_admission_now_and_then_and_whenever_much_was_learned() -> None:
    retry = Retry()
    asked = []
    for step in range(100):  # a block goes with every step
        retry.step()
        if retry.due(blocks=1 + step):
            asked.append(step)
    assert asked == [0, 1, 3, 7, 15, 31, 47, 63, 79, 95]
    for _ in range(Retry.STEPS):  # one that goes after a while asks at once
        retry.step()
    assert retry.due(blocks=101)
    assert not retry.due(blocks=102)
