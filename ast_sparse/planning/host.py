"""Host memory of a machine: what its processes hold there while models are read, while a run trains, and to save."""

from ast_sparse.planning.setup import Setup
from ast_sparse.planning.sizes import MASK_BYTES, Sizes, Term
from ast_sparse.storage.save_pieces import FILE_BYTES


def host_memory(
    setup: Setup, student: Sizes, teacher: Sizes | None, processes: int, calibrates: bool, saves_whole: bool = False
) -> dict[str, Term]:
    """Bytes on the host of one machine by moment; Python, its libraries and the text come on top.

    Args:
        student: with masks.
        processes: on the machine, one a device.
        calibrates: text decides the first masks: one process has the whole dense student to make the start of.
        saves_whole: transformers converts the weights of this family when they are saved.
    """
    of_teacher = Term(0) if teacher is None else Term.of(teacher.weights, 2 if setup.is_half else 4)
    terms = {"while models are read": (Term.of(student.weights, 4) + of_teacher).times(processes)}
    if setup.sharding == "fsdp2":  # each process reads its rows onto its device, a tensor at a time
        terms = {"while models are read": Term.of(student.tensor, 4).times(processes)}
        terms["while the first process saves the model"] = held_to_save(student, saves_whole)
    if calibrates:
        terms["while one process makes the start"] = Term.of(student.weights, 4)
    if setup.offload:
        buffers = Term.of(student.tensor, 12 if setup.is_half else 16)
        held = Term.of(student.weights, 4) + Term.of(student.trained, 8)
        terms["offloaded: masters, moments, masks, buffers"] = held + Term.of(student.masked, MASK_BYTES) + buffers
    return terms


def held_to_save(student: Sizes, whole: bool) -> Term:
    """What the first process of a sharded run holds on the host to save the student.

    Args:
        whole: it gathers the student and masks copies; otherwise it has a file of weights, then all SLoRB pairs.
    """
    if whole:
        return Term.of(student.weights, 4) + Term.of(student.masked, 4 + MASK_BYTES)
    model = student.weights - student.slorb
    file = Term.of(model, 4)
    if file.size > FILE_BYTES:
        file = max(Term(FILE_BYTES, "a file of weights"), Term.of(student.tensor, 4), key=lambda term: term.size)
    return file + Term.of(student.slorb, 4)
