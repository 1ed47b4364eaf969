"""The training loop: plain PyTorch on one process, or one of several in `torch.distributed`.

Everything random is a function of seed, step and rank: the crops, the augmentation, and torch's
generators, which are seeded in each step. So a run that is resumed from a checkpoint continues
exactly as if it had not been interrupted.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from latentmill.errors import ConfigError, TrainingError
from latentmill.models.families.trained import FOLDER, Trained
from latentmill.sources.open import open_source
from latentmill.text.log import get_logger
from latentmill.training.architectures import Trainable, build, crop_samples
from latentmill.training.checkpoints import Checkpoints
from latentmill.training.crops import AudioBatch, Crops, list_items
from latentmill.training.export import write_model
from latentmill.training.linearity import (
    LinearityAugmentation,
    LinearityBatch,
    plain_batch,
    random_numbers,
)
from latentmill.training.metrics import MetricsLog
from latentmill.training.settings import TrainSettings

_SEEDS = 2  # stream of the random numbers that seed torch

_log = get_logger("training")


@dataclass(frozen=True)
class TrainProcess:
    """Where the loop runs.

    Attributes:
        rank: Number of this process.
        device: Its device.
        wrap: Prepares the network for several processes (DDP).
        report: Gets the metrics of a logged step.
    """

    rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    wrap: Callable[[nn.Module], nn.Module] = field(default=lambda network: network)
    report: Callable[[dict[str, float]], None] = field(default=lambda metrics: None)


class Ema:
    """Moving average of a network's parameters; buffers are copied.

    The decay is min(decay, (1 + n) / (10 + n)) after n updates, so that a short run forgets its
    random start.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.values = {n: t.detach().clone() for n, t in network.state_dict().items()}

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                self.values[name].lerp_(tensor, 1 - decay)
            else:
                self.values[name].copy_(tensor)

    @contextlib.contextmanager
    def swapped(self, network: nn.Module) -> Iterator[None]:
        """The network with the averaged weights."""
        own = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
        network.load_state_dict(self.values)
        try:
            yield
        finally:
            network.load_state_dict(own)


class Trainer:
    """One process of a training run. `train` resumes from the newest checkpoint."""

    def __init__(self, settings: TrainSettings, place: TrainProcess | None = None) -> None:
        self.settings, self.place = settings, place or TrainProcess()
        self.out = Path(settings.out).absolute()
        items = list_items(open_source(settings))
        linearity = settings.linearity
        if linearity and linearity.mixing != "none" and len(items) < 2:
            raise ConfigError(
                f"{settings.source} has only one item, {items[0].key}, and mixtures need at least "
                "two: add audio, set mixing to none, or use --no-linearity."
            )
        torch.manual_seed(settings.seed)
        self.network: Trainable = build(settings)
        if self.place.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        self.network.to(self.place.device)
        self.optimizer = torch.optim.RAdam(
            [p for p in self.network.parameters() if p.requires_grad], lr=settings.learning_rate
        )
        self.ema = Ema(self.network, settings.ema)
        self.step = 0
        self._checkpoints = Checkpoints(self.out, settings.keep_checkpoints)
        self._checkpoints.load(settings, self._restore)
        self._linearity = None
        if linearity:
            self._linearity = LinearityAugmentation(
                linearity, steps=settings.steps, seed=settings.seed, rank=self.place.rank
            )
        spec = self.network.spec
        self._crops = Crops(
            items,
            sample_rate=spec.sample_rate,
            channels=spec.channels,
            samples=crop_samples(spec, settings.crop_seconds),
            batch_size=settings.batch_size,
            quieter_db=settings.quieter_db,
            seed=settings.seed,
            rank=self.place.rank,
        )

    def train(self) -> None:
        """Train to the last step.

        Raises:
            TrainingError: A loss or gradient is not finite.
        """
        settings = self.settings
        network = self.place.wrap(self.network)
        with contextlib.ExitStack() as stack:
            metrics = None
            if self.place.rank == 0:
                self._checkpoints.clear_scratch()
                metrics = stack.enter_context(
                    MetricsLog(self.out, start=self.step, tensorboard=settings.tensorboard)
                )
            batches = self._crops.batches(self.step, settings.steps, settings.load_threads)
            stack.enter_context(contextlib.closing(batches))
            start = time.perf_counter()
            for batch in batches:
                waited = time.perf_counter() - start
                loss = self._step(network, batch)
                self.step += 1
                self._log(metrics, loss, waited, time.perf_counter() - start)
                if self.step % settings.checkpoint_every == 0 or self.step == settings.steps:
                    self._save()
                start = time.perf_counter()
        if self.place.rank == 0 and not (self.out / FOLDER).exists():
            self.export()  # the model of a finished run was deleted

    def _step(self, network: nn.Module, crops: AudioBatch) -> Tensor:
        settings, device = self.settings, self.place.device
        torch.manual_seed(_torch_seed(settings.seed, self.step, self.place.rank))
        batch = self._augmented(crops.audio.to(device, non_blocking=True))
        self.network.step = self.step
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(settings, self.step)
        half = settings.precision == "bf16"
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss: Tensor = network(batch)
        self._check(loss, crops, "loss")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), settings.clip_norm)
        self._check(norm, crops, "gradient")
        self.optimizer.step()
        self.ema.update(self.network)
        return loss.detach()

    def _augmented(self, audio: Tensor) -> LinearityBatch:
        return self._linearity(audio, self.step) if self._linearity else plain_batch(audio)

    def _check(self, value: Tensor, crops: AudioBatch, what: str) -> None:
        if not math.isfinite(float(value.detach())):
            raise TrainingError(
                f"the {what} of step {self.step} is {float(value.detach())}: training stopped; "
                f"look at its audio ({', '.join(crops.names)}), or lower learning_rate."
            )

    def _log(self, metrics: MetricsLog | None, loss: Tensor, waited: float, took: float) -> None:
        """Log the step that has just ended, with the mean loss of all processes."""
        step = self.step - 1
        if step % self.settings.log_every and self.step != self.settings.steps:
            return
        if dist.is_available() and dist.is_initialized():
            loss = loss.clone()
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        values = {
            "loss": float(loss),
            "learning_rate": learning_rate(self.settings, step),
            "seconds": took,
            "wait_share": waited / took,
        }
        if metrics is not None:
            metrics.write(step, values)
            _log.info("step %d of %d: loss %.4f", step, self.settings.steps, values["loss"])
        self.place.report({"step": step, **values})

    def _restore(self, step: int, state: dict[str, Any]) -> None:
        """Continue from a checkpoint; an error of `LOAD_ERRORS` if it does not fit the network."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        moments = self.optimizer.state
        if not moments or any(s["exp_avg"].shape != p.shape for p, s in moments.items()):
            raise ValueError("its optimizer is of another network")
        if {n: t.shape for n, t in state["ema"].items()} != {
            n: t.shape for n, t in self.ema.values.items()
        }:
            raise ValueError("its averaged weights are of another network")
        self.ema.values = {n: t.to(self.place.device) for n, t in state["ema"].items()}
        self.step = self.ema.updates = step
        _log.info("resuming at step %d of %d", step, self.settings.steps)

    def _save(self) -> None:
        """Write the model with averaged weights and a checkpoint, on the first process."""
        if self.place.rank == 0:
            state: dict[str, Any] = {
                "step": self.step,
                "settings": self.settings.decisive(),
                "network": self.network.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "ema": self.ema.values,
            }
            self.export()  # first: a run that is interrupted here exports again
            self._checkpoints.save(self.step, state)

    def export(self) -> None:
        """Write the folder `model`."""
        linearity = self.settings.linearity
        trained = Trained(
            architecture=self.network.architecture,
            network=self.network.shape(),
            run=self.settings.run,
            step=self.step,
            linearity=linearity.model_dump(mode="json") if linearity else None,
        )
        with self.ema.swapped(self.network):
            write_model(self.out, self.network, trained)


def learning_rate(settings: TrainSettings, step: int) -> float:
    """The rate of a step: a linear warm-up, then half a period of a cosine."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    weight = (1 + math.cos(math.pi * progress)) / 2
    low = settings.final_learning_rate
    return low + (settings.learning_rate - low) * weight


def _torch_seed(seed: int, step: int, rank: int) -> int:
    return int(random_numbers(seed, step, rank, 1, _SEEDS)[0] * 2**53)
