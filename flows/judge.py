"""Stage judge: SFT model, reigning champion and candidate answer the same held-out prompts; figures, comparison, decision.

Two judges read the answers: the one whose thumbs trained the reward model, and a second one that never rated. Beside
them stand the figures that tell a gain from a collapse. All models answer a prompt with the same random stream.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flows import figures, judges, pairwise, retention, sentiment
from flows.contender import Contender, Prompt, fitting, read_prompts
from flows.figures import Interval
from flows.gate import GateOptions, decide
from flows.judges import JudgeSpec
from flows.pairwise import Orders
from models.job import Job
from models.rollout import Answer, generate, sequence_logprobs
from models.transformer import Transformer

ROLES = ("sft", "champion_before", "candidate")
OTHER_PROMPTS = 2  # how many foreign prompts each answer's relevance is measured against
DIGITS = 6


@dataclass(frozen=True)
class JudgeOptions:
    """Section `judge` of params.yaml.

    prompts: at most so many of the report's bucket; perplexity_tokens: of held-out text; samples: rows of samples.jsonl;
    choices: held-out conversations whose true answer is to be told from others; judges: more judges, see JudgeSpec.
    """

    prompts: int = 400
    max_new_tokens: int = 32
    temperature: float = 1.0
    width: int = 64
    bootstrap: int = 2000
    perplexity_tokens: int = 12_000
    samples: int = 20
    choices: int = 200
    judges: list[JudgeSpec] = field(default_factory=list)

    def __post_init__(self) -> None:
        specs = [each if isinstance(each, JudgeSpec) else JudgeSpec(**each) for each in self.judges]
        object.__setattr__(self, "judges", specs)
        if len({spec.name for spec in specs}) < len(specs):
            raise ValueError("judges: every judge needs a name of its own")
        for name in ("prompts", "max_new_tokens", "width", "bootstrap", "perplexity_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, it is {getattr(self, name)}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, it is {self.temperature}: the judge looks at samples")


@dataclass(frozen=True)
class Judged:
    """One model's answers with what was measured of each, in the order of the prompts. None: not measurable."""

    model_hash: str
    texts: list[str]
    tokens: list[int]
    ended: list[bool]  # by a stop token; the others were cut off at max_new_tokens
    thumbs: list[bool]
    seconds: list[bool] | None
    kl: list[float] | None
    relevance: list[float]
    perplexity: float | None


def run(job: Job) -> dict[str, Any]:
    """The stage body: models, prompts and held-out text → report.json, answers.jsonl, samples.jsonl, figures.csv."""
    options, limits = job.options("judge", JudgeOptions), job.options("gate", GateOptions)
    language = str(job.params.get("data", {}).get("language", "en"))
    contenders = find_contenders(job)
    sft, candidate = contenders["sft"], contenders["candidate"]
    if not candidate.speaks_as(sft):
        stage = method_of(job)
        raise ValueError(
            f"artifacts/{stage}/model and artifacts/sft/model have different tokenizers: run {stage} again"
        )
    prompts = read_prompts(job.input("artifacts/curate") / "prompts.report.jsonl", job.seed)
    prompts = fitting(prompts, list(contenders.values()), options.max_new_tokens)[: options.prompts]
    if len(prompts) < 2:
        raise ValueError("fewer than two prompts of artifacts/curate/prompts.report.jsonl fit the models' context")
    heldout = np.load(job.input("artifacts/tokenize") / "pretrain.heldout.npy")[: options.perplexity_tokens]

    judged: dict[str, Judged] = {}
    for step, role in enumerate(ROLES, start=1):
        same = [done for done in judged.values() if done.model_hash == contenders[role].hash]
        judged[role] = same[0] if same else judge(contenders[role], sft, prompts, heldout, options, language, job.seed)
        job.log(step, len(ROLES), {f"{role}/thumbs_up_rate": float(np.mean(judged[role].thumbs))})

    made = make_report(judged, seed=job.seed, language=language, resamples=options.bootstrap)
    report: dict[str, Any] = {"method": method_of(job), **made}
    report["pairwise"] = compare_pairs(job, options, prompts, judged)
    add_retention(job, options, report, contenders)
    decision = decide(report, limits)
    report["gate"] = decision.as_dict()
    base = Contender(job.input("artifacts/pretrain/model"), job.device)
    write_report(job.output, report)
    write_answers(job.output, prompts, judged)
    write_samples(job.output, prompts[: options.samples], base, judged, options)
    gain = report["comparisons"]["champion_before"]
    chosen = (
        *("thumbs_up_rate", "kl_per_answer", "relevance", "distinct_answers", "most_common_share", "ended_share"),
        "perplexity",
    )
    return {
        "prompts": len(prompts),
        **{key: report["candidate"][key] for key in chosen},
        "thumbs_up_gain": gain["thumbs_up_gain"],
        "win_rate": gain["win_rate"],
        "promote": int(decision.promote),
    }


# ---------------------------------------------------------------- who, and on what


def method_of(job: Job) -> str:
    """The stage that made the candidate (params.yaml: align.method)."""
    return str(job.params.get("align", {}).get("method", "ppo"))


def find_contenders(job: Job) -> dict[str, Contender]:
    """SFT, champion and candidate. Raises ValueError when champion.json does not name the weights at its path."""
    named = json.loads(job.input("champion.json").read_text(encoding="utf-8"))
    folder = job.root / named["path"]
    if not (folder / "model.safetensors").exists():
        raise FileNotFoundError(f"champion.json names {named['path']}, which is missing: run the flow, it writes both")
    champion = Contender(folder, job.device)
    if champion.hash != named["model_hash"]:
        raise ValueError(
            f"champion.json names model {named['model_hash'][:12]}, but {named['path']} holds {champion.hash[:12]}: "
            "the folder was changed; run the flow, it restores the champion's folder"
        )
    return {
        "sft": Contender(job.input("artifacts/sft/model"), job.device),
        "champion_before": champion,
        "candidate": Contender(job.input(f"artifacts/{method_of(job)}/model"), job.device),
    }


# ---------------------------------------------------------------- measuring one model


def judge(
    contender: Contender,
    sft: Contender,
    prompts: Sequence[Prompt],
    heldout: np.ndarray,
    options: JudgeOptions,
    language: str,
    seed: int,
) -> Judged:
    """Let one model answer every prompt once, and measure its answers."""
    tokenizer = contender.tokenizer
    asked = [tokenizer.encode_chat(p.messages) for p in prompts]
    sampled = generate(
        contender.model,
        asked,
        stop_id=tokenizer.stop_ids,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seeds=[p.seed for p in prompts],
        width=options.width,
    )
    answers = [answer.ids for answer in sampled]
    texts = [tokenizer.decode(ids).strip() for ids in answers]
    comparable = contender.speaks_as(sft)
    if comparable:
        own, under_sft = asked, answers
    else:
        own = [sft.tokenizer.encode_chat(p.messages) for p in prompts]
        room = sft.model.config.context_length - max(map(len, own))
        under_sft = [[*sft.tokenizer.encode(t)[: room - 1], sft.tokenizer.stop_id] for t in texts]
    own_fit = total_logprobs(sft.model, own, under_sft)
    opinions = [sentiment.second_opinion(t, language) for t in texts]
    return Judged(
        model_hash=contender.hash,
        texts=texts,
        tokens=[len(ids) - (ids[-1] in tokenizer.stop_ids) for ids in answers],
        ended=[answer.finish_reason == "stop" for answer in sampled],
        thumbs=[sentiment.thumb(t, language) for t in texts],
        seconds=[bool(o) for o in opinions] if None not in opinions else None,
        kl=kl_per_answer(sampled, own_fit) if comparable else None,
        relevance=relevance(sft.model, own, under_sft, own_fit, seed),
        perplexity=perplexity(contender.model, heldout) if comparable else None,
    )


def kl_per_answer(sampled: Sequence[Answer], reference: np.ndarray) -> list[float]:
    """Σ over an answer's tokens of log π(token) − log π_ref(token), in nats: k1, unbiased over what π sampled.

    reference: log π_ref(answer | prompt) in nats, [answers].
    """
    return [float(sum(a.logprobs) - r) for a, r in zip(sampled, reference, strict=True)]


def relevance(
    model: Transformer,
    prompts: Sequence[list[int]],
    answers: Sequence[list[int]],
    own: np.ndarray,
    seed: int,
    others: int = OTHER_PROMPTS,
) -> list[float]:
    """How much better an answer fits its own prompt than another's: nats per answer, under `model`.

    own, log p(answer | its prompt) [answers], less the mean of log p(answer | another prompt) over a few prompts. The
    pairing is drawn from the seed, is the same for all models of a report, and pairs nobody with himself.
    """
    n = len(prompts)
    order = np.random.default_rng(seed).permutation(n)
    room = model.config.context_length
    foreign = []
    for shift in range(1, min(others, n - 1) + 1):
        partner = np.empty(n, dtype=np.int64)
        partner[order] = np.roll(order, shift)
        paired = [prompts[p][-(room - len(a)) :] for p, a in zip(partner.tolist(), answers, strict=True)]
        foreign.append(total_logprobs(model, paired, answers))
    return [float(x) for x in own - np.mean(foreign, axis=0)]


def total_logprobs(model: Transformer, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> np.ndarray:
    """log p(answer | prompt) in nats: [answers]."""
    return np.array([sum(row) for row in sequence_logprobs(model, prompts, answers)], dtype=np.float64)


def perplexity(model: Transformer, stream: np.ndarray) -> float:
    """exp of the mean negative log-probability of a token of `stream` [tokens], read in windows of config.text_window.

    Each window's first token is only context. Raises ValueError for a stream of fewer than two tokens.
    """
    size = model.config.text_window
    windows = [[int(t) for t in stream[i : i + size]] for i in range(0, len(stream) - 1, size)]
    windows = [w for w in windows if len(w) > 1]
    if not windows:
        raise ValueError("artifacts/tokenize/pretrain.heldout.npy holds no text: perplexity needs some")
    rows = sequence_logprobs(model, [w[:1] for w in windows], [w[1:] for w in windows])
    return float(np.exp(-np.mean(np.concatenate(rows))))


# ---------------------------------------------------------------- the report


def make_report(judged: dict[str, Judged], *, seed: int, language: str, resamples: int) -> dict[str, Any]:
    """Everything of report.json but the gate's decision: pure in what was measured."""
    candidate = judged["candidate"]
    return {
        "seed": seed,
        "prompts": len(candidate.texts),
        "language": language,
        "judges": {
            "thumbs_up": "VADER compound >= 0.05" if language == "en" else "SnowNLP sentiment > 0.6",
            "second_judge": "TextBlob polarity > 0, never used for rating" if candidate.seconds else None,
        },
        **{role: figures_of(judged[role], resamples, seed) for role in ROLES},
        "comparisons": {
            role: compare(candidate, judged[role], resamples, seed) for role in ROLES if role != "candidate"
        },
    }


def figures_of(judged: Judged, resamples: int, seed: int) -> dict[str, Any]:
    """One model's figures. Rates with Wilson's interval, means with a bootstrap interval, as <name>, _low and _high."""
    n = len(judged.texts)
    text, share = figures.most_common(judged.texts)
    out: dict[str, Any] = {"model_hash": judged.model_hash}
    out |= spread("thumbs_up_rate", figures.wilson(sum(judged.thumbs), n))
    if judged.seconds is not None:
        out |= spread("second_judge_rate", figures.wilson(sum(judged.seconds), n))
    if judged.kl is not None:
        out |= spread("kl_per_answer", figures.bootstrap_mean(judged.kl, resamples=resamples, seed=seed))
    out |= spread("relevance", figures.bootstrap_mean(judged.relevance, resamples=resamples, seed=seed))
    out |= {
        "relevance_per_token": rounded(sum(judged.relevance) / max(1, sum(judged.tokens))),
        "length_characters": rounded(float(np.mean([len(t) for t in judged.texts]))),
        "length_tokens": rounded(float(np.mean(judged.tokens))),
        "ended_share": rounded(sum(judged.ended) / n),
        "distinct_answers": rounded(figures.distinct_share(judged.texts)),
        "most_common_share": rounded(share),
        "most_common_answer": text,
        "character_distinct_4": rounded(figures.character_distinct(judged.texts)),
    }
    if judged.perplexity is not None:
        out["perplexity"] = rounded(judged.perplexity)
    return out


def compare(candidate: Judged, other: Judged, resamples: int, seed: int) -> dict[str, Any]:
    """The candidate against another model, prompt by prompt, with paired-bootstrap intervals.

    win_rate: by thumbs, half a win for a tie. length_ratio: in characters. second_judge_gain is None without a judge.
    """
    draw = {"resamples": resamples, "seed": seed}
    wins = figures.win_rate(candidate.thumbs, other.thumbs, **draw)
    out: dict[str, Any] = {"model_hash": other.model_hash}
    out |= spread("thumbs_up_gain", figures.paired_bootstrap(candidate.thumbs, other.thumbs, **draw))
    if candidate.seconds is not None and other.seconds is not None:
        out |= spread("second_judge_gain", figures.paired_bootstrap(candidate.seconds, other.seconds, **draw))
    else:
        out["second_judge_gain"] = None
    out |= spread("win_rate", Interval(wins["value"], wins["low"], wins["high"]))
    out |= {name: wins[name] for name in ("wins", "ties", "losses")}
    out["relevance_kept"] = ratio(float(np.mean(candidate.relevance)), float(np.mean(other.relevance)))
    out["perplexity_ratio"] = ratio(candidate.perplexity, other.perplexity)
    lengths = [float(np.mean([len(t) for t in side.texts])) for side in (candidate, other)]
    out["length_ratio"] = ratio(*lengths)
    return out


def spread(name: str, interval: Interval) -> dict[str, float]:
    """{"x": value, "x_low": …, "x_high": …}: flat, because DVC and MLflow compare numbers under one name each."""
    found = interval.as_dict(DIGITS)
    return {name: found["value"], f"{name}_low": found["low"], f"{name}_high": found["high"]}


def ratio(over: float | None, under: float | None) -> float | None:
    """over / under; None where it says nothing."""
    return None if over is None or under is None or under <= 0 else rounded(over / under)


def rounded(number: float) -> float:
    """To the report's digits, so that last bits do not make another report."""
    return round(float(number), DIGITS)


# ---------------------------------------------------------------- other judges, and what was kept


def compare_pairs(
    job: Job, options: JudgeOptions, prompts: Sequence[Prompt], judged: dict[str, Judged]
) -> dict[str, dict[str, Any]]:
    """What each judge says of candidate against champion, pair by pair: the built-in word list, and options.judges."""
    candidate, other = judged["candidate"], judged["champion_before"]
    pairs = [
        judges.Pair(prompt.messages, *texts)
        for prompt, *texts in zip(prompts, candidate.texts, other.texts, strict=True)
    ]
    own, theirs = ([len(text) for text in side.texts] for side in (candidate, other))
    orders = [by_thumbs(*both) for both in zip(candidate.thumbs, other.thumbs, strict=True)]
    told = pairwise.figures(orders, own, theirs, resamples=options.bootstrap, seed=job.seed)
    found = {"words": {"kind": "words", **told}}
    for spec in options.judges:
        few = spec.prompts or len(pairs)
        tally = judges.ask(spec, pairs[:few], job.root, job.device)
        told = pairwise.figures(tally.orders, own[:few], theirs[:few], resamples=options.bootstrap, seed=job.seed)
        found[spec.name] = {"kind": spec.kind, **told, "cost": tally.cost}
    return found


def by_thumbs(candidate: bool, other: bool) -> Orders:
    """Two thumbs as a verdict; a word list reads each answer alone, so the order cannot matter."""
    if candidate == other:
        return Orders("tie", "tie")
    return Orders("first", "second") if candidate else Orders("second", "first")


def add_retention(job: Job, options: JudgeOptions, report: dict[str, Any], contenders: dict[str, Contender]) -> None:
    """Put into the report what of older knowledge is kept: next_turn_accuracy of each model that speaks as the SFT model
    does, its gain over the SFT model (the alignment tax), and `expert`, on held-out judgements of experts (None: there are
    none)."""
    sft, candidate = contenders["sft"], contenders["candidate"]
    draw = {"resamples": options.bootstrap, "seed": job.seed}
    speaking = {role: c for role, c in contenders.items() if c.speaks_as(sft)}
    context = min(c.model.config.context_length for c in speaking.values())
    path = job.input("artifacts/curate") / "sft.heldout.jsonl"
    asked = retention.questions(path, sft.tokenizer, context, options.choices, job.seed)
    report["comparisons"]["sft"]["next_turn_gain"] = None
    if asked:
        empty = sft.tokenizer.encode_chat([{"role": "user", "content": ""}])
        told = {role: retention.right(c.model, asked, empty) for role, c in speaking.items()}
        for role, answers in told.items():
            report[role] |= spread("next_turn_accuracy", figures.wilson(sum(answers), len(answers)))
        gain = figures.paired_bootstrap(told["candidate"], told["sft"], **draw)
        report["comparisons"]["sft"] |= spread("next_turn_gain", gain)
    vocabulary = sft.tokenizer.vocab_size
    judgements = retention.expert_judgements(job.input("artifacts/snapshot"), job.work, vocabulary, context)
    report["expert"] = None
    if judgements:
        before = "champion_before" if "champion_before" in speaking else "sft"
        sides = [retention.agrees(c.model, judgements) for c in (candidate, contenders[before])]
        kept = {"against": before, "pairs": len(judgements)}
        kept |= {name: rounded(float(np.mean(side))) for name, side in zip(("candidate", "before"), sides, strict=True)}
        report["expert"] = kept | spread("gain", figures.paired_bootstrap(*sides, **draw))


# ---------------------------------------------------------------- files


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """report.json, and figures.csv with a line a figure and model, for plots."""
    text = json.dumps(report, ensure_ascii=False, indent=2, allow_nan=True)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    with (folder / "figures.csv").open("w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(["model", "figure", "value", "low", "high"])
        for role in ROLES:
            found = report[role]
            for name, value in found.items():
                if isinstance(value, float) and not name.endswith(("_low", "_high")):
                    lines.writerow([role, name, value, found.get(f"{name}_low", ""), found.get(f"{name}_high", "")])


def write_answers(folder: Path, prompts: Sequence[Prompt], judged: dict[str, Judged]) -> None:
    """answers.jsonl: a line a prompt with every model's answer and what was measured of it."""
    with (folder / "answers.jsonl").open("w", encoding="utf-8") as file:
        for i, prompt in enumerate(prompts):
            row: dict[str, Any] = {"id": prompt.id, "prompt": prompt.text}
            for role, found in judged.items():
                row[role] = {
                    "text": found.texts[i],
                    "tokens": found.tokens[i],
                    "ended": found.ended[i],
                    "thumb": found.thumbs[i],
                    "second": found.seconds[i] if found.seconds is not None else None,
                    "kl": rounded(found.kl[i]) if found.kl is not None else None,
                    "relevance": rounded(found.relevance[i]),
                }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_samples(
    folder: Path, prompts: Sequence[Prompt], base: Contender, judged: dict[str, Judged], options: JudgeOptions
) -> None:
    """samples.jsonl: the first prompts answered by base, SFT model and candidate, side by side.

    The base model has seen no chat template, so it continues the prompt as plain text, up to the first end of a line.
    """
    tokenizer = base.tokenizer
    plain = [[tokenizer.end_of_text_id, *tokenizer.encode(p.text + "\n")] for p in prompts]
    room = base.model.config.context_length - options.max_new_tokens
    continued = generate(
        base.model,
        [ids[-room:] for ids in plain],
        stop_id=tokenizer.end_of_text_id,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seeds=[p.seed for p in prompts],
        width=options.width,
    )
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        for i, (prompt, answer) in enumerate(zip(prompts, continued, strict=True)):
            text = tokenizer.decode(answer.ids).strip()
            row = {
                "prompt": prompt.text,
                "base": text.splitlines()[0] if text else "",
                "sft": judged["sft"].texts[i],
                "candidate": judged["candidate"].texts[i],
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
