"""ast-data: tokenise text into memory-mapped shards, and inspect and verify shards."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ast_sparse.cli.command import Command, Group
from ast_sparse.config.data import BOS_CHOICES
from ast_sparse.errors import UserError

if TYPE_CHECKING:
    from ast_sparse.data.sources.entries import Entry
    from ast_sparse.data.tokens.shards import Manifest


@click.group(cls=Group)
def main() -> None:
    """Tokenise text once into memory-mapped shards for `data.train` of ast-train."""


@main.command(cls=Command)
@click.argument("out", metavar="OUT")
@click.argument("sources", nargs=-1, metavar="[SOURCE]...")
@click.option("--tokenizer", required=True, metavar="MODEL", help="Model whose tokenizer is used: hub id or folder.")
@click.option(
    "--domain", "domains", multiple=True, metavar="NAME=SOURCE",
    help="Text of a domain; its shards go to the folder OUT/NAME; repeatable.",
)  # fmt: skip
@click.option("--root", metavar="FOLDER", help="Folder that relative sources start from.")
@click.option("--text-field", default="text", show_default=True, help="Name of the text column or key.")
@click.option(
    "--bos", type=click.Choice(BOS_CHOICES), default="auto", show_default=True,
    help="BOS in the shards. document: before each document; none: no BOS; auto: as the tokenizer does; block or "
    "window: no BOS, but data.bos: block lets ast-train put one before each block.",
)  # fmt: skip
@click.option("--streaming", is_flag=True, help="Read hub data sets over the network instead of downloading them.")
@click.option(
    "--workers", type=click.IntRange(1), metavar="N",
    help="Number of processes that tokenise. Default: one for each core that this process may use; 1: no other "
    "processes are started.",
)  # fmt: skip
@click.option(
    "--shard-size", type=click.FloatRange(0, min_open=True), default=64, show_default=True, metavar="MILLIONS",
    help="Millions of characters of text in a shard. A document is never cut; a longer one is an error.",
)  # fmt: skip
@click.option("--keep-long", is_flag=True, help="Give a document that is longer than a shard its own shard.")
@click.option("--overwrite", is_flag=True, help="Replace the shards in OUT.")
@click.option("--gguf-file", metavar="NAME", help="Name of the .gguf file inside a MODEL that is a folder or hub id.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with MODEL.")
def prepare(out: str, sources: tuple[str, ...], domains: tuple[str, ...], **options: Any) -> None:
    """Tokenise text into shards in the folder OUT.

    SOURCE is a file or glob of text, JSONL, JSONL.gz, JSONL.zst or parquet, or a mapping of `datasets.load_dataset`
    arguments such as '{path: allenai/c4, name: en}'. A document is a text file, a line or a row, and ends with the
    tokenizer's EOS. If the command is killed or the disk is full, run it again: finished shards are kept. OUT can be
    read as soon as it has a manifest.json.
    """
    folder = Path(out).expanduser()
    parts = _parts(folder, sources, domains)
    from ast_sparse.storage.locate import load_tokenizer  # takes seconds, so --help does without it

    tokenizer = load_tokenizer(
        options["tokenizer"], gguf_file=options["gguf_file"], trust_remote_code=options["trust_remote_code"]
    )
    from ast_sparse.data.sources.entries import check_entries

    for entries in parts.values():
        check_entries(entries, options["root"], "SOURCE")
    for place, entries in parts.items():
        _prepare(place, entries, tokenizer, options)


def _parts(folder: Path, sources: tuple[str, ...], domains: tuple[str, ...]) -> dict[Path, list[Entry]]:
    """The folders to write, with their sources."""
    if bool(sources) == bool(domains):
        raise UserError("Name text either as SOURCE or as --domain NAME=SOURCE, not both.")
    if sources:
        return {folder: [_entry(source) for source in sources]}
    parts: dict[Path, list[Entry]] = {}
    for domain in domains:
        name, sign, source = domain.partition("=")
        if not sign or not source or not name.replace("-", "_").replace("_", "a").isalnum():
            raise UserError(f"--domain {domain!r} is not of the form NAME=SOURCE with letters, digits, _ or - in NAME.")
        parts.setdefault(folder / name, []).append(_entry(source))
    return parts


def _entry(source: str) -> Entry:
    if not source.startswith("{"):
        return source
    from ast_sparse.config.yaml12 import parse_yaml

    entry: dict[str, Any] = parse_yaml(source, f"SOURCE {source!r}")
    return entry


def _cores() -> int:
    """CPU cores that this process may use: a scheduler may give it fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _prepare(folder: Path, entries: list[Entry], tokenizer: Any, options: dict[str, Any]) -> None:
    from ast_sparse.data.tokens.prepare import PrepareSettings, prepare_shards
    from ast_sparse.data.tokens.shards import Shard
    from ast_sparse.progress import progress_bar

    settings = PrepareSettings(
        entries=entries,
        root=options["root"],
        text_field=options["text_field"],
        shard_characters=max(1, round(options["shard_size"] * 1e6)),
        keep_long=options["keep_long"],
        workers=options["workers"] or _cores(),
        streaming=options["streaming"],
        bos=options["bos"],
    )
    began, made, kept = time.monotonic(), 0, 0
    with progress_bar(desc=f"Tokenising {folder.name}", unit=" tokens", unit_scale=True, delay=1) as bar:

        def finished(shard: Shard, is_new: bool) -> None:
            nonlocal made, kept
            made, kept = made + (shard.tokens if is_new else 0), kept + (not is_new)

        manifest = prepare_shards(folder, settings, tokenizer, options["overwrite"], finished, bar.update)
    rate = f", {made / max(time.monotonic() - began, 1e-9):,.0f} tokens/s" if made else ""
    before = f" ({kept} of them from an earlier run)" if kept else ""
    click.echo(
        f"{folder}: {manifest.documents:,} documents, {manifest.tokens:,} tokens as {manifest.token_type} in "
        f"{_shards(manifest)}{before}{rate}"
        + ("" if made else ", already complete")
        + (f"; {manifest.empty:,} documents are empty" if manifest.empty else "")
        + ("; BOS before each document" if manifest.bos else "")
    )


@main.command(cls=Command)
@click.argument("folders", nargs=-1, required=True, metavar="FOLDER...")
def info(folders: tuple[str, ...]) -> None:
    """Print what is in folders of shards; file sizes are compared with the manifest, contents are not read."""
    from ast_sparse.data.tokens.shards import read_manifest

    for name in folders:
        folder = Path(name).expanduser()
        manifest = read_manifest(folder)
        size = sum(shard.tokens for shard in manifest.shards) * manifest.dtype.itemsize
        lines = {
            "documents": f"{manifest.documents:,}, {manifest.empty:,} of them empty",
            "tokens": f"{manifest.tokens:,} as {manifest.token_type} ({size / 2**20:,.1f} MiB)",
            "shards": f"{len(manifest.shards):,}",
            "tokenizer": f"{manifest.tokenizer}, {manifest.vocab_size:,} tokens, EOS {manifest.eos_token_id}, "
            f"key {manifest.tokenizer_key}",
            "bos": f"{', '.join(map(str, manifest.bos))} before each document" if manifest.bos else "none",
            "text": f"{', '.join(manifest.sources)}, field {manifest.text_field}",
            "format_version": str(manifest.format_version),
        }
        click.echo(f"{folder}\n" + "\n".join(f"  {key:<15} {value}" for key, value in lines.items()))


@main.command(cls=Command)
@click.argument("folders", nargs=-1, required=True, metavar="FOLDER...")
def verify(folders: tuple[str, ...]) -> None:
    """Read every byte of folders of shards and compare it with the checksums in the manifest."""
    from ast_sparse.data.tokens.shards import verify_shards
    from ast_sparse.progress import progress_bar

    for name in folders:
        folder = Path(name).expanduser()
        with progress_bar(desc=f"Verifying {folder.name}", unit="B", unit_scale=True, delay=1) as bar:
            manifest = verify_shards(folder, bar.update)
        click.echo(f"{folder}: {_shards(manifest)}, {manifest.tokens:,} tokens match the manifest")


def _shards(manifest: Manifest) -> str:
    count = len(manifest.shards)
    return f"{count:,} shard{'' if count == 1 else 's'}"


if __name__ == "__main__":
    main()
