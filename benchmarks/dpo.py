"""TRL's DPO from an SFT run's adapter on the embedded comparisons: an outside reference for what a policy run reaches.

The adapter goes on from that of the SFT run, whose frozen copy is the reference, as a policy run does; its directory is
then evaluated on the same prompts, with the same draws, as a policy run. TRL and PEFT come with the extra `bench`. Run:

    python benchmarks/dpo.py --sft runs/coffee-bar-sft --beta 0.1 --output runs/coffee-bar-dpo
    perlhf evaluate runs/coffee-bar-policy --adapter runs/coffee-bar-dpo/adapter \\
        --output runs/coffee-bar-dpo/evaluation.json
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import harness

COMPARISONS = "builtin:coffee-bar/comparison"
LENGTH = 512


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains, writes the adapter, and returns what was done."""
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportMissingImports]  of the extra `bench`

    from perlhf.config.stages import DataConfig
    from perlhf.data.records import Comparison
    from perlhf.data.splits import load
    from perlhf.model.bases.loading import load_tokenizer, pick_device, pick_dtype
    from perlhf.model.encoding.encode import Encoder
    from perlhf.model.finished import read_run
    from perlhf.system.machine import peak_memory_bytes

    sft = read_run(arguments.sft, ("sft",))
    encoder = Encoder(load_tokenizer(sft.base), sft.config.encoding)
    dtype, _ = pick_dtype(sft.config.dtype, pick_device(arguments.device).type)
    records = [r for r in load(DataConfig(paths=(COMPARISONS,)), ("comparison",), "train") if isinstance(r, Comparison)]
    rows = [
        {"prompt": encoder.tokenizer.decode(encoder.prompt(r.prompt)), "chosen": r.chosen, "rejected": r.rejected}
        for r in records
    ]
    network = AutoModelForCausalLM.from_pretrained(sft.base.directory, dtype=dtype)
    model = PeftModel.from_pretrained(network, arguments.sft / "adapter", is_trainable=True)
    scratch = tempfile.TemporaryDirectory()  # TRL makes its output directory even where nothing is saved
    settings = DPOConfig(
        scratch.name,
        beta=arguments.beta,
        learning_rate=arguments.learning_rate,
        num_train_epochs=arguments.epochs,
        per_device_train_batch_size=arguments.batch,
        max_length=LENGTH,
        lr_scheduler_type="linear",
        warmup_steps=2,
        gradient_checkpointing=False,
        bf16=dtype == torch.bfloat16,
        use_cpu=arguments.device == "cpu",
        seed=arguments.seed,
        report_to=[],
        save_strategy="no",
        logging_steps=5,
        disable_tqdm=True,
    )
    began = time.perf_counter()
    data = Dataset.from_list(rows)
    trainer = DPOTrainer(model, None, settings, train_dataset=data, processing_class=encoder.tokenizer)
    trainer.train()
    seconds = time.perf_counter() - began
    # By its name, not by the path where this machine keeps it; and nothing is looked up on the hub.
    model.peft_config["default"].base_model_name_or_path = sft.base.fingerprint["name"]
    model.save_pretrained(arguments.output / "adapter", selected_adapters=["default"], save_embedding_layers=False)
    return {
        "what": "TRL DPOTrainer",
        "beta": arguments.beta,
        "learning_rate": arguments.learning_rate,
        "epochs": arguments.epochs,
        "batch": arguments.batch,
        "seed": arguments.seed,
        "comparisons": len(rows),
        "updates": trainer.state.global_step,
        "log": trainer.state.log_history,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "dtype": str(dtype),
        "machine": harness.machine(torch.get_num_threads()),
        "versions": harness.versions(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sft", type=Path, required=True, help="SFT run whose adapter goes on")
    parser.add_argument("--output", type=Path, required=True, help="directory of the adapter and dpo.json")
    parser.add_argument("--beta", type=float, default=0.1, help="strength of the anchor (default: 0.1)")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="(default: 2e-4)")
    parser.add_argument("--epochs", type=float, default=1.0, help="(default: 1)")
    parser.add_argument("--batch", type=int, default=16, help="comparisons in an update (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    arguments = parser.parse_args()
    try:
        found = train(arguments)
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # without dpo.json the same command begins anew
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "dpo.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
