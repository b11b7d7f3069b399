"""Settings of the model and of the data that ast-train refuses, one at a time."""

from pathlib import Path

import pytest

from tests.cli.refused_runs import base, name_of, refused

# a mixture that succeeds, and what doremi and bandit also need
DOMAINS = [
    "data.train=null", "data.domains.cc={{train: text.txt, share: 0.6}}",
    "data.domains.wiki={{train: other.txt, share: 0.4}}",
]  # fmt: skip

STREAMING = ["data.streaming=true", "data.eval=other.txt"]

TARGETS = ["data.domains.cc.target=1.0", "data.domains.wiki.target=1.0"]

# one or several settings as after --set, and what the error says
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
    ("model.name_or_path={root}/text.txt", r"text\.txt` is a file, but not a \.gguf file"),
    ("model.name_or_path={root}/fake.gguf", r"fake\.gguf.*not a GGUF file"),
    ("model.name_or_path={root}/none.gguf", r"There is no file .*none\.gguf"),
    ("model.name_or_path={root}/finished", r"finished' is the result of a run.*Name the dense model"),
    ("model.name_or_path={root}/finished/checkpoint-1", r"checkpoint-1' is the result of a run"),
    ("model.name_or_path={root}/small-vocabulary", r"makes the token \d+, but the model has only 64 embeddings"),
    ("model.name_or_path={root}/cut-weights", r"model\.safetensors` is damaged.*Copy or write"),
    ("model.name_or_path={root}/no-weights", r"holds no model\.safetensors"),
    ("model.name_or_path={root}/nan-weights", r"`model\.embed_tokens\.weight` of .*nan-weights' holds values"),
    ("model.name_or_path={root}/cut-config", r"Cannot read .*cut-config/config\.json.*Restore"),
    ("model.name_or_path={root}/no-config", r"holds no config\.json"),
    ("model.name_or_path={root}/list-config", r"list-config/config\.json`: it is not a JSON object"),
    ("model.name_or_path={root}/no-size", r"no-size' cannot be built.*\(128, 0\).*Check its config\.json"),
    ("model.name_or_path={root}/negative-size", r"cannot be built: .*negative dimension -32"),
    ("model.name_or_path={root}/absurd-size", r"cannot be built: .*1000000000000000"),
    ("model.name_or_path={root}/text-size", r"text-size`.*hidden_size.*'big'"),
    ("model.name_or_path={root}/unknown-type", r"model type `lama`"),
    ("model.name_or_path={root}/no-tokenizer", r"no-tokenizer` holds no tokenizer"),
    ("model.name_or_path={root}/cut-tokenizer", r"tokenizer of .*cut-tokenizer`"),
    ("model.revision=5", r"model\.revision=5 is an integer"),
    ("model.revision=main", r"model\.revision='main' is for a model on the hub.*Remove it"),
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
    ("data.train={{path: json}}", r"\{{'path': 'json'\}} names a format but no files"),
    ("data.train={{path: json, data_files: none.jsonl}}", r"Cannot load data set json: .*none\.jsonl"),
    ("data.train={{path: text, data_files: '{root}/text.txt', nam: x}}", r"Cannot load data set text: .*nam"),
    ("data.train=short.txt", r"short\.txt has 3 tokens, fewer than one block of `data\.block_size` = 16"),
    ("data.train=empty.txt", r"empty\.txt is empty"),
    ("data.train=latin.txt", r"latin\.txt, line 1: not UTF-8"),
    ("data.train=zeros.txt", r"zeros\.txt is not text: it contains NUL bytes"),
    ("data.train=table.csv", r"table\.csv: files of this kind"),
    ("data.train=list.jsonl", r"list\.jsonl, line 2: not a JSON object"),
    ("data.train=field.jsonl", r"field\.jsonl, line 2: no field `text`, only body"),
    ("data.train=cut.jsonl", r"cut\.jsonl, line 2: not JSON"),
    ("data.train=number.jsonl", r"number\.jsonl, line 1: field `text` is not a string"),
    ("data.train=fake.parquet", r"fake\.parquet is not a parquet file.*Copy or write it again"),
    ("data.train=chat.jsonl", r"chat\.jsonl is chat data \(messages\), and the tokenizer of .* has no chat template"),
    (
        ["data.streaming=true", "data.eval=text.txt", "data.train=chat.jsonl"],
        r"chat\.jsonl, line 1: no field `text`, only messages\. This is chat data, but raw text is read here",
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
    ("data.streaming=true", r"data\.streaming=True cannot hold out documents of the stream\. Name data\.eval"),
    ([*STREAMING, "training.max_steps=-1"], r"the length of the text is unknown\. Set training\.max_steps"),
    ([*STREAMING, "training.dataloader_num_workers=2"], r"dataloader_num_workers=2: each worker would read the same"),
    ([*STREAMING, "data.train=latin.txt"], r"latin\.txt, line 1: not UTF-8"),
    (
        [*STREAMING, "model.name_or_path={root}/small-vocabulary", "evaluation.datasets=[]"],
        r"`data\.train`: the tokenizer makes the token \d+, but the model has only 64 embeddings",
    ),
    ([*DOMAINS, "data.streaming=true"], r"data\.streaming=True does not support domains\. Make shards"),
    # domains
    (["data.train=null"], r"data\.train is missing\. Name text in it, or domains in data\.domains"),
    ("data.domains.cc.train=other.txt", r"data\.train=\('text\.txt',\) cannot be combined with data\.domains"),
    ("data.update.type=doremi", r"data\.update=.* needs data\.domains"),
    ("data.domains=cc", r"data\.domains='cc' is text, expected a mapping"),
    (["data.train=null", "data.domains.cc=text.txt"], r"data\.domains\.cc='text\.txt' is not a mapping"),
    (["data.train=null", "data.domains.c c.train=text.txt"], r"data\.domains: the name 'c c' must consist of letters"),
    (["data.train=null", "data.domains.cc.share=1"], r"data\.domains\.cc\.train is missing"),
    ([*DOMAINS, "data.domains.cc.shares=1"], r"Unknown key data\.domains\.cc\.shares\. Known: train, eval, share"),
    ([*DOMAINS, "data.domains.cc.share=much"], r"data\.domains\.cc\.share='much' is text, expected a number"),
    ([*DOMAINS, "data.domains.cc.share=0.5"], r"data\.domains: the shares add up to 0\.9, not 1"),
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
]


@pytest.mark.parametrize(("change", "message"), SETTINGS, ids=name_of)
def test_one_wrong_setting_is_named_with_its_fix(root: Path, change: str | list[str], message: str) -> None:
    changes = [change] if isinstance(change, str) else change
    settings = [part for setting in changes for part in ("--set", setting.format(root=root))]
    refused(root, message.replace("{{", "{").replace("}}", "}"), base(root), *settings, "--output-dir", root / "out")
