"""Settings of the training that ast-train refuses, one at a time."""

from pathlib import Path

import pytest

from tests.cli.refused_runs import base, name_of, refused

BEST = ("training.eval_strategy=steps", "training.eval_steps=1")
_ACCUMULATION = "training.accelerator_config.gradient_accumulation_kwargs"

# one or several settings as after --set, and what the error says
SETTINGS: list[tuple[str | list[str], str]] = [
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
    ("sparsity={{schedule: imp, init: wanda}}", r"sparsity\.init='wanda' needs sparsity\.schedule=constant"),
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
    ("distillation.kl_weight=1", r"distillation\.kl_weight=1\.0 cannot be combined"),
    ("distillation={{ce_weight: 0, kl_weight: 0}}", r"are both 0"),
    ("distillation.temperature=0", r"distillation\.temperature=0\.0 must be above 0"),
    ("distillation.temperature=.inf", r"distillation\.temperature=inf is not a finite number"),
    ("distillation.kind=js", r"distillation\.kind='js' is text, expected 'kl' or 'reverse_kl'"),
    ("distillation.match_flops=true", r"distillation\.match_flops=True is for a run without a teacher.*alpha: 0"),
    (
        ["distillation={{alpha: 0, match_flops: true}}", "model.teacher=/nowhere/t"],
        r"model\.teacher='/nowhere/t': There is no folder",
    ),
    ("slorb={{init: svd, start: 0.5}}", r"slorb\.init='svd' is made while the model is pruned\. Set slorb\.start to 0"),
    ("slorb={{k: 8, init: svd}}", r"slorb\.init=svd needs text, and sparsity\.init='magnitude' reads none\. Choose"),
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
    ("training.warmup_steps=1.5", r"training\.warmup_steps=1\.5 must be a whole number"),
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
    ("training.lr_scheduler_kwargs=a.json", r"training\.lr_scheduler_kwargs='a\.json' is not a mapping"),
    ("training.lr_scheduler_kwargs.min_lr=0", r"the schedule 'linear' does not take 'min_lr'\. Remove it"),
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
        r"data\.eval: 'other\.txt' is also in evaluation\.datasets, and training\.load_best_model_at_end=True",
    ),
    ("training.metric_for_best_model=accuracy", r"training\.metric_for_best_model='accuracy' is unknown"),
    ("training.report_to=wandbx", r"training\.report_to='wandbx' is not a tracker\. Did you mean 'wandb'"),
    ("training.report_to=swanlab", r"training\.report_to='swanlab' is not installed"),
    ("training.log_level=loud", r"training\.log_level='loud' is unknown\. Choose from"),
    ("training.train_sampling_strategy=foo", r"training\.train_sampling_strategy='foo' is unknown"),
    ("training.torch_compile_backend=foo", r"training\.torch_compile_backend='foo' is unknown"),
    ("training.accelerator_config={{split_batchez: true}}", r"training\.accelerator_config=.*split_batchez"),
    (
        "training.accelerator_config.gradient_accumulation_kwargs.num_steps=4",
        r"num_steps=4: set gradient_accumulation_steps",
    ),
    (
        "training.accelerator_config.gradient_accumulation_kwargs.sync_each_batche=true",
        r"'sync_each_batche' has no effect.*sync_each_batch",
    ),
    (
        "training.accelerator_config.gradient_accumulation_kwargs.sync_each_batch=2",
        r"sync_each_batch=2 is neither true nor false",
    ),
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
        r"with cpu_ram_efficient_loading only",
    ),
    (["training.fsdp=true", "training.fsdp_config.cpu_offload=true"], r"fsdp_config: cpu_offload does not work"),
    (
        ["training.fsdp=true", "training.save_only_model=true"],
        r"training\.save_only_model=True does not work in a",
    ),
    ("training.do_train=false", r"training\.do_train=False: ast-train always trains"),
    ("training.resume_from_checkpoint=x", r"training\.resume_from_checkpoint='x': .*--resume"),
    ("training.gradient_checkpointing_kwargs.use_reentrant=false", r"gradient_checkpointing_kwargs=.*would be ignored"),
    ("training.save_on_each_node=true", r"training\.save_on_each_node=True: a checkpoint is one folder"),
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
        r"evaluation\.prompts: 'the the .* the model has 128 positions\. Shorten it",
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
        r"does not take 'min_lr_rat'\. Did you mean 'min_lr_rate'",
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
    ("sparsity.include=[a", r"--set .*not valid YAML"),
    ("sparcity.pattern=2:4", r"unknown section 'sparcity'\. Did you mean 'sparsity'"),
]


@pytest.mark.parametrize(("change", "message"), SETTINGS, ids=name_of)
def test_one_wrong_setting_is_named_with_its_fix(root: Path, change: str | list[str], message: str) -> None:
    changes = [change] if isinstance(change, str) else change
    settings = [part for setting in changes for part in ("--set", setting.format(root=root))]
    refused(root, message.replace("{{", "{").replace("}}", "}"), base(root), *settings, "--output-dir", root / "out")
