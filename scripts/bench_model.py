"""What a scenario must give, computed from its rates and capacities alone; nothing here is measured or fitted.

A step of n requests lasts step + n * per_request. A request takes so many steps and a KV cache for as long.
"""
from dataclasses import dataclass


@dataclass(frozen=True)
class Serving:
    """A model server's steps, in seconds."""
    step: float
    per_request: float
    linger: float
    steps: int

    def lasts(self, n, steps=None):
        """So many steps of a batch of n."""
        return (steps or self.steps) * (self.step + n * self.per_request)

    def closed_loop(self, clients, fit):
        """(requests per second, latency, time to the first answer) of clients that ask again when answered.

        `fit` requests have memory at a time. While clients wait the batch is full from step to step. When all
        fit, they are answered together and meet again after `linger`. Latency is clients / throughput (Little's
        law); it is every request's, and so the median too, where the batch divides the number of clients.
        """
        batch = min(clients, fit)
        if batch < 1:
            raise ValueError("not one request fits")
        wave = self.lasts(batch) + (self.linger if clients <= fit else 0)
        throughput = batch / wave
        latency = clients / throughput
        return throughput, latency, latency - wave + self.lasts(batch, 1) + (self.linger if clients <= fit else 0)


def fit(room, weights, kv):
    """How many KV caches have memory beside the weights."""
    return max(0, int((room - weights) // kv))


def cold_start(weights, disk, serving):
    """Seconds to the first answer of a new process: its weights come from the disk, which is slower than the link
    and reads ahead meanwhile. Starting a process is no part of it."""
    return weights / disk + serving.lasts(1, 1) + serving.linger


def swap(out_bytes, in_bytes, rate_out, rate_in):
    """Seconds until a model is there for which another has to leave, first all out, then all in: so it is done
    today. With both directions at a time it would be `swap_overlapped`."""
    return out_bytes / rate_out + in_bytes / rate_in


def swap_overlapped(out_bytes, in_bytes, rate_out, rate_in, rate_both):
    """The same with both directions at a time: the slower of the two, or all bytes over the link's sum."""
    return max(out_bytes / rate_out, in_bytes / rate_in, (out_bytes + in_bytes) / rate_both)


def turns_of(sizes, extra, room, order):
    """Bytes (out, in) for each entry of `order`, by least recently used: what has to leave so that the next has
    its size and `extra` (what it takes while it works). `order` names indices of `sizes`; the first entries, that
    were never there, are loaded and not moved in."""
    there, seen, moves = [], set(), []  # oldest first
    for now in order:
        out = into = 0
        if now in there:
            there.remove(now)
        elif now in seen:
            into = sizes[now]
        seen.add(now)
        while there and sum(sizes[i] for i in there) + sizes[now] + extra > room:
            out += sizes[there.pop(0)]
        there.append(now)
        moves.append((out, into))
    return moves


def share(work, swaps):
    """The part of the throughput that stays: as much work, and time for the swaps besides."""
    return work / (work + swaps)
