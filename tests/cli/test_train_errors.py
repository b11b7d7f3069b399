"""What ast-train refuses: one thing wrong at a time in a run that otherwise succeeds."""

import errno
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TrainerCallback

from ast_sparse.cli.train import main
from ast_sparse.errors import SharedError
from ast_sparse.training.resume.checkpoints import faults
from ast_sparse.training.trainer import SparseTrainer
from tests.models import generated_text, save_tiny_model, tiny_config, tiny_tokenizer

CHECKPOINT_FILES = (
    "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "sparsity_config.json", "trainer_state.json"
)  # fmt: skip


def base(root: Path) -> dict[str, Any]:
    """A run of two steps that succeeds."""
    return {
        "model": {"name_or_path": str(root / "llama")},
        "data": {"root": str(root), "train": "text.txt", "eval_share": 0.1, "block_size": 16},
        "sparsity": {"mask_interval": 2},
        "distillation": {"alpha": 0.5},
        "slorb": {"k": 16},
        "training": {
            "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "report_to": "none",
            "use_cpu": True, "save_steps": 1, "disable_tqdm": True,
        },
        "evaluation": {"datasets": ["heldout", "other.txt"], "seq_len": 16, "windows": 2},
    }  # fmt: skip


def cut(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def edit_config(**values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return edit


def poison(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


BROKEN_MODELS: dict[str, Callable[[Path], None]] = {
    "cut-weights": lambda folder: cut(folder / "model.safetensors"),
    "no-weights": lambda folder: (folder / "model.safetensors").unlink(),
    "nan-weights": poison,
    "cut-config": lambda folder: cut(folder / "config.json"),
    "no-config": lambda folder: (folder / "config.json").unlink(),
    "list-config": lambda folder: (folder / "config.json").write_text("[]"),
    "no-size": edit_config(hidden_size=0),
    "negative-size": edit_config(hidden_size=-32),
    "absurd-size": edit_config(hidden_size=10**15),
    "text-size": edit_config(hidden_size="big"),
    "unknown-type": edit_config(model_type="lama"),
    "no-tokenizer": lambda folder: [file.unlink() for file in folder.glob("token*")] and None,  # type: ignore[func-returns-value]
    "cut-tokenizer": lambda folder: cut(folder / "tokenizer.json"),
}


def write_texts(root: Path) -> None:
    (root / "text.txt").write_text(generated_text(100))
    (root / "other.txt").write_text(generated_text(40, seed=1))
    (root / "short.txt").write_text("two of four")
    (root / "empty.txt").write_text("")
    (root / "latin.txt").write_bytes(b"caf\xe9 " * 200)
    (root / "zeros.txt").write_bytes(b"\0\1\2" * 500)
    (root / "table.csv").write_text("a,b\n")
    (root / "list.jsonl").write_text('{"text": "x"}\n[1]\n')
    (root / "field.jsonl").write_text('{"text": "x"}\n{"body": "x"}\n')
    (root / "cut.jsonl").write_text('{"text": "x"}\n{"text": "x"\n')
    (root / "number.jsonl").write_text('{"text": 5}\n')
    (root / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}\n' * 2)
    (root / "cut-chat.jsonl").write_text('{"prompt": "x", "completion": "y"}\n{"prompt": "x"}\n')
    (root / "fake.parquet").write_text("hello")
    (root / "fake.gguf").write_text("hello")
    (root / "bytes.yaml").write_bytes(b"model: \xff\xfe")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything the runs read: texts, models whole and broken, a finished run and damaged copies of its checkpoint."""
    root = tmp_path_factory.mktemp("inputs")
    write_texts(root)
    save_tiny_model(root / "llama")
    other = tiny_config("llama")
    other.vocab_size = 64
    AutoModelForCausalLM.from_config(other).save_pretrained(root / "small-vocabulary")
    tiny_tokenizer().save_pretrained(root / "small-vocabulary")
    for name, damage in BROKEN_MODELS.items():
        damage(Path(shutil.copytree(root / "llama", root / name)))
    result = train(root, base(root), "--output-dir", root / "finished")
    assert result.exit_code == 0, result.output  # so every failure below is due to its one change
    for name in CHECKPOINT_FILES:
        cut(Path(shutil.copytree(root / "finished/checkpoint-2", root / f"damaged-{name}")) / name)
    return root


def train(root: Path, tree: dict[str, Any] | str, *arguments: str | Path) -> Result:
    config = root / "run.yaml"
    config.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return CliRunner().invoke(main, ["--config", str(config), *map(str, arguments)])


def files(root: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in root.rglob("*") if path.name != "run.yaml"}


def refused(root: Path, message: str, tree: dict[str, Any] | str, *arguments: str | Path) -> None:
    """One line, exit code 2, and no file that was not there before."""
    before = files(root)
    result = train(root, tree, *arguments)
    assert isinstance(result.exception, SystemExit), result.exc_info
    lines = [line for line in re.split(r"[\r\n]+", result.stderr) if line and not is_bar(line)]
    assert result.exit_code == 2 and len(lines) == 1 and lines[0].startswith("Error: "), result.output
    assert re.search(message, lines[0]), lines[0]
    after = files(root)
    after.pop(str(root), None), before.pop(str(root), None)  # its time changes with run.yaml
    assert after == before


def is_bar(line: str) -> bool:
    return "it/s]" in line or "examples/s]" in line


# a mixture that succeeds, and what doremi and bandit need as well
BEST = ("training.eval_strategy=steps", "training.eval_steps=1")
DOMAINS = [
    "data.train=null", "data.domains.cc={{train: text.txt, share: 0.6}}",
    "data.domains.wiki={{train: other.txt, share: 0.4}}",
]  # fmt: skip
STREAMING = ["data.streaming=true", "data.eval=other.txt"]
TARGETS = ["data.domains.cc.target=1.0", "data.domains.wiki.target=1.0"]

# what is set, as after --set, or several; and what the error says
SETTINGS: list[tuple[str | list[str], str]] = [
    # model
    ("model=null", r"model\.name_or_path is missing"),
    ("model.name_or_path=null", r"model\.name_or_path is missing"),
    ("model.name_or_path=''", r"model\.name_or_path='' is empty"),
    ("model.name_or_path=5", r"model\.name_or_path=5 is an integer, expected text"),
    ("model.name_or_path=[a, b]", r"model\.name_or_path=\['a', 'b'\] is a list, expected text"),
    ("model.name_or_path=/nowhere/x", r"There is no folder `/nowhere/x`"),
    ("model.name_or_path=nobody/nothing", r"configuration of `nobody/nothing`.*Check the hub id, or give a local"),
    ("model.name_or_path={root}", r"holds no config\.json"),
    ("model.name_or_path={root}/text.txt", r"text\.txt` is a file, but no \.gguf"),
    ("model.name_or_path={root}/fake.gguf", r"fake\.gguf.*not a GGUF file"),
    ("model.name_or_path={root}/none.gguf", r"There is no file .*none\.gguf"),
    ("model.name_or_path={root}/finished", r"finished' is the result of a run.*Name the dense model"),
    ("model.name_or_path={root}/finished/checkpoint-1", r"checkpoint-1' is the result of a run"),
    ("model.name_or_path={root}/small-vocabulary", r"makes the token \d+, the model has 64 embeddings"),
    ("model.name_or_path={root}/cut-weights", r"model\.safetensors` is damaged.*Copy or write"),
    ("model.name_or_path={root}/no-weights", r"holds no model\.safetensors"),
    ("model.name_or_path={root}/nan-weights", r"`model\.embed_tokens\.weight` of .*nan-weights' holds values"),
    ("model.name_or_path={root}/cut-config", r"Cannot read .*cut-config/config\.json.*Restore"),
    ("model.name_or_path={root}/no-config", r"holds no config\.json"),
    ("model.name_or_path={root}/list-config", r"list-config/config\.json`: it holds no JSON object"),
    ("model.name_or_path={root}/no-size", r"no-size' cannot be built.*\(128, 0\).*Check its config\.json"),
    ("model.name_or_path={root}/negative-size", r"cannot be built: .*negative dimension -32"),
    ("model.name_or_path={root}/absurd-size", r"cannot be built: .*1000000000000000"),
    ("model.name_or_path={root}/text-size", r"text-size`.*hidden_size.*'big'"),
    ("model.name_or_path={root}/unknown-type", r"model type `lama`"),
    ("model.name_or_path={root}/no-tokenizer", r"no-tokenizer` holds no tokenizer"),
    ("model.name_or_path={root}/cut-tokenizer", r"tokenizer of .*cut-tokenizer`"),
    ("model.revision=5", r"model\.revision=5 is an integer"),
    ("model.revision=main", r"model\.revision='main' belongs to a model on the hub.*Remove it"),
    ("model.gguf_file=none.gguf", r"holds no file `none\.gguf`"),
    ("model.gguf_file=config.json", r"config\.json.*not a GGUF file"),
    ("model.attn_implementation=sdpaa", r"model\.attn_implementation='sdpaa' cannot be used.*Use sdpa or eager"),
    ("model.trust_remote_code=maybe", r"model\.trust_remote_code='maybe' is text, expected true or false"),
    ("model.teacher=/nowhere/t", r"model\.teacher='/nowhere/t': There is no folder"),
    ("model.teacher=''", r"model\.teacher='' is empty"),
    ("model.teacher={root}/small-vocabulary", r"model\.teacher .* vocabulary of 64 tokens, the student 128"),
    ("model.teacher={root}/cut-weights", r"model\.teacher=.*model\.safetensors` is damaged"),
    ("model.teacher={root}/cut-config", r"model\.teacher=.*Cannot read"),
    ("model.config_overrides=5", r"model\.config_overrides=5 is an integer, expected a mapping"),
    ("model.config_overrides.hiden_size=32", r"no `hiden_size`. Did you mean `hidden_size`"),
    ("model.config_overrides.hidden_size=large", r"model\.config_overrides: .*hidden_size.*'large'"),
    ("model.config_overrides.hidden_size=64", r"has shape \(128, 32\), the model needs \(128, 64\)"),
    ("model.config_overrides.attention_dropout=2.0", r"config_overrides\.attention_dropout=2\.0 must be 0 or more"),
    ("model.config_overrides.hidden_act=relux", r"cannot be built: .*relux"),
    ("model.random_weights=maybe", r"model\.random_weights='maybe' is text, expected true or false"),
    (["model.name_or_path={root}/no-weights", "model.random_weights=true"], r"holds no model\.safetensors"),  # teacher
    ("model.name=x", r"Unknown key model\.name\. Did you mean 'name_or_path'|Unknown key model\.name\. Known"),
    # data
    ("data=null", r"data\.train is missing"),
    ("data=[]", r"Section 'data' is \[\], not a mapping"),
    ("data.root=/nowhere", r"text\.txt does not exist under `data\.root` = /nowhere"),
    ("data.root=5", r"data\.root=5 is an integer"),
    ("data.train=[]", r"data\.train=\(\) names no source"),
    ("data.train=''", r"data\.train=\(''.*has an empty entry"),
    ("data.train=[text.txt, 5]", r"data\.train=\['text\.txt', 5\] is a list, expected text"),
    ("data.train=none.txt", r"`data\.train`: file none\.txt does not exist"),
    ("data.train='*.nothing'", r"no file matches \*\.nothing"),
    ("data.train=llama", r"llama is a folder.*Name its files"),
    ("data.train=[text.txt, text.txt]", r"text\.txt occurs twice in `data\.train`"),
    ("data.train={{name: x}}", r"\{{'name': 'x'\}} names no data set"),
    ("data.train={{path: no/such}}", r"Cannot load data set no/such.*Check its entry"),
    ("data.train={{path: json}}", r"\{{'path': 'json'\}} names a format and no files"),
    ("data.train={{path: json, data_files: none.jsonl}}", r"Cannot load data set json: .*none\.jsonl"),
    ("data.train={{path: text, data_files: '{root}/text.txt', nam: x}}", r"Cannot load data set text: .*nam"),
    ("data.train=short.txt", r"short\.txt has 3 tokens, fewer than one block of `data\.block_size` = 16"),
    ("data.train=empty.txt", r"empty\.txt is empty"),
    ("data.train=latin.txt", r"latin\.txt, line 1: not UTF-8"),
    ("data.train=zeros.txt", r"zeros\.txt is not text: it holds zero bytes"),
    ("data.train=table.csv", r"table\.csv: files of this kind"),
    ("data.train=list.jsonl", r"list\.jsonl, line 2: not a JSON object"),
    ("data.train=field.jsonl", r"field\.jsonl, line 2: no field `text` but body"),
    ("data.train=cut.jsonl", r"cut\.jsonl, line 2: not JSON"),
    ("data.train=number.jsonl", r"number\.jsonl, line 1: field `text` is not a string"),
    ("data.train=fake.parquet", r"fake\.parquet is not a parquet file.*Copy or write it again"),
    ("data.train=chat.jsonl", r"chat\.jsonl is chat data \(messages\), and the tokenizer of .* has no chat template"),
    (
        ["data.streaming=true", "data.eval=text.txt", "data.train=chat.jsonl"],
        r"chat\.jsonl, line 1: no field `text` but messages\. This is chat data, and here raw text is read",
    ),
    ("data.train=cut-chat.jsonl", r"cut-chat\.jsonl, line 2: no `completion`, which the first line has"),
    ("data.eval=none.txt", r"`data\.eval`: file none\.txt does not exist"),
    ("data.eval=[]", r"data\.eval=\(\) names no source"),
    ("data.eval=text.txt", r"`data\.eval`: text\.txt is in `data\.train` too"),
    ("data.eval='te*.txt'", r"`data\.eval`: te\*\.txt is in `data\.train` too"),
    ("data.eval=short.txt", r"short\.txt has \d+ tokens, fewer than one block.*`data\.eval`"),
    ("data.eval_share=0.9", r"data\.eval_share=0\.9 must lie between 0 and 0\.5"),
    ("data.eval_share=-0.1", r"data\.eval_share=-0\.1 must lie between"),
    ("data.eval_share=2%", r"data\.eval_share='2%' is text, expected a number"),
    ("data.eval_share=.nan", r"data\.eval_share=nan is not a finite number"),
    ("data.eval_share=0", r"data\.eval_share is 0. Set data\.eval"),
    ("data.eval_share=0.0001", r"\(`data\.eval_share` = 0\.0001\) has 1 tokens, fewer than one block"),
    ("data.block_size=0", r"data\.block_size=0 must be at least 2"),
    ("data.block_size=129", r"data\.block_size=129 is longer than the 128 positions"),
    ("data.block_size=16.5", r"data\.block_size=16\.5 is a number, expected an integer"),
    ("data.block_size=true", r"data\.block_size=True is true or false, expected an integer"),
    ("data.text_field=5", r"data\.text_field=5 is an integer, expected text"),
    ("data.packing=documnts", r"data\.packing='documnts' is text, expected 'joined' or 'documents'"),
    ("data.sead=1", r"Unknown key data\.sead\. Did you mean 'seed'"),
    # streaming
    ("data.streaming=true", r"data\.streaming=True leaves no document to hold out\. Name data\.eval"),
    ([*STREAMING, "training.max_steps=-1"], r"does not know the length of the text\. Set training\.max_steps"),
    ([*STREAMING, "training.dataloader_num_workers=2"], r"dataloader_num_workers=2: each worker would read the same"),
    ([*STREAMING, "data.train=latin.txt"], r"latin\.txt, line 1: not UTF-8"),
    ([*DOMAINS, "data.streaming=true"], r"data\.streaming=True reads no domains\. Make shards"),
    # domains
    (["data.train=null"], r"data\.train is missing\. Name text in it, or domains in data\.domains"),
    ("data.domains.cc.train=other.txt", r"data\.train=\('text\.txt',\) stands beside data\.domains|stands beside"),
    ("data.update.type=doremi", r"data\.update=.* needs data\.domains"),
    ("data.domains=cc", r"data\.domains='cc' is text, expected a mapping"),
    (["data.train=null", "data.domains.cc=text.txt"], r"data\.domains\.cc='text\.txt' is not a mapping"),
    (["data.train=null", "data.domains.c c.train=text.txt"], r"data\.domains: the name 'c c' is not made of letters"),
    (["data.train=null", "data.domains.cc.share=1"], r"data\.domains\.cc\.train is missing"),
    ([*DOMAINS, "data.domains.cc.shares=1"], r"Unknown key data\.domains\.cc\.shares\. Known: train, eval, share"),
    ([*DOMAINS, "data.domains.cc.share=much"], r"data\.domains\.cc\.share='much' is text, expected a number"),
    ([*DOMAINS, "data.domains.cc.share=0.5"], r"data\.domains: the shares sum to 0\.9, not to 1"),
    ([*DOMAINS, "data.domains.cc.share=-0.4"], r"data\.domains\.cc\.share=-0\.4 must be 0 or more"),
    ([*DOMAINS, "data.domains.cc.share=null"], r"data\.domains\.cc\.share is missing"),
    ([*DOMAINS, "data.domains.cc.eval=text.txt"], r"data\.domains\.wiki\.eval is missing"),
    ([*DOMAINS, "data.update.typ=doremi"], r"Unknown key data\.update\.typ\. Known: type, rate, floor, clip"),
    ([*DOMAINS, "data.update.type=doremi"], r"data\.domains\.cc\.target is missing, and data\.update\.type=doremi"),
    ([*DOMAINS, "data.update.type=doremy"], r"data\.update\.type='doremy' is text.*Did you mean 'doremi'"),
    ([*DOMAINS, "data.update.rate=-1"], r"data\.update\.rate=-1\.0 must be 0 or more"),
    ([*DOMAINS, "data.update.floor=2"], r"data\.update\.floor=2\.0 must lie between 0 and 1"),
    ([*DOMAINS, "data.domains.cc.train=none.txt"], r"`data\.domains\.cc\.train`: file none\.txt does not exist"),
    ([*DOMAINS, "data.domains.cc.train=empty.txt"], r"empty\.txt is empty"),
    ([*DOMAINS, "data.domains.cc.train=short.txt"], r"data\.domains\.cc: The text of short\.txt has \d+ tokens, fewer"),
    (
        [*DOMAINS, "data.domains.cc.train=other.txt"],
        r"is in `data\.domains\.\w+\.train` too",
    ),
    (
        [*DOMAINS, *TARGETS, "data.update.type=doremi"],
        r"changes shares at every evaluation, and training\.eval_strategy",
    ),
    (
        [*DOMAINS, *TARGETS, "data.update.type=bandit", "data.eval_share=0", "training.eval_strategy=steps"],
        r"data\.eval_share is 0\. Set data\.eval",
    ),
    # sparsity
    ("sparsity=2:4", r"Section 'sparsity' is '2:4', not a mapping"),
    ("sparsity.pattern=4:2", r"sparsity\.pattern='4:2' needs 0 < N < M"),
    ("sparsity.pattern=24", r"sparsity\.pattern=24 is an integer, expected text"),
    ("sparsity.pattern=2-4", r"sparsity\.pattern='2-4' is not of the form N:M"),
    ("sparsity.pattern=٢:٤", r"is not of the form N:M"),
    ("sparsity.pattern=2:5", r"2:5 mask .*in_features=32 is not a multiple of 5.*sparsity\.exclude"),
    ("sparsity.mask_interval=-1", r"sparsity\.mask_interval=-1 must be 0"),
    ("sparsity.mask_interval=null", r"sparsity\.mask_interval=null is empty, expected an integer"),
    ("sparsity.mask_decay=-1", r"sparsity\.mask_decay=-1\.0 must be 0 or more"),
    ("sparsity.mask_decay=.inf", r"sparsity\.mask_decay=inf is not a finite number"),
    ("sparsity.decay_ramp=25", r"sparsity\.decay_ramp=25\.0 must lie between 0 and 1"),
    ("sparsity.decay_placement=momentun", r"'momentun' is text, expected .*Did you mean 'momentum'"),
    ("sparsity.include=nothing", r"sparsity\.include: 'nothing' matches no linear layer"),
    ("sparsity.exclude='*'", r"No layer is left to prune"),
    ("sparsity.criterion=wandas", r"sparsity\.criterion='wandas' is text, expected 'magnitude'.*Did you mean 'wanda'"),
    ("sparsity.mask_intervall=5", r"Unknown key sparsity\.mask_intervall\. Did you mean 'mask_interval'"),
    ("sparsity.schedule=linear", r"sparsity\.schedule='linear' is text, expected 'constant' or 'imp' or 'gmp'"),
    ("sparsity.rounds=0", r"sparsity\.rounds=0 must be at least 1"),
    ("sparsity.prune_share=1", r"sparsity\.prune_share=1\.0 must lie between 0 and 1"),
    ("sparsity.steps_per_round=0", r"sparsity\.steps_per_round=0 must be at least 1"),
    ("sparsity.prune_until=0", r"sparsity\.prune_until=0\.0 must be above 0 and at most 1"),
    ("sparsity={{schedule: imp, init: wanda}}", r"sparsity\.init='wanda' goes with sparsity\.schedule=constant"),
    ("sparsity={{schedule: gmp, mask_interval: 0}}", r"sparsity\.mask_interval=0 leaves gmp no step to prune at"),
    ("sparsity={{schedule: imp, rounds: 3}}", r"sparsity\.rounds=3 need more than the 2 steps of the run\. Lower it"),
    (
        "sparsity={{schedule: imp, steps_per_round: 9}}",
        r"sparsity\.rounds=4 of sparsity\.steps_per_round=9 need more than the 2 steps",
    ),
    (
        ["sparsity.schedule=gmp", "training={{load_best_model_at_end: true, eval_strategy: steps, eval_steps: 500}}"],
        r"training\.load_best_model_at_end=True with sparsity\.schedule=gmp.*Remove one of them",
    ),
    # distillation, SLoRB
    ("distillation=kl", r"Section 'distillation' is 'kl'"),
    ("distillation.alpha=2", r"distillation\.alpha=2\.0 must lie between 0 and 1"),
    ("distillation.kl_weight=1", r"distillation\.kl_weight=1\.0 exclude each other"),
    ("distillation={{ce_weight: 0, kl_weight: 0}}", r"are both 0"),
    ("distillation.temperature=0", r"distillation\.temperature=0\.0 must be above 0"),
    ("distillation.temperature=.inf", r"distillation\.temperature=inf is not a finite number"),
    ("distillation.kind=js", r"distillation\.kind='js' is text, expected 'kl' or 'reverse_kl'"),
    ("distillation.match_flops=true", r"distillation\.match_flops=True is for a run without teacher.*alpha: 0"),
    (
        ["distillation={{alpha: 0, match_flops: true}}", "model.teacher=/nowhere/t"],
        r"model\.teacher='/nowhere/t': There is no folder",
    ),
    ("slorb=true", r"Section 'slorb' is True"),
    ("slorb.k=7", r"slorb\.k=7 does not divide in_features=32"),
    ("slorb.k=0", r"slorb\.k=0 must be at least 1"),
    ("slorb.init=random", r"slorb\.init='random' is text, expected 'mean' or 'zero'"),
    ("slorb.start=1", r"slorb\.start=1\.0 must be 0 or more and below 1"),
    (["sparsity.schedule=gmp", "slorb.start=0.5"], r"slorb\.start=0\.5 begins SLoRB after 1 steps, before .*=gmp"),
    # training: values
    ("training=5", r"Section 'training' is 5"),
    ("training.learning_rat=1", r"Unknown key training\.learning_rat\. Did you mean 'learning_rate'"),
    ("training.nonsense=1", r"Unknown key training\.nonsense\. See transformers\.TrainingArguments"),
    ("training.learning_rate=2e-5x", r"training\.learning_rate='2e-5x' is text, expected a number"),
    ("training.learning_rate=-1e-3", r"training\.learning_rate=-0\.001 must be 0 or more"),
    ("training.learning_rate=.nan", r"training\.learning_rate=nan is not a finite number"),
    ("training.learning_rate=null", r"training\.learning_rate=null is empty"),
    ("training.max_steps=0", r"training\.max_steps=0 must be 1 or more"),
    ("training.max_steps=-5", r"training\.max_steps=-5 must be 1 or more"),
    ("training.max_steps=1e3", r"training\.max_steps=1000\.0 is a number, expected an integer"),
    ("training.max_steps=99999999999999999999", r"training\.max_steps=9+ must be below"),
    ("training.num_train_epochs=-3", r"training\.num_train_epochs=-3\.0 must be above 0"),
    ("training.per_device_train_batch_size=0", r"training\.per_device_train_batch_size=0 must be 1 or more"),
    ("training.per_device_train_batch_size=-1", r"training\.per_device_train_batch_size=-1 must be 1 or more"),
    ("training.per_device_eval_batch_size=0", r"training\.per_device_eval_batch_size=0 must be 1 or more"),
    ("training.gradient_accumulation_steps=0", r"training\.gradient_accumulation_steps=0 must be 1 or more"),
    ("training.warmup_steps=-1", r"training\.warmup_steps=-1\.0 must be 0 or more"),
    ("training.warmup_steps=1.5", r"training\.warmup_steps=1\.5 must be whole steps"),
    ("training.weight_decay=-0.1", r"training\.weight_decay=-0\.1 must be 0 or more"),
    ("training.adam_beta2=1", r"training\.adam_beta2=1\.0 must be 0 or more and below 1"),
    ("training.adam_epsilon=0", r"training\.adam_epsilon=0\.0 must be above 0"),
    ("training.max_grad_norm=-1", r"training\.max_grad_norm=-1\.0 must be 0 or more"),
    ("training.seed=-1", r"training\.seed=-1 must lie between"),
    ("training.dataloader_num_workers=-1", r"training\.dataloader_num_workers=-1 must be 0 or more"),
    ("training.save_total_limit=0", r"training\.save_total_limit=0 must be 1 or more"),
    ("training.save_steps=0", r"training\.save_steps=0\.0 must be above 0"),
    ("training.save_steps=1.5", r"training\.save_steps=1\.5: .*must be an integer"),
    ("training.logging_steps=-1", r"training\.logging_steps=-1\.0 must be above 0"),
    ("training.bf16=maybe", r"training\.bf16='maybe' is text, expected true or false"),
    (["training.bf16=true", "training.fp16=true"], r"training\.[bf]+p?16=True: At most one"),
    # training: choices
    ("training.lr_scheduler_type=cosin", r"training\.lr_scheduler_type='cosin' is text.*Did you mean 'cosine'"),
    ("training.lr_scheduler_type=cosine_with_min_lr", r"lr_scheduler_type='cosine_with_min_lr'.*min_lr_rate"),
    ("training.lr_scheduler_type=reduce_lr_on_plateau", r"'reduce_lr_on_plateau'.*requires an eval strategy"),
    ("training.lr_scheduler_kwargs=0.1", r"training\.lr_scheduler_kwargs=0\.1 is a number, expected a mapping"),
    ("training.lr_scheduler_kwargs=a.json", r"training\.lr_scheduler_kwargs='a\.json' is no mapping"),
    ("training.lr_scheduler_kwargs.min_lr=0", r"the schedule 'linear' takes no 'min_lr'\. Remove it"),
    ("training.save_strategy=stepz", r"training\.save_strategy='stepz' is text.*Did you mean 'steps'"),
    ("training.save_strategy=true", r"training\.save_strategy=True is true or false"),
    ("training.save_strategy=best", r"training\.save_strategy='best' needs.*metric_for_best_model"),
    ("training.eval_strategy=never", r"training\.eval_strategy='never' is text, expected 'no' or 'steps' or 'epoch'"),
    ("training.load_best_model_at_end=true", r"training\.load_best_model_at_end=True: .*eval strategy"),
    (
        [*BEST, "training.load_best_model_at_end=true", "data.eval={{path: wikitext, split: test}}"],
        r"data\.eval: .*'test'.* is a test set, and training\.load_best_model_at_end=True would choose .*Name another",
    ),
    (
        [
            *BEST,
            "training.save_strategy=best",
            "training.metric_for_best_model=loss",
            "data.eval={{path: wikitext, split: 'test[:10%]'}}",
        ],
        r"data\.eval: .*is a test set, and training\.save_strategy='best' would choose a checkpoint by it",
    ),
    (
        [*BEST, "training.load_best_model_at_end=true", "data.eval=other.txt"],
        r"data\.eval: 'other\.txt' is in evaluation\.datasets too, and training\.load_best_model_at_end=True",
    ),
    ("training.metric_for_best_model=accuracy", r"training\.metric_for_best_model='accuracy' is unknown"),
    ("training.report_to=wandbx", r"training\.report_to='wandbx' is no tracker\. Did you mean 'wandb'"),
    ("training.report_to=swanlab", r"training\.report_to='swanlab' is not installed"),
    ("training.log_level=loud", r"training\.log_level='loud' is unknown\. Choose from"),
    ("training.train_sampling_strategy=foo", r"training\.train_sampling_strategy='foo' is unknown"),
    ("training.torch_compile_backend=foo", r"training\.torch_compile_backend='foo' is unknown"),
    ("training.accelerator_config={{split_batchez: true}}", r"training\.accelerator_config=.*split_batchez"),
    ("training.accelerator_config=none.json", r"training\.accelerator_config='none\.json': .*No such file"),
    # training: what AST would ignore
    ("training.optim=adafactor", r"training\.optim='adafactor': AST trains with its own SparseAdamW"),
    ("training.deepspeed=none.json", r"training\.deepspeed='none\.json': DeepSpeed shards weights"),
    ("training.fsdp=full_shard", r"training\.fsdp='full_shard' is text, expected true or false"),
    ("training.fsdp=true", r"training\.fsdp=True needs processes to shard over\. Start with `accelerate launch"),
    ("training.fsdp_config={{version: 2}}", r"training\.fsdp_config=.*would be ignored\. Set fsdp: true, or remove"),
    (["training.fsdp=true", "training.fsdp_config.version=1"], r"fsdp_config: version 1 flattens .*fsdp_version: 2"),
    (
        ["training.fsdp=true", "training.fsdp_config.reshard_after=true"],
        r"there is no .reshard_after.\. Did you mean",
    ),
    (["training.fsdp=true", "training.fsdp_config.xla=true"], r"fsdp_config: xla is not supported\. Remove it"),
    (
        ["training.fsdp=true", "training.fsdp_config.state_dict_type=FULL_STATE_DICT"],
        r"fsdp_config: state_dict_type='FULL_STATE_DICT': checkpoints of a sharded run are sharded\. Remove it",
    ),
    (
        ["training.fsdp=true", "training.fsdp_config.cpu_ram_efficient_loading=true"],
        r"cpu_ram_efficient_loading le",
    ),
    (["training.fsdp=true", "training.fsdp_config.cpu_offload=true"], r"fsdp_config: cpu_offload has not been made"),
    (
        ["training.fsdp=true", "training.save_only_model=true"],
        r"training\.save_only_model=True cannot be had of a",
    ),
    ("training.do_train=false", r"training\.do_train=False: ast-train always trains"),
    ("training.resume_from_checkpoint=x", r"training\.resume_from_checkpoint='x': .*--resume"),
    ("training.gradient_checkpointing_kwargs.use_reentrant=false", r"gradient_checkpointing_kwargs=.*would be ignored"),
    ("training.enable_jit_checkpoint=true", r"training\.enable_jit_checkpoint=True: it saves before masks are ref"),
    ("training.push_to_hub=true", r"training\.hub_strategy='every_save' would upload"),
    # evaluation
    ("evaluation=heldout", r"Section 'evaluation' is 'heldout'"),
    ("evaluation.datasets=nowhere.txt", r"`evaluation\.datasets`: file nowhere\.txt does not exist"),
    ("evaluation.datasets=held_out", r"file held_out does not exist.*Did you mean 'heldout'"),
    ("evaluation.datasets=wikitext2", r"WikiText-2 cannot be loaded.*`evaluation\.data_dir`"),
    ("evaluation.datasets=''", r"evaluation\.datasets=\(''.*has an empty entry"),
    ("evaluation.steps=0", r"evaluation\.steps=0 must be at least 1"),
    ("evaluation={{datasets: [], steps: 2}}", r"evaluation\.steps=2 has nothing to measure.*Name a data set"),
    (
        ["evaluation.datasets=[other.txt, '{root}/other.txt']", "evaluation.steps=1"],
        r"'other\.txt' and '/.*/other\.txt' would both be logged as other_perplexity\. Rename one",
    ),
    ("evaluation.datasets=llama", r"`evaluation\.datasets`: llama is a folder"),
    ("evaluation.datasets=short.txt", r"evaluation\.datasets: 'short\.txt' has 3 tokens, fewer than one window of 16"),
    ("evaluation.datasets=latin.txt", r"latin\.txt, line 1: not UTF-8"),
    ("evaluation.datasets=list.jsonl", r"list\.jsonl, line 2: not a JSON object"),
    ("evaluation.seq_len=129", r"evaluation\.seq_len=129 is longer than the 128 positions"),
    ("evaluation.seq_len=1", r"evaluation\.seq_len=1 must be at least 2"),
    ("evaluation.windows=0", r"evaluation\.windows=0 must be at least 1"),
    ("evaluation.windows=all", r"evaluation\.windows='all' is text, expected an integer or null"),
    ("evaluation.report=maybe", r"evaluation\.report='maybe' is text, expected true or false"),
    ("evaluation.prompts=''", r"evaluation\.prompts=\(''.*has an empty entry"),
    (
        ["evaluation.report=true", f"evaluation.prompts={'the ' * 200}"],
        r"evaluation\.prompts: 'the the .* the model 128 positions\. Shorten it",
    ),
    ("evaluation.data_dir=/nowhere", r"evaluation\.data_dir='/nowhere' does not exist"),
    # watch
    ("watch=skip", r"Section 'watch' is 'skip', not a mapping"),
    ("watch.nan=warn", r"watch\.nan='warn' is text, expected 'stop' or 'skip'"),
    ("watch.spike=skp", r"watch\.spike='skp' is text, expected .*Did you mean 'skip'"),
    ("watch.spike=false", r"watch\.spike=False is true or false, expected 'off'"),
    ("watch.spike_factor=1", r"watch\.spike_factor=1\.0 must be above 1"),
    ("watch.spike_window=0", r"watch\.spike_window=0 must be at least 1"),
    ("watch.max_skips=0", r"watch\.max_skips=0 must be at least 1"),
    ("watch.spike_windw=5", r"Unknown key watch\.spike_windw\. Did you mean 'spike_window'"),
    # several together
    (
        ["training.lr_scheduler_type=cosine_with_min_lr", "training.lr_scheduler_kwargs.min_lr_rat=0.1"],
        r"takes no 'min_lr_rat'\. Did you mean 'min_lr_rate'",
    ),
    (
        ["training.lr_scheduler_type=cosine_with_min_lr", "training.lr_scheduler_kwargs.min_lr_rate=low"],
        r"lr_scheduler_kwargs=\{{'min_lr_rate': 'low'\}}: the schedule cannot be built",
    ),
    (
        ["training.lr_scheduler_type=cosine_with_min_lr", "training.lr_scheduler_kwargs.min_lr=0.1"],
        r"leaves the range from 0 to training\.learning_rate=0\.001",
    ),
    (
        ["training.gradient_checkpointing=true", "training.gradient_checkpointing_kwargs.use_reentrand=false"],
        r"there is no 'use_reentrand'\. Did you mean 'use_reentrant'",
    ),
    (
        ["data.eval_share=0", "evaluation.datasets=[]", "training.eval_strategy=steps"],
        r"training\.eval_strategy='steps' needs held-out text",
    ),
    (
        ["training.dataloader_drop_last=true", "training.per_device_train_batch_size=9999"],
        r"training\.dataloader_drop_last=True leaves nothing to train on",
    ),
    (["evaluation.datasets=wikitext2", "evaluation.data_dir={root}"], r"No wiki\.test\.raw in `evaluation\.data_dir`"),
    # --set itself, and the name of a section
    ("sparsity.pattern", r"--set 'sparsity\.pattern' is not of the form section\.key=value"),
    ("training.max_steps.x=1", r"--set .*max_steps is an integer, not a mapping"),
    ("sparsity.include=[a", r"--set .*no valid YAML"),
    ("sparcity.pattern=2:4", r"unknown section 'sparcity'\. Did you mean 'sparsity'"),
]


def name_of(case: Any) -> str | None:
    return case if isinstance(case, str) and "\\" not in case else "+".join(case) if isinstance(case, list) else ""


@pytest.mark.parametrize(("change", "message"), SETTINGS, ids=name_of)
def test_one_wrong_setting_is_named_with_its_mend(root: Path, change: str | list[str], message: str) -> None:
    changes = [change] if isinstance(change, str) else change
    settings = [part for setting in changes for part in ("--set", setting.format(root=root))]
    refused(root, message.replace("{{", "{").replace("}}", "}"), base(root), *settings, "--output-dir", root / "out")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"run\.yaml' is empty"),
        ("- a\n", r"is a list, not a mapping"),
        ("model: {name_or_path: a}\n", r"section 'data' is missing"),
        ("model: {name_or_path: a\n", r"no valid YAML: line 2, column 1"),
        ("\tmodel: a\n", r"no valid YAML: line 1"),
        ("model: {}\nmodel: {}\n", r"line 2: key 'model' stands twice"),
        ("model: " + "[" * 3000, r"line 1: more than 32 levels deep"),
        ("model: {k: " + "9" * 5000 + "}", r"no valid YAML"),
        ("model: \0", r"no valid YAML"),
        ("---\na: 1\n---\nb: 1\n", r"no valid YAML"),
    ],
    ids=["empty", "list", "no data", "open brace", "tab", "twice", "deep", "long number", "zero byte", "two documents"],
)
def test_a_broken_file_is_named(root: Path, text: str, message: str) -> None:
    refused(root, message, text, "--output-dir", root / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "{root}/none.yaml"], r"none\.yaml' does not exist"),
        (["--config", "{root}"], r"is a folder\. Give the path of a YAML file"),
        (["--config", "{root}/bytes.yaml"], r"bytes\.yaml is not UTF-8"),
        ([], r"training\.output_dir is missing"),
        (["--output-dir", "{root}/text.txt"], r"text\.txt' is a file"),
        (["--output-dir", "{root}/text.txt/below"], r"text\.txt' cannot be written to"),
        (["--output-dir", "{root}/finished"], r"finished' holds a run already.*--resume.*--overwrite"),
        (["--output-dir", "{root}"], r"holds files already"),
        (["--output-dir", "{root}/llama", "--overwrite"], r"llama' is model\.name_or_path, and would be replaced"),
        (["--output-dir", "{root}/out", "--resume"], r"Nothing to resume: '.*out' holds no complete checkpoint"),
        (["--output-dir", "{root}/out", "--resume", "/nowhere"], r"Checkpoint '/nowhere' is no folder"),
        (["--output-dir", "{root}/out", "--resume", "{root}/llama"], r"is no complete training checkpoint: optimizer"),
        (["--output-dir", "{root}/llama", "--resume", "{root}/finished/checkpoint-1"], r"llama' (holds|is)"),
        (["--output-dir", "{root}/out", "--resume", "--overwrite"], r"--resume and --overwrite exclude each other"),
        (["--output-dir", "{root}/out", "--resum"], r"No such option '--resum'"),
        *(
            (["--output-dir", "{root}/out", "--resume", f"{{root}}/damaged-{name}"], rf"{re.escape(name)}`? is damaged")
            for name in CHECKPOINT_FILES
        ),
        *(
            (["--output-dir", "{root}/finished", "--resume", "--set", change], message)
            for change, message in (
                ("sparsity.pattern=1:4", r"sparsity\.pattern='1:4' differs from '2:4' in .*checkpoint-2"),
                ("sparsity.mask_interval=3", r"sparsity\.mask_interval=3 differs from 2"),
                ("sparsity.exclude=down_proj", r"sparsity\.exclude=\['down_proj'\] differs from \[\]"),
                ("slorb=null", r"slorb\.enabled=False differs from True"),
                ("model.config_overrides.num_hidden_layers=1", r"is pruned in only one of this run"),
                ("model.config_overrides.intermediate_size=64", r"of the model has shape .*checkpoint-2' \(48, 32\)"),
            )
        ),
    ],
    ids=lambda case: " ".join(case).replace("{root}/", "") if isinstance(case, list) else "",
)
def test_a_wrong_file_or_folder_is_named(root: Path, arguments: list[str], message: str) -> None:
    refused(root, message, base(root), *(argument.format(root=root) for argument in arguments))


def test_missing_rights_are_named(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text(generated_text(100))
    (tmp_path / "a.yaml").write_text("model: {}")
    (tmp_path / "locked").mkdir()
    allowed_open, allowed_access = io.open, os.access

    def refuse(file: Any, *args: Any, **kwargs: Any) -> Any:  # root may do everything, so rights alone would not tell
        if Path(str(file)).parent == tmp_path and Path(str(file)).stem == "a":
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return allowed_open(file, *args, **kwargs)

    monkeypatch.setattr(io, "open", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path) and allowed_access(path, mode))
    data = ["--set", f"data.train={tmp_path}/a.txt", "--output-dir", f"{root}/out"]
    refused(root, r"(?i)a\.txt cannot be read: .*permission denied", base(root), *data)
    refused(root, r"a\.yaml' cannot be read", base(root), "--config", tmp_path / "a.yaml")
    refused(root, r"locked' cannot be written to", base(root), "--output-dir", tmp_path / "locked/out")


def test_a_loss_that_is_not_finite_names_the_step_and_the_checkpoint(root: Path, tmp_path: Path) -> None:
    tree = base(root)
    tree["training"].update(learning_rate=1e30, max_steps=4)
    result = train(root, tree, "--output-dir", tmp_path / "out")
    assert result.exit_code == 2
    last = result.stderr.rstrip("\n").splitlines()[-1]
    assert re.search(r"^Error: Training diverged at step \d: .*(checkpoint-\d|no checkpoint yet)", last), last
    assert Path(re.findall(r"The batch: (\S+/replay/step-\d-rank-0\.safetensors)\.", last)[0]).exists()


@pytest.mark.parametrize("change", ["training.max_steps=0", "data.train=list.jsonl"])
def test_a_process_ends_with_2_and_one_line(root: Path, tmp_path: Path, change: str) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(base(root)))
    command = ["--config", config, "--set", change, "--output-dir", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-m", "ast_sparse.cli.train", *map(str, command)], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert re.fullmatch(r"Error: .*(max_steps=0|list\.jsonl, line 2).*\n", done.stderr), done.stderr
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_passed_over(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "finished", tmp_path / "run")
    cut(tmp_path / "run/checkpoint-2/optimizer.pt")
    result = train(root, base(root), "--output-dir", tmp_path / "run", "--resume")
    assert result.exit_code == 0, result.output
    whole, again = (load_file(folder / "model.safetensors") for folder in (root / "finished", tmp_path / "run"))
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("build_datasets", r"The tokenised text cannot be cached: .*No space left.* HF_DATASETS_CACHE name a folder"),
        ("SparseTrainer", r"training: .*No space left on device\. Correct training\.output_dir"),
    ],
)
def test_a_full_disk_before_training_is_named(
    root: Path, monkeypatch: pytest.MonkeyPatch, what: str, message: str
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"ast_sparse.run.train.{what}", full)
    refused(root, message, base(root), "--output-dir", root / "out")


@pytest.mark.parametrize(("rank", "said"), [("0", "Error: no room\n"), ("1", "")])
def test_an_error_that_all_processes_get_is_said_once(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str, said: str
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise SharedError("no room")

    monkeypatch.setattr("ast_sparse.run.train.run_training", full)
    monkeypatch.setattr("ast_sparse.cli.train._SAID_S", 0)
    monkeypatch.setenv("RANK", rank)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(base(root)))
    result = CliRunner().invoke(main, ["--config", str(tmp_path / "run.yaml")])
    assert (result.exit_code, result.stderr) == (2, said)


@pytest.mark.parametrize(
    ("limit", "reason", "what"),
    [
        (0, "File too large", "out"),
        (20_000, "File too large", "out/checkpoint-2"),
        (120_000, "a file could not be written whole", "out/checkpoint-2"),
    ],
    ids=["log", "weights", "optimizer"],
)
def test_a_run_without_space_ends_in_one_line_and_leaves_the_last_good_checkpoint(
    root: Path, monkeypatch: pytest.MonkeyPatch, limit: int, reason: str, what: str
) -> None:
    """The file system refuses what is larger than the limit, from the second step on."""
    shutil.rmtree(root / "out", ignore_errors=True)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Full(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))

    build = SparseTrainer.__init__

    def build_full(self: SparseTrainer, *arguments: Any, **keywords: Any) -> None:
        build(self, *arguments, **keywords)
        self.add_callback(Full)

    monkeypatch.setattr(SparseTrainer, "__init__", build_full)
    try:
        result = train(root, base(root), "--output-dir", root / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    last = [line for line in re.split(r"[\r\n]+", result.stderr) if line.startswith("Error: ")]
    assert result.exit_code == 2 and len(last) == 1, result.output
    assert re.match(rf"Error: Cannot write `{root / what}`: .*({reason})", last[0]), last[0]
    assert last[0].endswith(f"Last good checkpoint: {root}/out/checkpoint-1. Make room, then use --resume."), last[0]
    assert [path.name for path in (root / "out").glob("*checkpoint*")] == ["checkpoint-1"]
    assert faults(root / "out" / "checkpoint-1") == []
    shutil.rmtree(root / "out")
