"""The adding task at T = 1000 and lr 1e-3, step by step: where a run overflows, and whether the run beside it has a part in that.

python tests/gpu/watch_overflow.py --out DIR      writes DIR/overflow.json, and the weights before an overflow in DIR/before_overflow
"""

import math
import shutil

import torch
from common import options, save

from wave_rnns.paper.checkpoints import save_weights
from wave_rnns.paper.experiments import EXPERIMENTS
from wave_rnns.paper.tasks import make_task
from wave_rnns.paper.training import Population, RunSettings

EXPERIMENT, STEPS = "adding1000_wrnn", 600
GROUPS = ((0, 1), (0, 5), (1, 0), (7, 1), (0,), (1,), tuple(range(2, 10)))  # seeds that train together


def short(x):
    "Five digits; None where the number is not finite."
    return float(f"{x:.5g}") if math.isfinite(x) else None


def population(seeds, device):
    "The recorded experiment, and a buffer that keeps the loss of the last step."
    e = EXPERIMENTS[EXPERIMENT]
    runs = [RunSettings(s, e.lr, e.clip, e.drop_factor, e.drop_every) for s in seeds]
    pop = Population(make_task(e.task, **e.task_options), e.model, runs, device)
    pop.loss, update = torch.zeros(len(seeds), device=device), pop.update

    def watched(loss, sums, grad):
        pop.loss.copy_(loss)
        update(loss, sums, grad)

    pop.update = watched
    return pop


def watch(seeds, device, steps):
    "Train; the loss at every step, the step at which each run overflowed, and each run's weights before that step."
    pop = population(seeds, device)
    step, losses, before = pop.step_function(), [], {}
    for _ in range(steps):
        step()
        losses.append([short(x) for x in pop.loss.tolist()])
        for r, diverged in enumerate(pop.diverged.tolist()):
            if diverged and r not in before:
                before[r] = pop.weights(pop.theta, r)  # a run whose step overflowed is frozen as it was before it
        if len(before) == len(seeds):
            break
    row = {"seeds": list(seeds), "diverged": [d or None for d in pop.diverged.tolist()], "loss": losses}
    return row, before


def main():
    more = {"device": dict(default="cuda"), "steps": dict(type=int, default=STEPS)}
    chosen, rows = options(__doc__, quick=None, **more), []
    shutil.rmtree(chosen.out / "before_overflow", ignore_errors=True)  # those of another run would not fit the record
    for seeds in GROUPS:
        row, before = watch(seeds, torch.device(chosen.device), chosen.steps)
        rows.append(row)
        print(seeds, "overflow at", row["diverged"], flush=True)
        if seeds == GROUPS[0] and before:
            r = min(before, key=lambda r: row["diverged"][r])
            about = {"experiment": EXPERIMENT, "seed": seeds[r], "steps": row["diverged"][r] - 1, "beside": seeds}
            save_weights(chosen.out / "before_overflow", before[r], EXPERIMENTS[EXPERIMENT].model, about)
            rows[0]["kept"] = about
        record = {
            "what": f"{EXPERIMENT}, the training error of every step, null where it is not finite",
            "experiment": EXPERIMENT,
            "steps": chosen.steps,
            "rows": rows,
        }
        save(chosen.out / "overflow.json", record, indent=None)


if __name__ == "__main__":
    main()
