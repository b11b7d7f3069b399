"""What a planned run costs on given hardware: memory needed and available, FLOPs, hours, and settings that fit."""

import psutil  # comes with accelerate
import torch
from transformers.pytorch_utils import Conv1D

from ast_sparse.errors import UserError, one_line
from ast_sparse.kernels.bf16 import multiplies_in_bf16
from ast_sparse.planning.fit import find_fit
from ast_sparse.planning.host import host_memory
from ast_sparse.planning.masked_weights import settle_masked_weights
from ast_sparse.planning.memory import Memory
from ast_sparse.planning.plan import Hardware, Plan
from ast_sparse.planning.setup import Setup
from ast_sparse.planning.sizes import Term
from ast_sparse.training.callbacks.metrics import peak_flops

GIB = 2**30
USABLE = 0.92  # of a GPU: the rest is for its context, communication and the gaps between allocated blocks
_GPU_GIB, _GPU_FLOPS, _GPU = 80, 989.4e12, "an H100 SXM"


class Budget:
    """Memory and time of a plan."""

    def __init__(self, plan: Plan, setup: Setup, hardware: Hardware) -> None:
        self.plan = plan
        self.setup = setup
        self.on_cpu = setup.on_cpu
        self.has_gpu = torch.cuda.is_available() and not setup.on_cpu
        self.hardware = hardware
        self.memory: Memory | None = None
        self.reason = ""  # why the memory is unknown
        self.masked_weights: str | None = None  # the line on them
        assert plan.memory is not None
        try:
            self.setup, self.masked_weights = settle_masked_weights(plan.memory, setup, self.limit)
            self.memory = plan.memory(self.setup)
        except Exception as error:  # whatever a model's code raises if it needs data
            self.reason = one_line(error, 200)

    @property
    def device_bytes(self) -> float:
        """Memory of a device in bytes."""
        if self.hardware.device_memory is not None:
            return self.hardware.device_memory * GIB
        if self.on_cpu:
            return float(psutil.virtual_memory().total)
        return float(torch.cuda.get_device_properties(0).total_memory) if self.has_gpu else float(_GPU_GIB * GIB)

    @property
    def limit(self) -> float:
        """Bytes of a device that a run may use."""
        return self.device_bytes * (1 if self.on_cpu else USABLE)

    def lines(self) -> list[str]:
        """FLOPs, hours and memory as text."""
        chosen = [] if self.masked_weights is None else [self.masked_weights]
        return [*self._cost_lines(), *chosen, *self._memory_lines(), *self._host_lines()]

    def check(self) -> None:
        """Raise UserError, with settings that fit, if the run needs more memory than a device has."""
        if self.memory is None or self.memory.total <= self.limit:
            return
        assert self.plan.memory is not None
        student = self.plan.memory.student
        can_shard = not self.on_cpu and not any(isinstance(module, Conv1D) for module in student.modules())
        can_halve = not self.on_cpu or multiplies_in_bf16(torch.device("cpu"))[0]
        can = dict(can_shard=can_shard, can_halve=can_halve, can_offload=not self.on_cpu)
        can["can_recompute"] = student.supports_gradient_checkpointing
        fit = find_fit(self.plan.memory, self.setup, self.limit, **can)
        needs = f"The run needs {_shown(self.memory.total)} per device, and {_shown(self.limit)} can be used."
        if fit is None:
            raise UserError(f"{needs} No settings make it fit. Use devices with more memory, or a smaller model.")
        settings = ", ".join(fit.settings(self.setup))
        raise UserError(f"{needs} It fits with {settings}: {_shown(fit.memory.total)} per device.")

    def _cost_lines(self) -> list[str]:
        per_step = self.plan.flops_per_token * self.plan.tokens_per_step
        steps = self.plan.steps
        lines = [f"FLOPs: {per_step:.3g} per step" + ("" if steps is None else f", {steps * per_step:.3g} in all")]
        peak = self._peak()
        if peak is None:
            return [*lines, "time: the peak of the device is unknown; give --peak-tflops"]
        rate = self.setup.world_size * peak[0] * self.hardware.mfu
        span = f"{1000 * per_step / rate / 3600:,.1f} hours for 1,000 steps"
        span = span if steps is None else f"{steps * per_step / rate / 3600:,.1f} hours"
        devices = f"{self.setup.world_size} x {peak[0] / 1e12:g} TFLOP/s{peak[1]}"
        return [*lines, f"time: {span}, if {self.hardware.mfu:.0%} of {devices} are used (MFU, assumed)"]

    def _peak(self) -> tuple[float, str] | None:
        """Peak FLOPs per second of a device, and the device it belongs to."""
        if self.hardware.peak_tflops is not None:
            return self.hardware.peak_tflops * 1e12, ""
        if self.has_gpu:
            name = torch.cuda.get_device_name(0)
            known = peak_flops(name)
            return None if known is None else (known, f" ({name})")
        return None if self.on_cpu else (_GPU_FLOPS, f" ({_GPU})")

    def _memory_lines(self) -> list[str]:
        if self.memory is None:
            return [f"memory: unknown, because this model cannot run without data ({self.reason})"]
        how = {"none": "", "ddp": ", DDP", "fsdp2": _sharded(self.setup)}[self.setup.sharding]
        whose = f"each of {self.setup.world_size} devices" if self.setup.world_size > 1 else "the device"
        share = "" if self.on_cpu else f"{USABLE:.0%} of {self.device_bytes / GIB:.1f}"
        beside = "Python and its libraries come on top" if self.on_cpu else ""
        rows = {**self.memory.terms, "total": Term(self.memory.total)}
        return [
            f"memory of {whose}{how}, at its peak, the {self.memory.moment}:",
            *(_row(item, term.size, term.how) for item, term in rows.items()),
            _row("can be used", self.limit, f"{share}{beside}"),
            "in all at other moments:",
            *(_row(moment, size) for moment, size in self.memory.others.items()),
        ]

    def _host_lines(self) -> list[str]:
        if self.on_cpu or self.memory is None:
            return []
        model, processes = self.plan.memory, min(self.setup.world_size, self.hardware.node)
        assert model is not None
        terms = host_memory(
            self.setup, model.sizes, model.teacher_sizes, processes, model.calibrates, model.saves_whole
        )
        several = "process" if processes == 1 else "processes"
        return [
            f"host memory of a machine with {processes} {several}; Python, its libraries and the text come on top:",
            *(_row(item, term.size, term.how) for item, term in terms.items()),
        ]


def _sharded(setup: Setup) -> str:
    replicas = setup.world_size // setup.pieces
    return ", FSDP2" if replicas == 1 else f", FSDP2 in {setup.pieces} pieces, {replicas} replicas"


def _row(name: str, size: float, how: str = "") -> str:
    return f"  {name:<40} {size / GIB:8.2f} GiB  {how}".rstrip()


def _shown(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.2f} MiB"
