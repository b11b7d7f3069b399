"""How much memory a device needs at each moment of a run: what is always there, and what the moment adds.

Weights, masks, moments, gradients and gathered pieces are counted by their number; what a pass adds is found by running
it on tensors without data (`passes.py`). How FSDP2 gathers and reduces follows torch's `_fsdp_param_group.py`.
"""

from dataclasses import dataclass, field, replace

from transformers import PreTrainedModel

from ast_sparse.config import DistillationConfig
from ast_sparse.distillation.gpu_rows import planned_for_gpu
from ast_sparse.planning.host import held_to_save
from ast_sparse.planning.passes import Passes
from ast_sparse.planning.setup import Setup
from ast_sparse.planning.sizes import MASK_BYTES, MOMENTS_8BIT, Sizes, Term
from ast_sparse.sparsity.model import sparse_layers
from ast_sparse.storage.save_pieces import plain_pieces, stored_pieces

_EAGER_BLOCK = 1 << 18  # elements that an eager update on a CPU takes at a time


@dataclass(frozen=True)
class Memory:
    """Bytes by item at the moment when a device uses most memory.

    Attributes:
        terms: bytes and formula by item.
        moment: the name of that moment.
        others: total bytes at the other moments.
    """

    terms: dict[str, Term]
    moment: str
    others: dict[str, int] = field(default_factory=dict)

    @property
    def items(self) -> dict[str, int]:
        """Bytes by item."""
        return {name: term.size for name, term in self.terms.items()}

    @property
    def total(self) -> int:
        """Bytes of all items."""
        return sum(self.items.values())


class MemoryModel:
    """The memory of a student and its teacher with any setup.

    Args:
        student: already sparse, on the meta device.
        teacher: dense, on the meta device, or None.
        distillation: the loss.
        hessians: bytes of the Hessians for mask refreshes by SparseGPT.
        calibrates: the run makes a start, from text.

    Raises:
        Exception: whatever a model's code raises if it cannot run without data.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        distillation: DistillationConfig | None,
        hessians: int = 0,
        calibrates: bool = False,
    ) -> None:
        self.hessians, self.calibrates = hessians, calibrates
        self.passes = Passes(student, teacher, distillation)
        self.student, self.teacher = student, teacher
        self.sizes = Sizes.of(student)
        self.saves_whole = stored_pieces(plain_pieces(student)[0], student) is None
        self.fixed_masks = any(layer.fixed_mask for layer in sparse_layers(student).values())
        self.teacher_sizes = None if teacher is None else Sizes.of(teacher)

    def __call__(self, setup: Setup) -> Memory:
        """The memory of one device at the moment of a run when it uses most."""
        moments = self.moments(setup)
        totals = {name: sum(term.size for term in terms.values()) for name, terms in moments.items()}
        moment = max(totals, key=lambda name: totals[name])
        terms = {name: term for name, term in moments[moment].items() if term.size}
        return Memory(terms, moment, {name: total for name, total in totals.items() if name != moment})

    def moments(self, setup: Setup) -> dict[str, dict[str, Term]]:
        """What a device holds at each moment, by item."""
        with planned_for_gpu(not setup.on_cpu):
            return self._moments(setup)

    def _moments(self, setup: Setup) -> dict[str, dict[str, Term]]:
        held, gradients = self._held(setup), self._gradients(setup)
        step = {"gradients": Term.of(self.sizes.trained, 4, setup.pieces)}
        masked = "masked weights in 16 bits"
        compressed = {"the same, compressed": Term.of(self.sizes.masked, setup.compressed_bytes)}
        passing = {masked: Term.of(self.sizes.masked, 2 * setup.holds_masked_weights), **compressed}
        kept = {masked: Term.of(self.sizes.masked, 2 * setup.keeps_masked_weights), **compressed}
        moments = {
            "forward and backward pass": {**held, **passing, **gradients, **self._pass(setup)},
            "update of the weights": {**held, **kept, **step, "temporaries": self._update(setup)},
        }
        if setup.sharding == "fsdp2":
            moments["loss of a micro-batch"] = {**held, **gradients, **self._loss(setup)}
            moments["reduction of the last gradients"] = {**held, **step, **self._last_reduction(setup)}
        if setup.eval_batch_size:
            counted = _counted(self.passes.evaluation(setup).activations, setup.eval_batch_size, setup.block_size)
            moments["evaluation"] = {**held, **self._gathered(setup, setup.is_half, is_step=False), **counted}
        if setup.offload:  # before the first and after the last step the masters are on the device
            held = {**self._held(replace(setup, offload=False)), "moments": Term(0)}
        if setup.offload or (setup.sharding == "fsdp2" and setup.on_cpu):
            moments["saving of the trained model"] = {**held, "to save": self._to_save(setup)}
        if setup.measured_tokens:
            counted = _counted(self.passes.measurement(setup).activations, 1, setup.measured_tokens)
            moments["measurement of perplexities"] = {**held, **self._gathered(setup, False, is_step=False), **counted}
        return moments

    # ---- what is always there ------------------------------------------------------------------------------------

    def _held(self, setup: Setup) -> dict[str, Term]:
        pieces, ours = setup.pieces, self.sizes
        if setup.offload:
            in_products = Term.of(ours.masked, 2 if setup.is_half else 4)
            terms = {"masked weights; embeddings, head, norms": in_products + Term.of(ours.plain, 4)}
            if self.fixed_masks:
                terms["masks"] = Term.of(ours.masked, 1)
        else:
            moments = Term.of(ours.trained, 8, pieces)
            if setup.moments == "8bit":
                moments = Term.of(ours.masked, MOMENTS_8BIT) + Term.of(ours.plain, 8)
            masks = Term.of(ours.masked, MASK_BYTES, pieces)
            terms = {"weights (float32 masters)": Term.of(ours.weights, 4, pieces), "masks": masks, "moments": moments}
        terms["teacher"] = self._teacher(setup)
        terms["Hessians of a refresh"] = Term(self.hessians, "in² x 4 bytes of each layer")
        return terms

    def _teacher(self, setup: Setup) -> Term:
        if (theirs := self.teacher_sizes) is None:
            return Term(0)
        each = 2 if setup.is_half else 4
        if setup.sharding != "fsdp2":
            return Term.of(theirs.weights, each)
        # its embeddings and head are not sharded
        return Term.of(theirs.weights - theirs.outside, each, setup.pieces) + Term.of(theirs.outside, each)

    def _gradients(self, setup: Setup) -> dict[str, Term]:
        """Gradients that are there when a step's last pass begins, or that the pass makes."""
        trained, accumulates = self.sizes.trained, setup.gradient_accumulation_steps > 1
        if setup.sharding == "none" and not accumulates:
            return {}
        if setup.keeps_whole_gradients:  # there are no pieces until the last pass, where they take their place
            return {"whole gradients between micro-batches": Term.of(trained, 4)}
        terms = {"gradients": Term.of(trained, 4, setup.pieces)}
        if setup.sharding == "ddp" and accumulates:
            terms["buckets of DDP, which the last batch fills"] = Term.of(trained, 4)
        return terms

    # ---- what a moment adds --------------------------------------------------------------------------------------

    def _pass(self, setup: Setup) -> dict[str, Term]:
        """A forward and backward pass, under FSDP2 while blocks run."""
        keeps = setup.gradient_accumulation_steps > 1 or setup.sharding != "none"  # DDP's buckets are always there
        peak = self.passes.step(setup, keeps)
        if setup.sharding != "fsdp2":
            made = {} if keeps else {"gradients": Term(peak.gradients, "those made before the peak of the pass")}
            return {**made, **_counted(peak.activations, setup.batch_size, setup.block_size)}
        block, sent = self.sizes.block, max(self.sizes.block, self.sizes.last)
        reduced = Term.of(block, 2 if setup.is_half else 4) + Term.of(sent, 4)
        return {
            **self._gathered(setup, setup.is_half),
            "gradients of a block; those being sent": reduced,
            **_counted(peak.in_blocks, setup.batch_size, setup.block_size),
        }

    def _gathered(self, setup: Setup, is_half: bool, is_step: bool = True) -> dict[str, Term]:
        """What FSDP2 gathers while blocks run: the current and the next one.

        The teacher's blocks, which are smaller, are gathered before the student's first one. Masks stay in pieces: a
        piece of the weight is masked and cast before it is sent. Embeddings that share the head's weight stay gathered
        during a step, and the head does so in evaluation.
        """
        if setup.sharding != "fsdp2":
            return {}
        each, sizes = 2 if is_half else 4, self.sizes
        stays = sizes.last if not (is_step and sizes.first) else 0
        return {
            "gathered head": Term.of(stays, each),
            "gathered blocks: current and next": Term.of(2 * sizes.block, each),
            "masked pieces on their way": Term.of(sizes.block, each, setup.pieces),
        }

    def _loss(self, setup: Setup) -> dict[str, Term]:
        """The head is gathered, once as it comes and once as it is used."""
        peak, each = self.passes.step(setup, True).at_loss, 2 if setup.is_half else 4
        return {
            "gathered head": Term.of(2 * self.sizes.last, each),
            **_counted(peak, setup.batch_size, setup.block_size),
        }

    def _last_reduction(self, setup: Setup) -> dict[str, Term]:
        """Embeddings come last in the backward pass: gathered, their whole gradients, and a float32 copy to send."""
        last, each = self.sizes.first or self.sizes.last, 2 if setup.is_half else 4
        return {
            "gathered embeddings": Term.of(last, each),
            "their gradients, and a copy to send": Term.of(last, each + 4),
            "their reduced pieces": Term.of(last, 4, setup.pieces),
        }

    def _to_save(self, setup: Setup) -> Term:
        """What saving adds: in a sharded run on the host, otherwise masked copies."""
        if setup.sharding == "fsdp2":
            return held_to_save(self.sizes, self.saves_whole)
        return Term.of(self.sizes.masked, 4)

    def _update(self, setup: Setup) -> Term:
        """Temporaries of SparseAdamW: on a GPU the square roots of all second moments without masks, at once.

        A compiled update of masked weights needs none; an eager one three of the largest weight, on a CPU of a block.
        """
        sizes, pieces = self.sizes, setup.pieces
        if setup.offload:
            return Term(0)
        masked = min(sizes.largest // pieces, _EAGER_BLOCK) if setup.on_cpu else sizes.largest // pieces
        eager = Term.of(masked, 12) if setup.eager else Term(0)
        roots = Term(0) if setup.on_cpu else Term.of(sizes.plain, 4, pieces)
        return max(eager, roots, key=lambda term: term.size)


def _counted(size: int, sequences: int, tokens: int) -> dict[str, Term]:
    how = f"counted by running {sequences} x {tokens:,} tokens without data"
    return {"activations, logits, temporaries": Term(size, how)}
