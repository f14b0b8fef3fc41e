"""Gradient alignment in the Hugging Face Trainer: a Trainer whose training_step hands over one loss per view.

    pip install transformers accelerate
    python examples/hf_trainer.py

The Trainer's own clipping, accumulation, schedulers, logging and checkpoints work as they do: after the last
micro-batch the gradients are aligned, and it finds them in ``.grad``. On several GPUs, build the optimizer with
``process_group=torch.distributed.group.WORLD``.
"""

import tempfile

import torch
from transformers import Trainer, TrainingArguments

import gradalign as ga


class Detector(torch.nn.Module):
    """A detector as the Trainer calls it: keyword inputs, a dict of loss and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.model = ga.detectors.create("light")

    def forward(self, wave, labels):
        """Map wave [B, T] and labels [B] to the loss and logits [B, 2]."""
        logits = self.model(wave)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


class AlignedTrainer(Trainer):
    """A Trainer with clean and augmented views of each batch, and aligned gradients."""

    boost = ga.RawBoost(algo=4)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Differentiate each view's loss; return their mean."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        # What Accelerate has wrapped.
        aligned = self.optimizer.optimizer
        with self.compute_loss_context_manager():
            views = (inputs["wave"], self.boost(inputs["wave"]))
            losses = [self.compute_loss(model, {**inputs, "wave": view}) for view in views]
            losses = [loss / self.current_gradient_accumulation_steps for loss in losses]
        # With fp16=True the Trainer unscales what it finds in ``.grad``.
        scaler = self.accelerator.scaler
        aligned.backward(losses if scaler is None else [scaler.scale(loss) for loss in losses])
        if self.accelerator.sync_gradients:
            aligned.align()
        return torch.stack(losses).mean().detach()


def main() -> ga.AlignedOptimizer:
    """Train for two epochs of two steps, each of two micro-batches, and return the optimizer."""
    torch.manual_seed(0)
    data = [{"wave": 0.1 * torch.randn(8000), "labels": i % 2} for i in range(8)]
    model = Detector()
    optimizer = ga.AlignedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), method="pcgrad")
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            num_train_epochs=2,
            max_grad_norm=1.0,
            save_steps=2,
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=not torch.cuda.is_available(),
        )
        AlignedTrainer(model, arguments, train_dataset=data, optimizers=(optimizer, None)).train()
    return optimizer


if __name__ == "__main__":
    print(main().stats)
