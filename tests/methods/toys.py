"""Tasks of token sequences for a tiny language model, with the loop's own `Data`."""

import random

import torch

from dymoe.learning.data import Data
from dymoe.learning.recipe import Training
from dymoe.methods import Stage
from dymoe.tasks import Sample, Task


def task(name, train=6, validation=4, words=range(1, 60), seed=0):
    """A task whose prompts are 3 to 7 of the tokens `words` and whose answers are one of them."""
    rng = random.Random(f"{name}{seed}")

    def sample(number):
        question = " ".join(str(rng.choice(list(words))) for _ in range(rng.randint(3, 7)))
        answer = str(rng.choice(list(words)))
        return Sample(f"{name}-{number}", None, question, answer, {"answer": answer})

    made = [sample(number) for number in range(train + validation)]
    return Task(name, made[:train], made[train:], [], "exact_match", 2)


def tokens(text):
    return [int(word) for word in text.split()]


def collate(samples):
    """Left-padded prompts and answers; labels on the answers alone."""
    rows = [(tokens(sample.question), tokens(sample.answer)) for sample in samples]
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(rows):
        ids[row, length - len(prompt) - len(answer) :] = torch.tensor(prompt + answer)
        labels[row, length - len(answer) :] = torch.tensor(answer)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


def data(samples):
    training = Training(steps_per_task=1, batch_size=4, dtype="float32")
    return Data(samples, collate, lambda samples: None, training, torch.device("cpu"), 1)


def stages(folder, tasks):
    """One stage per task, as the loop makes them."""
    folders = [folder / str(index) for index in range(len(tasks))]
    return [
        Stage(
            index + 1, tasks[index].name, (tasks[index],), folders[index], tuple(folders[:index]), tuple(tasks[:index])
        )
        for index in range(len(tasks))
    ]
