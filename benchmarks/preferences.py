"""Real people's preferences: does a reward model from a real base tell which answer people liked better?

    python -m benchmarks.preferences FOLDER --base BASE

FOLDER holds pandalm_testset_v1.json and openassistant_en_100_tree.jsonl (benchmarks/human_pairs.py says what they are);
BASE is a model in Hugging Face's format, or a *.gguf. The base stays as it is: an answer is what a few of its middle layers
say at the answer's last token and on average over the answer, and the reward r is one linear reading of that, learned with
the loss of the reward stage. Ten-fold cross-validation by prompt, several times over, beside baselines that see the same
folds; intervals resample prompts. Writes docs/preferences.md and the section of docs/evidence.md that points there. What
the base said is kept under --workdir, prompt by prompt. Exits 1 when the reward model does not beat TF-IDF.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.human_pairs import (
    MAX_ANSWER,
    MAX_PROMPT,
    OPENASSISTANT,
    PANDALM,
    Question,
    folds,
    read_openassistant,
    read_pandalm,
)
from benchmarks.speed import machine, revision
from flows.figures import Interval
from flows.files import write_text
from models.checkpoint import load_model
from models.gguf_file import load_gguf
from models.layout import branched_layout
from models.opinions import Preference, Rated
from models.tokenizer import Tokenizer
from models.transformer import Transformer

CHECKOUT = Path(__file__).resolve().parents[1]
PAGE, EVIDENCE = CHECKOUT / "docs" / "preferences.md", CHECKOUT / "docs" / "evidence.md"
DEPTHS = (0.4, 0.533, 0.667)  # of the base's layers, where an answer is read: 12, 16 and 20 of 30
RIDGE = 1e-3
FOLDS, REPEATS, RESAMPLES = 10, 5, 10_000
SETS = {"PandaLM": (PANDALM, read_pandalm), "OpenAssistant": (OPENASSISTANT, read_openassistant)}
BASELINES = ("TF-IDF", "more characters", "more tokens")
TITLE, TITLE_TABLE = "## Real people's preferences", "## Accuracy"

Floats = NDArray[np.float64]
# (questions to learn from, questions held out) → a score for each answer of each held-out question
Scorer = Callable[[Sequence[int], Sequence[int]], list[Sequence[float]]]


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preferences", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help=f"holds {PANDALM} and {OPENASSISTANT}")
    parser.add_argument("--base", type=Path, required=True, help="a model's folder, or a *.gguf")
    parser.add_argument("--workdir", type=Path, default=CHECKOUT / ".thumbwheel" / "preferences")
    arguments = parser.parse_args()
    started = time.process_time()
    torch.set_num_threads(1)
    sets = {name: read(arguments.folder / file) for name, (file, read) in SETS.items()}
    trunk, tokenizer = open_base(arguments.base)
    results = {name: measure(questions, trunk, tokenizer, arguments.workdir) for name, questions in sets.items()}
    write_text(PAGE, document(results, arguments.base.name, layers_read(trunk)[-1], time.process_time() - started))
    if EVIDENCE.exists():
        write_text(EVIDENCE, with_section(EVIDENCE.read_text(encoding="utf-8"), PAGE))
    print(PAGE.read_text(encoding="utf-8"))
    return 0 if all(result["gain over TF-IDF"].low > 0 for result in results.values()) else 1


def open_base(path: Path) -> tuple[Transformer, Tokenizer]:
    """The base in bf16, without the layers above those that are read, and its tokenizer."""
    if path.suffix == ".gguf":
        trunk, tokenizer = load_gguf(path, dtype=torch.bfloat16)
    else:
        trunk, tokenizer = load_model(path, dtype=torch.bfloat16), Tokenizer.load(path)
    trunk.blocks = trunk.blocks[: layers_read(trunk)[-1]]
    return trunk, tokenizer


def layers_read(trunk: Transformer) -> list[int]:
    """After how many layers an answer is read."""
    return [max(1, round(depth * trunk.config.num_hidden_layers)) for depth in DEPTHS]


# ---------------------------------------------------------------- what the base says


@torch.inference_mode()
def readings(trunk: Transformer, rated: Rated) -> Tensor:
    """What the base says of each answer: [K, layers read · 2 · d], at the last token and as the mean over the answer.

    The prompt is computed once for all of them.
    """
    lengths = [len(answer) for answer in rated.answers]
    layout = branched_layout([len(rated.prompt)], [lengths])
    x = trunk.embedding(torch.tensor([*rated.prompt, *(token for answer in rated.answers for token in answer)]))
    cos, sin = trunk.cos[layout.positions].to(x.dtype), trunk.sin[layout.positions].to(x.dtype)
    read, out = layers_read(trunk), []
    for number, block in enumerate(trunk.layers, 1):
        x, _, _ = block(x, cos, sin, layout)
        if number in read:
            answers = x[len(rated.prompt) :].float().split(lengths)
            out.append(torch.stack([torch.cat([answer[-1], answer.mean(0)]) for answer in answers]))
    return torch.cat(out, dim=1)


def all_readings(
    trunk: Transformer, opinions: Sequence[Rated], work: Path, report: Callable[[str], None]
) -> list[Tensor]:
    """The readings of every prompt's answers; what an earlier run kept in `work` is taken from there."""
    work.mkdir(parents=True, exist_ok=True)
    weights = hashlib.sha256()
    for parameter in trunk.parameters():
        weights.update(parameter.detach().view(torch.uint8).numpy().data)
    base = f"{weights.hexdigest()} {layers_read(trunk)}"
    out = []
    for done, rated in enumerate(opinions, 1):
        key = hashlib.sha256(f"{base} {rated.prompt} {rated.answers}".encode()).hexdigest()[:24]
        file = work / f"{key}.npy"
        if not file.exists():
            draft = work / f"{key}.draft.npy"
            np.save(draft, readings(trunk, rated).numpy())
            draft.rename(file)
            if done % 20 == 0:
                report(f"{done} of {len(opinions)} prompts read")
        out.append(torch.from_numpy(np.load(file)))
    return out


# ---------------------------------------------------------------- the reward model and what it is held against


def reward_scorer(read: Sequence[Tensor], opinions: Sequence[Rated]) -> Scorer:
    """r is a linear reading, learned by L-BFGS with the reward stage's loss (a mean over pairs in each prompt, then over
    prompts) and a ridge. Readings are scaled by their mean and deviation over the answers learned from."""

    def score(train: Sequence[int], heldout: Sequence[int]) -> list[Sequence[float]]:
        known = torch.cat([read[i] for i in train])
        mean, deviation = known.mean(0), known.std(0) + 1e-2
        scale = (2 * known.shape[1]) ** -0.5

        def scaled(i: int) -> Tensor:
            return (read[i] - mean) / deviation * scale

        differences = torch.cat([_differences(scaled(i), opinions[i].preferences) for i in train])
        counts = [len(opinions[i].preferences) for i in train]
        weights = torch.cat([torch.full((n,), 1 / (n * len(train))) for n in counts])
        head = torch.zeros(known.shape[1], requires_grad=True)
        optimizer = torch.optim.LBFGS([head], max_iter=100, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            total = (weights * F.softplus(-(differences @ head))).sum() + 0.5 * RIDGE * head.square().sum()
            total.backward()
            return total

        optimizer.step(loss)
        return [(scaled(i) @ head.detach()).tolist() for i in heldout]

    return score


def _differences(rows: Any, preferences: Sequence[Preference]) -> Any:
    """The winner's row less the loser's, for each pair; rows: a tensor, or a sparse matrix."""
    return rows[[p.winner for p in preferences]] - rows[[p.loser for p in preferences]]


def tfidf_scorer(questions: Sequence[Question]) -> Scorer:
    """TF-IDF of words and pairs of words, and a logistic regression on the difference of two answers (Bradley-Terry)."""
    from scipy.sparse import vstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    def score(train: Sequence[int], heldout: Sequence[int]) -> list[Sequence[float]]:
        vectorizer = TfidfVectorizer(ngram_range=(1, 2)).fit([a for i in train for a in questions[i].answers])
        rows = [vectorizer.transform(questions[i].answers) for i in train]
        differences = vstack([_differences(x, questions[i].preferences) for x, i in zip(rows, train, strict=True)])
        signs = np.repeat([1, -1], differences.shape[0])
        model = LogisticRegression(fit_intercept=False, max_iter=1000).fit(vstack([differences, -differences]), signs)
        return [model.decision_function(vectorizer.transform(questions[i].answers)).tolist() for i in heldout]

    return score


def length_scorer(lengths: Sequence[Sequence[int]]) -> Scorer:
    """The longer answer is the better one."""
    return lambda train, heldout: [[float(n) for n in lengths[i]] for i in heldout]


# ---------------------------------------------------------------- the arithmetic


def right(questions: Sequence[Question], scorer: Scorer, count: int = FOLDS, repeats: int = REPEATS) -> list[Floats]:
    """Of each question's pairs, how often the held-out scores put them in people's order (a draw counts half): [pairs], a
    mean over `repeats` ways to deal groups into folds. Each pair is held out once a repeat."""
    out = [np.zeros(len(question.preferences)) for question in questions]
    for repeat in range(repeats):
        fold = np.array(folds(questions, count, seed=repeat))
        for k in range(count):
            train, heldout = np.flatnonzero(fold != k).tolist(), np.flatnonzero(fold == k).tolist()
            for i, scores in zip(heldout, scorer(train, heldout), strict=True):
                gaps = np.array([scores[p.winner] - scores[p.loser] for p in questions[i].preferences])
                out[i] += (0.5 + 0.5 * np.sign(gaps)) / repeats
    return out


def grouped_bootstrap(questions: Sequence[Question], values: Sequence[Floats], resamples: int = RESAMPLES) -> Interval:
    """The mean of a value per pair, with its 95 % percentile interval: groups are drawn, each with all its pairs."""
    names = sorted({question.group for question in questions})
    place = {name: i for i, name in enumerate(names)}
    sums, counts = np.zeros(len(names)), np.zeros(len(names))
    for question, own in zip(questions, values, strict=True):
        sums[place[question.group]] += own.sum()
        counts[place[question.group]] += len(own)
    drawn = np.random.default_rng(0).integers(len(names), size=(resamples, len(names)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(sums.sum() / counts.sum()), float(low), float(high))


def measure(questions: Sequence[Question], trunk: Transformer, tokenizer: Tokenizer, work: Path) -> dict[str, Any]:
    """Accuracies with their intervals, differences to the baselines, and the counts, of one data set."""
    opinions = [question.rated(tokenizer) for question in questions]
    read = all_readings(trunk, opinions, work, lambda text: print(text, flush=True))
    characters = [[len(answer) for answer in question.answers] for question in questions]
    tokens = [[len(tokenizer.encode(answer)) for answer in question.answers] for question in questions]
    hits = {
        "reward model": right(questions, reward_scorer(read, opinions)),
        "TF-IDF": right(questions, tfidf_scorer(questions)),
        "more characters": right(questions, length_scorer(characters), repeats=1),
        "more tokens": right(questions, length_scorer(tokens), repeats=1),
    }
    result: dict[str, Any] = {name: grouped_bootstrap(questions, values) for name, values in hits.items()}
    for name in BASELINES:
        gaps = [ours - theirs for ours, theirs in zip(hits["reward model"], hits[name], strict=True)]
        result[f"gain over {name}"] = grouped_bootstrap(questions, gaps)
    return result | {
        "pairs": sum(len(question.preferences) for question in questions),
        "prompts": len(questions),
        "groups": len({question.group for question in questions}),
        "answers": sum(len(question.answers) for question in questions),
    }


# ---------------------------------------------------------------- the page


def document(results: Mapping[str, Mapping[str, Any]], base: str, layers: int, seconds: float) -> str:
    """docs/preferences.md. layers: how many of the base's were computed."""
    found = machine()
    parts = [
        "# Real people's preferences",
        f"Written by `python -m benchmarks.preferences FOLDER --base {base}` on {datetime.date.today()} at revision "
        f"{revision()}: {seconds:.0f} CPU seconds of one thread of {found['processor']} ({', '.join(found['vectors'])}), "
        "less what an earlier run had read already. FOLDER is the user's own: this project holds no row of it.",
        TITLE_TABLE,
        accuracies(results),
        "Shares of held-out pairs put in the order that people put them in, with 95 % intervals that resample "
        "prompts (OpenAssistant: trees) with all their pairs; a draw counts half, chance is .500.",
        "## The reward model less each baseline",
        gains(results),
        "The same pairs, the same folds, the same resamples.",
        "## What was done",
        what_was_done(results, layers),
    ]
    return "\n\n".join(parts) + "\n"


def accuracies(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The headline table."""
    heads = ["data", "pairs", "prompts", "**reward model**", *BASELINES, "chance"]
    rows = []
    for name, result in results.items():
        figures = [shown(result[key]) for key in BASELINES]
        counts = [f"{result['pairs']:,}", str(result["prompts"])]
        rows.append([name, *counts, f"**{shown(result['reward model'])}**", *figures, ".500"])
    return table(heads, rows)


def gains(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The differences' table, and whether each interval lies above 0."""
    rows = [
        [name, *(f"{signed(gain)}{'' if gain.low > 0 else ': not above 0'}" for gain in _gains(result))]
        for name, result in results.items()
    ]
    return table(["data", *(f"less {name}" for name in BASELINES)], rows)


def _gains(result: Mapping[str, Any]) -> list[Interval]:
    return [result[f"gain over {name}"] for name in BASELINES]


def what_was_done(results: Mapping[str, Mapping[str, Any]], layers: int) -> str:
    """The recipe, with what was tuned on what."""
    trees = results["OpenAssistant"]["groups"] if "OpenAssistant" in results else 0
    return f"""- **Data**: PandaLM's test set ({PANDALM}): the majority of three annotators, ties left out. OpenAssistant's trees
  ({OPENASSISTANT}): ranks of sibling answers as pairs; equal texts left out. Prompts in the base's own chat template, the last
  {MAX_PROMPT} tokens of a prompt and the first {MAX_ANSWER} of an answer.
- **Split**: {FOLDS}-fold cross-validation by prompt, dealt {REPEATS} times, so that every pair is held out {REPEATS} times and
  never learned from by what judges it. OpenAssistant's {trees} trees stay whole, as later prompts quote earlier answers.
- **Reward model**: the base is frozen and computed in bf16 up to layer {layers}; an answer is read after layers at
  {", ".join(f"{depth:.0%}" for depth in DEPTHS)} of the base's depth, at its last token and as the mean over its tokens. r is a
  linear reading, learned with the reward stage's loss (−log σ(r_w − r_l), a mean over the pairs of each prompt, then over
  prompts) and a ridge of {RIDGE:g}. It is told neither length nor words.
- **Baselines**: TF-IDF of words and pairs of words with a Bradley-Terry logistic regression (scikit-learn, its defaults); the
  answer with more characters; the answer with more tokens of the base's tokenizer.
- **Tuned**: layers and ridge on PandaLM's pairs with these folds, so its figure is a little flattered: there, layers in the
  middle read .02 to .04 better than the last one, and ridges from 1e-4 to 1e-2 lay within .015. OpenAssistant's pairs chose
  nothing."""


def section(page: Path) -> str:
    """The section of docs/evidence.md: the headline table of `page` and where the rest is; "" where there is no page."""
    if not page.exists():
        return ""
    found = re.search(re.escape(TITLE_TABLE) + r"\n\n(.*?)\n\n", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    if found is None:
        raise ValueError(f"{page} has no section {TITLE_TABLE!r}: write it anew with python -m benchmarks.preferences")
    return (
        f"{TITLE}\n\nAccuracy on held-out pairs that people compared, of a reward model that reads a real base, frozen; "
        f"[{page.name}]({page.name}) says how, on which machine, and with which command.\n\n{found[1]}\n"
    )


def with_section(evidence: str, page: Path) -> str:
    """The text of docs/evidence.md with this section, which is its last, as `page` has it now."""
    return "\n\n".join(filter(None, (evidence.split(TITLE)[0].strip(), section(page).strip()))) + "\n"


def shown(interval: Interval) -> str:
    """A share with its interval."""
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def signed(interval: Interval) -> str:
    """A difference with its interval."""
    return f"{interval.value:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *rows))


if __name__ == "__main__":
    sys.exit(main())
