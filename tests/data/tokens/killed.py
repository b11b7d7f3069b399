"""`ast-data`, killed in the middle of a shard; `test_shards.py` runs this."""

import os
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ast_sparse.cli.data import main
from ast_sparse.data.tokens import prepare, shard_writer


def dying(folder: Path, name: str, batches: Iterable[Any]) -> Any:
    if name == "shard-00002":
        with shard_writer._whole_file(folder / (name + ".tokens")) as stream:
            stream.write(b"half")
            stream.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    return shard_writer.write_shard(folder, name, batches)


if __name__ == "__main__":
    prepare.write_shard = dying  # type: ignore[assignment]
    main()
