"""What SparseTrainer refuses: settings that it would ignore, and those that masks do not survive."""

import functools
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, WandbLogModel

from ast_sparse import SLoRBConfig, SparseAdamW, SparseTrainer, UserError
from ast_sparse.training.checks.arguments import check_arguments, check_shared_batches
from ast_sparse.training.fsdp import check_shardable
from tests.families import family_model
from tests.models import tiny_model
from tests.training.small_runs import arguments, blocks, trainer


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(optim="adafactor"), r"training.optim='adafactor': AST trains with its own SparseAdamW"),
        (dict(label_smoothing_factor=0.1), r"training.label_smoothing_factor=0.1"),
        (dict(use_liger_kernel=True), r"training.use_liger_kernel=True"),
        (dict(bf16_full_eval=True), r"training.bf16_full_eval=True"),
        (dict(auto_find_batch_size=True), r"training.auto_find_batch_size=True"),
        (dict(debug="underflow_overflow"), r"training.debug=.*: it cannot look at masks"),
        (dict(metric_for_best_model="eval_perplexity"), r"greater_is_better=True would keep the worst"),
        (dict(label_names=["label_ids"]), r"training.label_names=\['label_ids'\] has no 'labels'"),
        (dict(push_to_hub=True), r"training.hub_strategy='every_save' would upload weights"),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused_by_name(tmp_path: Path, values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        trainer(tmp_path / "run", args=values)
    assert not (tmp_path / "run").exists()


def test_what_is_not_a_plain_model_is_refused(tmp_path: Path) -> None:
    with_adapter = tiny_model("llama")
    with_adapter._hf_peft_config_loaded = True
    compiled = torch.compile(tiny_model("llama"), backend="eager")
    for model, message in (
        (torch.nn.Linear(4, 4), "model is Linear. Pass a causal LM"),
        (compiled, "model is wrapped by torch.compile"),
        (with_adapter, "model has a PEFT adapter"),
    ):
        with pytest.raises(UserError, match=message):
            trainer(tmp_path, model)


@pytest.mark.parametrize("name", ["", "model.layers.1"])
def test_a_function_that_the_copy_as_teacher_would_share_is_refused(tmp_path: Path, name: str) -> None:
    model = tiny_model("llama")
    module = model.get_submodule(name)
    module.forward = functools.wraps(module.forward)(lambda *args, own=module.forward, **kwargs: own(*args, **kwargs))
    with pytest.raises(UserError, match=rf"`{f'model.{name}'.rstrip('.')}.forward` was replaced by a function"):
        trainer(tmp_path, model)
    trainer(tmp_path, model, teacher_model=tiny_model("llama", seed=1))
    bound = tiny_model("llama")
    bound.forward = bound.forward  # a copy has its own
    trainer(tmp_path, bound)


def test_a_function_that_a_cast_copy_of_a_given_teacher_would_share_is_refused(tmp_path: Path) -> None:
    teacher = tiny_model("llama", seed=1)
    teacher.forward = torch.compile(teacher.forward, backend="eager")
    with pytest.raises(UserError, match=r"`teacher_model.forward` was replaced .* may run teacher_model itself"):
        trainer(tmp_path, teacher_model=teacher, args=dict(bf16=True))
    trainer(tmp_path, teacher_model=teacher)  # is not copied


def test_a_foreign_optimizer_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with pytest.raises(UserError, match="AdamW, which does not support masks"):
        trainer(tmp_path, model, optimizers=(torch.optim.AdamW(model.parameters()), None))


def test_an_optimizer_of_whole_parameters_is_refused_in_a_sharded_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ast_sparse.training.checks.inputs.sharding_plugin", lambda args: object())
    model = tiny_model("llama")
    with pytest.raises(UserError, match=r"optimizers\[0\] has whole parameters, and FSDP2 .* Pass None"):
        trainer(tmp_path, model, optimizers=(SparseAdamW(model.parameters()), None))


@pytest.mark.parametrize("name", ["compute_loss_func", "optimizer_cls_and_kwargs", "model_init"])
def test_an_argument_that_would_be_ignored_is_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"{name} would be ignored"):
        trainer(tmp_path, **{name: object()})


def test_an_optimizer_without_the_slorb_parameters_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with pytest.raises(UserError, match=r"does not have `.*slorb.S`, which would never be trained"):
        trainer(tmp_path, model, optimizers=(SparseAdamW(model.parameters()), None), slorb_config=SLoRBConfig())


def test_the_auxiliary_loss_of_a_router_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.config.output_router_logits = True
    with pytest.raises(UserError, match="output_router_logits=True"):
        trainer(tmp_path, model)


@pytest.mark.parametrize(
    ("engine", "what"),
    [("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron-LM")],
)
def test_setups_of_accelerate_that_would_lose_masks_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, what: str
) -> None:
    args = arguments(tmp_path)
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(UserError, match=f"configured for {what}.*where masks cannot follow the weights"):
        SparseTrainer(tiny_model("llama"), args, train_dataset=blocks())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"FSDP_VERSION": "1"}, "version 1 flattens weights and masks .* Set fsdp_version: 2"),
        ({}, "version 1 flattens"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "with cpu_ram_efficient_loading only one process has the weights"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "cpu_offload does not work with masks"),
        ({"FSDP_IGNORED_MODULES": "lm_head"}, "ignored_modules would not get the gradients"),
        ({"FSDP_AUTO_WRAP_POLICY": "BY_LAYER"}, "Invalid auto wrap policy: BY_LAYER"),
    ],
    ids=["fsdp1", "no version", "ram", "offload", "ignored", "policy"],
)
def test_settings_of_fsdp_by_accelerate_that_masks_do_not_survive_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], message: str
) -> None:
    args = arguments(tmp_path)
    version = {} if "version" in message else {"FSDP_VERSION": "2"}
    for name, value in {"ACCELERATE_USE_FSDP": "true", **version, **settings}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"^fsdp_config of `accelerate launch`: {message}"):
        SparseTrainer(tiny_model("llama"), args, train_dataset=blocks())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"split_batches": True}, "split_batches=True: 2 processes would share a batch.* Remove it; per_device_train"),
        ({"even_batches": False}, "even_batches=False: of 2 processes, those with a batch more would wait.* Remove it"),
    ],
)
def test_processes_that_would_not_have_a_whole_batch_each_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: dict[str, bool], message: str
) -> None:
    args = arguments(tmp_path, accelerator_config=setting)
    check_arguments(args)  # of a single process
    with pytest.raises(UserError, match=message):
        check_shared_batches(args, processes=2)  # of a plan
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: 2))
    with pytest.raises(UserError, match=message):
        check_arguments(args)


@pytest.mark.parametrize(
    ("tracker", "variable", "value"), [("wandb", "WANDB_LOG_MODEL", "end"), ("dvclive", "HF_DVCLIVE_LOG_MODEL", "True")]
)
def test_a_tracker_that_saves_the_model_before_it_is_masked_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: str, variable: str, value: str
) -> None:
    monkeypatch.setattr(f"{check_arguments.__module__}.get_available_reporting_integrations", lambda: [tracker])
    args = arguments(tmp_path)
    args.report_to = [tracker]
    for other in ("false", "FALSE", "0", "", *(["END"] if tracker == "wandb" else [])):  # as the trackers read it
        monkeypatch.setenv(variable, other)
        check_arguments(args)
    monkeypatch.setenv(variable, value)
    message = f"^{variable}='{value}' would upload weights that are not masked yet .* Unset"
    with pytest.raises(UserError, match=message):
        check_arguments(args)
    args.report_to = []
    with pytest.raises(UserError, match=message):
        SparseTrainer(tiny_model("llama"), args, train_dataset=blocks(), callbacks=[INTEGRATION_TO_CALLBACK[tracker]])


@pytest.mark.parametrize(
    ("tracker", "uploads", "others"),
    [
        ("dvclive", [True], [False, "all", None]),
        ("wandb", [WandbLogModel.END, WandbLogModel.CHECKPOINT], [WandbLogModel.FALSE]),
    ],
)
def test_a_tracker_that_has_been_made_is_asked_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: str, uploads: list[Any], others: list[Any]
) -> None:
    class Made(INTEGRATION_TO_CALLBACK[tracker]):
        def __init__(self, log_model: Any) -> None:
            self._log_model = log_model

    for value in uploads:
        with pytest.raises(UserError, match=r"^Made was made with log_model=.* not masked yet\. Make it without"):
            check_arguments(arguments(tmp_path), [Made(value)])
        with pytest.raises(UserError, match=r"^Made was made with log_model="):
            SparseTrainer.add_callback(cast(Any, None), Made(value))
    monkeypatch.setenv("WANDB_LOG_MODEL", "end")
    monkeypatch.setenv("HF_DVCLIVE_LOG_MODEL", "true")
    for value in others:
        check_arguments(arguments(tmp_path), [Made(value)])


def test_a_conv1d_is_not_sharded() -> None:
    with pytest.raises(UserError, match=r"`transformer\.h\.0\.attn\.c_attn` is a Conv1D, whose mask groups .* use DDP"):
        check_shardable(tiny_model("gpt2"))
    with pytest.raises(UserError, match="FSDP2 cannot shard a weight that two blocks share"):
        check_shardable(family_model("zamba2"))
    check_shardable(tiny_model("llama"))


def test_half_precision_masters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"torch.bfloat16: half-precision master weights.*dtype=torch.float32"):
        trainer(tmp_path, tiny_model("llama").bfloat16())


def test_batches_without_labels_are_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, data_collator=lambda rows: {"input_ids": torch.tensor([r["input_ids"] for r in rows])})
    with pytest.raises(UserError, match="no labels"):
        run.train()
