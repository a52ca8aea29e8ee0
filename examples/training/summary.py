"""summary.json, and the line that a run ends with."""

from pathlib import Path

import torch

from training.model import implementation


def summarize(trainer, test: dict[str, float]) -> dict:
    """What a run came to. Accuracies in percent, memory in MB = 1e6 bytes, the highest of all epochs.

    Args:
        trainer: after `train`.
        test: loss and accuracy of the best weights on the test split.
    """
    options, state, processes = trainer.options, trainer.state, trainer.processes
    rows, gpu = state.rows, trainer.device.type == "cuda"
    images = state.step * options.accumulate * options.batch_size * processes.world_size
    seconds = rows[-1]["train_seconds"]
    return {
        "dataset": options.dataset,
        "variant": options.variant,
        "efficient": implementation(trainer.model),
        "depth": options.depth,
        "growth_rate": options.growth_rate,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "seed": options.seed,
        "batch_size": options.batch_size,
        "processes": processes.world_size,
        "epochs": len(rows),
        "steps": state.step,
        "best_epoch": state.best["epoch"],
        "validation_loss": state.best["validation_loss"],
        "validation_accuracy": state.best["validation_accuracy"],
        "test_loss": test["loss"],
        "test_accuracy": test["accuracy"],
        "peak_memory_mb": max(row["peak_memory_mb"] for row in rows),
        "train_seconds": seconds,
        "images_per_second": images / seconds,
        "device": torch.cuda.get_device_name(trainer.device) if gpu else "cpu",
        "torch": torch.__version__,
    }


def summary_line(summary: dict, folder: Path) -> str:
    return (
        f"{folder}: test accuracy {summary['test_accuracy']:.2f} %, loss {summary['test_loss']:.4f} "
        f"(weights of epoch {summary['best_epoch']}, validation loss {summary['validation_loss']:.4f}); "
        f"{summary['epochs']} epochs in {summary['train_seconds']:.0f} s, {summary['images_per_second']:.0f} images/s, "
        f"peak memory {summary['peak_memory_mb']:.0f} MB"
    )
