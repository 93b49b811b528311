"""A transformers Trainer recorded by a callback: a small GPT-2 learns to add modulo p.

pip install 'groktrace[transformers]'
python examples/transformers_addition.py --out runs/gpt2
groktrace analyze runs/gpt2
tensorboard --logdir runs/gpt2
"""

import argparse

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from groktrace.recording.transformers import GroktraceCallback


class Sums(Dataset):
    """The sentences "a b = c"; only c is to be predicted."""

    def __init__(self, p: int, pairs: Tensor) -> None:
        a, b = pairs // p, pairs % p
        self.tokens = torch.stack([a, b, torch.full_like(a, p), (a + b) % p], dim=1)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        """Tokens, and labels that are -100 where nothing is to be predicted."""
        return {"input_ids": self.tokens[i], "labels": self.tokens[i].where(torch.arange(4) == 3, -100)}


def main() -> None:
    """Train; the one groktrace line is marked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--p", type=int, default=23, help="modulus")
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps")
    parser.add_argument("--out", default="snapshots", help="where the snapshots go")
    options = parser.parse_args()

    set_seed(0)
    pairs = torch.randperm(options.p**2)
    half = len(pairs) // 2
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=options.p + 1, n_positions=4, n_embd=64, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0
        )
    )
    arguments = TrainingArguments(
        output_dir=f"{options.out}-trainer",
        max_steps=options.steps,
        per_device_train_batch_size=half,
        learning_rate=1e-3,
        weight_decay=1.0,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    train, val = Sums(options.p, pairs[:half]), Sums(options.p, pairs[half:])
    trainer = Trainer(
        model,
        arguments,
        train_dataset=train,
        # The one line:
        callbacks=[GroktraceCallback(val=val, out=options.out, every=25)],
    )
    trainer.train()


if __name__ == "__main__":
    main()
