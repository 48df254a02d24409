"""What every rank has decoded of a step, on every rank: from there on all compute alike.

A step's samples are small beside what made them (25 bytes a token), and with all of them at hand a rank knows
every reward, every denominator and every mini-batch of the step without asking again.
"""

from __future__ import annotations

from collections.abc import Sequence

from elastic_decode.rl.batch import Group, Row
from elastic_decode.rl.distributed import World
from elastic_decode.rl.rollout import RolloutStats, warn_of_spread


def in_order(groups: Sequence[Group], rows: Sequence[Row]) -> list[Group]:
    """Groups in the order of their rows, whatever order they were complete in; a row that comes twice has two
    groups with different seeds.
    """
    place = {row.index: number for number, row in enumerate(rows)}
    return sorted(groups, key=lambda group: (place[group.index], group.samples[0].seed))


def exchange(world: World, own: Sequence[Group], rows: Sequence[Row], stats: RolloutStats) -> list[Group]:
    """The groups of all `rows`, in their order, from those this rank has decoded.

    Where no row fits on any rank, every rank raises the engine's error, as a rollout alone does. The main
    rank warns where nearly no group has a spread.
    """
    if world.size == 1:
        return in_order(own, rows)
    said = world.gather((list(own), stats.refusal))
    groups = in_order([group for part, _ in said for group in part], rows)
    refusals = [refusal for _, refusal in said if refusal is not None]
    if refusals and not groups:
        raise refusals[0]
    if groups and world.main:
        spread = sum(group.has_spread for group in groups)
        warn_of_spread(groups[0].step, len(groups), spread, stats)
    return groups
