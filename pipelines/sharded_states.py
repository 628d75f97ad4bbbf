"""What resuming a DeepSpeed training needs, written by all ranks at once and read by any number of ranks.

Every parameter's weight and Adam moments are gathered whole, one parameter at a time, and kept by one rank in turn; so
each rank writes its share of whole tensors, and neither the number of ranks nor the ZeRO stage is written into the
files. Of DeepSpeed's insides this module knows only where an optimizer's flat partitions lie; the version is pinned.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from aldm.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")
WEIGHT = "weight"
STEPS_FILE = "deepspeed.json"
"""Number of ranks that wrote the folder, and of optimizer steps of every player.

The folder may hold files of more ranks: those of an attempt at the same step that died and whose ranks were more.
"""


def write_states(folder: Path, engines: dict[str, Any]) -> None:
    """Write this rank's share of every player; all ranks call it.

    Args:
        folder: of the checkpoint.
        engines: DeepSpeed's engine of every player.
    """
    rank = dist.get_rank()
    for name, engine in engines.items():
        own = {key: tensor for place, key, tensor in _whole_tensors(engine) if place % dist.get_world_size() == rank}
        save_file(own, folder / _file_name(name, rank))
    if rank == 0:
        steps = {name: _steps(engine) for name, engine in engines.items()}
        record = {"world_size": dist.get_world_size(), "steps": steps}
        (folder / STEPS_FILE).write_text(json.dumps(record) + "\n")


def read_sharded_weights(folder: Path, name: str, module: nn.Module) -> None:
    """Load a player's weights and buffers into its module, before DeepSpeed takes it.

    Raises:
        UserError: the folder was not written by this module, or it holds another model.
    """
    states = States(folder, name)
    for key, tensor in module.state_dict().items():
        tensor.copy_(states.tensor(key, WEIGHT))


def read_moments(folder: Path, engines: dict[str, Any]) -> None:
    """Load the optimizers' states into DeepSpeed's engines, each rank its own part."""
    steps = json.loads((folder / STEPS_FILE).read_text())["steps"]
    for name, engine in engines.items():
        if steps[name] == 0:
            continue
        states = States(folder, name)
        _make_moments(engine, steps[name])
        for key, parameter in engine.module.named_parameters():
            if parameter.requires_grad:
                for moment in MOMENTS:
                    _set_moment(engine, parameter, moment, states.tensor(key, moment))


class States:
    """The whole tensors of one player, read one at a time."""

    def __init__(self, folder: Path, name: str) -> None:
        if not (folder / STEPS_FILE).is_file():
            raise UserError(f"{folder} was not written by --engine deepspeed: resume with the engine that wrote it")
        self.folder, self.name = folder, name
        self._files: dict[str, Path] = {}
        for rank in range(json.loads((folder / STEPS_FILE).read_text())["world_size"]):
            file = folder / _file_name(name, rank)
            if not file.is_file():
                raise UserError(f"{folder} lacks {file.name}: resume from another checkpoint")
            with safe_open(file, "pt") as opened:
                self._files |= dict.fromkeys(opened.keys(), file)

    def tensor(self, key: str, kind: str) -> Tensor:
        """Return a parameter's weight or moment."""
        file = self._files.get(f"{key}|{kind}")
        if file is None:
            raise UserError(f"{self.folder} holds no {kind} of {key} of {self.name}: resume from another checkpoint")
        with safe_open(file, "pt") as opened:
            tensor: Tensor = opened.get_tensor(f"{key}|{kind}")
        return tensor


def flat_partitions(engine: Any) -> list[Tensor]:
    """Return the tensors whose states the optimizer keeps on this rank: flat partitions, or parameters at stage 0."""
    zero = engine.optimizer
    for attribute in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):  # stage 3, stages 1 and 2
        if hasattr(zero, attribute):
            return list(getattr(zero, attribute))
    return [parameter for group in zero.param_groups for parameter in group["params"]]


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """Return the torch optimizer inside DeepSpeed's."""
    found: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return found


def _whole_tensors(engine: Any) -> Iterator[tuple[int, str, Tensor]]:
    """Yield (place, key|kind, whole tensor on the CPU); all ranks go through it together."""
    import deepspeed

    module, stepped = engine.module, _steps(engine) > 0
    place = 0
    for key, parameter in module.named_parameters():
        sharded = [parameter] if hasattr(parameter, "ds_id") else []
        with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
            yield place, f"{key}|{WEIGHT}", parameter.detach().to("cpu", copy=True).contiguous()
        if stepped and parameter.requires_grad:
            for moment in MOMENTS:
                whole = _moment(engine, parameter, moment)
                yield place, f"{key}|{moment}", whole.to("cpu", copy=True).view(_shape(parameter)).contiguous()
        place += 1
    for key, buffer in module.named_buffers():
        yield place, f"{key}|{WEIGHT}", buffer.detach().to("cpu", copy=True).contiguous()
        place += 1


def _file_name(player: str, rank: int) -> str:
    return f"states-{player}-{rank:05d}.safetensors"


def _steps(engine: Any) -> int:
    states = base_optimizer(engine).state
    return max((int(states[flat]["step"]) for flat in flat_partitions(engine) if flat in states), default=0)


def _moment(engine: Any, parameter: Tensor, moment: str) -> Tensor:
    from deepspeed.utils import safe_get_full_optimizer_state

    if engine.zero_optimization_stage() == 0:
        whole: Tensor = base_optimizer(engine).state[parameter][moment]
    else:
        whole = safe_get_full_optimizer_state(parameter, moment)
    return whole


def _set_moment(engine: Any, parameter: Tensor, moment: str, value: Tensor) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    value = value.to(engine.device)
    if engine.zero_optimization_stage() == 0:
        base_optimizer(engine).state[parameter][moment].copy_(value)
    elif hasattr(parameter, "ds_tensor"):
        length = parameter.ds_tensor.numel()
        padded = nn.functional.pad(value.flatten(), (0, length * dist.get_world_size() - value.numel()))
        safe_set_local_optimizer_state(parameter, padded.narrow(0, length * dist.get_rank(), length), moment)
    else:
        safe_set_full_optimizer_state(parameter, value, moment)


def _make_moments(engine: Any, steps: int) -> None:
    """Give the optimizer the states that its first step would make."""
    optimizer = base_optimizer(engine)
    for flat in flat_partitions(engine):
        moments = {moment: torch.zeros_like(flat) for moment in MOMENTS}
        optimizer.state[flat] = {"step": torch.tensor(float(steps), device=flat.device), **moments}
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _shape(parameter: Tensor) -> torch.Size:
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape
