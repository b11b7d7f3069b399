"""Second moments of the inputs of a model's layers, block by block or during a training step."""

import copy
import math
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from ast_sparse.errors import UserError
from ast_sparse.storage.model_kind import without_cache

Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]  # arguments of a block, without its hidden states
_WITHOUT_TEXT = "Use the method magnitude; to round to 4 bits, --calibration none."


class InputStatistics:
    """Second moments of the inputs of a layer, as running means over sequences, computed as in the published code.

    Attributes:
        mean_squares: `[in]` float32, mean over the sequences of `Σ_tokens x_j²` (Wanda); unused with `hessian`.
        hessian: `[in, in]` float32, `2 X Xᵀ / sequences` (SparseGPT); None unless asked for.
        sequences: number of sequences so far.
    """

    def __init__(self, in_features: int, with_hessian: bool, device: torch.device) -> None:
        self.mean_squares = torch.zeros(in_features, device=device)
        self.hessian = torch.zeros(in_features, in_features, device=device) if with_hessian else None
        self.sequences = 0

    def to(self, device: torch.device) -> "InputStatistics":
        """The same statistics on a device; themselves if they are there."""
        if self.mean_squares.device == device:
            return self
        moved = copy.copy(self)
        moved.mean_squares = self.mean_squares.to(device)
        moved.hessian = None if self.hessian is None else self.hessian.to(device)
        return moved

    @torch.no_grad()
    def add(self, inputs: Tensor) -> None:
        """Add the inputs `[sequences, tokens, in]` (or `[tokens, in]`) of a forward pass, any float dtype."""
        with torch.autocast(inputs.device.type, enabled=False):  # sums in bf16 give no positive definite Hessian
            self._add(inputs)

    def _add(self, inputs: Tensor) -> None:
        columns = inputs.reshape(-1, inputs.shape[-1]).float().t()
        before = self.sequences
        self.sequences += inputs.shape[0] if inputs.dim() > 2 else 1
        if self.hessian is None:
            self.mean_squares *= before / self.sequences
            self.mean_squares += columns.norm(dim=1).square() / self.sequences
        else:
            self.hessian *= before / self.sequences
            columns = math.sqrt(2 / self.sequences) * columns
            self.hessian += columns @ columns.t()

    @property
    def input_norm(self) -> Tensor:
        """`‖x_j‖₂` up to a factor, `[in]`: the `input_norm` of `wanda_mask`."""
        return self.squares.sqrt()

    @property
    def squares(self) -> Tensor:
        """Mean over the sequences of `Σ_tokens x_j²`, `[in]`."""
        return self.mean_squares if self.hessian is None else self.hessian.diagonal() / 2

    def average_over_ranks(self) -> None:
        """Include the inputs of the other ranks, so that all ranks choose the same masks."""
        count = torch.tensor(float(self.sequences), device=self.mean_squares.device)
        for tensor in (self.mean_squares, self.hessian):
            if tensor is not None:
                tensor *= self.sequences
                torch.distributed.all_reduce(tensor)
        torch.distributed.all_reduce(count)
        self.sequences = int(count)
        self.mean_squares /= max(self.sequences, 1)
        if self.hessian is not None:
            self.hessian /= max(self.sequences, 1)


class InputRecorder:
    """Collects `InputStatistics` of layers by forward hooks; layers with the same input tensor share them.

    A forward pass that activation checkpointing repeats counts twice, which scales all sums equally.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        with_hessian: bool,
        twins: Mapping[str, Mapping[str, nn.Module]] | None = None,
    ) -> None:
        self.layers = layers
        self.twins = twins or {}  # by layer name, the other modules that run with its weight
        self.with_hessian = with_hessian
        self._owner: dict[str, str] = {}
        self._sums: dict[str, InputStatistics] = {}
        self._last: tuple[Tensor, str] | None = None
        self._handles: list[RemovableHandle] = []

    def start(self) -> None:
        """Attach the hooks."""
        modules = [(name, [layer, *self.twins.get(name, {}).values()]) for name, layer in self.layers.items()]
        self._handles = [each.register_forward_pre_hook(self._hook(name)) for name, all_ in modules for each in all_]

    def stop(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._last = None

    def statistics(self) -> dict[str, InputStatistics]:
        """By layer name; a layer that was never called is missing. Layers with one input share one object."""
        return {name: self._sums[owner] for name, owner in self._owner.items()}

    def reduced_statistics(self) -> dict[str, InputStatistics]:
        """The same over all ranks of a distributed run; a layer counts even if only some ranks called it."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            widths = {owner: len(statistics.mean_squares) for owner, statistics in self._sums.items()}
            everywhere: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everywhere, (self._owner, widths))
            device = next(next(iter(self.layers.values())).parameters()).device
            self._owner = {name: owner for owners, _ in everywhere for name, owner in owners.items()}
            for owner, width in sorted({item for _, known in everywhere for item in known.items()}):
                if owner not in self._sums:
                    self._sums[owner] = InputStatistics(width, self.with_hessian, device)
                self._sums[owner].average_over_ranks()
        return self.statistics()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            inputs = args[0]
            if self._last is not None and self._last[0] is inputs:  # q, k and v; gate and up
                owner = self._last[1]
            else:
                owner = name
                self._last = (inputs, name)
            if self._owner.setdefault(name, owner) != name:
                return
            if name not in self._sums:
                self._sums[name] = InputStatistics(inputs.shape[-1], self.with_hessian, inputs.device)
            self._sums[name].add(inputs)

        return hook


class BlockSteps:
    """What a caller of `calibrate_blocks` does with whole blocks; here nothing.

    Attributes:
        needs_targets: run the dense model beside the sparse one, for `finish`.
    """

    needs_targets = False

    def restore(self, name: str, block: nn.Module) -> bool:
        """Whether the block was pruned in an earlier try, and has been made so again."""
        return False

    def finish(
        self, name: str, block: nn.Module, inputs: Sequence[Tensor], targets: Sequence[Tensor], call: Call
    ) -> None:
        """Called when the layers of a block are pruned.

        Args:
            name: of the block.
            block: on the device where blocks run.
            inputs: of the sparse model, `[1, tokens, width]` for each sequence, on the device of the model.
            targets: outputs of the dense block from the dense model's inputs, shaped as `inputs`, if they are needed.
            call: the other arguments of the block.
        """


class _Stop(Exception):
    """Ends a forward pass once the inputs of the first block are known."""


@torch.no_grad()
def calibrate_blocks(
    model: nn.Module,
    blocks: Mapping[str, nn.Module],
    layers: Mapping[str, nn.Module],
    samples: Tensor,
    with_hessian: bool,
    device: torch.device | None = None,
    steps: BlockSteps | None = None,
    changes: bool = True,
) -> Iterator[dict[str, InputStatistics | None]]:
    """Statistics of the layers, one decoder block at a time; None for a layer that no token reached.

    When the caller asks for the next block, this one is run again, so that the next one is calibrated on the output of
    the pruned layers, unless it says that it changes nothing. In memory at a time: one block on `device`, the
    activations between two blocks, and the statistics of one block.

    Args:
        blocks: the decoder blocks, in the order in which they run.
        layers: the layers to measure, by name; a name starts with that of its block.
        samples: `[sequences, tokens]` int64.
        with_hessian: collect the Hessian for SparseGPT.
        device: where blocks run; default: where they are.
        steps: what to do with whole blocks; a restored block yields nothing. If it needs targets, the hidden states of
            the dense model are in memory, too.
        changes: False: blocks stay as they are, and are run once.

    Raises:
        UserError: the blocks do not run one after the other, or a token has no embedding.
    """
    check_tokens(model, samples)
    was_training, steps = model.training, steps or BlockSteps()
    model.eval()
    try:
        hidden, calls = _block_inputs(model, blocks, samples)
        dense = list(hidden) if steps.needs_targets else []
        for index, (name, block) in enumerate(blocks.items()):
            home = next(block.parameters()).device
            place = device or home
            block.to(place)
            inside = {layer: module for layer, module in layers.items() if layer.startswith(f"{name}.")}
            call = _moved(calls[name], place)
            _advance(dense, block, place, call)
            is_restored = steps.restore(name, block)
            if not is_restored:
                yield _inputs_of(block, inside, with_hessian, hidden, place, call, advances=not changes)
                steps.finish(name, block, hidden, dense, call)
            if index + 1 < len(blocks) and (changes or is_restored):
                _advance(hidden, block, place, call)
            block.to(home)
    finally:
        model.train(was_training)


def check_tokens(model: Any, tokens: Tensor) -> None:
    """Raise UserError for a token that the model has no embedding for."""
    largest = int(tokens.max()) if tokens.numel() else 0
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    rows = getattr(embedding, "num_embeddings", None)  # more than `vocab_size` in a few families
    if rows is not None and largest >= rows:
        raise UserError(
            f"The text has the token {largest}, but the model has {rows} embeddings. Use the model's own tokenizer."
        )


def _inputs_of(
    block: nn.Module,
    layers: Mapping[str, nn.Module],
    with_hessian: bool,
    hidden: list[Tensor],
    place: torch.device,
    call: Call,
    advances: bool,
) -> dict[str, InputStatistics | None]:
    """The statistics of a block's layers from all sequences, whose hidden states may be replaced by its outputs."""
    recorder = InputRecorder(layers, with_hessian)
    recorder.start()
    for i, sample in enumerate(hidden):
        output = run_block(block, sample.to(place), call)
        if advances:
            hidden[i] = output.to(sample.device)
    recorder.stop()
    seen = recorder.statistics()
    return {layer: seen.get(layer) for layer in layers}


def _advance(hidden: list[Tensor], block: nn.Module, place: torch.device, call: Call) -> None:
    """Replace hidden states by those after a block, one at a time: there is room for one copy of all."""
    for i, sample in enumerate(hidden):
        hidden[i] = run_block(block, sample.to(place), call).to(sample.device)


def _block_inputs(
    model: nn.Module, blocks: Mapping[str, nn.Module], samples: Tensor
) -> tuple[list[Tensor], dict[str, Call]]:
    """The input of the first block for each sample, and the other arguments of every block: masks, positions."""
    calls: dict[str, Call] = {}
    again: dict[str, Call] = {}
    hidden: list[Tensor] = []
    first = next(iter(blocks))

    def remember(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kwargs = dict(kwargs)
            if not args and "hidden_states" not in kwargs:
                raise UserError(f"`{name}` is not called with hidden states, so it cannot be calibrated on its own.")
            if index < 2 and name in (again if index else calls):
                raise _out_of_order(model)  # it runs its blocks several times
            inputs = args[0] if args else kwargs.pop("hidden_states")
            if name == first:
                hidden.append(inputs)
            if index > 1:
                raise _Stop
            (again if index else calls)[name] = (args[1:], kwargs)

        return hook

    device = next(model.parameters()).device
    handles = [block.register_forward_pre_hook(remember(name), with_kwargs=True) for name, block in blocks.items()]
    try:
        for index in range(len(samples)):  # the first records the calls of all blocks, the second compares
            with suppress(_Stop):
                model(input_ids=samples[index : index + 1].to(device), **without_cache(model))
    finally:
        for handle in handles:
            handle.remove()
    if list(calls) != list(blocks):
        raise _out_of_order(model)
    for name, call in again.items():
        pairs = zip(tree_leaves(calls[name]), tree_leaves(call), strict=True)
        if any(isinstance(first, Tensor) and not torch.equal(first, second) for first, second in pairs):
            raise UserError(
                f"`{name}` of {type(model).__name__} takes inputs other than hidden states from the text, so it cannot "
                f"be calibrated on its own. {_WITHOUT_TEXT}"
            )
    for name, call in calls.items():  # transformers hands keys and values from block to block in a UserDict
        if any(isinstance(value, UserDict) and value for value in tree_leaves(call)):
            raise UserError(
                f"`{name}` of {type(model).__name__} shares keys and values with other blocks, so it cannot be "
                f"calibrated on its own. {_WITHOUT_TEXT}"
            )
    return hidden, calls


def _out_of_order(model: nn.Module) -> UserError:
    return UserError(
        f"{type(model).__name__} does not run its blocks one after the other, each once, so it cannot be calibrated "
        f"block by block. {_WITHOUT_TEXT}"
    )


def run_block(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """The hidden states after a block."""
    output = block(hidden, *call[0], **call[1])
    return output[0] if isinstance(output, tuple | list) else output


def _moved(call: Any, device: torch.device) -> Any:
    return tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, call)
