"""Engines of many processes: DDP (replicas) and DeepSpeed (ZeRO: states, gradients and weights sharded).

Both run inside a process group that exists (Ray Train makes it). A player's own loss calls the module that `prepare`
returns; everybody else's module is called directly, its parameters frozen meanwhile, so no engine's hooks meet a
gradient that is not theirs.
"""

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from aldm.engine import PlainEngine, make_optimizer
from aldm.errors import UserError
from aldm.players import Player
from aldm.precision import arithmetic
from pipelines.sharded_states import STEPS_FILE, base_optimizer, read_moments, read_sharded_weights, write_states


class DDPEngine(PlainEngine):
    """Whole replicas whose gradients are averaged over the ranks (torch DistributedDataParallel)."""

    def __init__(self, device: torch.device | str = "cpu", precision: str = "fp32") -> None:
        """Join the process group that exists."""
        super().__init__(device, precision)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def prepare(self, player: Player) -> nn.Module:
        """Wrap the module; rank 0's weights go to all ranks. Buffers are kept equal by who changes them."""
        super().prepare(player)
        devices = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(player.module, device_ids=devices, forward_sync_buffers=False)

    def reduce(self, value: Tensor) -> Tensor:
        """The mean over all ranks."""
        return mean_over_ranks(value)

    def save(self, folder: Path) -> None:
        """Rank 0 writes engine.pt, from which any number of workers can go on.

        The ranks are equal, but for the statistics of batch norms and CycleGAN's pools: rank 0's are kept.
        """
        if self.rank == 0:
            super().save(folder)

    def load(self, folder: Path) -> None:
        """Read engine.pt on every rank.

        Raises:
            UserError: another engine wrote the checkpoint.
        """
        if (folder / STEPS_FILE).is_file():
            raise UserError(f"{folder} was written by --engine deepspeed: resume with that")
        super().load(folder)


class DeepSpeedEngine:
    """DeepSpeed's ZeRO: stage 1 shards optimizer states, 2 gradients too, 3 weights too; 0 shards nothing.

    Weights stay in fp32 and bf16 is autocast, as in the other engines: norms and the code search keep their precision.

    Args:
        device: of this rank.
        precision: fp32, tf32 or bf16.
        zero_stage: 0 to 3.
        batch_size: of all ranks together.
        resume_from: the checkpoint to go on from, if any; of whatever stage and number of ranks.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        precision: str = "fp32",
        *,
        zero_stage: int = 1,
        batch_size: int = 1,
        resume_from: Path | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._precision, self._zero_stage, self._batch_size = precision, zero_stage, batch_size
        self._players: dict[str, Player] = {}
        self._engines: dict[str, Any] = {}
        self._squares: dict[str, Tensor] = {}
        self._resume_from = resume_from
        _start_deepspeed()

    def prepare(self, player: Player) -> nn.Module:
        """Hand module and optimizer to DeepSpeed."""
        import deepspeed

        if self._resume_from is not None:  # before DeepSpeed shards the weights
            read_sharded_weights(self._resume_from, player.name, player.module)
        player.module.to(self.device).train()
        for parameter in player.module.parameters():  # its first broadcast looks at weights as rows of bytes
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        engine, *_ = deepspeed.initialize(
            model=player.module, optimizer=make_optimizer(player), config=self._config(player)
        )
        self._players[player.name], self._engines[player.name] = player, engine
        for parameter in player.module.parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient, name=player.name: self._note(name, gradient))
        return engine

    def autocast(self) -> AbstractContextManager[Any]:
        """That of the precision: bf16 autocast, or nothing."""
        return arithmetic(self._precision, self.device)

    def backward(self, player: Player, loss: Tensor) -> None:
        """Backward through DeepSpeed, which reduces the gradients on the way."""
        self._squares[player.name] = torch.zeros((), device=self.device)
        self._engines[player.name].backward(loss)

    def step(self, player: Player, learning_rate: float) -> Tensor:
        """Clip and step.

        Raises:
            FloatingPointError: a gradient of some rank is not finite; nothing was changed.
        """
        engine = self._engines[player.name]
        local = self.reduce(self._squares[player.name])
        if not torch.isfinite(local):
            raise FloatingPointError(f"the gradient of {player.name} has norm {float(local.sqrt())}")
        norm = _gradient_norm(player.module) if self._zero_stage == 0 else None
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate
        engine.step()
        return torch.as_tensor(engine.get_global_grad_norm() if norm is None else norm, device=self.device).float()

    def reduce(self, value: Tensor) -> Tensor:
        """The mean over all ranks."""
        return mean_over_ranks(value)

    def whole(self, parameters: Sequence[Tensor]) -> AbstractContextManager[Any]:
        """Gather sharded parameters inside the block."""
        if self._zero_stage < 3:
            return contextlib.nullcontext()
        import deepspeed

        gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(list(parameters))
        return gathered

    def weights(self, player: Player) -> dict[str, Tensor]:
        """The whole weights, gathered one by one where they are sharded."""
        state = dict(player.module.state_dict())
        if self._zero_stage == 3:
            for name, parameter in player.module.named_parameters():
                # between turns nothing is in use, but DeepSpeed forgets to let go of a layer that a backward pass
                # went through twice
                parameter.ds_active_sub_modules.clear()  # type: ignore[attr-defined]
                with self.whole([parameter]):
                    state[name] = parameter.detach().clone()
        return state

    def memory_bytes(self) -> dict[str, int]:
        """Return the bytes of weights and optimizer states that this rank holds, from DeepSpeed's own tensors.

        Gradients and DeepSpeed's buffers are left out.
        """
        weights = states = 0
        for name, engine in self._engines.items():
            for parameter in self._players[name].module.parameters():
                weights += _nbytes(getattr(parameter, "ds_tensor", parameter))
            optimizer = base_optimizer(engine)
            states += sum(_nbytes(value) for state in optimizer.state.values() for value in _tensors(state))
        return {"weights": weights, "optimizer_states": states}

    def save(self, folder: Path) -> None:
        """Write this rank's share of every player, all ranks at the same time."""
        write_states(folder, self._engines)

    def load(self, folder: Path) -> None:
        """Read the optimizers' states; `prepare` has read the weights."""
        assert folder == self._resume_from, "the engine was made for another checkpoint"
        read_moments(folder, self._engines)

    def _config(self, player: Player) -> dict[str, Any]:
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": self._batch_size // self.world_size,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": player.config.gradient_clip or 0.0,
            "zero_optimization": {"stage": self._zero_stage},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        if self._precision == "bf16":
            config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        return config

    def _note(self, name: str, gradient: Tensor) -> None:
        """Add up the squares of this rank's gradients: whether they are finite is known before the step."""
        self._squares[name] = self._squares[name] + gradient.float().square().sum()


def mean_over_ranks(value: Tensor) -> Tensor:
    """Return the mean of a floating-point tensor over all ranks."""
    if dist.get_world_size() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def _start_deepspeed() -> None:
    """Join the process group; on a CPU without DeepSpeed's shared-memory kernel, which would ask for a compiler."""
    import deepspeed

    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)


def _gradient_norm(module: nn.Module) -> Tensor:
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def _tensors(state: dict[str, Any]) -> list[Tensor]:
    return [value for value in state.values() if isinstance(value, Tensor)]


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
