"""Where to cut: units that stay together, put in order, and divided by dynamic programming."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from shrink.split._stages import Graph, Item, Op, in_order

__all__ = ["Division", "Unit", "divide", "orders", "units"]

# A stage that is over the limit anyway may hold more besides, up to this part of the limit.
_BESIDE = 16


@dataclass(frozen=True)
class Unit:
    """Ops that run in one stage. `reads` are tensors that other units compute, `writes` those that others may read.

    `own_bytes` is what its nodes take in a file, without `items`.
    """

    ops: tuple[Op, ...]
    reads: frozenset[str]
    writes: tuple[str, ...]
    items: frozenset[Item]
    own_bytes: int


# --- units -----------------------------------------------------------------------------------------------------


def units(graph: Graph, held: frozenset[str], op_bytes: Mapping[Op, int]) -> list[Unit]:
    """The ops, joined where a tensor of `held` runs between them, and where two would wait for each other."""
    makers = {name: number for number, op in enumerate(graph.ops) for name in op.writes if op.number is not None}
    group = list(range(len(graph.ops)))

    def root(number: int) -> int:
        while group[number] != number:
            group[number] = group[group[number]]
            number = group[number]
        return number

    for number, op in enumerate(graph.ops):
        for name in op.reads:
            if name in held:
                first, second = sorted((root(makers[name]), root(number)))
                group[second] = first
    before: dict[int, set[int]] = {root(number): set() for number in range(len(group))}
    for number, op in enumerate(graph.ops):
        before[root(number)] |= {root(makers[name]) for name in op.reads} - {root(number)}
    for circle in _circles(before):
        for number in circle[1:]:
            group[root(number)] = root(circle[0])
    members: dict[int, list[Op]] = {}
    for number, op in enumerate(graph.ops):
        members.setdefault(root(number), []).append(op)
    results = frozenset(graph.outputs)
    read_by: dict[str, set[int]] = {}
    for number, op in enumerate(graph.ops):
        for name in op.reads:
            read_by.setdefault(name, set()).add(root(number))
    return [
        _unit(ops, {n for n in _writes(ops) if n in results or read_by.get(n, set()) - {key}}, op_bytes)
        for key, ops in members.items()
    ]


def _unit(ops: Sequence[Op], outside: set[str], op_bytes: Mapping[Op, int]) -> Unit:
    made = set(_writes(ops))
    return Unit(
        tuple(ops),
        frozenset(name for op in ops for name in op.reads if name not in made),
        tuple(name for name in _writes(ops) if name in outside),
        frozenset().union(*(op.items for op in ops)),
        sum(op_bytes[op] for op in ops),
    )


def _writes(ops: Iterable[Op]) -> Iterator[str]:
    return (name for op in ops for name in op.writes)


def _circles(before: Mapping[int, set[int]]) -> list[list[int]]:
    """Groups of more than one that wait for each other: Tarjan's strongly connected components, without recursion."""
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    on_stack: set[int] = set()
    found = []
    for start in before:
        if start in index:
            continue
        work = [(start, iter(sorted(before[start])))]
        index[start] = low[start] = len(index)
        stack.append(start)
        on_stack.add(start)
        while work:
            here, others = work[-1]
            other = next(others, None)
            if other is None:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[here])
                if low[here] == index[here]:
                    circle: list[int] = []
                    while not circle or circle[-1] != here:
                        circle.append(stack.pop())
                        on_stack.discard(circle[-1])
                    if len(circle) > 1:
                        found.append(sorted(circle))
            elif other not in index:
                index[other] = low[other] = len(index)
                stack.append(other)
                on_stack.add(other)
                work.append((other, iter(sorted(before[other]))))
            elif other in on_stack:
                low[here] = min(low[here], index[other])
    return found


# --- orders ----------------------------------------------------------------------------------------------------


def orders(graph: Graph, parts: Sequence[Unit]) -> Iterator[list[Unit]]:
    """Running orders to try: the model's own, one that goes deep before it goes wide, and one that holds little."""
    makers = {name: number for number, unit in enumerate(parts) for name in unit.writes}
    before = [{makers[name] for name in unit.reads} for unit in parts]
    own = in_order(before)
    tried = []
    for order in (own, _deep(before), _thrifty(graph, parts, before)):
        if order not in tried:
            tried.append(order)
            yield [parts[number] for number in order]


def _deep(before: Sequence[set[int]]) -> list[int]:
    """Each as late as what reads it allows: the order of a walk from the results back."""
    done: set[int] = set()
    order = []
    for last in range(len(before)):
        work = [last]
        while work:
            number = work[-1]
            missing = sorted(before[number] - done, reverse=True) if number not in done else []
            if missing:
                work.append(missing[0])
                continue
            work.pop()
            if number not in done:
                done.add(number)
                order.append(number)
    return order


def _thrifty(graph: Graph, parts: Sequence[Unit], before: Sequence[set[int]]) -> list[int]:
    """Always what then leaves the fewest bytes to be kept."""
    after: list[list[int]] = [[] for _ in before]
    waits = [len(earlier) for earlier in before]
    readers: dict[str, int] = {}
    for number, earlier in enumerate(before):
        for other in earlier:
            after[other].append(number)
        for name in parts[number].reads:
            readers[name] = readers.get(name, 0) + 1
    results = frozenset(graph.outputs)

    def cost(number: int) -> int:
        made = sum(graph.sizes[n] for n in parts[number].writes if n not in results)
        return made - sum(graph.sizes[n] for n in parts[number].reads if readers[n] == 1 and n not in results)

    ready = [(cost(number), number) for number, count in enumerate(waits) if count == 0]
    heapq.heapify(ready)
    order = []
    while ready:
        number = heapq.heappop(ready)[1]
        order.append(number)
        for name in parts[number].reads:
            readers[name] -= 1
        for other in after[number]:
            waits[other] -= 1
            if waits[other] == 0:
                heapq.heappush(ready, (cost(other), other))
    return order


# --- division --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Division:
    """`cuts` are the ends of the stages, as numbers of units; `crossing` the bytes that are kept at each."""

    order: tuple[Unit, ...]
    cuts: tuple[int, ...]
    crossing: tuple[int, ...]

    @property
    def cost(self) -> tuple[int, int]:
        return len(self.cuts), sum(self.crossing)


def divide(
    graph: Graph,
    order: Sequence[Unit],
    limit: int,
    item_bytes: Mapping[Item, int],
    edge_bytes: Mapping[str, int],
    base_bytes: int,
) -> Division:
    """The fewest stages of at most `limit` bytes, then the least crossing, then the most even.

    A unit that is over the limit by itself is a stage with next to nothing else. A file is `base_bytes`, its nodes
    and items, and `edge_bytes` for each tensor that it takes or gives.
    """
    count = len(order)
    last = _last_uses(graph, order)
    live = _live(graph, order, last)
    results = frozenset(graph.outputs)
    # Stages, bytes that cross, sum of squares of sizes, and where the last of these stages starts.
    best: list[tuple[int, int, int, int] | None] = [(0, 0, 0, 0)] + [None] * count
    for end in range(1, count + 1):
        held: set[Item] = set()
        taken: set[str] = set()
        # What is over the limit by itself is counted apart: with it, little else may be in the stage.
        rest, alone, given = base_bytes, 0, 0
        for start in range(end - 1, -1, -1):
            unit = order[start]
            new = unit.items - held
            held |= new
            added = unit.own_bytes + sum(item_bytes[item] for item in new)
            taken |= unit.reads
            taken.difference_update(unit.writes)
            given += sum(edge_bytes[n] for n in unit.writes if last[n] >= end or n in results)
            edges = given + sum(edge_bytes[n] for n in taken)
            if base_bytes + added + edges <= limit:
                rest += added
            elif alone:
                break
            else:
                alone = added
            room = limit // _BESIDE if alone else limit
            if rest > room and start < end - 1:
                break
            size = rest + alone + edges
            before = best[start]
            if before is None or (rest + edges > room and start < end - 1):
                continue
            stages, crossing, squares, _ = before
            candidate = (stages + 1, crossing + (live[start] if start else 0), squares + size * size, start)
            now = best[end]
            if now is None or candidate < now:
                best[end] = candidate
    cuts = [count]
    while (entry := best[cuts[-1]]) is not None and entry[3] > 0:
        cuts.append(entry[3])
    cuts.reverse()
    return Division(tuple(order), tuple(cuts), tuple(live[cut] if cut < count else 0 for cut in cuts))


def _last_uses(graph: Graph, order: Sequence[Unit]) -> dict[str, int]:
    """The place of the last unit that reads a tensor; its maker's where none does."""
    last = {name: place for place, unit in enumerate(order) for name in unit.writes}
    for place, unit in enumerate(order):
        last |= dict.fromkeys(unit.reads, place)
    return last


def _live(graph: Graph, order: Sequence[Unit], last: Mapping[str, int]) -> list[int]:
    """The bytes that are kept between the units, in front of each. Results of the network are kept anyway."""
    results = frozenset(graph.outputs)
    change = [0] * (len(order) + 1)
    for place, unit in enumerate(order):
        for name in unit.writes:
            if name not in results and last[name] > place:
                change[place + 1] += graph.sizes[name]
                change[last[name] + 1] -= graph.sizes[name]
    return list(accumulate(change))
