"""Training on a GPU.  python tests/gpu/check_training.py --out DIR [--quick]

The step as a CUDA graph gives the bits of the step without one; a run that was interrupted and resumed gives the bits of one
that was not; a population gives its members' curves; a diverging run stays alone; a run on the GPU follows the run on the CPU. Writes DIR/check_training.json, exit code 1 if anything fails.
"""

import json
import sys
from functools import partial

import torch
from common import options, save

from wave_rnns.core import to_json
from wave_rnns.paper.models import ModelConfig
from wave_rnns.paper.data import have_data
from wave_rnns.paper.tasks import make_task
from wave_rnns.paper.training import Interrupted, RunSettings, fit

# Training amplifies a rounding error, at 1e-3 on a sequence of 50 a thousandfold within 60 steps, on a CPU too: there we would compare
# chaos with chaos. So what sums in another order (a population, a CPU) is compared over the first steps, what must be the same bits over all.
FEW = 20
CASES = {
    "copy wRNN": ("copy", dict(T=10), ModelConfig("wrnn", 10, 10, 40, 4, every_step=True), 1e-3),
    "copy iRNN": ("copy", dict(T=10), ModelConfig("irnn", 10, 10, 40, every_step=True), 1e-3),
    "adding wRNN": ("adding", dict(T=50), ModelConfig("wrnn", 2, 1, 40, 5), 1e-3),
    "adding iRNN": ("adding", dict(T=50), ModelConfig("irnn", 2, 1, 40), 1e-3),
    "sMNIST wRNN": ("smnist", dict(limit=2000), ModelConfig("wrnn", 1, 10, 64, 8), 1e-4),
    "psMNIST wRNN + MLP": ("psmnist", dict(limit=2000), ModelConfig("wrnn", 1, 10, 64, 8, readout="mlp"), 1e-4),
    "nsCIFAR10 wRNN": ("nscifar10", dict(limit=2000, batch_size=64), ModelConfig("wrnn", 96, 10, 64, 8), 1e-4),
    "nsCIFAR10 iRNN": ("nscifar10", dict(limit=2000, batch_size=64), ModelConfig("irnn", 96, 10, 64), 1e-4),
}


def curves(name, options, config, runs, steps, device="cuda", graph=None, **more):
    rhythm = dict(steps=steps, eval_every=steps, log_every=5, progress=False)
    return fit(make_task(name, **options), config, runs, device=device, graph=graph, **rhythm, **more)


class Memory:
    "A checkpoint that needs no disk."

    kept = None

    def save(self, tensors, meta):
        self.kept = {k: t.cpu().clone() for k, t in tensors.items()}, json.loads(to_json(meta))

    def load(self):
        return self.kept


def resumed(name, options, config, runs, steps, device="cuda", graph=None):
    "Interrupted in the middle of a row of the curve, and gone on in a new population with a new graph."
    checkpoint, countdown = Memory(), iter(range(steps // 2 + 1))
    run = partial(curves, name, options, config, runs, steps, device, graph, checkpoint=checkpoint)
    try:
        run(interrupt=lambda: next(countdown, None) is None)
    except Interrupted:
        return run()
    raise AssertionError("the run was not interrupted")


def losses(result):
    return [row["loss"] for row in result.curve]


def worst_gap(a, b):
    "Largest relative difference of two loss curves."
    return max(abs(p - q) / max(abs(q), 1e-12) for p, q in zip(losses(a), losses(b), strict=True))


def check(name, options, config, lr, steps):
    runs = [RunSettings(seed, lr, clip=1.0) for seed in (0, 1, 2)]
    with_graph = curves(name, options, config, runs, steps, graph=True)
    without = curves(name, options, config, runs, steps, graph=False)
    again = curves(name, options, config, runs, steps, graph=True)
    halves = resumed(name, options, config, runs, steps, graph=True)
    few = min(steps, FEW)
    together = curves(name, options, config, runs, few, graph=True)[:2]
    alone = [curves(name, options, config, [run], few, graph=True)[0] for run in runs[:2]]
    cpu = curves(name, options, config, runs[:1], min(steps, 10), device="cpu")[0]
    wild = curves(name, options, config, [runs[0], RunSettings(9, 1e30), runs[2]], steps, graph=True)
    short = curves(name, options, config, runs[:1], min(steps, 10), graph=True)[0]
    row = {
        "graph_gives_the_same_bits": [losses(r) for r in with_graph] == [losses(r) for r in without],
        "repeats": [losses(r) for r in with_graph] == [losses(r) for r in again],
        "resumed_gives_the_same_bits": [losses(r) for r in halves] == [losses(r) for r in with_graph],
        "population_against_alone": max(worst_gap(a, p) for a, p in zip(alone, together, strict=True)),
        "gpu_against_cpu": worst_gap(short, cpu),
        "diverged": [r.status for r in wild],
        "neighbours_untouched": [losses(wild[0]), losses(wild[2])] == [losses(with_graph[0]), losses(with_graph[2])],
        "steps_per_second": with_graph[0].steps_per_second,
        "last_loss": [losses(r)[-1] for r in with_graph],
    }
    same = ("graph_gives_the_same_bits", "repeats", "resumed_gives_the_same_bits", "neighbours_untouched")
    close = max(row["population_against_alone"], row["gpu_against_cpu"]) < 1e-3
    row["ok"] = all(row[k] for k in same) and close and row["diverged"] == ["done", "diverged", "done"]
    return row


def main():
    chosen, cases = options(__doc__, quick="fewer steps"), {}
    torch.set_num_threads(min(4, torch.get_num_threads()))  # small steps on many cores wait for each other
    for title, (name, task, config, lr) in CASES.items():
        needs = {"smnist": "mnist", "psmnist": "mnist", "nscifar10": "cifar10"}.get(name)
        if needs and not have_data(needs):
            cases[title] = {"skipped": f"no {needs} in the data root", "ok": True}
            continue
        try:
            cases[title] = check(name, task, config, lr, 20 if chosen.quick else 60)
        except Exception as e:  # a case that breaks is a finding, and the others still run
            cases[title] = {"failed": f"{type(e).__name__}: {e}"[:600], "ok": False}
        print(title, json.dumps(cases[title]), flush=True)
    ok = all(case["ok"] for case in cases.values())
    save(chosen.out / "check_training.json", {"ok": ok, "cases": cases})
    print(f"check_training: {'all as they should be' if ok else 'SOMETHING IS WRONG'}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
