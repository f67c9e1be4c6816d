"""The simulations once more, as processes of SimPy that know nothing of recursions or rounds."""

import simpy

from jaxinfer.parallel.hexgen.rounds import RoundTimes


def whole_requests(arrivals, kinds, lines, chosen):
    """[(begin, end) of every stage] and the finish of every request, each of which goes to the
    replica `chosen[i]`."""
    env = simpy.Environment()
    visits, finish = [[] for _ in arrivals], [0.0] * len(arrivals)

    def source(channel, mine):
        for i in mine:
            yield env.timeout(arrivals[i] - env.now)
            yield channel.put((i, env.now))

    def stage(line, s, before, behind, count):
        for _ in range(count):
            i, ready = yield before.get()  # channels keep the order
            yield env.timeout(max(ready - env.now, 0.0))
            begin = env.now
            yield env.timeout(line.service_s[kinds[i], s])
            visits[i].append((begin, env.now))
            there = env.now + line.travel_s[kinds[i], s]
            if behind is None:
                finish[i] = there
            else:
                yield behind.put((i, there))

    for r, line in enumerate(lines):
        mine = [i for i in range(len(arrivals)) if chosen[i] == r]
        channels = [simpy.Store(env) for _ in range(line.service_s.shape[1])]
        env.process(source(channels[0], mine))
        for s, (before, behind) in enumerate(zip(channels, [*channels[1:], None], strict=True)):
            env.process(stage(line, s, before, behind, len(mine)))
    env.run()
    return visits, finish


def continuous_batching(arrivals, prompts, outputs, times: RoundTimes, most_rows: int):
    """(first token, finish) of every request on one replica that has `most_rows` rows."""
    env = simpy.Environment()
    waiting, first, finish = simpy.FilterStore(env), {}, {}
    bell = [env.event()]

    def request(i):
        yield env.timeout(arrivals[i])
        yield waiting.put(i)
        if not bell[0].triggered:
            bell[0].succeed()

    def replica():
        rows = {}
        while True:
            if not rows and not waiting.items:
                bell[0] = env.event()
                yield bell[0]
            new = []
            while waiting.items and len(rows) + len(new) < most_rows:
                new.append((yield waiting.get()))
            began = env.now
            if new:
                ends, _ = times.prompts([prompts[i] for i in new])
                yield env.timeout(ends[-1])
                for i, end in zip(new, ends, strict=True):
                    rows[i], first[i] = 1, began + end
                done = {i: first[i] for i in new if outputs[i] == 1}
            else:
                context = sum(prompts[i] + n for i, n in rows.items()) / len(rows)
                yield env.timeout(times.step(len(rows), context)[0])
                rows = {i: n + 1 for i, n in rows.items()}
                done = {i: env.now for i, n in rows.items() if n == outputs[i]}
            finish.update(done)
            rows = {i: n for i, n in rows.items() if i not in done}

    for i in range(len(arrivals)):
        env.process(request(i))
    env.process(replica())
    while len(finish) < len(arrivals):
        env.step()
    return first, finish
