"""Several short rows in one sequence. Imports no torch."""

from collections.abc import Sequence


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put each item, in order, into the first pack that still has room for it.

    Args:
        lengths: of the items, each at most `capacity`.
        capacity: of a pack.
    Returns:
        The packs, each the numbers of its items in ascending order. Depends on nothing but the arguments.
    """
    num_leaves = 1 << max(0, len(lengths) - 1).bit_length()
    # A tree over all packs there can be: each node holds the most room of a pack below it, so the first
    # pack with room is found in log(n) steps, not by trying all that are open.
    room = [capacity] * (2 * num_leaves)
    packs: list[list[int]] = []
    for number, length in enumerate(lengths):
        if length > capacity:
            raise ValueError(f"item {number} of length {length} does not fit a pack of {capacity}")
        node = 1
        while node < num_leaves:
            node = 2 * node if room[2 * node] >= length else 2 * node + 1
        pack = node - num_leaves
        if pack == len(packs):
            packs.append([])
        packs[pack].append(number)
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return packs
