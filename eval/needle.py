"""What a compressed cache costs in answers: `python -m kvfold.eval.needle`.

Every setting is asked the same questions about the same long documents (`demo/generate.py`, keys
and values that training never saw), greedily and one at a time, by an engine of its own. An answer
counts as exact if it begins with the whole expected one. The first setting is the reference: the
others are compared with it document by document, and where both say the same, in the
log-probability that they give to it. Bytes are those that the allocator has handed out when the
prompt is sealed and its first token drawn.

Nearly every setting computes prompts exactly. One more engine does that once and hands its keys and
values to those, as the prefix that they hit.

On a CPU each worker is a process of one thread. Two of them are worth more than one of two threads,
which wait for each other all the time, and for anybody else who takes a core.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

import torch
from tqdm import tqdm

from ..bench.report import facts, write
from ..bench.settings import cache_settings, every_form
from ..core.config import Config, ModelSettings, SchedulerSettings
from ..core.errors import KvfoldError
from ..core.sequence import Request, SamplingParams
from ..demo.generate import Kind, make_task
from ..demo.where import model_dir
from ..engine.engine import Engine
from ..engine.forecast import forecast
from ..engine.plan import probe
from ..engine.text import Text
from ..models.loader import identity, locate

# ThinK keeps a multiple of 16 channels. Of the demo model's 64 these are 48 and 32; 0.375 would be
# 48 again.
SETTINGS = (
    *every_form("dense", "think prune_ratio=0.25", "think prune_ratio=0.5"),
    *every_form("cskv keep=0.5", "cskv keep=0.2", "cskv keep=0.125"),
    *every_form("cskv keep=0.2 mode=selective budget=512"),
)
# A long answer is four sentences of twelve tokens with one more for its end.
MAX_NEW_TOKENS = 60
# Chat template, question and answer beside the document.
_AROUND_TOKENS = 256

Question = tuple[Kind, int]
"""A kind of task, and the seed of its document."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which engines to ask about documents of which length."""

    model: str
    device: str
    dtype: str
    length_tokens: int
    settings: tuple[str, ...]
    """The first is the reference."""
    memory_bytes: int
    """Of each engine's pool."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one setting said about one document, and what the document took."""

    setting: str
    kind: Kind
    seed: int
    is_exact: bool
    tokens: tuple[int, ...]
    logprob: float
    """Of all its tokens."""
    cached_tokens: int
    """When the prompt was sealed."""
    cached_bytes: int
    """Allocated for them."""
    planned_bytes_per_token: int
    """What the allocator's own arithmetic says of a long sequence."""
    seconds: float
    """From its prefix hit on."""


class Exam:
    """An engine per setting, and the questions they are asked."""

    def __init__(self, plan: Plan) -> None:
        self._length_tokens = plan.length_tokens
        self._text = Text.load(plan.model)
        self._reader = Engine(_config(plan, "dense"))
        self._engines = {words: Engine(_config(plan, words)) for words in plan.settings}

    def ask(self, kind: Kind, seed: int) -> list[Answer]:
        """Every setting's answer to the question of one document."""
        task = make_task(seed, self._length_tokens, kind)
        content = f"{task.document}\n{task.question}"
        prompt = self._text.chat_ids([{"role": "user", "content": content}])
        request = Request(
            id=f"{kind}-{seed}",
            prompt=tuple(prompt),
            sampling=SamplingParams(
                max_tokens=MAX_NEW_TOKENS,
                temperature=0.0,
                stop_token_ids=self._text.eos_ids,
                logprobs=0,
            ),
        )
        answers = []
        self._reader.add(replace(request, sampling=replace(request.sampling, max_tokens=1)))
        while self._reader.has_work:
            self._reader.step()
        for setting, engine in self._engines.items():
            # A prompt that reads latents is not what anybody else computed.
            if cache_settings(setting).options.get("exact_prefill", True):
                engine.adopt(request, self._reader)
            started = time.monotonic()
            engine.add(request)
            outputs = engine.step()
            while not outputs:
                outputs = engine.step()
            sealed = engine.stats()
            while engine.has_work:
                outputs += engine.step()
            tokens = tuple(token for output in outputs for token in output.tokens)
            answers.append(
                Answer(
                    setting=setting,
                    kind=kind,
                    seed=seed,
                    is_exact=task.is_exact(self._text.decode(tokens)),
                    tokens=tokens,
                    logprob=sum(entry.logprob for o in outputs for entry in o.logprobs or ()),
                    cached_tokens=sealed.kv_tokens,
                    cached_bytes=sum(sealed.kv_bytes.values()),
                    planned_bytes_per_token=engine.info.bytes_per_token,
                    seconds=time.monotonic() - started,
                )
            )
        return answers


def _config(plan: Plan, words: str) -> Config:
    return Config(
        model=ModelSettings(
            path=plan.model,
            device=plan.device,
            dtype=plan.dtype,
            max_len=plan.length_tokens + _AROUND_TOKENS,
        ),
        cache=cache_settings(words, memory_bytes=plan.memory_bytes),
        scheduler=SchedulerSettings(max_sequences=1),
    )


@cache
def _exam(plan: Plan) -> Exam:
    """A worker loads its engines once."""
    torch.set_num_threads(1)
    return Exam(plan)


def _ask(plan: Plan, question: Question) -> list[Answer]:
    return _exam(plan).ask(*question)


class Journal:
    """Answers in a file, one document per line, so that a run can go on where it was ended."""

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        """Read what is there. Raises `SystemExit` when it answers another plan, or other code."""
        self.answers: list[Answer] = []
        first = json.dumps(head)
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        if lines and lines[0] != first:
            raise SystemExit(
                f"{path} was begun by another plan or commit: remove it, or name another --out"
            )
        for line in lines[1:]:
            self.answers += [
                Answer(**{**entry, "tokens": tuple(entry["tokens"])}) for entry in json.loads(line)
            ]
        self._path = path
        if not lines:
            self._write(first)

    def add(self, answers: list[Answer]) -> None:
        """Keep what all settings said about a document."""
        self.answers += answers
        self._write(json.dumps([asdict(answer) for answer in answers]))

    def _write(self, line: str) -> None:
        with self._path.open("a") as file:
            file.write(line + "\n")


def examine(plan: Plan, questions: list[Question], n_workers: int, journal: Journal) -> None:
    """Have the questions answered that the journal does not hold yet."""
    answered = {(answer.kind, answer.seed) for answer in journal.answers}
    rest = [question for question in questions if question not in answered]
    n_worse = 0
    with (
        ProcessPoolExecutor(n_workers, mp_context=get_context("spawn")) as pool,
        tqdm(total=len(rest), unit="document") as bar,
    ):
        for answers in pool.map(_ask, repeat(plan), rest):
            journal.add(answers)
            bar.update()
            reference, *others = answers
            n_worse += sum(answer.is_exact < reference.is_exact for answer in others)
            bar.set_postfix(lost=n_worse)


def compare(answers: list[Answer], settings: Sequence[str]) -> list[dict[str, Any]]:
    """One row per setting, beside the first of them, from everybody's answers."""
    found = {(a.setting, a.kind, a.seed): a for a in answers}
    rows = []
    for setting in settings:
        pairs = [(found[settings[0], a.kind, a.seed], a) for a in answers if a.setting == setting]
        spent, base = (
            [a.cached_bytes / a.cached_tokens for a in side]
            for side in zip(*[(ours, reference) for reference, ours in pairs], strict=True)
        )
        alike = [(reference, ours) for reference, ours in pairs if reference.tokens == ours.tokens]
        rows.append(
            {
                "setting": setting,
                "bytes_per_token": statistics.fmean(spent),
                "planned_bytes_per_token": pairs[0][1].planned_bytes_per_token,
                "share_of_bytes": statistics.fmean(spent) / statistics.fmean(base),
                "kinds": {
                    kind: _score([pair for pair in pairs if pair[1].kind == kind])
                    for kind in dict.fromkeys(a.kind for a in answers)
                },
                "all": _score(pairs),
                "same_answers": len(alike),
                "lost_nats_per_same_answer": statistics.fmean(
                    [reference.logprob - ours.logprob for reference, ours in alike] or [0.0]
                ),
                "seconds_per_document": statistics.median(ours.seconds for _, ours in pairs),
            }
        )
    return rows


def _score(pairs: list[tuple[Answer, Answer]]) -> dict[str, Any]:
    """Exact answers, and where they differ from the reference's, which comes first in a pair."""
    n_exact = sum(ours.is_exact for _, ours in pairs)
    n_lost = sum(reference.is_exact and not ours.is_exact for reference, ours in pairs)
    n_won = sum(ours.is_exact and not reference.is_exact for reference, ours in pairs)
    return {
        "n": len(pairs),
        "exact": n_exact / len(pairs),
        "loss_points": 100 * (n_lost - n_won) / len(pairs),
        "lost": n_lost,
        "won": n_won,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    kinds = list(rows[0]["kinds"])
    head = ["setting", "bytes per token", "of the first", *kinds, "loss, points", "lost / won"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in rows:
        total = row["all"]
        lines.append(
            [
                row["setting"],
                f"{row['bytes_per_token']:,.0f}",
                f"{row['share_of_bytes']:.3f}",
                *(f"{100 * row['kinds'][kind]['exact']:.1f} %" for kind in kinds),
                f"{total['loss_points']:.2f}",
                f"{total['lost']} / {total['won']} of {total['n']}",
            ]
        )
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(model_dir()), help="directory")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--setting", action="append", help="as in 'think prune_ratio=0.5'")
    parser.add_argument(
        "--kinds", nargs="+", default=["single", "multikey"], choices=get_args(Kind)
    )
    parser.add_argument("--length", type=int, default=8192, help="tokens of a document")
    parser.add_argument("--n", type=int, default=50, help="documents of each kind")
    parser.add_argument("--seed", type=int, default=2_000_000, help="of the first document")
    parser.add_argument("--memory-bytes", type=int, default=2**28, help="of each engine's pool")
    parser.add_argument("--workers", type=int, help="default is one per core, on CUDA one")
    parser.add_argument(
        "--out", type=Path, help="file that keeps the JSON document; an ended run goes on"
    )
    arguments = parser.parse_args()
    if arguments.n < 1:
        parser.error(f"--n is {arguments.n}; it must be at least 1")
    try:
        path = locate(arguments.model, None)
        plan = Plan(
            model=str(path),
            device=probe(arguments.device).device,
            dtype=arguments.dtype,
            length_tokens=arguments.length,
            settings=tuple(arguments.setting or SETTINGS),
            memory_bytes=arguments.memory_bytes,
        )
        for words in dict.fromkeys(("dense", *plan.settings)):
            # Refuses what a worker would stumble over.
            forecast(_config(plan, words))
    except (KvfoldError, ValueError) as error:
        parser.error(str(error))
    about = {"evaluation": "needle", **facts(), "model_identity": identity(path)}
    seeds = range(arguments.seed, arguments.seed + arguments.n)
    questions = [(kind, seed) for seed in seeds for kind in arguments.kinds]
    n_cores = os.cpu_count() or 1
    n_workers = arguments.workers or (n_cores if plan.device == "cpu" else 1)
    partial = Path(os.devnull)
    if arguments.out is not None:
        partial = arguments.out.with_suffix(".partial.jsonl")
    same = ("commit", "is_dirty", "machine", "model_identity")
    journal = Journal(partial, {name: about[name] for name in same} | {"plan": asdict(plan)})
    examine(plan, questions, n_workers, journal)
    rows = compare(journal.answers, plan.settings)
    sys.stdout.write(table(rows))
    about |= {"dtype": plan.dtype, "length_tokens": plan.length_tokens, "workers": n_workers}
    write({**about, "rows": rows}, arguments.out)
    if arguments.out is not None:
        partial.unlink()


if __name__ == "__main__":
    main()
