"""Nets too large for one GPU: each process holds its share of the weights, gradients, moments and averages (torch's FSDP2)."""

from typing import Any

import torch.distributed as dist
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning.strategies import DDPStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from ldm_sg.models.unet import GuidedUNet

CPU_SHARES = hasattr(
    FSDPModule, "set_force_sum_reduction_for_comms"
)  # before torch 2.8, gloo's mean is a sum and nothing says so


class Sharded(DDPStrategy):
    """Lightning's DDP, but with shares. What it saves is whole: the same checkpoint as of any other strategy, on any number of
    processes. It is read, too, before the weights are shared out."""

    def model_to_device(self) -> None:
        """Not yet: in shares only."""

    def configure_ddp(self) -> None:
        assert self.lightning_module is not None
        share_out(self.lightning_module.network)
        super().model_to_device()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return gathered(super().lightning_module_state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return gathered(super().optimizer_state(optimizer))

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"]):
            weights, ids = (
                [p for g in groups for p in g["params"]] for groups in (optimizer.param_groups, saved["param_groups"])
            )
            for weight, moments in ((w, saved["state"].get(i, {})) for w, i in zip(weights, ids)):
                for name, value in moments.items():
                    if value.ndim:  # not the count of steps
                        moments[name] = distribute_tensor(value, weight.device_mesh, weight.placements)
        super().load_optimizer_state_dict(checkpoint)


def share_out(network: nn.Module) -> None:
    """Each block of the UNet by itself, to be whole only while it computes, and what is left."""
    assert isinstance(network, GuidedUNet)
    for block in (*network.unet.down_blocks, network.unet.mid_block, *network.unet.up_blocks, network):
        shared = fully_shard(block)
        if next(shared.parameters()).device.type == "cpu":
            shared.set_force_sum_reduction_for_comms(True)


def put_back(network: nn.Module) -> None:
    """What was whole for a pass without gradients, after which nothing does that, is in shares again."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gathered(state: Any) -> Any:
    """Whole tensors, in the memory of rank 0; None elsewhere, though all must ask."""

    def whole(share: DTensor) -> Any:
        full = share.detach().full_tensor()
        return full.cpu() if dist.get_rank() == 0 else None

    return apply_to_collection(state, DTensor, whole)
