"""Trains the demo model on two CPU cores, from nothing: `python -m kvfold.demo.train`.

Every step draws its texts from `(seed, step)`, so an interrupted run resumes where its last
checkpoint was and a repeated one sees the same texts. The retrieval circuit is there at the start
(`llama.initialise`); training teaches the chat format, chains and lists, sharpens the circuit
against thousands of distractors, and teaches prose.

Distances are trained ahead of lengths: positions jump at sentence boundaries (PoSE,
arXiv:2309.10400), so that a text of 512 tokens spans up to 14k positions. That alone is not enough,
for it shows no dilution: while texts had at most 512 tokens, single needles at 8k fell from 3 of 4
to none; 0.9M tokens with texts of 2k among them brought 4 of 4.
"""

import argparse
import json
import logging
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from .generate import KINDS, Kind, Task, make_task
from .lessons import ASSISTANT, BOS, END, PAD, USER, Segment, make_lesson
from .llama import Llama, Shape, export, initialise
from .tokenizer import build_tokenizer, save_tokenizer
from .where import model_dir

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """A part of the training, with one learning rate or a line between two.

    `shapes` are (tokens per text, texts per step), one drawn per step. `text_weight` is the weight
    of prose in the loss, `tally_rate` the share of chats that ask for the most common word,
    `story_order` how often a sentence of a story is followed by the next one in the templates,
    `is_open` whether input of any kind is answered.
    """

    n_steps: int
    shapes: tuple[tuple[int, int], ...]
    text_weight: float
    tally_rate: float
    story_order: float
    lr_start: float
    lr_end: float
    is_open: bool = False


STAGES = (
    Stage(1500, ((128, 12), (256, 6), (256, 6), (512, 3)), 0.10, 0.25, 0.0, 1e-3, 1e-3),
    Stage(500, ((256, 6), (512, 3), (1024, 2), (2048, 1), (2048, 1)), 0.25, 0.5, 0.0, 1e-3, 1e-3),
    Stage(250, ((512, 4), (2048, 1), (4096, 1)), 0.30, 0.5, 0.7, 1e-3, 7e-4),
    Stage(40, ((2048, 1), (8192, 1)), 0.30, 0.5, 0.7, 7e-4, 5e-4),
    Stage(
        460,
        (
            *((256, 8), (256, 8), (512, 4), (512, 4), (512, 4), (1024, 2), (1024, 2)),
            *((2048, 1), (2048, 1), (2048, 1), (4096, 1), (8192, 1)),
        ),
        0.50,
        0.5,
        0.7,
        5e-4,
        5e-5,
    ),
    Stage(
        320,
        (
            *((256, 8), (256, 8), (256, 8), (512, 4), (512, 4), (512, 4), (512, 4), (1024, 2)),
            *((2048, 1), (2048, 1), (4096, 1), (8192, 1)),
        ),
        0.50,
        0.5,
        0.7,
        4e-4,
        2e-5,
        is_open=True,
    ),
)
# How far positions may reach when a text skips some.
SPAN = 14336
WARMUP_STEPS = 200
PROBE_EVERY = 500
CHECKPOINT_EVERY = 250


@dataclass(frozen=True)
class Batch:
    """Ids, positions and loss weights, all [batch, tokens]; `is_answer` marks what weighs 1."""

    tokens: Tensor
    positions: Tensor
    weights: Tensor
    is_answer: Tensor


def special_id(tokenizer: Tokenizer, name: str) -> int:
    """The id of a special token, which every tokenizer of ours has."""
    found = tokenizer.token_to_id(name)
    assert found is not None, name
    return found


def encode(
    tokenizer: Tokenizer, segments: list[Segment]
) -> tuple[list[int], list[float], list[int]]:
    """Ids, one weight per id, and where a sentence or a turn begins (where positions may jump)."""
    ids: list[int] = []
    weights: list[float] = []
    starts: list[int] = []
    encodings = tokenizer.encode_batch([text for text, _ in segments], add_special_tokens=False)
    for (text, weight), encoding in zip(segments, encodings, strict=True):
        if text.startswith(USER) or (text[0] in " \n" and text[1:2].isupper()):
            starts.append(len(ids))
        ids += encoding.ids
        weights += [weight] * len(encoding.ids)
    return ids, weights, starts


def skip_positions(rng: random.Random, n_tokens: int, starts: list[int], span: int) -> list[int]:
    """Positions 0..n-1 with up to eight jumps at `starts`; half of the texts keep their own."""
    positions = list(range(n_tokens))
    if not starts or rng.random() < 0.5 or span <= n_tokens:
        return positions
    at = sorted(rng.sample(starts, min(len(starts), rng.randint(1, 8))))
    total = rng.randint(0, span - n_tokens)
    cuts = sorted(rng.randint(0, total) for _ in at)
    for start, cut, previous in zip(at, cuts, [0, *cuts[:-1]], strict=True):
        for i in range(start, n_tokens):
            positions[i] += cut - previous
    return positions


def make_batch(tokenizer: Tokenizer, rng: random.Random, stage: Stage) -> Batch:
    """Draw texts, cut or pad them to one length and skip positions."""
    n_tokens, n_texts = rng.choice(stage.shapes)
    rows: list[tuple[list[int], list[int], list[float]]] = []
    pad = special_id(tokenizer, PAD)
    for _ in range(n_texts):
        is_easy = rng.random() < 0.1
        segments = make_lesson(
            rng,
            n_tokens,
            stage.text_weight,
            is_easy,
            stage.tally_rate,
            stage.story_order,
            stage.is_open,
        )
        ids, weights, starts = encode(tokenizer, segments)
        positions = skip_positions(rng, max(len(ids), n_tokens + 1), starts, SPAN)
        n_missing = max(0, n_tokens + 1 - len(ids))
        ids += [pad] * n_missing
        weights += [0.0] * n_missing
        rows.append((ids[: n_tokens + 1], positions[: n_tokens + 1], weights[: n_tokens + 1]))
    tokens, positions_, weights_ = (torch.tensor(column) for column in zip(*rows, strict=True))
    return Batch(tokens, positions_, weights_, weights_ == 1.0)


def prompt_text(task: Task) -> str:
    """The task as one chat turn, in the form of the chat template."""
    return f"{BOS}{USER}{task.document}\n{task.question}{END}{ASSISTANT}"


@torch.no_grad()
def probe(
    model: Llama, tokenizer: Tokenizer, length: int, kinds: tuple[Kind, ...], n: int
) -> dict[str, float]:
    """Share of held-out tasks whose whole answer is the arg max at every step: what greedy decoding
    would write.
    """
    scores: dict[str, float] = {}
    for kind in kinds:
        n_exact = 0
        for seed in range(n):
            task = make_task(10_000 + seed, length, kind)
            answer = tokenizer.encode(f"{task.answer}{END}", add_special_tokens=False).ids
            ids = tokenizer.encode(prompt_text(task), add_special_tokens=False).ids + answer
            tokens = torch.tensor([ids])
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(tokens, torch.arange(len(ids))[None])[0, -len(answer) - 1 : -1]
            n_exact += logits.argmax(-1).tolist() == answer
        scores[f"{kind}@{length}"] = n_exact / n
    return scores


def learning_rate(step: int) -> tuple[Stage, float]:
    """The stage of a step and its rate: linear within a stage, after a linear warm-up."""
    at = step
    for stage in STAGES:
        if at < stage.n_steps:
            rate = stage.lr_start + (stage.lr_end - stage.lr_start) * at / stage.n_steps
            return stage, rate * min(1.0, (step + 1) / WARMUP_STEPS)
        at -= stage.n_steps
    raise IndexError(f"step {step} is past the last stage")


def train(work: Path, out: Path, seed: int) -> None:
    """Run all stages, resuming from `work`/checkpoint.pt; every checkpoint is exported to `out`."""
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(seed)
    model = Llama(Shape(tokenizer.get_vocab_size()))
    initialise(model, seed)
    save_tokenizer(tokenizer, out, model.shape.max_len)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    n_done, n_seen_tokens, elapsed_s = 0, 0, 0.0
    checkpoint, curve_file = work / "checkpoint.pt", work / "curve.jsonl"
    kept: list[str] = []
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        n_done, n_seen_tokens, elapsed_s = state["step"], state["tokens"], state["seconds"]
        lines = curve_file.read_text().splitlines(keepends=True)
        # Rows written after the checkpoint will be written again.
        kept = [line for line in lines if json.loads(line)["step"] < n_done]
        log.info("resumed at step %d", n_done)
    curve_file.write_text("".join(kept))
    n_steps = sum(stage.n_steps for stage in STAGES)
    ids = [special_id(tokenizer, name) for name in (BOS, END, PAD)]
    started_s = time.monotonic() - elapsed_s
    with curve_file.open("a", buffering=1) as curve:
        for step in range(n_done, n_steps):
            stage, rate = learning_rate(step)
            rng = random.Random(f"train/{seed}/{step}")
            batch = make_batch(tokenizer, rng, stage)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(batch.tokens[:, :-1], batch.positions[:, :-1])
            targets, weights = batch.tokens[:, 1:], batch.weights[:, 1:]
            losses = F.cross_entropy(
                logits.float().flatten(0, 1), targets.flatten(), reduction="none"
            )
            losses = losses.view_as(targets)
            loss = (losses * weights).sum() / weights.sum().clamp(min=1.0)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            n_seen_tokens += targets.numel()
            if step % 20 == 0 or step == n_steps - 1:
                is_answer = batch.is_answer[:, 1:]
                is_text = (weights > 0) & (weights == stage.text_weight)
                right = (logits.argmax(-1) == targets)[is_answer].float().mean().item()
                row: dict[str, float] = {
                    "step": step,
                    "tokens": n_seen_tokens,
                    "seconds": round(time.monotonic() - started_s, 1),
                    "length": targets.shape[1],
                    "lr": round(rate, 6),
                    "loss": round(loss.item(), 4),
                    "text_loss": round(losses[is_text].mean().item(), 4),
                    "answer_accuracy": round(right, 4),
                }
                if step % PROBE_EVERY == 0 or step == n_steps - 1:
                    row |= probe(model, tokenizer, 1024, KINDS, 8)
                    row |= probe(model, tokenizer, 8192, ("single", "multikey"), 4)
                # A batch without answers, or without weighted prose, has no mean: JSON has no NaN.
                row = {name: value for name, value in row.items() if not math.isnan(value)}
                curve.write(json.dumps(row) + "\n")
                log.info("%s", row)
            if (step + 1) % CHECKPOINT_EVERY == 0 or step == n_steps - 1:
                partial = checkpoint.with_suffix(".partial")
                state = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step + 1,
                    "tokens": n_seen_tokens,
                    "seconds": time.monotonic() - started_s,
                }
                torch.save(state, partial)
                partial.replace(checkpoint)
                export(model, out, *ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--work", type=Path, default=Path("demo-training"), help="checkpoint and curve"
    )
    parser.add_argument("--out", type=Path, default=model_dir(), help="where the model is exported")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    train(arguments.work, arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
