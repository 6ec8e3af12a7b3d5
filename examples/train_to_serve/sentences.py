"""What the classifier learns from: short sentences about this server, and what each of them is about."""

import random
from itertools import product
from typing import NamedTuple

LABELS = ("memory", "speed", "safety")

SUBJECTS = {
    "memory": (
        "the vector bank",
        "a compact adapter",
        "an evicted factor",
        "the disk",
        "the budget",
        "a pinned version",
    ),
    "speed": ("a decode step", "the queue", "the first token", "a full batch", "the prefill", "a fused kernel"),
    "safety": ("an api key", "a tenant", "a refused upload", "a forged digest", "a scope", "a foreign adapter"),
}
FRAMES = (
    "{} is what people ask about first",
    "this page is about {}",
    "the tests say enough about {}",
    "we have written down what happens to {}",
    "nobody should have to think of {} at night",
    "{} has a chapter of its own",
    "what the log says of {} is short",
    "look at {} before anything else",
    "{} came up in every review",
    "what is new here is {}",
    "ask the operator about {}",
    "{} was easier than it seemed",
    "a benchmark tells us more of {}",
    "it all comes down to {} in the end",
    "we were wrong about {} for a week",
    "remember {}",
)


class Example(NamedTuple):
    text: str
    label: int


def train_and_held_out(seed: int = 0) -> tuple[list[Example], list[Example]]:
    """Every subject in every frame, shuffled: three quarters to learn from, and a quarter that is never shown."""
    examples = [
        Example(frame.format(subject), label)
        for label, name in enumerate(LABELS)
        for subject, frame in product(SUBJECTS[name], FRAMES)
    ]
    random.Random(seed).shuffle(examples)
    kept = len(examples) // 4
    return examples[kept:], examples[:kept]
