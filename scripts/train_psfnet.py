"""Teach Gk of the preset "best" to read PSF widths off random scenes. Prints progress; writes the weights.

    python scripts/train_psfnet.py --minutes 90 --out deconv/weights/psfnet.npz [--start FILE] [--seed 0]

Nothing but `deconv.scenes` is seen: no phantom that judges the methods, no measured image. A batch holds windows of
scenes blurred by random PSFs, each seen along its three axes and from a random side. The loss is the negative logarithm
of Student's t with four degrees of freedom about the network's own mean and variance, so that the scenes that cannot be
read (no edge, no contrast) do not rule the others; the rate falls as a cosine. It takes the time that it is given, on
one core beside another that makes the scenes.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deconv.psfnet import WINDOW, PsfNet
from deconv.scenes import blurred, random_blur, random_truth

MARGIN = 4  # PET voxels of true surroundings on every side, so that no border is invented
BATCH = 36
BLURS = 3  # of one scene
LEAST_SD = 0.03  # of a window: below it there is nothing to read
FREEDOM = 4.0


def batch(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Windows (BATCH, 24, 24, 24) and ln FWHM (BATCH,) along their first axis, in PET voxels."""
    images: list[np.ndarray] = []
    widths: list[float] = []
    side = 2 * (WINDOW + 2 * MARGIN)
    while len(images) < BATCH:
        truth = random_truth((side, side, side), rng)
        for _ in range(BLURS):
            blur = random_blur(rng)
            y = blurred(truth, blur, MARGIN, rng)
            if y.std() < LEAST_SD:
                continue
            for axis in range(3):
                seen = np.moveaxis(y, axis, 0)
                seen = seen.transpose(0, 2, 1) if rng.random() < 0.5 else seen
                images.append(np.ascontiguousarray(np.flip(seen, tuple(a for a in range(3) if rng.random() < 0.5))))
                widths.append(float(np.log(blur.fwhm[axis])))
    return torch.from_numpy(np.stack(images[:BATCH])), torch.tensor(widths[:BATCH])


def make(queue: mp.Queue, seed: int) -> None:
    """Fill the queue with batches for ever."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    while True:
        queue.put(batch(rng))


def loss_of(said: Tensor, truth: Tensor) -> Tensor:
    """Negative log likelihood of Student's t, up to a constant."""
    mean, log_variance = said[:, 0], said[:, 1]
    squares = (mean - truth).square() * torch.exp(-log_variance)
    return (0.5 * log_variance + (FREEDOM + 1) / 2 * torch.log1p(squares / FREEDOM)).mean()


def train(network: PsfNet, minutes: float, rate: float, seed: int) -> None:
    """Teach `network` in place."""
    queue: mp.Queue = mp.Queue(12)
    maker = mp.Process(target=make, args=(queue, seed), daemon=True)
    maker.start()
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=1e-3)
    begun, steps, errors = time.monotonic(), 0, []
    while (done := (time.monotonic() - begun) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (steps + 1) / 100) * 0.5 * (1 + np.cos(np.pi * done)) + 1e-5
        images, widths = queue.get()
        said = network(images)
        loss = loss_of(said, widths)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        steps += 1
        errors.append(float((said[:, 0] - widths).detach().abs().median()))
        if steps % 100 == 0:
            print(f"{steps} steps, {100 * done:.0f} %: median error of ln FWHM {np.mean(errors):.3f}", flush=True)
            errors = []
    maker.terminate()


def save(network: torch.nn.Module, path: Path) -> None:
    """Weights in half precision."""
    held = {name: value.numpy().astype(np.float16) for name, value in network.state_dict().items()}
    np.savez_compressed(path, **held)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=90.0)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="weights to go on from")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    network = PsfNet().to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    if options.start:
        with np.load(options.start) as held:
            network.load_state_dict({name: torch.from_numpy(held[name].astype(np.float32)) for name in held.files})
    train(network, options.minutes, options.rate, options.seed + 1000)
    save(network, options.out)
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
