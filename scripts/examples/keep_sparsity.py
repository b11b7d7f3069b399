"""Fine-tune a sparse model with plain transformers and export it again: its layers stay N:M.

usage: python scripts/examples/keep_sparsity.py MODEL TEXT OUT [STEPS]

MODEL is a folder with an N:M model, for example an export of ast-export, and TEXT a text file. With TRL, give the same
callback to `SFTTrainer`.
"""

import sys
from pathlib import Path

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from ast_sparse import KeepSparsityCallback, export_model


def main(name: str, text: str, out: str, steps: str = "100") -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(name, dtype="float32")  # a compressed export is decoded
    lines = load_dataset("text", data_files=text, split="train").filter(lambda row: row["text"].strip())
    tokens = lines.map(lambda row: tokenizer(row["text"], truncation=True, max_length=512), remove_columns="text")
    trainer = Trainer(
        model,
        TrainingArguments(f"{out}/run", max_steps=int(steps), learning_rate=1e-5, weight_decay=0.1, report_to="none"),
        train_dataset=tokens,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
        callbacks=[KeepSparsityCallback()],
    )
    trainer.train()
    trainer.save_model(f"{out}/tuned")  # an ordinary dense checkpoint with zeros
    report = export_model(Path(out, "tuned"), Path(out, "compressed"), overwrite=True)
    print("\n".join(report.lines()))


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    main(*sys.argv[1:])
