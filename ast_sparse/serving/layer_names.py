"""Which layers of a checkpoint an engine has built: under other names, and some of them merged into one."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from ast_sparse.errors import UserError

DENSE_FIX = "Export the model with --format dense."
# What engines merge, for models that do not list it; a wrong entry is noticed, because every name must be built.
_USUAL_MERGES = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class LayerNames:
    """Layer names of a checkpoint, each with the engine's name for it, and whether the engine has built it.

    Args:
        names: of the compressed layers, as the checkpoint spells them.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._stored = {name: name for name in names}  # by the engine's name
        self._not_built = set(self._stored)

    def rename(self, renamed: Callable[[list[str]], list[str]]) -> None:
        """Apply a renaming of the engine; a name it drops stays, and counts as not built."""
        self._stored = {(renamed([name]) or [name])[0]: stored for name, stored in self._stored.items()}

    def parts(self, name: str, merged: Mapping[str, Sequence[str]]) -> list[str]:
        """The checkpoint's layers that one layer of the engine is made of; empty if they are dense.

        Args:
            name: of the engine's layer, `model.layers.0.self_attn.qkv_proj`.
            merged: by the last part of a merged layer's name, those of its parts: `qkv_proj` has `q_proj` and others.

        Raises:
            UserError: only some parts are compressed.
        """
        if name in self._stored:
            return self._take([name])
        parent, dot, last = name.rpartition(".")
        parts = [f"{parent}{dot}{part}" for part in merged.get(last, _USUAL_MERGES.get(last, ()))]
        dense = [part for part in parts if part not in self._stored]
        if parts and dense and len(dense) < len(parts):
            compressed = next(part for part in parts if part not in dense)
            raise UserError(
                f"The engine merges {_listed(parts)} into `{name}`, but `{compressed}` is compressed and `{dense[0]}` "
                f"is not. {DENSE_FIX}"
            )
        return [] if dense else self._take(parts)

    def _take(self, names: Sequence[str]) -> list[str]:
        stored = [self._stored[name] for name in names]
        self._not_built.difference_update(stored)
        return stored

    def check_all_built(self) -> None:
        """Raise UserError if the engine, whose model is complete, has no layer for one of the names."""
        if missing := sorted(self._not_built):
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise UserError(
                f"The checkpoint has `{missing[0]}`{more} compressed, but the engine builds no such layer. {DENSE_FIX}"
            )


def _listed(names: Sequence[str]) -> str:
    quoted = [f"`{name}`" for name in names]
    return f"{', '.join(quoted[:-1])} and {quoted[-1]}"
