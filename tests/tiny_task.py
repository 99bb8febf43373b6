"A task that costs nothing, with epochs, and a program that trains on it: for tests that kill, resume and count."

import json
import sys

import torch

from wave_rnns.paper.random import counter_permutation, counter_uniform
from wave_rnns.paper.models import ModelConfig
from wave_rnns.paper.tasks import Task
from wave_rnns.paper.training import RunSettings

STREAM = 90_001


class TinyTask(Task):
    "Predict the mean of a short sequence. `poison=(seed, step)`: that run's batch of that step holds a NaN."

    name, metric, higher_is_better = "tiny", "mse", False
    input_size, output_size, T, steps_per_epoch, baseline = 1, 1, 6, 5, 1 / 12
    x_dims = 0

    def __init__(self, batch_size=8, poison=None):
        super().__init__(batch_size=batch_size)
        self.poison, self.epochs, self.looked_at = poison, [], []

    def to(self, device):
        self.order = None
        return super().to(device)

    def prepare_epoch(self, seeds, epoch):
        self.epochs.append(epoch)
        order = counter_permutation(seeds, epoch, self.steps_per_epoch, STREAM)
        self.order = order if self.order is None else self.order.copy_(order)

    def batch(self, seeds, step, stream):
        x = counter_uniform(seeds, step, (self.T, self.batch_size, 1), stream)
        return x, x.mean(1)

    def train_batch(self, seeds, step):
        # The epoch's order takes part in the numbers, so that a wrong order would show.
        x, y = self.batch(seeds, step, STREAM + 1)
        x = x + self.order.index_select(1, (step % self.steps_per_epoch)[None])[..., None, None] * 0.1
        if self.poison is not None:
            seed, bad = self.poison
            x = torch.where(((seeds == seed) & (step == bad))[:, None, None, None], torch.nan, x)
        return x, y

    def eval_batches(self, split, batch=1000, limit=None):
        self.looked_at.append(split)
        for i in range(2):
            x, y = self.batch(torch.tensor([7]), i, STREAM + 2 + (split == "test"))
            yield x[0, :, :batch], y[0, :batch]

    def loss(self, out, y):
        return (out - y).square().mean()

    def measure(self, out, y):
        error = (out - y).double().square().sum()
        return {"count": torch.full((), y.shape[0], dtype=torch.float64), "mse": error}


WAVE = ModelConfig("wrnn", 1, 1, n=12, c=2)
RUNS = (RunSettings(0, 1e-2, clip=1.0), RunSettings(1, 1e12), RunSettings(2, 1e-3, drop_factor=3.0, drop_every=2))
RHYTHM = dict(steps=43, eval_every=8, log_every=6, device="cpu", progress=False)


def main(checkpoint: str, every: str, report: str) -> int:
    "Train, resuming from `checkpoint`, write the results to `report`; the exit code is a command's."
    from wave_rnns.paper.checkpoints import CheckpointFile, listen_for
    from wave_rnns.paper.training import Interrupted, fit

    torch.set_num_threads(1)
    resumable = dict(checkpoint=CheckpointFile(checkpoint), checkpoint_every=int(every))
    with listen_for() as asked:
        try:
            results = fit(TinyTask(), WAVE, RUNS, interrupt=asked, **resumable, **RHYTHM)
        except Interrupted as e:
            return e.exit_code
    with open(report, "w") as f:
        json.dump([summary(r) for r in results], f)
    return 0


def summary(r) -> dict:
    "Everything of a result that must not depend on interruptions, each number as its bits."
    weights = {k: [x.hex() for x in t.double().flatten().tolist()] for k, t in r.weights.items()}
    numbers = repr((r.curve, r.best_step, r.valid_best, r.valid_final, r.test_best, r.test_final))
    return {"status": r.status, "diverged": r.diverged_step, "numbers": numbers, "weights": weights}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
